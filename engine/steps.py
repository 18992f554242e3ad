"""One step on its device: the forward pass, then the draft layer over it. As single calls, or as CUDA graphs.

A step is made for a batch, asked for logits once, told how many of each segment's tokens stay, and then asked for guess
after guess. What lies between those calls stays on the device. Or it draws, verifies and guesses by itself, where all
that draws depend on can be handed over before: graphs then follow one another without a word from the host.

T tokens of B segments, P pages at most, V vocabulary, D hidden.
"""

from __future__ import annotations

import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Segment, StepMeta, Tables, extents
from engine.cache.pools import KvPools
from engine.kernels.sample import HOW, How, draw, takes
from engine.kernels.verify import Asked, Guessing, advance, verify
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.mtp import DraftLayer

log = structlog.get_logger()
T = TypeVar("T")

SEGMENT_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKEN_SIZES = (*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PAGE_SIZES = (16, 64, 256, 1024, 4096)
"""A graph is captured for the next larger of these: contexts of 4K, 16K, 64K, 256K and 1M tokens. The pages decide how
many programs look for work in a context, so short ones do not pay for long ones."""
MOST_DRAWN = 64
"""Tokens of a step that draws where its logits are: it draws behind every one of them."""
MOST_GUESSES = 8
"""Of a segment, in such a step."""
MOST_FAMILIES = 24
"""Families of graphs that are kept; the one not used for longest goes first."""


class Step(Protocol):
    """One step of a batch; the calls come in this order."""

    def logits(self, wanted: list[int]) -> Tensor:
        """[len(wanted), V] float32 of these token rows, which ascend."""
        ...

    def streams(self) -> Tensor:
        """[T, 4, D] behind the last layer, once `logits` has been asked for."""
        ...

    def remember(self, kept: list[int]) -> None:
        """Let the draft layer see the first `kept` tokens of each segment, at least 1 of each."""
        ...

    def guess(self, going: list[int], ids: list[int], depth: int) -> Tensor:
        """[len(going), V] float32: what the draft layer guesses to come behind each of `ids`.

        going   segments to guess for, ascending; later calls name no others
        ids     the token `depth` places behind the kept ones of each of them
        depth   0 in the first call, and one more in each call
        """
        ...


class SingleStep:
    """Every kernel is called for itself: any batch, on any device."""

    def __init__(
        self, model: DeepseekV4, draft: DraftLayer | None, pools: KvPools, batch: list[Segment], tables: Tables
    ) -> None:
        self._model, self._draft, self._pools, self._tables = model, draft, pools, tables
        self._ids, self._meta = token_ids(batch), StepMeta.at(tables, *extents(batch))
        self._scored = any(segment.following for segment in batch)
        self._streams: Tensor | None = None

    def logits(self, wanted: list[int]) -> Tensor:
        rows = torch.tensor(wanted, dtype=torch.int64)
        if self._draft is None and not self._scored:
            return self._model.forward(self._ids, self._meta, rows, self._pools)
        self._streams = self._model.streams(self._ids, self._meta, self._pools)
        return self._model.read_out(self._streams[rows.to(self._streams.device)])

    def streams(self) -> Tensor:
        assert self._streams is not None
        return self._streams

    def remember(self, kept: list[int]) -> None:
        assert self._draft is not None
        stay = torch.tensor(kept)
        self._ends = self._meta.starts + stay
        self._before, self._oldest = self._draft.remember(self.streams(), self._ids, self._meta, stay, self._pools)

    def guess(self, going: list[int], ids: list[int], depth: int) -> Tensor:
        assert self._draft is not None
        ones = torch.ones(len(going), dtype=torch.int64)
        starts = self._ends[going] + depth
        at = StepMeta.at(self._tables.only(going), starts, ones, len(going), self._oldest[going])
        logits, self._before[going] = self._draft.guess(torch.tensor(ids), self._before[going], at, self._pools)
        return logits


class StepGraphs:
    """CUDA graphs of steps, captured as they are needed and shared by all batches of about a size.

    A batch is padded to a size there is a graph for. Rows of the padding belong to one more segment, whose tables hold
    zeros: it reads and writes the sinks. A part of a step runs as it is when it is first asked for, which compiles its
    kernels, is captured the second time, and replayed from then on. What is captured finds its inputs in buffers of its
    family, which the host fills by one copy for each replay.
    """

    def __init__(self, model: DeepseekV4, draft: DraftLayer | None, pools: KvPools, *, capture: bool = True) -> None:
        """Without `capture`, parts are never captured, so that the padding can be tried on a CPU."""
        self._model, self._draft, self._pools = model, draft, pools
        self._memory = _Memory() if capture else None
        self._families: OrderedDict[tuple[int, int], _Family] = OrderedDict()

    def step(self, batch: list[Segment], tables: Tables) -> GraphStep | None:
        """None for a batch that no graph takes: a long one, one that rebuilds windows, one of which every row is
        scored.
        """
        num_tokens = sum(len(segment.tokens) for segment in batch)
        sizes = (
            _size(SEGMENT_SIZES, len(batch)),
            _size(TOKEN_SIZES, num_tokens),
            _size(PAGE_SIZES, tables.pages.shape[1]),
        )
        if None in sizes or tables.write_pages is not None or any(segment.following for segment in batch):
            return None
        segments, tokens, pages = sizes
        assert segments is not None
        assert tokens is not None
        assert pages is not None
        key = (segments + 1, pages)
        if key not in self._families:
            self._families[key] = _Family(self._model, self._draft, self._pools, *key, self._memory)
            if len(self._families) > MOST_FAMILIES:
                self._families.popitem(last=False)
        self._families.move_to_end(key)
        return GraphStep(self._families[key], tokens, batch, tables)


class _Memory:
    """Where graphs keep what they make: one pool for all of them, for no two run at once."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """To be called behind a capture that failed: torch goes on recording into its pool."""
        self.pool: Any = torch.cuda.graph_pool_handle()


class _Part(Generic[T]):
    """A piece of a step in which the host looks at no value.

    behind  the piece whose results this one reads: they lie in one place only once that one is captured
    """

    def __init__(self, run: Callable[[], T], memory: _Memory | None, behind: _Part[Any] | None = None) -> None:
        self._run, self._memory, self._behind = run, memory, behind
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ran = False
        self._made: T

    def __call__(self) -> T:
        stays = self._behind is None or self._behind._graph is not None
        if not self._ran or self._memory is None or not stays:
            self._made, self._ran = self._run(), True
            return self._made
        if self._graph is None:
            try:
                self._graph = self._captured(self._memory.pool)
            except Exception as error:  # of torch, of the driver or of cuda.core: capturing has run nothing
                log.warning(
                    "part_of_a_step_not_captured", why=str(error)[:300], instead="its kernels are called singly"
                )
                self._memory.renew()
                self._memory = None
                return self()
        self._graph.replay()
        return self._made

    def _captured(self, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()  # where a capture can not be ended, torch leaves its own the current one
        # A family that was given up holds graphs until garbage is collected, and to destroy one ends a capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            # Other threads go on copying pages meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._made = self._run()
        finally:
            torch.cuda.set_stream(before)
            if collects:
                gc.enable()
        return graph


class _Buffer:
    """int32 numbers that the host fills and one copy brings to the device."""

    def __init__(self, count: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.device = torch.zeros(count, dtype=torch.int32, device=device)
        self._pinned = torch.zeros(count, dtype=torch.int32, pin_memory=on_gpu)
        self._host: NDArray[np.int32] = self._pinned.numpy()
        self._sent = torch.cuda.Event() if on_gpu else None

    def host(self) -> NDArray[np.int32]:
        """The host's side, to be written: the last copy of it has been made."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host

    def send(self) -> None:
        self.device.copy_(self._pinned, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def send_these(self, numbers: Sequence[int]) -> None:
        """Fill all of it, and send it."""
        self.host()[:] = numbers
        self.send()


class _Inputs(NamedTuple):
    """What the host hands over for a step of up to B segments of up to P pages: arrays of the host, or tensors.

    how        [B, 2 HOW], the bits of a `How` of any position
    slots      [B], pages and swa_pages [B, P]: see `Tables`
    starts     [B], counts [B], of each segment's tokens; ids of all
    asked      [3, B]: an `Asked`
    """

    how: Any
    slots: Any
    pages: Any
    swa_pages: Any
    starts: Any
    counts: Any
    asked: Any
    ids: Any

    @classmethod
    def of(cls, flat: Any, b: int, p: int) -> _Inputs:
        """The parts of so many numbers as `size` says. Those of 64 bits come first, where they are aligned."""
        parts, at = [], 0
        for shape in cls._shapes(b, p):
            size = math.prod(shape)
            parts.append(flat[at : at + size].reshape(shape))
            at += size
        return cls(*parts)

    @classmethod
    def size(cls, b: int, p: int) -> int:
        return sum(map(math.prod, cls._shapes(b, p)))

    @staticmethod
    def _shapes(b: int, p: int) -> list[tuple[int, ...]]:
        return [(b, 2 * HOW), (b,), (b, p), (b, p), (b,), (b,), (3, b), (TOKEN_SIZES[-1],)]


class _Results:
    """int32 numbers that a step makes and one copy brings to the host."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.device = torch.full((count,), -1, dtype=torch.int32, device=device)
        self._pinned = torch.empty(count, dtype=torch.int32, pin_memory=device.type == "cuda")

    def host(self) -> NDArray[np.int32]:
        """When all that the step queued is done."""
        self._pinned.copy_(self.device, non_blocking=True)
        if self.device.is_cuda:
            torch.cuda.current_stream().synchronize()
        return self._pinned.numpy()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step drew behind each of its tokens, as `sample.draw` says, and each segment's guesses."""

    drawn: list[list[int]]
    guesses: list[list[int]]


class _Family:
    """What is captured for batches of up to B - 1 segments of up to P pages."""

    def __init__(
        self,
        model: DeepseekV4,
        draft: DraftLayer | None,
        pools: KvPools,
        segments: int,
        pages: int,
        memory: _Memory | None,
    ) -> None:
        self.model, self.draft, self.pools, self.memory = model, draft, pools, memory
        self.segments, self.pages = segments, pages
        device = model.device
        self.given = _Buffer(_Inputs.size(segments, pages), device)
        self.inputs = _Inputs.of(self.given.device, segments, pages)
        self.kept = _Buffer(segments, device)
        self.guessing = _Buffer(3 * segments, device)  # a `Guessing`
        self.results = _Results(2 * MOST_DRAWN + segments * MOST_GUESSES, device)
        self.forwards: dict[int, _Forward] = {}
        if draft is not None:
            c = model.config
            self.before = torch.zeros(segments, c.hc_mult, c.hidden_size, device=device)
            self.oldest = torch.zeros(segments, dtype=torch.int64, device=device)
            self.guess = _Part(self._guess, memory)
            self.advance = {
                filtered: _Part(partial(self._advance, filtered), memory, self.guess) for filtered in (False, True)
            }
            self.guessed = torch.empty(0)  # logits that `guess` made last: once it is captured, always in one place

    def forward(self, tokens: int) -> _Forward:
        if tokens not in self.forwards:
            self.forwards[tokens] = _Forward(self, tokens)
        return self.forwards[tokens]

    def tables(self) -> Tables:
        return Tables(self.inputs.slots, self.inputs.pages, self.inputs.swa_pages)

    def how(self) -> Tensor:
        """[B, HOW] int64."""
        bits: Tensor = self.inputs.how
        return bits.view(torch.int64)

    def to_guess(self) -> Guessing:
        return Guessing(*self.guessing.device.view(3, self.segments))

    def guesses(self) -> Tensor:
        """[B, MOST_GUESSES] int32."""
        return self.results.device[2 * MOST_DRAWN :].view(self.segments, MOST_GUESSES)

    def _advance(self, filtered: bool) -> None:
        to_guess = self.to_guess()
        drawn = draw(self.guessed, self.how(), filtered, None, to_guess.places.long())
        advance(drawn, self.inputs.swa_pages, Asked(*self.inputs.asked), to_guess, self.guesses())

    def _guess(self) -> Tensor:
        """[B, V]; rows of segments that do not go on mean nothing."""
        assert self.draft is not None
        ids, places, going = self.to_guess()
        tables, more = self.tables(), going[:, None]
        at = StepMeta.at(
            Tables(tables.slots * going, tables.pages * more, tables.swa_pages * more),
            places,
            torch.ones_like(places),
            self.segments,
            self.oldest * going,
        )
        logits, streams = self.draft.guess(ids.long(), self.before, at, self.pools)
        self.before.copy_(streams)
        return logits


class _Forward:
    """What is captured for T tokens of a family."""

    def __init__(self, family: _Family, tokens: int) -> None:
        self.family, self.tokens = family, tokens
        self.run = _Part(self._run, family.memory)
        self.verify = {
            filtered: _Part(partial(self._verify, filtered), family.memory, self.run) for filtered in (False, True)
        }
        self.remember = _Part(self._remember, family.memory, self.run)
        self.streams = self.logits = torch.empty(0)  # what `run` made last: once it is captured, always in one place

    def _inputs(self) -> tuple[Tensor, StepMeta]:
        given = self.family.inputs
        meta = StepMeta.at(self.family.tables(), given.starts, given.counts, self.tokens)
        return given.ids[: self.tokens].long(), meta

    def _run(self) -> tuple[Tensor, Tensor]:
        """streams [T, 4, D] and logits [T, V]."""
        model = self.family.model
        streams = model.streams(*self._inputs(), self.family.pools)
        return streams, model.read_out(streams)

    def _verify(self, filtered: bool) -> None:
        family, (ids, meta) = self.family, self._inputs()
        drawn = family.results.device[: 2 * self.tokens].view(self.tokens, 2)
        drawn.copy_(draw(self.logits, family.how(), filtered, meta.segment, meta.positions))
        asked = Asked(*family.inputs.asked)
        verify(drawn, ids, meta, asked, family.kept.device, family.to_guess(), family.guesses())

    def _remember(self) -> None:
        family, (ids, meta) = self.family, self._inputs()
        assert family.draft is not None
        before, oldest = family.draft.remember(self.streams, ids, meta, family.kept.device.long(), family.pools)
        family.before.copy_(before)
        family.oldest.copy_(oldest)


class GraphStep:
    """One batch's pass through what its family has captured."""

    def __init__(self, family: _Family, tokens: int, batch: list[Segment], tables: Tables) -> None:
        self._family, self._forward = family, family.forward(tokens)
        self._batch, self._tables = batch, tables
        self._ids = [token for segment in batch for token in segment.tokens]
        self._guesses = max(segment.guesses for segment in batch)

    def takes(self) -> bool:
        """Whether `drawn` can be asked for."""
        model = self._family.model
        return (
            self._forward.tokens <= MOST_DRAWN
            and self._guesses <= MOST_GUESSES
            and takes(model.device, model.config.vocab_size)
        )

    @torch.inference_mode()
    def drawn(self, how: How) -> Outcome:
        """The whole step, in which the host looks at nothing: it draws behind every token, keeps the drafts that are
        what was drawn, and guesses on; all by `how` [B], of any position. Nothing else is asked for then, but `row`.
        """
        family, forward, filtered = self._family, self._forward, bool(how.filtered.any())
        self._run(how)
        forward.verify[filtered]()
        if family.draft is not None:
            forward.remember()
            for _ in range(self._guesses):
                family.guessed = family.guess()
                family.advance[filtered]()
        results = family.results.host()
        made = results[2 * MOST_DRAWN :].reshape(family.segments, MOST_GUESSES)[: len(self._batch)]
        return Outcome(
            drawn=results[: 2 * len(self._ids)].reshape(-1, 2).tolist(),
            guesses=[[token for token in row if token >= 0] for row in made.tolist()],
        )

    def row(self, token: int) -> Tensor:
        """[1, V] float32, the logits of one of the step's tokens."""
        return self._forward.logits[token : token + 1]

    def _run(self, how: How | None = None) -> None:
        family, forward, batch, tables = self._family, self._forward, self._batch, self._tables
        flat, n = family.given.host(), len(batch)
        flat[:] = 0
        given = _Inputs.of(flat, family.segments, family.pages)
        given.slots[:n] = tables.slots
        given.pages[:n, : tables.pages.shape[1]] = tables.pages
        given.swa_pages[:n, : tables.swa_pages.shape[1]] = tables.swa_pages
        given.starts[:n] = [segment.start for segment in batch]
        given.counts[:n] = [len(segment.tokens) for segment in batch]
        given.counts[-1] = self._spare
        given.ids[: len(self._ids)] = self._ids
        if how is not None:
            given.how.view(np.uint64)[:n] = how.bits
            given.asked[:, :n] = [[s.drafts for s in batch], [s.sample for s in batch], [s.guesses for s in batch]]
        family.given.send()
        forward.streams, forward.logits = forward.run()

    @property
    def _spare(self) -> int:
        """Tokens of the padding, which the last segment takes; those between have none."""
        return self._forward.tokens - len(self._ids)

    @torch.inference_mode()
    def logits(self, wanted: list[int]) -> Tensor:
        self._run()
        logits = self._forward.logits
        if len(wanted) == len(self._ids):
            return logits[: len(wanted)]
        return logits[torch.tensor(wanted, dtype=torch.int64, device=logits.device)]

    def streams(self) -> Tensor:
        return self._forward.streams[: len(self._ids)]

    @torch.inference_mode()
    def remember(self, kept: list[int]) -> None:
        self._ends = [segment.start + count for segment, count in zip(self._batch, kept, strict=True)]
        self._family.kept.send_these([*kept, *[0] * (self._family.segments - len(kept) - 1), self._spare])
        self._forward.remember()

    @torch.inference_mode()
    def guess(self, going: list[int], ids: list[int], depth: int) -> Tensor:
        token, place, goes = ([0] * self._family.segments for _ in range(3))
        for segment, one in zip(going, ids, strict=True):
            token[segment], place[segment], goes[segment] = one, self._ends[segment] + depth, 1
        self._family.guessing.send_these([*token, *place, *goes])
        logits = self._family.guess()
        if going == list(range(len(going))):
            return logits[: len(going)]
        return logits[torch.tensor(going, device=logits.device)]


def _size(sizes: Sequence[int], count: int) -> int | None:
    """The smallest that holds so many."""
    return next((size for size in sizes if size >= count), None)


def token_ids(batch: list[Segment]) -> Tensor:
    """[T] int64."""
    return torch.tensor([token for segment in batch for token in segment.tokens], dtype=torch.int64)
