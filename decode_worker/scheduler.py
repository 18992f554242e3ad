"""Continuous batching of requests whose pages come from elsewhere. Pure: events in, actions and batches out.

A request waits for room, fetches its pages while prefill still computes, then joins the batch that advances by
one token a step, or by several where a draft layer guessed right. Pages of earlier requests that begin alike
are not fetched again. When answers outgrow the pages there are, the request that came last makes room: its
bytes move to host memory and back once there is room again, and it goes on where it was. However a request
ends, it holds nothing afterwards, except pages that a read has not let go of yet.

A request that names nobody to fetch from has its prompt computed here, a page's worth of it in each step beside those
who decode.

A request may bring tokens that another worker has emitted. These are computed, not drawn: several in a step, with
the bits they had there, and the next token is drawn as it would have been there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum, auto

from decode_worker.admission import Admission, Place, Pools, has_room, places_of
from decode_worker.drafting import DraftDepth
from decode_worker.fetch import Fetch
from decode_worker.preemption import HostPages
from engine.batch import (
    Drawn,
    Segment,
    Sequence,
    following,
    most_drafts,
    most_guesses,
    not_drawn,
    rebuild_tokens,
)
from engine.loop import Load, StepFailed, Tick
from engine.pace import Pace
from kvtransfer.plan import item_bytes
from kvtransfer.reader import ReadJob, ReadResult
from wire.convert import failed_from_error
from wire.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PenumbraError,
    StaleAttempt,
    TransferFailed,
    WorkerLost,
)
from wire.prefix import page_hashes
from wire.types import (
    PAGE_TOKENS,
    Admitted,
    AttemptId,
    Failed,
    Fetching,
    Finished,
    FinishReason,
    PageClass,
    PageOffer,
    PrefixEvent,
    Progress,
    RegionClass,
    Replaying,
    SamplingParams,
    StartEvent,
    StartRequest,
    TokenEvent,
    Tokens,
    WorkerRef,
)

REPLAY_TOKENS = 256
"""Emitted tokens computed again in one step, of all requests that bring some: the others wait for this long."""

# Events.


@dataclass(frozen=True, slots=True)
class Start:
    """A request to decode; `secret` is 16 fresh random bytes that will open and release its claim."""

    request: StartRequest
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Whoever asked has left. Idempotent."""

    run: AttemptId


@dataclass(frozen=True, slots=True)
class OfferArrived:
    run: AttemptId
    offer: PageOffer


@dataclass(frozen=True, slots=True)
class ClaimEnded:
    """The claim's stream ended, for whatever reason; only a failure if the last offer had not come."""

    run: AttemptId
    error: PenumbraError


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """Exactly one for every submitted read, also for a cancelled one."""

    result: ReadResult


@dataclass(frozen=True, slots=True)
class Settled:
    """Items a `ReadEnded` reported unsettled are quiet now."""

    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """The answer to `Save`."""

    run: AttemptId
    pages: HostPages


@dataclass(frozen=True, slots=True)
class Restored:
    """The answer to `Restore`; `num_damaged` items do not hold what was saved."""

    run: AttemptId
    num_damaged: int


@dataclass(frozen=True, slots=True)
class Borrow:
    """Reads are to be measured, into so many full pages; answered by `Borrowed`."""

    probe_id: str
    num_pages: int


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The pages of this probe are wanted no more; `unsettled` ones may still be written. Idempotent."""

    probe_id: str
    unsettled: tuple[Place, ...] = ()


DecodeEvent = Start | Cancel | OfferArrived | ClaimEnded | ReadEnded | Settled | Saved | Restored | Borrow | GiveBack

# Actions.


@dataclass(frozen=True, slots=True)
class Emit:
    """Send the router this. Finished and Failed are the last of their run."""

    run: AttemptId
    event: StartEvent


@dataclass(frozen=True, slots=True)
class OpenClaim:
    run: AttemptId
    source: WorkerRef
    from_token: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CloseClaim:
    """Release the claim and end its stream; `claim_id` is None when its first offer had not come."""

    run: AttemptId
    source: WorkerRef
    claim_id: str | None
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SubmitRead:
    job: ReadJob


@dataclass(frozen=True, slots=True)
class CancelRead:
    job_id: str


@dataclass(frozen=True, slots=True)
class Save:
    """Copy these items to host memory before anything else happens; answered by `Saved`."""

    run: AttemptId
    items: dict[PageClass, list[int]]


@dataclass(frozen=True, slots=True)
class Restore:
    """Copy these pages to these items before anything else happens; answered by `Restored`."""

    run: AttemptId
    items: dict[PageClass, list[int]]
    pages: HostPages


@dataclass(frozen=True, slots=True)
class PrefixesChanged:
    """What the prefix tree stored and removed, in order."""

    events: tuple[PrefixEvent, ...]


@dataclass(frozen=True, slots=True)
class Borrowed:
    """The answer to `Borrow`; no items when there is no page to spare."""

    probe_id: str
    items: tuple[int, ...]


DecodeAction = Emit | OpenClaim | CloseClaim | SubmitRead | CancelRead | Save | Restore | PrefixesChanged | Borrowed


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    max_waiting: int = 256
    queue_timeout_s: float = 30.0
    offer_timeout_s: float = 300.0  # between two offers; a dead owner is noticed by its broken stream long before
    growth_tokens: int = 512  # kept free behind each request when another one comes in
    host_memory_bytes: int = 1 << 30  # for preempted requests
    prefix_cache: bool = True
    draft_tokens: int | None = 0  # verified in one step at most; None: as many as pay
    local_prefill: bool = False  # compute prompts for which no source is named
    num_layers: int = 1  # says how much to compute again for a window that is gone
    max_context: int
    vocab_size: int
    eos_token_id: int


class _State(Enum):
    """Where a request is. All but waiting and preempted ones hold a sequence."""

    WAITING = auto()  # for room
    FETCHING = auto()
    COMPUTING = auto()  # its prompt, itself
    RUNNING = auto()
    SAVING = auto()
    PREEMPTED = auto()  # in host memory
    RESTORING = auto()


@dataclass(slots=True, eq=False)
class _Run:
    id: AttemptId
    request: StartRequest
    secret: bytes = field(repr=False)
    deadline: float | None
    state: _State = _State.WAITING
    order: int = 0  # of admission
    sequence: Sequence | None = None
    fetch: Fetch | None = None  # while fetching
    saved: HostPages | None = None  # while preempted
    host_bytes: int = 0  # set aside for `saved`
    digests: list[bytes] = field(default_factory=list, repr=False)  # of the prompt's whole pages
    answer: list[int] = field(default_factory=list, repr=False)  # generated so far, here or elsewhere
    guesses: tuple[int, ...] = ()  # at the tokens behind those
    length: int = 0  # tokens whose KV is computed, once the prompt's is
    cached_tokens: int = 0
    rebuilt_at: int = 0  # up to here, of a prompt that is computed here, only windows are computed
    trusted: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.answer)

    @property
    def ahead(self) -> list[int]:
        """Tokens of the answer to compute: the last one, and before it those emitted elsewhere."""
        return self.answer[self.length - len(self.request.prompt) :]

    @property
    def limit(self) -> int:
        """Tokens whose KV is ever computed here: all but the answer's last."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - 1


@dataclass(frozen=True, slots=True)
class _Flown:
    run: _Run
    sequence: Sequence
    taken: int  # tokens of the answer to compute
    drafts: int  # at most, behind those
    chunk: bool = False  # of the prompt instead


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was planned and has not been answered, and who is in it."""

    places: list[_Flown]
    planned_s: float


def _latest(run: _Run, drafts: int) -> int:
    """The furthest a step with so many drafts may bring a request, as its number of computed tokens."""
    return min(run.length + 1 + drafts, run.limit - 1)


class DecodeCore:
    """The decode worker's scheduler; implements `engine.loop.Core` and `engine.loop.Planner`.

    A step may be planned while one runs. Each running request then goes on from wherever the running step leaves it,
    which the engine finds out; places are taken for the furthest it may come. Whoever leaves meanwhile leaves his
    places behind until the steps he is in have ended.
    """

    def __init__(self, pools: Pools, limits: DecodeLimits, pace: Pace | None = None) -> None:
        """`pace` is what this worker knows of how fast it computes prompts."""
        self._pools = pools
        self._limits = limits
        self._admission = Admission(pools, limits.growth_tokens)
        self._item_bytes = {region_class.name: item_bytes(region_class) for region_class in pools.classes}
        self._runs: dict[AttemptId, _Run] = {}
        self._waiting: deque[_Run] = deque()
        self._running: dict[AttemptId, _Run] = {}
        self._flights: deque[_Flight] = deque()  # two at most
        self._landed_s = 0.0  # when the last one ended
        self._outdated = False  # the last one would be another now
        self._leaving: list[tuple[Sequence, bool]] = []  # of requests that are gone, but not from a step; trusted
        self._depth = DraftDepth(limits.draft_tokens)
        self._computing: deque[_Run] = deque()  # whose chunk is next, first
        self._pace = pace or Pace()
        self._rebuild_tokens = rebuild_tokens(limits.num_layers)
        self._by_job: dict[str, _Run] = {}
        self._orphans: dict[str, tuple[Place, ...]] = {}  # reads that outlived their request -> quarantined places
        self._num_admitted = 0
        self._host_bytes = 0
        self._preemptions_total = 0

    @property
    def classes(self) -> tuple[RegionClass, ...]:
        return self._pools.classes

    @property
    def max_requests(self) -> int:
        """Requests that run at once, at most."""
        return self._pools.slots.capacity

    def step(self, now_s: float, event: DecodeEvent | Tick | StepFailed) -> list[DecodeAction]:
        match event:
            case Start(request, secret):
                actions = self._start(now_s, request, secret)
            case Cancel(run_id):
                run = self._runs.get(run_id)
                if run is not None:
                    self._share_answer(run)
                actions = [] if run is None else self._leave(run)
            case OfferArrived(run_id, offer):
                actions = self._offer(now_s, run_id, offer)
            case ClaimEnded(run_id, error):
                run = self._runs.get(run_id)
                lost = run is not None and run.fetch is not None and run.fetch.tail is None
                actions = self._fail(run, error) if lost and run is not None else []
            case ReadEnded(result):
                actions = self._read_ended(result)
            case Settled(places):
                self._admission.settle(places)
                actions = []
            case Borrow(probe_id, num_pages):
                actions = [Borrowed(probe_id, self._admission.borrow(probe_id, num_pages))]
            case GiveBack(probe_id, unsettled):
                self._admission.give_back(probe_id, unsettled)
                actions = []
            case Saved(run_id, pages):
                self._saved(run_id, pages)
                actions = []
            case Restored(run_id, num_damaged):
                actions = self._restored(run_id, num_damaged)
            case Tick():
                actions = self._expire(now_s)
            case StepFailed(error):
                failed = self._flights.popleft().places
                actions = []
                for run in [place.run for place in failed if self._is_here(place.run)]:
                    actions += self._fail(run, WorkerLost(f"the decode step of {run.id} failed: {error}"))
                self._let_go()
        return actions + self._share_out(now_s)

    def next_batch(self, now_s: float) -> list[Segment]:
        """The last token of every running request that has room for it, and the guesses at what follows it; and a chunk
        of one prompt that is computed here.
        """
        assert len(self._flights) < 2, "two steps have not been answered"
        ahead = self._flights[-1].places if self._flights else []
        if any(place.chunk or place.taken > 1 for place in ahead):
            return []  # who computes a page's worth may need both window pages of his for that one step
        flown = {id(place.run): (n, place.drafts) for n, place in enumerate(ahead)}
        going: list[tuple[_Run, Sequence, tuple[int, int] | None]] = []
        self._outdated = False
        for run in self._running.values():
            sequence, before = run.sequence, flown.get(id(run))
            assert sequence is not None
            if before is not None and run.length + 1 >= run.limit:
                continue  # the step in flight draws its last token
            if has_room(sequence, None if before is None else _latest(run, before[1])):
                going.append((run, sequence, before))
            elif ahead:
                return []  # somebody may have to make room, which only one who is in no step can
        depth = self._depth.choose(len(going)) if going else 0
        segments, places = [], []
        replay_left = REPLAY_TOKENS
        for run, sequence, before in going:
            if before is not None:
                segment = self._follow(run, sequence, before, depth)
            elif len(run.ahead) > 1:
                if not replay_left:
                    continue
                segment = self._replay(run, sequence, replay_left)
                replay_left -= len(segment.tokens)
            else:
                segment = self._go_on(run, sequence, depth)
            segments.append(segment)
            places.append(_Flown(run, sequence, len(segment.tokens) - segment.drafts, segment.drafts))
        if self._computing:
            run = self._computing[0]
            self._computing.rotate(-1)
            assert run.sequence is not None
            segments.append(self._chunk(run, run.sequence))
            places.append(_Flown(run, run.sequence, len(segments[-1].tokens), 0, chunk=True))
        if segments:
            self._flights.append(_Flight(places, now_s))
        return segments

    def _go_on(self, run: _Run, sequence: Sequence, depth: int) -> Segment:
        room = len(sequence.pages) * PAGE_TOKENS
        drafts = run.guesses[: min(depth, most_drafts(run.length, run.limit, room))]
        guesses = min(depth, most_guesses(run.length, run.limit))
        self._admission.window.cover(sequence, run.length, run.length + 1 + len(drafts) + guesses)
        return Segment(
            sequence=sequence,
            start=run.length,
            tokens=[run.answer[-1], *drafts],
            sample=True,
            index=run.num_tokens,
            drafts=len(drafts),
            guesses=guesses,
        )

    def _follow(self, run: _Run, sequence: Sequence, before: tuple[int, int], depth: int) -> Segment:
        """The same behind a step in flight: `before` is (the number of the request's segment there, its drafts)."""
        room, start = len(sequence.pages) * PAGE_TOKENS, _latest(run, before[1])
        drafts = min(depth, most_drafts(run.length + 1, run.limit, room))
        guesses = min(depth, most_guesses(run.length + 1, run.limit))
        self._admission.window.cover(sequence, run.length, start + 1 + drafts + guesses)
        return Segment(
            sequence=sequence,
            start=start,
            tokens=[0] * (1 + drafts),
            sample=True,
            drafts=drafts,
            guesses=guesses,
            follows=before[0],
            limit=run.limit,
            room=room,
        )

    def _chunk(self, run: _Run, sequence: Sequence) -> Segment:
        """The next part of a prompt that is computed here: within one page, so that neither its window needs more than
        is reserved nor those who decode beside it wait for long.
        """
        start, total = run.length, len(run.request.prompt)
        end = min(total, (start // PAGE_TOKENS + 1) * PAGE_TOKENS)
        self._admission.window.cover(sequence, start, end)
        return Segment(
            sequence=sequence,
            start=start,
            tokens=list(run.request.prompt[start:end]),
            # Where the answer goes on from what another worker emitted, its first token is known.
            sample=end == total and not run.answer,
            rebuild=start < run.rebuilt_at,
            following=() if run.answer else following(run.request.prompt, run.request.sampling, start, end),
        )

    def _computed(self, run: _Run, taken: int, drawn: Drawn) -> list[DecodeAction]:
        """A chunk of the prompt is there; behind the last one the request runs like any other."""
        sequence, total = run.sequence, len(run.request.prompt)
        assert sequence is not None
        run.length += taken
        sequence.length = run.length
        self._admission.window.trim(sequence)
        told = Emit(run.id, Progress(done=run.length, total=total, cached=run.cached_tokens))
        if run.length < total:
            return [told]
        self._computing.remove(run)
        run.state = _State.RUNNING
        self._running[run.id] = run
        if not run.answer:
            (first,) = drawn.tokens
            if not first.ok:
                run.trusted = bool(first.problem)
                return [told, *self._fail(run, not_drawn(first, f"prompt {run.id}"))]
        self._admission.share(sequence, run.digests)
        if run.answer:
            return [told, self._replaying(run)]
        token = TokenEvent(index=0, token_id=first.token_id, logprob=first.logprob, top=first.top, prompt=first.prompt)
        return [told, *self._advance(run, [token])]

    def _replay(self, run: _Run, sequence: Sequence, most: int) -> Segment:
        """Tokens of the answer that another worker has drawn; behind the last of them one is drawn here."""
        # Within one page, which is as far as the window reaches that the request has reserved.
        room = len(sequence.pages) * PAGE_TOKENS - run.length
        tokens = run.ahead[: min(room, PAGE_TOKENS - run.length % PAGE_TOKENS, most)]
        self._admission.window.cover(sequence, run.length, run.length + len(tokens))
        last = len(tokens) == len(run.ahead)
        return Segment(sequence=sequence, start=run.length, tokens=tokens, sample=last, index=run.num_tokens)

    def is_outdated(self) -> bool:
        return self._outdated

    def take_back(self) -> None:
        self._flights.pop()
        self._let_go()

    def finish(self, now_s: float, results: list[Drawn]) -> list[DecodeAction]:
        actions: list[DecodeAction] = []
        flight = self._flights.popleft()
        seconds, self._landed_s = now_s - max(flight.planned_s, self._landed_s), now_s
        chunks = [(place.run.length, place.taken) for place in flight.places if place.chunk]
        if chunks and len(chunks) == len(flight.places):
            self._pace.record(chunks, seconds)
        # A step that replays, or computes a prompt, says nothing about what drafts cost.
        if not chunks and all(place.taken == 1 for place in flight.places):
            self._depth.measured([(one.drafts, len(one.tokens) - 1) for one in results if one.tokens], seconds)
        for place, drawn in zip(flight.places, results, strict=True):
            run, sequence = place.run, place.sequence
            if not self._is_here(run):
                continue
            if place.chunk:
                actions += self._computed(run, place.taken, drawn)
                continue
            whole = place.taken == len(run.ahead)
            assert bool(drawn.tokens) is whole, f"run {run.id} got {len(drawn.tokens)} tokens"
            run.length += place.taken + max(len(drawn.tokens) - 1, 0)
            sequence.length = run.length
            self._admission.window.trim(sequence)
            if not whole:
                actions.append(self._replaying(run))
                continue
            run.guesses = drawn.guesses
            good = drawn.tokens if drawn.tokens[-1].ok else drawn.tokens[:-1]
            actions += self._advance(
                run,
                [
                    TokenEvent(index=index, token_id=one.token_id, logprob=one.logprob, top=one.top)
                    for index, one in enumerate(good, start=run.num_tokens)
                ],
            )
            if len(good) < len(drawn.tokens) and self._is_here(run):
                # A row that is not a number may be on any of its pages: nobody is to find them.
                run.trusted = bool(drawn.tokens[-1].problem)
                actions += self._fail(run, not_drawn(drawn.tokens[-1], f"token {run.num_tokens} of {run.id}"))
        self._let_go()
        return actions + self._share_out(now_s)

    def _is_here(self, run: _Run) -> bool:
        return self._runs.get(run.id) is run

    def _in_flight(self, sequence: Sequence) -> bool:
        return any(place.sequence is sequence for flight in self._flights for place in flight.places)

    def _let_go(self) -> None:
        """A step ended: give back the places of those who left while they were in it."""
        done = [(sequence, trusted) for sequence, trusted in self._leaving if not self._in_flight(sequence)]
        self._leaving = [(sequence, trusted) for sequence, trusted in self._leaving if self._in_flight(sequence)]
        for sequence, trusted in done:
            self._admission.leave(sequence, trusted=trusted)

    def next_deadline(self) -> float | None:
        return min((run.deadline for run in self._runs.values() if run.deadline is not None), default=None)

    def load(self) -> Load:
        pools = self._pools
        fetching = [run for run in self._runs.values() if run.fetch is not None]
        computing = [run for run in (*self._waiting, *self._computing) if run.request.source is None]
        token_ns, depth_ns = self._pace.line()
        return Load(
            running=len(self._runs) - len(self._waiting),
            waiting=len(self._waiting),
            queued_tokens=sum(len(run.request.prompt) for run in (*self._waiting, *fetching)),
            free_tokens=self._admission.free_pages * PAGE_TOKENS,
            prefill_token_ns=token_ns,
            prefill_depth_ns=depth_ns,
            computing_tokens=sum(len(run.request.prompt) - run.length for run in computing),
            pages={
                PageClass.FULL: self._admission.cache.counts(PageClass.FULL),
                PageClass.SWA: pools.swa.counts(),
                PageClass.STATE: pools.slots.counts(),
            },
            quarantined_total=self._admission.quarantined_total,
            preemptions_total=self._preemptions_total,
            host_bytes=self._host_bytes,
            drafts_total=self._depth.drafts_total,
            drafts_kept_total=self._depth.kept_total,
            drafted_steps_total=self._depth.verified_total,
        )

    # A request's states.

    def _start(self, now_s: float, request: StartRequest, secret: bytes) -> list[DecodeAction]:
        run_id = AttemptId(request.request_id, request.attempt)
        try:
            self._check(run_id, request)
        except PenumbraError as error:
            return [Emit(run_id, failed_from_error(error))]
        actions: list[DecodeAction] = []
        for older in [run for run in self._runs.values() if run.id.request_id == request.request_id]:
            actions += self._fail(older, StaleAttempt(f"run {older.id} was overtaken by attempt {request.attempt}"))
        if (reason := self._end_of(request.sampling, request.emitted)) is not None:
            # Whoever emitted the last token was not there to say so.
            n = len(request.prompt)
            done = Finished(reason=reason, prompt_tokens=n, cached_tokens=0, completion_tokens=len(request.emitted))
            return [*actions, Emit(run_id, done)]
        run = _Run(run_id, request, secret, now_s + self._limits.queue_timeout_s)
        run.answer.extend(request.emitted)
        # Where log probabilities of a prompt are asked for, whoever computes it computes every token of it.
        all_of_it = request.source is None and request.sampling.prompt_logprobs is not None
        if self._limits.prefix_cache and not all_of_it:
            run.digests = page_hashes(request.prompt, request.namespace)
        self._runs[run_id] = run
        self._waiting.append(run)
        return actions

    def _check(self, run_id: AttemptId, request: StartRequest) -> None:
        """Refuse what can not run here. The router has checked all this; versions differ, so it is checked
        again.
        """
        n, sampling, limits = len(request.prompt), request.sampling, self._limits
        newest = max((a for r, a in self._runs if r == request.request_id), default=-1)
        if request.attempt <= newest:
            raise StaleAttempt(f"run {run_id} comes after attempt {newest}, which is here; send a higher attempt")
        if request.source is None and not limits.local_prefill:
            raise InvalidRequest("this worker computes no prompts; name the worker that does", param="source")
        if len(request.emitted) > sampling.max_tokens:
            raise InvalidRequest(
                f"{len(request.emitted)} tokens have been emitted of max_tokens={sampling.max_tokens}", param="resume"
            )
        if n == 0:
            raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
        if sampling.max_tokens < 1:
            raise InvalidRequest(f"max_tokens={sampling.max_tokens} must be at least 1", param="max_tokens")
        if n + sampling.max_tokens > limits.max_context:
            raise InvalidRequest(
                f"{n} prompt tokens and max_tokens={sampling.max_tokens} exceed the context of {limits.max_context}",
                param="max_tokens",
            )
        if min(request.prompt) < 0 or max(request.prompt) >= limits.vocab_size:
            raise InvalidRequest(
                f"the prompt has token ids outside the vocabulary of {limits.vocab_size}", param="prompt"
            )
        if request.emitted and max(request.emitted) >= limits.vocab_size:
            raise InvalidRequest(f"emitted token ids are outside the vocabulary of {limits.vocab_size}", param="resume")
        self._admission.check(request)
        if len(self._waiting) >= limits.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting here; try another worker")

    def _share_out(self, now_s: float) -> list[DecodeAction]:
        """Free pages to those who have waited longest: the next page of running requests, preempted requests,
        new ones.
        """
        actions = self._grow(now_s)
        actions += self._let_in(now_s)
        if events := self._admission.cache.drain_events():
            actions.append(PrefixesChanged(tuple(events)))
        return actions

    def _let_in(self, now_s: float) -> list[DecodeAction]:
        if any(not has_room(run.sequence) for run in self._running.values() if run.sequence is not None):
            return []
        actions = self._resume()
        if any(run.state in (_State.SAVING, _State.PREEMPTED) for run in self._runs.values()):
            return actions
        return actions + self._admit(now_s)

    def _grow(self, now_s: float) -> list[DecodeAction]:
        """A page for every running request whose next token needs one, behind what is in flight. When pages run out the
        request that came last moves to host memory; where that is full too, requests stand still until pages come back.
        """
        stuck: list[_Run] = []
        in_flight: Counter[int] = Counter()
        for place in [place for flight in self._flights for place in flight.places]:
            in_flight[id(place.run)] += place.taken + place.drafts
        for run in self._by_order(_State.RUNNING):
            assert run.sequence is not None
            furthest = min(run.length + in_flight[id(run)], run.limit - 1)
            if self._admission.grow(run.sequence, furthest) or has_room(run.sequence):
                run.deadline = None
            else:
                stuck.append(run)
                run.deadline = run.deadline or now_s + self._limits.queue_timeout_s
        moving = self._by_order(_State.SAVING, _State.RESTORING)
        if not stuck or moving or self._flights:
            return []
        for victim in reversed(self._by_order(_State.RUNNING)[1:]):
            if (save := self._preempt(victim)) is not None:
                return [save]
        coming = self._pools.full.counts().quarantined or self._by_order(_State.FETCHING, _State.COMPUTING)
        if len(stuck) < len(self._running) or coming:
            return []
        # Everybody stands still and nothing will come back by itself.
        n = stuck[-1].length
        error = Overloaded(f"neither a page nor host memory is left for the {n} tokens of this request; try again")
        return self._fail(stuck[-1], error) + self._grow(now_s)

    def _preempt(self, run: _Run) -> Save | None:
        """Running -> saving, if host memory has room for it."""
        assert run.sequence is not None
        items = {cls: list(places.values()) for cls, places in places_of(run.sequence, run.length).items()}
        num_bytes = sum(len(ids) * self._item_bytes.get(cls, 0) for cls, ids in items.items())
        if self._host_bytes + num_bytes > self._limits.host_memory_bytes:
            return None
        del self._running[run.id]
        run.state, run.deadline, run.host_bytes, run.guesses = _State.SAVING, None, num_bytes, ()
        self._host_bytes += num_bytes
        self._preemptions_total += 1
        return Save(run.id, items)

    def _saved(self, run_id: AttemptId, pages: HostPages) -> None:
        run = self._runs.get(run_id)
        if run is None:
            return
        assert run.sequence is not None
        self._admission.leave(run.sequence)
        run.state, run.sequence, run.saved = _State.PREEMPTED, None, pages

    def _resume(self) -> list[DecodeAction]:
        """Preempted -> restoring, in the order they were admitted."""
        actions: list[DecodeAction] = []
        for run in self._by_order(_State.PREEMPTED):
            admitted = self._admission.admit(run.request, run.length, run.digests)
            if admitted is None:
                break
            assert run.saved is not None
            run.state, (run.sequence, resident) = _State.RESTORING, admitted
            run.sequence.answer = run.answer
            items = {cls: list(places.values()) for cls, places in places_of(run.sequence, run.length).items()}
            del items[PageClass.FULL][:resident]
            actions.append(Restore(run.id, items, run.saved))
        return actions

    def _restored(self, run_id: AttemptId, num_damaged: int) -> list[DecodeAction]:
        run = self._runs.get(run_id)
        if run is None:
            return []
        assert run.sequence is not None
        self._forget_saved(run)
        if num_damaged:
            error = TransferFailed(f"{num_damaged} pages of {run.id} came back from host memory with other bytes")
            return self._fail(run, error)
        run.state, run.sequence.length = _State.RUNNING, run.length  # as when it was saved
        self._running[run.id] = run
        self._outdated = True
        return []

    def _forget_saved(self, run: _Run) -> None:
        self._host_bytes -= run.host_bytes
        run.saved, run.host_bytes = None, 0

    def _by_order(self, *states: _State) -> list[_Run]:
        """Requests in these states, the first admitted first."""
        return sorted((run for run in self._runs.values() if run.state in states), key=lambda run: run.order)

    def _admit(self, now_s: float) -> list[DecodeAction]:
        """First come, first served: a long request at the head is not overtaken for ever by short ones."""
        actions: list[DecodeAction] = []
        while self._waiting:
            run = self._waiting[0]
            # At least one token is left to compute, so that there is a first one to answer with.
            n, source = len(run.request.prompt), run.request.source
            admitted = self._admission.admit(
                run.request, n, run.digests[: (n - 1) // PAGE_TOKENS], computed=source is not None
            )
            if admitted is None:
                break
            sequence, resident = admitted
            self._waiting.popleft()
            self._num_admitted += 1
            run.state, run.sequence, run.order = _State.FETCHING, sequence, self._num_admitted
            sequence.answer = run.answer
            if source is None:
                actions += self._compute(run, resident)
                continue
            run.fetch = Fetch(
                run.request,
                sequence,
                resident,
                classes=self._pools.classes,
                signature=self._pools.signature,
                vocab_size=self._limits.vocab_size,
            )
            run.deadline = now_s + self._limits.offer_timeout_s
            actions += [
                Emit(run.id, Admitted(resident_prefix=resident * PAGE_TOKENS, secret=run.secret)),
                Emit(run.id, Fetching(pages=run.fetch.total_pages)),
                OpenClaim(run.id, run.fetch.source, resident * PAGE_TOKENS, run.secret),
            ]
        return actions

    def _compute(self, run: _Run, resident_pages: int) -> list[DecodeAction]:
        """Waiting -> computing. The prefix tree here keeps no windows, so the one behind the resident pages is computed
        again, from as far back as it takes to be right.
        """
        assert run.sequence is not None
        run.state, run.deadline, self._outdated = _State.COMPUTING, None, True
        run.rebuilt_at = resident_pages * PAGE_TOKENS
        run.length = run.sequence.length = run.cached_tokens = max(0, run.rebuilt_at - self._rebuild_tokens)
        run.sequence.swa_pages[:] = [0] * (run.length // PAGE_TOKENS)
        self._computing.append(run)
        total = len(run.request.prompt)
        return [
            Emit(run.id, Admitted(resident_prefix=run.rebuilt_at, secret=run.secret)),
            Emit(run.id, Progress(done=run.length, total=total, cached=run.cached_tokens)),
        ]

    def _offer(self, now_s: float, run_id: AttemptId, offer: PageOffer) -> list[DecodeAction]:
        run = self._runs.get(run_id)
        if run is None or run.fetch is None:
            return []
        try:
            job = run.fetch.accept(offer)
        except PenumbraError as error:
            return self._fail(run, error)
        # From the tail on only reads are left, and the reader bounds those.
        run.deadline = None if run.fetch.tail is not None else now_s + self._limits.offer_timeout_s
        if job is None:
            return self._join(run)
        self._by_job[job.job_id] = run
        return [SubmitRead(job)]

    def _read_ended(self, result: ReadResult) -> list[DecodeAction]:
        orphaned = self._orphans.pop(result.job_id, None)
        if orphaned is not None:
            unsettled = frozenset(result.unsettled)
            self._admission.settle(place for place in orphaned if place not in unsettled)
            return []
        run = self._by_job.pop(result.job_id)
        fetch = run.fetch
        assert fetch is not None, f"read {result.job_id} ended for a request that fetches nothing"
        if result.ok:
            fetch.landed(result.job_id)
            return self._join(run)
        del fetch.reading[result.job_id]
        error = result.error or TransferFailed(f"read {result.job_id} failed without a reason")
        return self._fail(run, error, result.unsettled)

    def _join(self, run: _Run) -> list[DecodeAction]:
        """Fetching -> running, once everything has landed. Token 0 goes out at once, if it has not elsewhere."""
        fetch, sequence = run.fetch, run.sequence
        assert sequence is not None
        if fetch is None or not fetch.complete:
            return []
        assert fetch.tail is not None
        closed = self._close_claim(run, fetch)
        run.state, run.fetch, run.deadline = _State.RUNNING, None, None
        run.cached_tokens = fetch.tail.cached_tokens
        sequence.length = run.length = len(run.request.prompt)
        self._running[run.id] = run
        self._outdated = True
        # Now, not at the end: requests that begin alike often come together.
        self._admission.share(sequence, run.digests)
        if run.answer:
            return [self._replaying(run), closed]
        return [*self._advance(run, [fetch.tail.first]), closed]

    def _replaying(self, run: _Run) -> Emit:
        """How much of the emitted answer has been computed here; to wait for the rest is not to wait in vain."""
        done = run.length - len(run.request.prompt)
        return Emit(run.id, Replaying(done=done, total=len(run.request.emitted)))

    def _end_of(self, sampling: SamplingParams, answer: Items[int]) -> FinishReason | None:
        """Whether an answer is over with its last token, and why."""
        if not answer:
            return None
        is_eos = answer[-1] == self._limits.eos_token_id and not sampling.ignore_eos
        if is_eos or answer[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(answer) >= sampling.max_tokens else None

    def _advance(self, run: _Run, tokens: Items[TokenEvent]) -> list[DecodeAction]:
        """These tokens come next; the last one of the answer ends the request, and what was drawn behind it is void."""
        reason = None
        for taken, token in enumerate(tokens, start=1):
            run.answer.append(token.token_id)
            if (reason := self._end_of(run.request.sampling, run.answer)) is not None:
                tokens = tokens[:taken]
                break
        actions: list[DecodeAction] = []
        if tokens:
            actions.append(Emit(run.id, Tokens(attempt=run.id.attempt, tokens=tuple(tokens))))
        if reason is None:
            return actions
        done = Finished(
            reason=reason,
            prompt_tokens=len(run.request.prompt),
            cached_tokens=run.cached_tokens,
            completion_tokens=run.num_tokens,
        )
        self._share_answer(run)
        return [*actions, *self._leave(run), Emit(run.id, done)]

    def _share_answer(self, run: _Run) -> None:
        """Keep what a running request has computed: the next turn of its conversation begins with it."""
        if run.state is _State.RUNNING and self._limits.prefix_cache:
            assert run.sequence is not None
            tokens = (*run.request.prompt, *run.answer)[: run.length]
            self._admission.share(run.sequence, page_hashes(tokens, run.request.namespace, run.digests))

    def _expire(self, now_s: float) -> list[DecodeAction]:
        actions: list[DecodeAction] = []
        limits = self._limits
        for run in [r for r in self._runs.values() if r.deadline is not None and r.deadline <= now_s]:
            error: PenumbraError
            match run.state:
                case _State.WAITING:
                    what = f"no room for {len(run.request.prompt)} prompt tokens within {limits.queue_timeout_s:g} s"
                    error = Overloaded(f"{what}; try again")
                case _State.FETCHING:
                    assert run.fetch is not None
                    source = run.fetch.source.worker_id
                    error = DeadlineExceeded(f"worker {source} offered nothing for {limits.offer_timeout_s:g} s")
                case _:
                    what = f"no page for token {run.num_tokens} of the answer within {limits.queue_timeout_s:g} s"
                    error = Overloaded(f"{what}; try again")
            actions += self._fail(run, error)
        return actions

    def _fail(self, run: _Run, error: PenumbraError, unsettled: tuple[Place, ...] = ()) -> list[DecodeAction]:
        failed: Failed = failed_from_error(error)
        return [*self._leave(run, unsettled), Emit(run.id, failed)]

    def _leave(self, run: _Run, unsettled: tuple[Place, ...] = ()) -> list[DecodeAction]:
        """Out of every book, from any state. Pages under a read are quarantined until that read has ended."""
        del self._runs[run.id]
        self._running.pop(run.id, None)
        if run in self._computing:
            self._computing.remove(run)
        self._forget_saved(run)
        if run.state is _State.WAITING:
            self._waiting.remove(run)
        if run.sequence is None:
            return []
        actions: list[DecodeAction] = []
        being_read: list[Place] = []
        if run.fetch is not None:
            # What has landed is right whatever became of the rest: a later attempt goes on from there.
            if digests := run.digests[: run.fetch.landed_pages]:
                self._admission.share(run.sequence, digests)
            actions.append(self._close_claim(run, run.fetch))
            being_read = run.fetch.places_being_read()
            for job_id, places in run.fetch.reading.items():
                del self._by_job[job_id]
                self._orphans[job_id] = places
                actions.append(CancelRead(job_id))
        if self._in_flight(run.sequence):
            self._outdated = True
            self._leaving.append((run.sequence, run.trusted))
        else:
            self._admission.leave(run.sequence, [*being_read, *unsettled], trusted=run.trusted)
        run.fetch = run.sequence = None
        return actions

    def _close_claim(self, run: _Run, fetch: Fetch) -> CloseClaim:
        return CloseClaim(run.id, fetch.source, fetch.claim_id, run.secret)
