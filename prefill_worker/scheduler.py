"""Which chunks run next. Pure: events in, actions and batches out, time as an argument.

A run waits for its pages, computes its prompt chunk by chunk in turn with the others, then holds its pages
until it is dropped. Only `Drop` gives pages back, and the claim table is its only author: so no page moves
under a reader.

What others have computed is not computed again. A run starts behind the longest prefix the cache holds, and looks
again before each chunk, since a prompt like its own may be ahead of it. Where the cache has compressed rows but no
window to resume at, the run computes the window again and reads the rows. Each finished page goes to the cache at
once and stays under the run's lease until the run is dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from engine.batch import Sampled, Segment, Sequence, following, not_drawn, rebuild_tokens
from engine.cache.shadow_radix import Lease, Match, ShadowRadix
from engine.loop import Load, StepFailed, Tick
from engine.pace import Pace
from engine.window import WindowPages, first_window_page, most_window_pages, num_pages
from prefill_worker.offers import Offers, PageChecksums, Pools
from wire.convert import failed_from_error
from wire.errors import ConfigError, InvalidRequest, Overloaded, PenumbraError, WorkerLost
from wire.prefix import page_hashes
from wire.types import (
    PAGE_TOKENS,
    AttemptId,
    Failed,
    PageClass,
    PageGroup,
    PrefixEvent,
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


@dataclass(frozen=True, slots=True)
class Lend:
    """Somebody wants to measure reads of so many full pages; answered by `Lent`."""

    lend_id: str
    num_pages: int


@dataclass(frozen=True, slots=True)
class TakeBack:
    """What was lent under this id is read no more. Idempotent."""

    lend_id: str


PrefillEvent = Submit | Drop | Lend | TakeBack

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


@dataclass(frozen=True, slots=True)
class PrefixesChanged:
    """What the prefix tree stored and removed, in order."""

    events: tuple[PrefixEvent, ...]


@dataclass(frozen=True, slots=True)
class Crowded:
    """The first prompt in line finds no room: what is only held for another reader should go."""


@dataclass(frozen=True, slots=True)
class Lent:
    """The answer to `Lend`; None when there is no page to spare."""

    lend_id: str
    group: PageGroup | None


PrefillAction = Progressed | Offered | Ended | PrefixesChanged | Crowded | Lent

MIN_CHUNK_TOKENS = 32
"""However slow the machine, a chunk is this long: the cost of a step must be shared by some tokens."""

LENT_SHARE = 8
"""At most one page in so many is lent for measuring at a time."""

MAX_PASSES = 8
"""So many prompts may find room before the first in line, when that one needs more than there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    chunk_tokens: int = 512  # of one request in one step
    max_batch_tokens: int = 1024  # of all requests in one step
    step_s: float = 0.5  # of all requests in one step, as far as that can be predicted
    max_waiting: int = 256
    queue_timeout_s: float = 60.0
    max_context: int
    vocab_size: int
    num_layers: int = 1  # says how much to compute again for a lost window
    prefix_cache: bool = True
    retained_windows: int = 0  # see `ShadowRadix`


@dataclass(slots=True, eq=False)
class _Run:
    id: AttemptId
    request: RunRequest
    deadline: float  # while waiting
    digests: list[bytes] = field(repr=False)  # of the prompt's whole pages; none when nothing is to be cached
    passes: int = 0  # while first in line
    # From admission on:
    sequence: Sequence | None = None
    offers: Offers | None = None
    lease: Lease | None = None  # on the full pages that are the cache's
    window: Lease | None = None  # on the window a rebuild starts from, where that is not under `lease`
    rebuilt_at: int = 0  # up to here only windows are computed
    cached_tokens: int = 0  # not computed at all
    trusted: bool = True

    @property
    def total(self) -> int:
        return len(self.request.prompt)

    @property
    def reusable(self) -> list[bytes]:
        """Digests of the pages it may find in the cache: the last token is always computed, for its logits."""
        return self.digests[: (self.total - 1) // PAGE_TOKENS]

    @property
    def left(self) -> int:
        return self.total - (self.sequence.length if self.sequence is not None else 0)


class PrefillCore:
    """The prefill worker's scheduler; implements `engine.loop.Core`."""

    def __init__(self, pools: Pools, limits: PrefillLimits) -> None:
        if limits.chunk_tokens < 1 or limits.max_batch_tokens < 1:
            raise ConfigError(
                f"chunk_tokens={limits.chunk_tokens} and max_batch_tokens={limits.max_batch_tokens} must be positive."
            )
        self._pools = pools
        self._limits = limits
        self._cache = ShadowRadix(pools.full, pools.swa, retained_windows=limits.retained_windows)
        self._checksums = PageChecksums(pools)
        self._window = WindowPages(pools.swa, reclaim=lambda n: self._cache.evict(PageClass.SWA, n))
        self._pace = Pace()
        self._rebuild_tokens = rebuild_tokens(limits.num_layers)
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
        self._batch_at = 0.0
        self._ahead = False  # the last batch was of those with least left
        self._ahead_s = 0.0  # how long such batches took since the last whole one
        self._whole_s = 0.0  # how long that one took
        self._uncomputed = 0  # prompt tokens of all waiting and computing runs
        self._lent: dict[str, list[int]] = {}  # full pages, by the id they were lent under

    @property
    def cache(self) -> ShadowRadix:
        return self._cache

    def step(self, now_s: float, event: PrefillEvent | Tick | StepFailed) -> list[PrefillAction]:
        match event:
            case Submit(request):
                actions = self._submit(now_s, request) + self._admit()
            case Drop(run_id):
                self._drop(run_id)
                actions = self._admit()
            case Lend(lend_id, num_pages):
                actions = [Lent(lend_id, self._lend(lend_id, num_pages))]
            case TakeBack(lend_id):
                self._pools.full.release(self._lent.pop(lend_id, ()))
                actions = self._admit()
            case Tick():
                actions = self._expire(now_s) + self._admit()
            case StepFailed(error):
                actions = self._step_failed(error)
        return actions + self._changes()

    def next_batch(self, now_s: float) -> list[Segment]:
        """A chunk of each computing run in turn, as far as the step's tokens and time go."""
        assert not self._batch, "the last batch has not been answered"
        self._batch_at = now_s
        turns, left_s = self._turns()
        left = self._limits.max_batch_tokens
        coming: set[bytes] = set()
        for run in turns:
            sequence = run.sequence
            assert sequence is not None
            self._catch_up(run)
            start = sequence.length
            if not coming.isdisjoint(run.reusable[start // PAGE_TOKENS :][:1]):
                continue  # somebody computes this very page now
            budget = min(left, self._limits.chunk_tokens)
            in_time = self._pace.tokens_in(left_s, start)
            if in_time < budget:
                least = min(MIN_CHUNK_TOKENS, budget)
                if self._batch and in_time < least:
                    break
                budget = max(least, int(in_time) // MIN_CHUNK_TOKENS * MIN_CHUNK_TOKENS)
            rebuild = start < run.rebuilt_at
            end = self._chunk_end(start, run.rebuilt_at if rebuild else run.total, budget)
            left -= end - start
            left_s -= self._pace.seconds_for(end - start, start)
            self._window.cover(sequence, start, end)
            tokens = list(run.request.prompt[start:end])
            last = end == run.total
            segment = Segment(
                sequence=sequence,
                start=start,
                tokens=tokens,
                sample=last,
                rebuild=rebuild,
                following=following(run.request.prompt, run.request.sampling, start, end),
            )
            self._batch.append((run, segment))
            coming.update(run.digests[start // PAGE_TOKENS : end // PAGE_TOKENS])
            self._computing.remove(run)
            self._computing.append(run)
            if left <= 0:
                break
        return [segment for _, segment in self._batch]

    def finish(self, now_s: float, results: list[Sampled | None]) -> list[PrefillAction]:
        actions: list[PrefillAction] = []
        batch, self._batch = self._batch, []
        took_s = now_s - self._batch_at
        self._pace.record(((s.start, len(s.tokens)) for _, s in batch), took_s)
        if self._ahead:
            self._ahead_s += took_s
        else:
            # At most what a step is to take: a worker that stood still for an hour owes no prompt an hour.
            self._ahead_s, self._whole_s = 0.0, min(took_s, self._limits.step_s)
        for (run, segment), result in zip(batch, results, strict=True):
            sequence, offers = run.sequence, run.offers
            assert sequence is not None
            assert offers is not None
            sequence.length += len(segment.tokens)
            self._uncomputed -= len(segment.tokens)
            actions.append(self._progressed(run))
            if not segment.sample:
                self._share(run)
                self._trim(run)
                if groups := offers.ready(sequence.length // PAGE_TOKENS):
                    actions.append(Offered(run.id, groups, None))
                continue
            assert result is not None, f"run {run.id} asked for a token and got none"
            if not result.ok:
                self._rest(run)
                # A row that is not a number may be on any of its pages: nobody is to find them.
                run.trusted = bool(result.problem)
                actions.append(_failed(run.id, not_drawn(result, f"prompt {run.id}")))
                continue
            self._share(run)
            self._rest(run)
            first = TokenEvent(
                index=0, token_id=result.token_id, logprob=result.logprob, top=result.top, prompt=result.prompt
            )
            groups, tail = offers.last(first, run.cached_tokens)
            actions.append(Offered(run.id, groups, tail))
            actions.append(Ended(run.id, RunFinished(prompt_tokens=run.total, cached_tokens=run.cached_tokens)))
        return actions + self._admit() + self._changes()

    def next_deadline(self) -> float | None:
        # All waiting runs get the same patience, so the first in line runs out first.
        return self._waiting[0].deadline if self._waiting else None

    def load(self) -> Load:
        pools, full = self._pools, self._cache.counts(PageClass.FULL)
        token_ns, depth_ns = self._pace.line()
        depths = [run.sequence.length for run in self._computing if run.sequence is not None]
        return Load(
            running=len(self._computing),
            waiting=len(self._waiting),
            queued_tokens=self._uncomputed,
            queued_depth=sum(depths) // len(depths) if depths else 0,
            free_tokens=(pools.full.free + full.evictable) * PAGE_TOKENS,
            prefill_token_ns=token_ns,
            prefill_depth_ns=depth_ns,
            pages={
                PageClass.FULL: full,
                PageClass.SWA: self._cache.counts(PageClass.SWA),
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
        if (known := self._known(request)) is not None:
            return self._again(known, request)
        # Where log probabilities of the prompt are asked for, every token of it has to be computed.
        cached = self._limits.prefix_cache and request.sampling.prompt_logprobs is None
        digests = page_hashes(request.prompt, request.namespace) if cached else []
        run = _Run(run_id, request, now_s + self._limits.queue_timeout_s, digests)
        self._runs[run_id] = run
        self._waiting.append(run)
        self._uncomputed += run.total
        return []

    def _known(self, request: RunRequest) -> _Run | None:
        """An earlier attempt of the same request whose pages are all still here."""
        for run in self._runs.values():
            was = run.request
            same = (was.request_id, was.namespace, was.prompt) == (
                request.request_id,
                request.namespace,
                request.prompt,
            )
            if same and run.trusted and run.offers is not None and run.offers.closed:
                return run
        return None

    def _again(self, run: _Run, request: RunRequest) -> list[PrefillAction]:
        """Another attempt takes over the run of an earlier one, which was or will be dropped: nothing is computed."""
        del self._runs[run.id]
        run.id, run.request, n = AttemptId(request.request_id, request.attempt), request, run.total
        self._runs[run.id] = run
        assert run.offers is not None
        run.offers, groups, tail = run.offers.again(request.skip)
        return [
            Progressed(run.id, Progress(done=n, total=n, cached=n)),
            Offered(run.id, groups, tail),
            Ended(run.id, RunFinished(prompt_tokens=n, cached_tokens=n)),
        ]

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
        """Give waiting runs their full pages, window and slot, all or none: nobody waits half provided for.

        In order; but while the first needs more than there is, a few others may pass.
        """
        actions: list[PrefillAction] = []
        for run in list(islice(self._waiting, 1 + MAX_PASSES)):
            first = self._waiting[0]
            if run is not first and first.passes >= MAX_PASSES:
                break
            if not self._provide(run):
                if run is first and any(r.offers is not None and r.offers.closed for r in self._runs.values()):
                    actions.append(Crowded())
                continue
            if run is not first:
                first.passes += 1
            self._waiting.remove(run)
            self._computing.append(run)
            actions.append(self._progressed(run))
            assert run.offers is not None
            assert run.lease is not None
            if groups := run.offers.ready(run.lease.pages):
                actions.append(Offered(run.id, groups, None))
        return actions

    def _provide(self, run: _Run) -> bool:
        pools = self._pools
        window = min(num_pages(run.total), most_window_pages(self._step_tokens))
        if self._window.available < window or not pools.slots.free:
            return False
        lease = self._cache.lease(run.reusable, window=False)
        missing = num_pages(run.total) - lease.pages
        if missing > pools.full.free + self._cache.counts(PageClass.FULL).evictable:
            lease.release()
            return False
        if self._checksums.changed(lease.items()):
            # Memory went bad under the cache. Nothing is built on such pages, and this prompt is computed anew.
            self._cache.discard(lease)
            run.digests = []
            return self._provide(run)
        sequence = run.sequence = Sequence(
            request_id=run.id.request_id,
            sampling=run.request.sampling,
            slot=pools.slots.allocate(1)[0],
            prompt=run.request.prompt,
        )
        self._window.reserve(sequence, window)
        run.offers = Offers(pools, self._checksums, sequence, run.total, run.request.skip)
        run.lease = lease
        self._resume(run, lease, self._cache.match(run.reusable))
        self._cache.evict(PageClass.FULL, missing - pools.full.free)
        sequence.pages += pools.full.allocate(missing)
        return True

    def _resume(self, run: _Run, lease: Lease, found: Match) -> None:
        """Go on behind pages that are in the cache and under `lease`, which becomes the run's; `found` is what can be
        resumed behind among them.
        """
        sequence, held = run.sequence, run.lease
        assert sequence is not None
        assert held is not None
        self._pools.full.release(sequence.pages[held.pages : lease.pages])
        sequence.pages[: lease.pages] = lease.items()
        start = self._start(found)
        for j in self._window.mapped(sequence):
            if j < num_pages(start):
                self._window.release(sequence, j)
        sequence.swa_pages[:] = [0] * (start // PAGE_TOKENS)
        if run.window is not None:
            run.window.release()
            run.window = None
        if start and start == found.tokens:
            run.window = self._cache.lease(run.digests[: found.pages])
            assert run.window.tokens == start
            sequence.swa_pages[-1] = run.window.window
        if held is not lease:
            held.release()
        run.lease = lease
        run.rebuilt_at = lease.tokens
        run.cached_tokens += start - sequence.length
        self._uncomputed -= start - sequence.length
        sequence.length = start

    def _start(self, found: Match) -> int:
        """Where to go on with a prefix: behind its last window, or where the one at its end is computed again from."""
        return max(found.tokens, found.full_pages * PAGE_TOKENS - self._rebuild_tokens)

    def _catch_up(self, run: _Run) -> None:
        """Somebody else may have computed further than this run has."""
        sequence, held = run.sequence, run.lease
        assert sequence is not None
        assert held is not None
        found = self._cache.match(run.reusable, held)
        if self._start(found) > sequence.length:
            lease = self._cache.lease(run.reusable, window=False)
            assert lease.pages == found.full_pages
            self._resume(run, lease, found)

    def _share(self, run: _Run) -> None:
        """Hand the pages finished by now to the cache, with the window of the last."""
        sequence, lease = run.sequence, run.lease
        assert sequence is not None
        assert lease is not None
        end = min(sequence.length // PAGE_TOKENS, len(run.digests))
        if sequence.length < run.rebuilt_at or not end:
            return
        before = lease.pages
        # The same prompt again will resume behind the page before its last token.
        again = (run.total - 1) // PAGE_TOKENS - 1
        windows: dict[int, int] = {}
        for j in self._window.mapped(sequence):
            if j == end - 1 or (before <= j < end and (j == again or self._cache.retains(j))):
                windows[j] = self._window.take(sequence, j)
            elif j < end:
                # Behind the window, or within a rebuilt span, where only the last page's is right.
                self._window.release(sequence, j)
                sequence.swa_pages[j] = 0
        if not windows:
            return
        self._cache.insert(run.digests[:end], sequence.pages[:end], windows, lease)
        sequence.pages[before:end] = lease.items(before)
        sequence.swa_pages[end - 1] = lease.window

    def _trim(self, run: _Run) -> None:
        assert run.sequence is not None
        self._window.trim(run.sequence)
        if run.window is not None and first_window_page(run.sequence.length) >= run.window.pages:
            run.window.release()
            run.window = None

    def _turns(self) -> tuple[list[_Run], float]:
        """Computing runs in the order of their turns, and the seconds a step of them may take.

        Time is shared evenly between whole steps, which go round and round, and steps ahead, which begin with the run
        that has least left and last no longer than if all their tokens were its. So 2,000 tokens beside 900,000 wait
        for half a second once and not for half a second a chunk, and a long prompt is never put off for ever.
        """
        step_s = self._limits.step_s
        self._ahead = len(self._computing) > 1 and (not self._ahead or self._ahead_s < self._whole_s)
        if not self._ahead:
            return list(self._computing), step_s
        turns = sorted(self._computing, key=lambda run: run.left)
        assert turns[0].sequence is not None
        alone_s = self._pace.seconds_for(self._limits.max_batch_tokens, turns[0].sequence.length)
        return turns, min(step_s, alone_s or step_s)

    def _progressed(self, run: _Run) -> Progressed:
        assert run.sequence is not None
        return Progressed(run.id, Progress(done=run.sequence.length, total=run.total, cached=run.cached_tokens))

    def _lend(self, lend_id: str, num_pages: int) -> PageGroup | None:
        """Full pages that nobody holds, with bytes that are nobody's."""
        pools = self._pools
        lent = sum(map(len, self._lent.values()))
        spare = pools.full.free + self._cache.counts(PageClass.FULL).evictable
        num_pages = min(num_pages, pools.full.capacity // LENT_SHARE - lent, spare)
        if num_pages < 1 or PageClass.FULL not in {cls.name for cls in pools.classes if cls.regions}:
            return None
        self._cache.evict(PageClass.FULL, num_pages - pools.full.free)
        items = self._lent[lend_id] = pools.full.allocate(num_pages)
        pools.scribble(PageClass.FULL, items)
        return PageGroup(
            page_class=PageClass.FULL,
            positions=tuple(range(num_pages)),
            items=tuple(items),
            generations=tuple(pools.full.generation(item) for item in items),
            checksums=tuple(pools.export_pages(PageClass.FULL, items)),
        )

    def _changes(self) -> list[PrefillAction]:
        events = self._cache.drain_events()
        return [PrefixesChanged(tuple(events))] if events else []

    def _chunk_end(self, start: int, total: int, budget: int) -> int:
        end = min(total, start + budget)
        aligned = end - end % PAGE_TOKENS
        # End on a page where that costs nothing: a page finished now is offered now.
        return aligned if start < aligned and end < total else end

    def _rest(self, run: _Run) -> None:
        """Stop computing, keep the pages that are or will be read."""
        sequence, lease = run.sequence, run.lease
        assert sequence is not None
        assert lease is not None
        self._computing.remove(run)
        self._uncomputed -= run.left
        self._trim(run)
        if first_window_page(sequence.length) >= lease.pages:
            lease.release_window()
        self._window.keep_mapped(sequence, leased=bool(lease.window) + (run.window is not None))

    def _drop(self, run_id: AttemptId) -> None:
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        if run.lease is None:
            if run in self._waiting:
                self._waiting.remove(run)
                self._uncomputed -= run.total
            return
        if run in self._computing:
            self._rest(run)
        sequence, lease = run.sequence, run.lease
        assert sequence is not None
        self._pools.swa.release(self._window.drop(sequence))
        self._pools.full.release(sequence.pages[lease.pages :])
        self._pools.slots.release([sequence.slot])
        if run.window is not None:
            run.window.release()
        if run.trusted:
            lease.release()
        else:
            self._cache.discard(lease)

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
