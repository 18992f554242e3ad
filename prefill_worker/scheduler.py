"""Which chunks run next. Pure: events in, actions and batches out, time as an argument.

A run waits for its pages, computes its prompt chunk by chunk in turn with the others, then holds its pages
until it is dropped. Only `Drop` gives pages back, and the claim table is its only author: so no page moves
under a reader.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.batch import Sampled, Segment, Sequence, not_drawn
from engine.loop import Load, StepFailed, Tick
from engine.window import WindowPages, most_window_pages, num_pages
from prefill_worker.offers import Offers, Pools
from wire.convert import failed_from_error
from wire.errors import ConfigError, InvalidRequest, Overloaded, PenumbraError, WorkerLost
from wire.types import (
    PAGE_TOKENS,
    AttemptId,
    Failed,
    PageClass,
    PageGroup,
    Progress,
    RunFinished,
    RunRequest,
    Tail,
    TokenEvent,
)

# Events.


@dataclass(frozen=True, slots=True)
class Submit:
    """The claim table expects this run."""

    request: RunRequest


@dataclass(frozen=True, slots=True)
class Drop:
    """Nobody may read this run's pages any more: stop computing, give everything back. Idempotent."""

    run: AttemptId


PrefillEvent = Submit | Drop

# Actions.


@dataclass(frozen=True, slots=True)
class Progressed:
    run: AttemptId
    progress: Progress


@dataclass(frozen=True, slots=True)
class Offered:
    """Pages that are ready; `tail` comes with the run's last."""

    run: AttemptId
    groups: tuple[PageGroup, ...]
    tail: Tail | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The run computes no more; it holds its pages until dropped. Once per run, unless dropped before."""

    run: AttemptId
    outcome: RunFinished | Failed


PrefillAction = Progressed | Offered | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    chunk_tokens: int = 512  # of one request in one step
    max_batch_tokens: int = 1024  # of all requests in one step
    max_waiting: int = 256
    queue_timeout_s: float = 60.0
    max_context: int
    vocab_size: int


@dataclass(slots=True, eq=False)
class _Run:
    id: AttemptId
    request: RunRequest
    deadline: float  # while waiting
    sequence: Sequence | None = None  # set at admission
    offers: Offers | None = None

    @property
    def total(self) -> int:
        return len(self.request.prompt)


class PrefillCore:
    """The prefill worker's scheduler; implements `engine.loop.Core`."""

    def __init__(self, pools: Pools, limits: PrefillLimits) -> None:
        if limits.chunk_tokens < 1 or limits.max_batch_tokens < 1:
            raise ConfigError(
                f"chunk_tokens={limits.chunk_tokens} and max_batch_tokens={limits.max_batch_tokens} must be positive."
            )
        self._pools = pools
        self._limits = limits
        self._window = WindowPages(pools.swa)
        self._step_tokens = min(limits.chunk_tokens, limits.max_batch_tokens)
        if most_window_pages(self._step_tokens) > pools.swa.capacity:
            raise ConfigError(
                f"a chunk of {self._step_tokens} tokens needs {most_window_pages(self._step_tokens)} window pages and "
                f"the pool has {pools.swa.capacity}. Lower chunk_tokens or raise max_requests."
            )
        self._runs: dict[AttemptId, _Run] = {}
        self._waiting: deque[_Run] = deque()
        self._computing: deque[_Run] = deque()  # whose turn is next, first
        self._batch: list[tuple[_Run, Segment]] = []
        self._uncomputed = 0  # prompt tokens of all waiting and computing runs

    def step(self, now_s: float, event: PrefillEvent | Tick | StepFailed) -> list[PrefillAction]:
        match event:
            case Submit(request):
                return self._submit(now_s, request) + self._admit()
            case Drop(run_id):
                self._drop(run_id)
                return self._admit()
            case Tick():
                return self._expire(now_s) + self._admit()
            case StepFailed(error):
                return self._step_failed(error)

    def next_batch(self, now_s: float) -> list[Segment]:
        """One chunk of each computing run in turn, as far as the step's token budget goes."""
        assert not self._batch, "the last batch has not been answered"
        left = self._limits.max_batch_tokens
        for run in list(self._computing):
            if left <= 0:
                break
            sequence = run.sequence
            assert sequence is not None
            start = sequence.length
            end = self._chunk_end(start, run.total, min(left, self._limits.chunk_tokens))
            left -= end - start
            self._window.cover(sequence, start, end)
            last = end == run.total
            tokens = list(run.request.prompt[start:end])
            self._batch.append((run, Segment(sequence=sequence, start=start, tokens=tokens, sample=last)))
            self._computing.rotate(-1)
        return [segment for _, segment in self._batch]

    def finish(self, now_s: float, results: list[Sampled | None]) -> list[PrefillAction]:
        actions: list[PrefillAction] = []
        batch, self._batch = self._batch, []
        for (run, segment), result in zip(batch, results, strict=True):
            sequence, offers = run.sequence, run.offers
            assert sequence is not None
            assert offers is not None
            sequence.length += len(segment.tokens)
            self._uncomputed -= len(segment.tokens)
            actions.append(Progressed(run.id, Progress(done=sequence.length, total=run.total, cached=0)))
            if not segment.sample:
                self._window.trim(sequence)
                if groups := offers.ready():
                    actions.append(Offered(run.id, groups, None))
                continue
            assert result is not None, f"run {run.id} asked for a token and got none"
            self._rest(run)
            if not result.ok:
                actions.append(_failed(run.id, not_drawn(result, f"prompt {run.id}")))
                continue
            first = TokenEvent(index=0, token_id=result.token_id, logprob=result.logprob, top=result.top)
            groups, tail = offers.last(first, cached_tokens=0)
            actions.append(Offered(run.id, groups, tail))
            actions.append(Ended(run.id, RunFinished(prompt_tokens=run.total, cached_tokens=0)))
        return actions + self._admit()

    def next_deadline(self) -> float | None:
        # All waiting runs get the same patience, so the first in line runs out first.
        return self._waiting[0].deadline if self._waiting else None

    def load(self) -> Load:
        pools = self._pools
        return Load(
            running=len(self._computing),
            waiting=len(self._waiting),
            queued_tokens=self._uncomputed,
            free_tokens=pools.full.free * PAGE_TOKENS,
            pages={
                PageClass.FULL: pools.full.counts(),
                PageClass.SWA: pools.swa.counts(),
                PageClass.STATE: pools.slots.counts(),
            },
        )

    # Inside.

    def _submit(self, now_s: float, request: RunRequest) -> list[PrefillAction]:
        run_id = AttemptId(request.request_id, request.attempt)
        assert run_id not in self._runs, f"run {run_id} submitted twice"
        error = self._refusal(request)
        if error is not None:
            return [_failed(run_id, error)]
        run = _Run(run_id, request, now_s + self._limits.queue_timeout_s)
        self._runs[run_id] = run
        self._waiting.append(run)
        self._uncomputed += run.total
        return []

    def _refusal(self, request: RunRequest) -> PenumbraError | None:
        """Why this run can not be taken. The router has checked all this; versions differ, so it is checked
        again.
        """
        n, limits, capacity = len(request.prompt), self._limits, self._pools.full.capacity
        if n == 0:
            return InvalidRequest("the prompt is empty; send at least one token", param="prompt")
        if n > limits.max_context:
            return InvalidRequest(f"the prompt has {n} tokens and the context is {limits.max_context}", param="prompt")
        if num_pages(n) > capacity:
            return InvalidRequest(
                f"a prompt of {n} tokens needs {num_pages(n)} pages and this worker has {capacity} in all",
                param="prompt",
            )
        if min(request.prompt) < 0 or max(request.prompt) >= limits.vocab_size:
            return InvalidRequest(
                f"the prompt has token ids outside the vocabulary of {limits.vocab_size}", param="prompt"
            )
        if request.skip % PAGE_TOKENS or not 0 <= request.skip < n:
            return InvalidRequest(
                f"skip={request.skip} is not a page boundary inside a prompt of {n} tokens; "
                f"send a multiple of {PAGE_TOKENS}",
                param="skip",
            )
        if len(self._waiting) >= limits.max_waiting:
            return Overloaded(f"{len(self._waiting)} prompts are waiting here; try another worker")
        return None

    def _admit(self) -> list[PrefillAction]:
        """Give the first in line its full pages, window and slot, all or none: nobody waits half provided
        for.
        """
        actions: list[PrefillAction] = []
        pools = self._pools
        while self._waiting:
            run = self._waiting[0]
            window = min(num_pages(run.total), most_window_pages(self._step_tokens))
            if pools.full.free < num_pages(run.total) or self._window.available < window or not pools.slots.free:
                break
            self._waiting.popleft()
            run.sequence = Sequence(
                request_id=run.id.request_id,
                sampling=run.request.sampling,
                slot=pools.slots.allocate(1)[0],
                pages=pools.full.allocate(num_pages(run.total)),
                prompt=run.request.prompt,
            )
            self._window.reserve(run.sequence, window)
            run.offers = Offers(pools, run.sequence, run.total, run.request.skip)
            self._computing.append(run)
            actions.append(Progressed(run.id, Progress(done=0, total=run.total, cached=0)))
        return actions

    def _chunk_end(self, start: int, total: int, budget: int) -> int:
        end = min(total, start + budget)
        aligned = end - end % PAGE_TOKENS
        # End on a page where that costs nothing: a page finished now is offered now.
        return aligned if start < aligned and end < total else end

    def _rest(self, run: _Run) -> None:
        """Stop computing, keep the pages."""
        assert run.sequence is not None
        self._computing.remove(run)
        self._uncomputed -= run.total - run.sequence.length
        self._window.trim(run.sequence)
        self._window.keep_mapped(run.sequence)

    def _drop(self, run_id: AttemptId) -> None:
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        sequence = run.sequence
        if sequence is None:
            self._waiting.remove(run)
            self._uncomputed -= run.total
            return
        if run in self._computing:
            self._rest(run)
        self._pools.swa.release(self._window.drop(sequence))
        self._pools.full.release(sequence.pages)
        self._pools.slots.release([sequence.slot])

    def _expire(self, now_s: float) -> list[PrefillAction]:
        late = [run for run in self._waiting if run.deadline <= now_s]
        actions: list[PrefillAction] = []
        for run in late:
            self._drop(run.id)
            error = Overloaded(
                f"no room for a prompt of {run.total} tokens within {self._limits.queue_timeout_s:g} s; try again"
            )
            actions.append(_failed(run.id, error))
        return actions

    def _step_failed(self, error: str) -> list[PrefillAction]:
        actions: list[PrefillAction] = []
        batch, self._batch = self._batch, []
        for run, _ in batch:
            self._rest(run)
            actions.append(_failed(run.id, WorkerLost(f"the prefill step of {run.id} failed: {error}")))
        return actions


def _failed(run: AttemptId, error: PenumbraError) -> Ended:
    return Ended(run, failed_from_error(error))
