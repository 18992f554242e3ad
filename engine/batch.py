"""What the scheduler hands the runner: sequences, the part of each that a step computes, and the step's addresses."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.config import WINDOW
from wire.errors import GrammarFailed, NumericalError, PenumbraError
from wire.types import PAGE_TOKENS, SamplingParams

if TYPE_CHECKING:
    from engine.sampler import Draws


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
    # What draws depend on besides logits. The scheduler's own sequences, not copies: `answer` grows as tokens come.
    prompt: collections.abc.Sequence[int] = field(default=(), repr=False)
    answer: collections.abc.Sequence[int] = field(default=(), repr=False)
    draws: Draws | None = field(default=None, repr=False)  # the runner's, derived from the two above


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens of one sequence to compute in one step, at positions [start, start + len(tokens)).

    The pages covering those positions and the 128-token window before them must be mapped.
    With `sample`, one token is drawn from the last position's logits; it is generated token `index`.

    The last `drafts` tokens are guesses at what `sample` will draw, `index` counting from before them: each is kept if
    the draw before it agrees, and the first draw that does not ends the step. `guesses` more are wanted for the next
    step, as far as SWA pages are mapped for them.

    With `rebuild`, the sequence's full pages hold these tokens' compressed rows already and are only read: the step
    writes window rows and rings. What it computes is right from `rebuild_tokens` behind `start` on.
    """

    sequence: Sequence
    start: int
    tokens: list[int]
    sample: bool
    index: int = 0
    rebuild: bool = False
    drafts: int = 0
    guesses: int = 0


def rebuild_tokens(num_layers: int) -> int:
    """Tokens to compute again so that the page before a boundary gets its window back, bit for bit.

    The first layer's rows need nothing but the tokens. Each further layer's need the layer before over another window,
    and compressed rows, which are still there. Whole pages, so that the computation starts on one.
    """
    tokens = PAGE_TOKENS + (num_layers - 1) * WINDOW
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A drawn token. `ok` is False when none could be drawn, because the logits were not finite or as `problem` says;
    the token then means nothing.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    ok: bool = True
    problem: str = ""


def not_drawn(sampled: Sampled, what: str) -> PenumbraError:
    """Why a token that is not `ok` could not be drawn for `what`."""
    if sampled.problem:
        return GrammarFailed(f"{what} can not be drawn: {sampled.problem}")
    return NumericalError(f"the model's output for {what} is not finite")


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew for one segment: a token more than drafts were kept, or none; and guesses at what comes next.

    The KV of every token but the last one drawn is in the pools.
    """

    tokens: tuple[Sampled, ...] = ()
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepMeta:
    """One step's addresses, computed once and shared by every layer; T tokens of B segments, P pages at most.

    Item, page and slot 0 are sinks: never read for their meaning, harmless to write.
    """

    positions: Tensor  # [T] int64    token position in its request
    segment: Tensor  # [T] int32    row of the tables a token belongs to
    offsets: Tensor  # [B+1] int32  segment b is token rows offsets[b]:offsets[b+1], consecutive positions
    starts: Tensor  # [B] int64    first position of each segment
    page_table: Tensor  # [B, P] int32 full page of each page index
    swa_table: Tensor  # [B, P] int32 SWA page of each page index, 0 where not mapped
    slots: Tensor  # [B] int32    request slot
    write_table: Tensor | None = None  # [B, P] int32 where compressed rows go, if not all to page_table
    oldest: Tensor | None = None  # [B] int64    first position whose window row may be read, if not 0

    @classmethod
    def of(cls, batch: list[Segment]) -> StepMeta:
        starts = [segment.start for segment in batch]
        lengths = [len(segment.tokens) for segment in batch]
        width = max(-(-(start + n) // PAGE_TOKENS) for start, n in zip(starts, lengths, strict=True))
        pages = [(s.sequence.pages + [0] * width)[:width] for s in batch]
        swa_pages = [(s.sequence.swa_pages + [0] * width)[:width] for s in batch]
        page_table, write_table = torch.tensor(pages, dtype=torch.int32), None
        if any(segment.rebuild for segment in batch):
            # To the sink, so that pages others are reading stay as they are.
            write_table = page_table * torch.tensor([[not segment.rebuild] for segment in batch], dtype=torch.int32)
        starts_t = torch.tensor(starts, dtype=torch.int64)
        lengths_t = torch.tensor(lengths, dtype=torch.int64)
        ends = lengths_t.cumsum(0)
        segment = torch.repeat_interleave(torch.arange(len(batch)), lengths_t)
        first_row = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        return cls(
            positions=torch.arange(int(ends[-1])) - first_row[segment] + starts_t[segment],
            segment=segment.int(),
            offsets=first_row.int(),
            starts=starts_t,
            page_table=page_table,
            swa_table=torch.tensor(swa_pages, dtype=torch.int32),
            slots=torch.tensor([s.sequence.slot for s in batch], dtype=torch.int32),
            write_table=write_table,
        )
