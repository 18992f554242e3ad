"""Grammars on a worker: compiled once, off the engine's thread, and followed by any number of answers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from wire.errors import InvalidRequest
from wire.grammar import compile_grammar, load_tokenizer

KEPT_GRAMMARS = 64
"""Compiled grammars kept for the next request that brings the same one; those in use come on top."""


class Grammars:
    """One worker's compiled grammars. Safe to use from any thread."""

    def __init__(self, model: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Reads nothing yet: the tokenizer is built with the first grammar, off the engine's thread."""
        self._model = model
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # least recently used first
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    @contextlib.asynccontextmanager
    async def hold(self, grammar: str) -> AsyncIterator[None]:
        """Compile `grammar` on a thread of its own, if it is not empty, and keep it compiled while inside. Raises
        InvalidRequest for a grammar that does not compile.
        """
        if not grammar:
            yield
            return
        with self._lock:
            self._held[grammar] = self._held.get(grammar, 0) + 1
        try:
            await asyncio.to_thread(self._find, grammar)
            yield
        finally:
            with self._lock:
                self._held[grammar] -= 1
                if not self._held[grammar]:
                    del self._held[grammar]
                self._trim()

    def follow(self, grammar: str) -> Follower:
        """For one answer, at its beginning. Quick while the grammar is held."""
        return Follower(self._find(grammar).deep_copy(), self._vocab_size)

    def _find(self, grammar: str) -> LLMatcher:
        with self._lock:
            if (found := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                return found
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._model, self._vocab_size, self._eos)
        try:
            made = compile_grammar(self._tokenizer, grammar)
        except InvalidRequest as error:
            raise InvalidRequest(f"grammar: {error}", param="grammar", code="invalid_grammar") from error
        with self._lock:
            self._compiled[grammar] = made
            self._trim()
        return made

    def _trim(self) -> None:
        idle = [grammar for grammar in self._compiled if grammar not in self._held]
        for grammar in idle[: max(0, len(idle) - KEPT_GRAMMARS)]:
            del self._compiled[grammar]


class Follower:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def push(self, tokens: Sequence[int]) -> None:
        """These tokens were added to the answer. Tokens behind a complete answer are passed over."""
        for token in tokens:
            if self._matcher.is_stopped():
                return
            self._matcher.consume_token(token)

    def mask(self, drafts: Sequence[int] = ()) -> NDArray[np.bool_] | None:
        """[V] tokens that may come after the answer so far and `drafts`; None when drafts break the grammar, so that
        what is drawn behind them is thrown away.
        """
        taken = self._matcher.try_consume_tokens(list(drafts)) if drafts else 0
        try:
            if taken < len(drafts):
                return None
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            return np.unpackbits(packed, bitorder="little", count=self._vocab_size).astype(bool)
        finally:
            if taken:
                self._matcher.rollback(taken)

    @property
    def problem(self) -> str:
        """Why the grammar can be followed no further; empty while it can."""
        if not self._matcher.is_error():
            return ""
        return f"the grammar can not be followed further ({self._matcher.stop_reason()})"
