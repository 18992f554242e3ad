"""What all answers have in common: what they report of themselves, and what feeds and reads them.

An answer is synchronous and knows no network: tokens go in, chunks for its client come out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from router.timeline import PromptProgress
from wire.types import FinishReason, TokenEvent

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


class Answer(Protocol):
    """One answer on its way to the client: fed with tokens, read as streamed chunks or as one response."""

    num_tokens: int  # tokens the answer counts; a stop string may leave later ones out
    stopped: bool  # a stop string matched: no further token is wanted

    def opening(self, usage: Usage) -> list[Json]:
        """Chunks to send before the first token; `usage` is the prompt's."""

    def push(self, tokens: Sequence[TokenEvent]) -> list[Json]:
        """Chunks that became certain with these tokens. Never called again after `stopped`."""

    def close(self, reason: FinishReason, usage: Usage) -> list[Json]:
        """The last chunks, finish reason included, usage not."""

    def response(self, usage: Usage) -> Json:
        """The whole answer as one body; after `close`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What every chunk of one answer repeats."""

    answer_id: str
    model: str
    prompt_ids: Sequence[int] = field(repr=False)
    return_token_ids: bool = False
    choice: int = 0
    created: int = field(default_factory=lambda: int(time.time()))


def merged(wholes: Sequence[Json]) -> Json:
    """OpenAI's body with the choices of all and what they used together; the prompt counts once."""
    whole, *others = wholes
    if not others:
        return whole
    usage = whole["usage"]
    for other in others:
        whole["choices"] += other["choices"]
        for key in ("completion_tokens", "total_tokens"):
            usage[key] += other["usage"]["completion_tokens"]
        for key, count in other["usage"].get("completion_tokens_details", {}).items():
            details = usage.setdefault("completion_tokens_details", {})
            details[key] = details.get(key, 0) + count
    return whole


def progress_chunk(header: Header, kind: str) -> Callable[[PromptProgress], Json]:
    """Makes OpenAI's chunk of a prompt's progress, in llama.cpp's words; `kind` is the chunk's object."""

    def chunk(progress: PromptProgress) -> Json:
        return {
            "id": header.answer_id,
            "object": kind,
            "created": header.created,
            "model": header.model,
            "choices": [],
            "prompt_progress": progress.to_json(),
        }

    return chunk


def usage_chunk(whole: Json) -> Json:
    """OpenAI's last chunk, of a stream that asked for it, from the body the stream would have been."""
    kind = whole["object"]
    return {
        "id": whole["id"],
        "created": whole["created"],
        "model": whole["model"],
        "object": "chat.completion.chunk" if kind == "chat.completion" else kind,
        "choices": [],
        "usage": whole["usage"],
    }
