"""What the scheduler hands the runner: sequences, and the part of each that one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from wire.types import SamplingParams


@dataclass(slots=True, kw_only=True)
class Sequence:
    """One request's place in the pools. Owned by a scheduler; the runner reads it during a step.

    pages[i] and swa_pages[i] hold tokens [256 i, 256 (i + 1)); an SWA entry of 0 means "not mapped".
    """

    request_id: str
    sampling: SamplingParams
    slot: int  # request slot: addresses the C128 rings
    pages: list[int] = field(default_factory=list)
    swa_pages: list[int] = field(default_factory=list)
    length: int = 0  # tokens whose KV is in the pools


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens of one sequence to compute in one step, at positions [start, start + len(tokens)).

    The pages covering those positions and the 128-token window before them must be mapped.
    With `sample`, one token is drawn from the last position's logits; it is generated token `index`.
    """

    sequence: Sequence
    start: int
    tokens: list[int]
    sample: bool
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A drawn token. `ok` is False when the logits were not finite; the token then means nothing."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    ok: bool = True
