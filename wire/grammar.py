"""Grammars that answers must follow, compiled alike by the router, which refuses bad ones, and by the workers.

A grammar travels as llguidance's own text; what it was made from, a schema or a list of tools, only the router knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from wire.errors import ConfigError, InvalidRequest

DSML = "｜DSML｜"
"""The added token that tool calls are written with: text to a grammar, unlike every other added token."""

MAX_ERROR_CHARS = 400


def _limits() -> LLParserLimits:
    """Fuel, not seconds: what compiles on one machine compiles on all. A step burns it in about 15 ms, so a grammar
    that grows as it is followed fails its own answer before it holds up others; a lexer state takes about 2 kB.
    """
    return LLParserLimits(
        initial_lexer_fuel=2_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        # Whole-vocabulary work ahead of time, for a grammar that may be used for ten tokens.
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def load_tokenizer(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The checkpoint's tokens as grammars see them. Raises ConfigError naming the file."""
    path = directory / "tokenizer.json"
    try:
        data = json.loads(path.read_bytes())
        # Control tokens are never part of what a grammar calls text, however a checkpoint declares them: a schema's
        # string must not be able to end the model's turn.
        for token in data.get("added_tokens", ()):
            token["special"] = token["content"] != DSML
        return LLTokenizer(json.dumps(data), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} can not be used for grammars ({type(error).__name__}: {error}). Restore the checkpoint's file."
        ) from error


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of an answer. Raises InvalidRequest with the reason, also when no answer fits."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    if not matcher.is_error():
        # The first step as well: it is the first to meet rules that go round in circles.
        matcher.compute_bitmask()
        if matcher.is_error():
            reason = _first_line(matcher.get_error())
            raise InvalidRequest("no answer satisfies it" if reason.startswith("NoExtension") else reason)
        matcher.reset()
    if matcher.is_error():
        raise InvalidRequest(_first_line(matcher.get_error()))
    return matcher


def _first_line(error: str) -> str:
    """llguidance's reason without its excerpt of the grammar."""
    reason = error.partition("\n<state>")[0].partition("\n   1 |")[0].strip()
    _, _, after_place = reason.partition("): ")
    return " ".join((after_place if reason.startswith("at ") and after_place else reason).split())[:MAX_ERROR_CHARS]
