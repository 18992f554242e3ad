"""What the scheduler hands the runner: sequences, the part of each that a step computes, and the step's addresses."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.config import WINDOW
from engine.kernels.addresses import token_addresses
from wire.errors import GrammarFailed, NumericalError, PenumbraError
from wire.types import PAGE_TOKENS, PromptScores, SamplingParams

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

    `following` are the tokens behind each of `tokens`, as far as their log probabilities are asked for: the prompt's,
    which are kept until its answer's first token is drawn.

    With `rebuild`, the sequence's full pages hold these tokens' compressed rows already and are only read: the step
    writes window rows and rings. What it computes is right from `rebuild_tokens` behind `start` on.

    With `follows`, this was planned while the step before it was still running, in which the sequence has the segment
    of that number. It goes on with what that one draws and guesses, or is nothing if the answer ended there: see
    `Chain`. Until then `start` is the latest place it may begin at, and `tokens` stand for as many as there may be.
    """

    sequence: Sequence
    start: int
    tokens: list[int]
    sample: bool
    index: int = 0
    rebuild: bool = False
    following: collections.abc.Sequence[int] = ()
    drafts: int = 0
    guesses: int = 0
    follows: int | None = None
    limit: int = 0  # with `follows`: tokens of the sequence that are ever computed, all but the answer's last
    room: int = 0  # with `follows`: tokens its full pages hold


def most_drafts(start: int, limit: int, room: int) -> int:
    """Drafts that a step from `start` on has use and room for: the last token of an answer is drawn, not computed."""
    return max(0, min(limit, room) - start - 1)


def most_guesses(start: int, limit: int) -> int:
    """Guesses of use behind a step from `start` on, which brings a token; the last one is drawn, not drafted."""
    return max(0, limit - start - 2)


def following(
    prompt: collections.abc.Sequence[int], sampling: SamplingParams, start: int, end: int
) -> collections.abc.Sequence[int]:
    """Tokens behind each of [start, end) of a prompt, if its log probabilities are asked for."""
    return () if sampling.prompt_logprobs is None else prompt[start + 1 : end + 1]


def ends_of(sampling: SamplingParams, eos_token_id: int) -> frozenset[int]:
    """Token ids that end an answer."""
    return frozenset(sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, eos_token_id))


def rebuild_tokens(num_layers: int) -> int:
    """Tokens to compute again so that the page before a boundary gets its window back, bit for bit.

    The first layer's rows need nothing but the tokens. Each further layer's need the layer before over another window,
    and compressed rows, which are still there. Whole pages, so that the computation starts on one.
    """
    tokens = PAGE_TOKENS + (num_layers - 1) * WINDOW
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A drawn token; with an answer's first, what was asked about its prompt. `ok` is False when none could be drawn,
    because the logits were not finite or as `problem` says; the token then means nothing.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    prompt: PromptScores | None = None
    ok: bool = True
    problem: str = ""


def not_drawn(sampled: Sampled, what: str) -> PenumbraError:
    """Why a token that is not `ok` could not be drawn for `what`."""
    if sampled.problem:
        return GrammarFailed(f"{what} can not be drawn: {sampled.problem}")
    return NumericalError(f"the model's output for {what} is not finite")


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew for one segment: a token more than of its `drafts` were kept, or none; and guesses at what comes
    next.

    The KV of every token but the last one drawn is in the pools.
    """

    tokens: tuple[Sampled, ...] = ()
    guesses: tuple[int, ...] = ()
    drafts: int = 0


class Chain:
    """What each step leaves for one that was planned behind it: where its sequences are, and what comes next there."""

    def __init__(self, eos_token_id: int) -> None:
        self._eos = eos_token_id
        self._last: list[tuple[Segment, Drawn] | None] = []

    def bind(self, batch: list[Segment]) -> list[Segment | None]:
        """Each segment as it is now that the step before has been drawn; None where that ended the answer."""
        return [segment if segment.follows is None else self._behind(segment) for segment in batch]

    def drawn(self, bound: list[Segment | None], results: list[Drawn]) -> None:
        """The step is over."""
        self._last = [(s, d) if s is not None else None for s, d in zip(bound, results, strict=True)]

    def _behind(self, segment: Segment) -> Segment | None:
        assert segment.follows is not None
        last = self._last[segment.follows]
        if last is None:
            return None
        before, drawn = last
        assert before.sequence is segment.sequence, "a step was planned behind another than the one that ran"
        ends = ends_of(segment.sequence.sampling, self._eos)
        if not drawn.tokens or not drawn.tokens[-1].ok or any(token.token_id in ends for token in drawn.tokens):
            return None
        start = before.start + len(before.tokens) - before.drafts + len(drawn.tokens) - 1
        if start >= segment.limit:
            return None
        tried = drawn.guesses[: min(segment.drafts, most_drafts(start, segment.limit, segment.room))]
        return replace(
            segment,
            start=start,
            tokens=[drawn.tokens[-1].token_id, *tried],
            index=before.index + len(drawn.tokens),
            drafts=len(tried),
            guesses=min(segment.guesses, most_guesses(start, segment.limit)),
            follows=None,
        )


@dataclass(frozen=True, slots=True)
class Tables:
    """Where B sequences lie: what a step's host hands over, P pages at most. Known before the step's tokens are.

    Item, page and slot 0 are sinks: never read for their meaning, harmless to write.
    """

    slots: Tensor  # [B] int32     request slot
    pages: Tensor  # [B, P] int32  full page of each page index
    swa_pages: Tensor  # [B, P] int32  SWA page of each page index, 0 where not mapped
    write_pages: Tensor | None = None  # [B, P] int32 where compressed rows go, if not all to `pages`

    @classmethod
    def of(cls, batch: list[Segment]) -> Tables:
        # Guesses lie behind the tokens; the page they may need is mapped, or they stop at its edge.
        ends = [segment.start + len(segment.tokens) + segment.guesses for segment in batch]
        width = max(-(-end // PAGE_TOKENS) for end in ends)
        pages, swa_pages = np.zeros((2, len(batch), width), dtype=np.int32)
        for b, segment in enumerate(batch):
            for table, items in ((pages, segment.sequence.pages), (swa_pages, segment.sequence.swa_pages)):
                part = items[:width]
                table[b, : len(part)] = part
        full, write_pages = torch.from_numpy(pages), None
        if any(segment.rebuild for segment in batch):
            # To the sink, so that pages others are reading stay as they are.
            write_pages = full * torch.tensor([[not segment.rebuild] for segment in batch], dtype=torch.int32)
        return cls(
            slots=torch.tensor([segment.sequence.slot for segment in batch], dtype=torch.int32),
            pages=full,
            swa_pages=torch.from_numpy(swa_pages),
            write_pages=write_pages,
        )

    def only(self, rows: list[int]) -> Tables:
        """Of the sequences with these numbers."""
        if len(rows) == len(self.slots):
            return self
        write_pages = None if self.write_pages is None else self.write_pages[rows]
        return Tables(self.slots[rows], self.pages[rows], self.swa_pages[rows], write_pages)


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

    def to(self, device: torch.device) -> StepMeta:
        """The same addresses on the device that computes the step."""
        if self.positions.device == device and (self.oldest is None or self.oldest.device == device):
            return self
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    @classmethod
    def at(
        cls, tables: Tables, starts: Tensor, counts: Tensor, num_tokens: int, oldest: Tensor | None = None
    ) -> StepMeta:
        """The addresses of `counts` [B] tokens of each sequence from `starts` [B] on, `num_tokens` in all.

        Tensors in, tensors out, and no value of one is looked at: so it can be computed where they lie.
        """
        positions, segment, offsets, starts = token_addresses(starts, counts, num_tokens)
        return cls(
            positions=positions,
            segment=segment,
            offsets=offsets,
            starts=starts,
            page_table=tables.pages,
            swa_table=tables.swa_pages,
            slots=tables.slots,
            write_table=tables.write_pages,
            oldest=oldest,
        )

    @classmethod
    def of(cls, batch: list[Segment]) -> StepMeta:
        """The addresses of a batch whose tokens are known."""
        return cls.at(Tables.of(batch), *extents(batch))


def extents(batch: list[Segment]) -> tuple[Tensor, Tensor, int]:
    """([B] int64 first position of each segment, [B] int64 its tokens, tokens in all)."""
    counts = [len(segment.tokens) for segment in batch]
    return torch.tensor([segment.start for segment in batch]), torch.tensor(counts), sum(counts)
