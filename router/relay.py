"""Carries out what `attempts.RelayCore` decides: places attempts, runs the two RPCs of each as tasks of one group, and
hands tokens on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc

from router.attempts import (
    Acquit,
    Begun,
    Broke,
    Complete,
    Deliver,
    Drop,
    DropDecode,
    Fail,
    Leaving,
    Moved,
    NotPlaced,
    Place,
    Placed,
    RelayAction,
    RelayCore,
    RelayEvent,
    RelayLimits,
    RelayRequest,
    Retry,
    Said,
    StartDecode,
    StartPrefill,
    Ticked,
)
from router.fleet import Fleet, FleetSnapshot
from router.mirror import PrefixMirror
from router.placement import GROWTH_TOKENS, Placement, choose, why_not
from router.quarantine import Quarantine, fingerprint
from wire import convert
from wire.errors import (
    Cancelled,
    InvalidRequest,
    PenumbraError,
    RequestQuarantined,
    WorkerLost,
)
from wire.prefix import pack_tokens
from wire.rpc import error_from_rpc
from wire.tracing import NO_SPAN, Span
from wire.types import (
    Finished,
    Role,
    RunEvent,
    RunFinished,
    RunRequest,
    StartEvent,
    StartRequest,
    TokenEvent,
    WorkerInfo,
)
from wire.v1 import worker_pb2_grpc

ALONE_AGAIN_S, ALONE_LOOKS = 0.02, 500
"""Between two looks for workers without another request on trial, and how many there are at most."""


class Relay:
    """Iterate it for the delivered tokens; then `finished` is set. A failed request raises its PenumbraError."""

    def __init__(self) -> None:
        self._ready: deque[tuple[TokenEvent, ...] | Finished | PenumbraError] = deque()
        self._filled = asyncio.Event()
        self.finished: Finished | None = None
        self.cached_tokens = 0  # of the prompt; certain once `finished` is set
        self.attempts = 0
        self.placement: Placement | None = None

    def put(self, item: tuple[TokenEvent, ...] | Finished | PenumbraError) -> None:
        self._ready.append(item)
        self._filled.set()

    def __aiter__(self) -> Relay:
        return self

    async def __anext__(self) -> tuple[TokenEvent, ...]:
        """Every token that is ready."""
        if self.finished is not None:
            raise StopAsyncIteration
        while not self._ready:
            self._filled.clear()
            await self._filled.wait()
        match self._ready.popleft():
            case Finished() as finished:
                self.finished, self.cached_tokens = finished, finished.cached_tokens
                raise StopAsyncIteration
            case PenumbraError() as error:
                raise error
            case tokens:
                while self._ready and isinstance(more := self._ready[0], tuple):
                    tokens += more
                    self._ready.popleft()
                return tokens


@contextlib.asynccontextmanager
async def relay(
    fleet: Fleet,
    request: RelayRequest,
    limits: RelayLimits,
    mirror: PrefixMirror,
    *,
    on_retry: Callable[[int, PenumbraError], None] = lambda attempt, error: None,
    on_place: Callable[[Placement], None] = lambda placement: None,
    watch: Callable[[float, RelayEvent], None] = lambda now, event: None,
    span: Span = NO_SPAN,
    quarantine: Quarantine | None = None,
    on_moved: Callable[[Moved], None] = lambda moved: None,
) -> AsyncIterator[Relay]:
    """Run the request while inside. Leaving, for whatever reason, ends both RPCs before it returns.

    Raises RequestQuarantined at once for a request like one that workers died of.

    `watch` sees every event before the core does, with the monotonic time in seconds. The RPCs are steps of `span`.

    The queue between is bounded by the request itself: at most `max_tokens` tokens.
    """
    feed = Relay()
    quarantine = quarantine or Quarantine()
    packed = pack_tokens(request.prompt) if request.packed is None else request.packed
    alike = request.alike or fingerprint(packed, request.sampling.grammar)
    quarantine.check(time.monotonic(), alike)

    def failed(error: PenumbraError) -> None:
        if isinstance(error, RequestQuarantined):
            quarantine.add(time.monotonic(), alike)

    failure: Exception | None = None
    async with asyncio.TaskGroup() as tasks:
        shell = _Shell(
            fleet, request, limits, mirror, feed, tasks, on_retry, on_place, watch, span, failed, on_moved, quarantine
        )
        try:
            shell.take(Begun())
            yield feed
        except Exception as error:
            failure = error  # raised below as itself; leaving the group with it would wrap it
        finally:
            shell.close()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback knows this frame


# The generated stubs carry no types.
_decode_stub: Callable[[grpc.aio.Channel], Any] = worker_pb2_grpc.DecodeStub
_prefill_stub: Callable[[grpc.aio.Channel], Any] = worker_pb2_grpc.PrefillStub


class _Attempt:
    """What one attempt holds: its share of the workers' load and its two running streams."""

    def __init__(self) -> None:
        self.holds: dict[Role, contextlib.ExitStack] = {role: contextlib.ExitStack() for role in Role}
        self.calls: dict[Role, asyncio.Task[None]] = {}

    def drop(self) -> None:
        # Forgotten as well: a cancelled task's traceback knows us, and all of the request would wait in that circle for
        # a garbage collection, which holds the router up.
        calls, self.calls = self.calls, {}
        for task in calls.values():
            task.cancel()
        for hold in self.holds.values():
            hold.close()

    def drop_decode(self) -> None:
        if Role.DECODE in self.calls:
            self.calls.pop(Role.DECODE).cancel()
        self.holds[Role.DECODE].close()


class _Shell:
    def __init__(
        self,
        fleet: Fleet,
        request: RelayRequest,
        limits: RelayLimits,
        mirror: PrefixMirror,
        feed: Relay,
        tasks: asyncio.TaskGroup,
        on_retry: Callable[[int, PenumbraError], None],
        on_place: Callable[[Placement], None],
        watch: Callable[[float, RelayEvent], None],
        span: Span,
        on_failed: Callable[[PenumbraError], None],
        on_moved: Callable[[Moved], None],
        quarantine: Quarantine,
    ) -> None:
        self._fleet = fleet
        self._request = request
        self._rules = limits.placement
        self._on_place = on_place
        self._mirror = mirror
        self._core = RelayCore(request, limits)
        self._feed = feed
        self._tasks = tasks
        self._on_retry = on_retry
        self._watch = watch
        self._span = span
        self._on_failed = on_failed
        self._on_moved = on_moved
        self._quarantine = quarantine
        self._events: deque[RelayEvent] = deque()  # not yet taken to the core, the one being taken first
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._placing: asyncio.Task[None] | None = None
        self._attempts: dict[int, _Attempt] = {}
        self._closed = False

    def take(self, event: RelayEvent) -> None:
        """Take the event to the core, and do what it asks for, there and then: a token that comes costs no switch of
        tasks on its way to the one that waits for it.
        """
        if self._closed:
            return  # what was on its way when the request ended must not start it again
        self._events.append(event)
        if len(self._events) > 1:
            return  # of what is being done for an earlier one, further up the stack
        while self._events:
            now, event = time.monotonic(), self._events[0]
            self._watch(now, event)
            self._carry_out(self._core.step(now, event))
            self._events.popleft()
        self._arm()

    def _arm(self) -> None:
        """Tell the core the time no later than it wants. A timer that is early looks again, so that a deadline which
        moves with every token costs nothing.
        """
        deadline = self._core.next_deadline()
        if self._timer is not None and (deadline is None or deadline < self._timer_at):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and deadline is not None:
            self._timer_at = deadline
            self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer = None
        deadline = self._core.next_deadline()
        if deadline is not None and time.monotonic() >= deadline:
            self._tasks.create_task(self._tick(), name=f"deadline {self._request.request_id}")
        else:
            self._arm()

    async def _tick(self) -> None:
        self.take(Ticked())

    def close(self) -> None:
        """End everything that runs for the request, and take no more events."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._placing is not None:
            self._placing.cancel()
        for attempt in self._attempts.values():
            attempt.drop()
        self._attempts.clear()
        self._quarantine.acquit(self._request.request_id)

    async def _place_later(self, place: Place) -> None:
        await asyncio.sleep(place.pause_s)
        for _ in range(ALONE_LOOKS if place.on_trial else 0):
            if self._choose(place, alone=True) is not None or self._choose(place) is None:
                break
            await asyncio.sleep(ALONE_AGAIN_S)
        self.take(self._place(place))

    def _carry_out(self, actions: list[RelayAction]) -> None:
        for action in actions:
            match action:
                case Deliver(tokens):
                    self._feed.cached_tokens = self._core.cached_tokens
                    self._feed.put(tokens)
                case Place(pause_s=pause_s):
                    if pause_s:
                        self._placing = self._tasks.create_task(self._place_later(action))
                    else:
                        self.take(self._place(action))
                case StartDecode(attempt, placement, emitted):
                    self._attempts[attempt].calls[Role.DECODE] = self._tasks.create_task(
                        self._run(attempt, Role.DECODE, self._decode(attempt, placement, emitted)),
                        name=f"decode {self._request.request_id}",
                    )
                case StartPrefill(attempt, placement, skip, secret):
                    self._attempts[attempt].calls[Role.PREFILL] = self._tasks.create_task(
                        self._run(attempt, Role.PREFILL, self._prefill(attempt, placement, skip, secret)),
                        name=f"prefill {self._request.request_id}",
                    )
                case Acquit():
                    self._quarantine.acquit(self._request.request_id)
                case Drop(attempt):
                    if (dropped := self._attempts.pop(attempt, None)) is not None:
                        dropped.drop()
                case DropDecode(attempt):
                    if (kept := self._attempts.get(attempt)) is not None:
                        kept.drop_decode()
                case Retry(attempt, error):
                    self._quarantine.acquit(self._request.request_id)
                    self._on_retry(attempt, error)
                case Moved():
                    self._on_moved(action)
                case Complete(finished):
                    self._feed.put(finished)
                case Fail(error):
                    self._on_failed(error)
                    self._feed.put(error)

    def _choose(self, place: Place, *, alone: bool = False) -> Placement | None:
        """A pair for the attempt; with `alone`, none that another request is on trial on."""
        prompt_tokens, max_tokens = len(self._request.prompt), self._request.sampling.max_tokens
        fleet = self._fleet.snapshot()
        # A worker that failed us once is better than none: on a cluster of one pair it is the only one there is,
        # and a dead one is out of the snapshot by its own health.
        resident = self._resident(fleet)
        for worker_id, tokens in place.held:
            resident[worker_id] = max(tokens, resident.get(worker_id, 0))
        rules, turn, avoid = self._rules, self._fleet.next_turn(), place.avoid
        others = self._quarantine.trying(self._request.request_id) if alone else frozenset[str]()
        decode, prefill = ({view.info.worker_id for view in views} for views in (fleet.decode, fleet.prefill))
        if any(worker_id in decode and tokens for worker_id, tokens in place.held):
            # It may go on from there by itself, where that is quicker than to compute those pages once more.
            rules = replace(rules, local_prefill_tokens=max(rules.local_prefill_tokens, prompt_tokens))
        for excluded in dict.fromkeys((avoid, avoid & decode, avoid & prefill, frozenset[str]())):
            placement = choose(fleet, prompt_tokens, max_tokens, excluded | others, resident, rules=rules, turn=turn)
            if placement is not None:
                return placement
        return None

    def _place(self, place: Place) -> Placed | NotPlaced:
        attempt, in_company = place.attempt, False
        prompt_tokens, max_tokens = len(self._request.prompt), self._request.sampling.max_tokens
        placement = self._choose(place, alone=place.on_trial)
        if placement is None and place.on_trial:
            placement, in_company = self._choose(place), True
        if placement is None:
            return NotPlaced(attempt, why_not(self._fleet.snapshot(), prompt_tokens, max_tokens))
        if place.on_trial:
            on = {info.worker_id for info in (placement.prefill, placement.decode) if info is not None}
            self._quarantine.try_on(self._request.request_id, on)
        self._feed.attempts, self._feed.placement = attempt, placement
        self._on_place(placement)
        # Counted at once, before the next placement looks, not when a task gets to run.
        holds = self._attempts.setdefault(attempt, _Attempt()).holds
        if placement.prefill is not None:
            to_compute = prompt_tokens - placement.prefill_resident
            holds[Role.PREFILL].enter_context(self._fleet.assigned(placement.prefill.ref, to_compute))
        to_hold = prompt_tokens + min(max_tokens, GROWTH_TOKENS)
        holds[Role.DECODE].enter_context(self._fleet.assigned(placement.decode.ref, to_hold))
        return Placed(attempt, placement, in_company)

    def _leaving(self, attempt: int) -> None:
        """The decode worker drains. If there is nowhere else to go, its grace period is the best there is."""
        prompt_tokens, max_tokens = len(self._request.prompt), self._request.sampling.max_tokens
        if choose(self._fleet.snapshot(), prompt_tokens, max_tokens, rules=self._rules) is not None:
            self.take(Leaving(attempt))

    def _resident(self, fleet: FleetSnapshot) -> dict[str, int]:
        """Prompt tokens that each worker is believed to hold."""
        digests = self._request.digests
        return {
            view.info.worker_id: self._mirror.resident_tokens(view.info.worker_id, digests.get(view.info.model, ()))
            for view in (*fleet.prefill, *fleet.decode)
        }

    async def _run(self, attempt: int, role: Role, events: AsyncIterator[StartEvent | RunEvent]) -> None:
        """Turn one stream into events, its end included."""
        error: PenumbraError | None = None
        try:
            async for event in events:
                self.take(Said(attempt, role, event))
                if isinstance(event, RunFinished) and (live := self._attempts.get(attempt)) is not None:
                    live.holds[role].close()  # the call goes on, the work does not
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
            if isinstance(error, Cancelled):  # not by us: our own cancellation ends this task
                error = WorkerLost(f"The {role} worker ended the call: {error}")
        except InvalidRequest as failure:
            # From our own conversion of the worker's message: its fault, not the client's.
            error = WorkerLost(f"The {role} worker sent a message that does not parse: {failure}")
        if (live := self._attempts.get(attempt)) is not None:
            live.holds[role].close()
        self.take(Broke(attempt, role, error))

    async def _decode(self, attempt: int, placement: Placement, emitted: tuple[int, ...]) -> AsyncIterator[StartEvent]:
        request = StartRequest(
            request_id=self._request.request_id,
            attempt=attempt,
            prompt=self._request.prompt,
            sampling=self._request.sampling,
            source=None if placement.prefill is None else placement.prefill.ref,
            emitted=emitted,
            namespace=self._request.namespace(placement.decode.model),
            keep_s=self._request.keep_s,
            context=self._request.context,
        )
        async with self._fleet.channel(placement.decode.ref) as channel:
            with (
                self._fleet.told_of_leaving(placement.decode.ref, lambda: self._leaving(attempt)),
                _step(self._span, "Decode.Start", attempt, placement.decode) as metadata,
            ):
                message = convert.start_request_to_wire(request, self._request.packed)
                call = _decode_stub(channel).Start(message, metadata=metadata)
                try:
                    async for message in call:
                        yield convert.start_event_from_wire(message)
                finally:
                    call.cancel()

    async def _prefill(self, attempt: int, placement: Placement, skip: int, secret: bytes) -> AsyncIterator[RunEvent]:
        assert placement.prefill is not None, "a decode worker that computes the prompt itself needs no prefill"
        request = RunRequest(
            request_id=self._request.request_id,
            attempt=attempt,
            prompt=self._request.prompt,
            sampling=self._request.sampling,
            skip=skip,
            secret=secret,
            namespace=self._request.namespace(placement.prefill.model),
            hold=True,
        )
        async with self._fleet.channel(placement.prefill.ref) as channel:
            with _step(self._span, "Prefill.Run", attempt, placement.prefill) as metadata:
                message = convert.run_request_to_wire(request, self._request.packed)
                call = _prefill_stub(channel).Run(message, metadata=metadata)
                try:
                    async for message in call:
                        yield convert.run_event_from_wire(message)
                finally:
                    call.cancel()


@contextlib.contextmanager
def _step(span: Span, name: str, attempt: int, worker: WorkerInfo) -> Iterator[tuple[tuple[str, str], ...]]:
    """One RPC as a step of its request; gives what the RPC carries so that the worker's part joins it."""
    step = span.child(name, attempt=attempt, worker_id=worker.worker_id)
    error: BaseException | None = None
    try:
        yield step.metadata()
    except BaseException as failure:
        error = failure
        raise
    finally:
        step.end(error)
