"""The engine thread: the one owner of a worker's scheduler, model and pools.

Everyone else talks to it by message: `post` puts an event in its inbox, `emit` hands actions out. The core
that it drives decides without I/O; this file is the only place where its decisions meet a clock, a queue and
a model.

A core that can plan ahead is driven in two stages. While the step thread runs step k, the engine thread handles events
and what came of step k - 1, plans step k + 1 and prepares it; the step thread goes from one to the next without asking.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypedDict, TypeVar

from engine.batch import Segment
from engine.cache.pools import PoolCounts
from wire.types import PageClass

IDLE_WAIT_S = 1.0
"""An idle loop looks at its deadlines at least this often, whatever the core says."""

MAX_EVENTS_PER_TURN = 1024
"""A flood of events may delay the next step by this many, not for ever."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline the core named has passed."""


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The runner raised during the last batch: its sequences hold undefined rows and have no result."""

    error: str


class FullPages(TypedDict):
    """Items of the full pool by state, as a worker's record names them."""

    free_pages: int
    used_pages: int
    cached_pages: int
    quarantined_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a worker has on its hands. Replaced whole after every turn, so any thread may read the latest."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0  # prompt tokens not yet computed (prefill) or not yet fetched (decode)
    queued_depth: int = 0  # of the prompts being computed: tokens in front of what comes next, on average
    free_tokens: int = 0  # full-pool tokens not spoken for
    prefill_token_ns: int = 0  # measured: a prompt token at the start of a prompt
    prefill_depth_ns: int = 0  # and so much more for each 1,024 tokens in front of it
    computing_tokens: int = 0  # of prompts that a decode worker computes itself, not computed yet
    pages: dict[PageClass, PoolCounts] = field(default_factory=dict)  # request slots under STATE
    quarantined_total: int = 0  # items ever quarantined
    preemptions_total: int = 0  # requests ever moved to host memory to make room
    host_bytes: int = 0  # what they hold there now
    drafted_steps_total: int = 0  # steps of a request with drafts in them
    drafts_total: int = 0  # the drafts in those
    drafts_kept_total: int = 0  # and how many were what was drawn

    def full_pages(self) -> FullPages:
        """The full pool by state. Cached pages are those that nobody uses."""
        counts = self.pages.get(PageClass.FULL, PoolCounts(free=0, used=0, quarantined=0))
        return FullPages(
            free_pages=counts.free,
            used_pages=counts.used - counts.evictable,
            cached_pages=counts.evictable,
            quarantined_pages=counts.quarantined,
        )


EventIn = TypeVar("EventIn", contravariant=True)
Event = TypeVar("Event")
Action = TypeVar("Action")


class Core(Protocol[EventIn, Action]):
    """A scheduler: events in, actions and batches out. Same calls, same answers; time is an argument."""

    def step(self, now_s: float, event: EventIn | Tick | StepFailed) -> list[Action]: ...

    def next_batch(self, now_s: float) -> list[Segment]:
        """What to compute next; empty when there is nothing. Answered by `finish`, or by StepFailed."""

    def finish(self, now_s: float, results: list[Any]) -> list[Action]:
        """Results of the oldest batch not answered yet, one per segment, of the kind its runner gives."""

    def next_deadline(self) -> float | None:
        """When to send the next Tick; after a Tick it lies in the future."""

    def load(self) -> Load: ...


class Planner(Protocol):
    """The part of a core that plans ahead: `next_batch` may be asked for one more batch while one is unanswered."""

    def is_outdated(self) -> bool:
        """Whether what happened since calls for another batch than the one planned last."""

    def take_back(self) -> None:
        """The batch planned last has not begun, and will not."""


class StepRunner(Protocol):
    def prepare(self, batch: list[Segment]) -> Any:
        """The part of a step that needs none before it to have ended."""

    def execute(self, plan: Any) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class _Followed:
    """An event, and what to do once the core has acted on it."""

    event: Any
    then: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Landed:
    """A step ended."""

    results: list[Any]
    error: Exception | None
    seconds: float


class _StepThread:
    """Runs plans one after the other, in the order they are offered; `land` is told of each that ended.

    After a plan that failed none begins before `recover`.
    """

    def __init__(
        self, execute: Callable[[Any], list[Any]], land: Callable[[_Landed], None], clock: Callable[[], float]
    ) -> None:
        self._execute = execute
        self._land = land
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Any] = deque()
        self._broken = self._stopping = False
        self._thread = threading.Thread(target=self._main, name="step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, plan: Any) -> None:
        with self._changed:
            self._waiting.append(plan)
            self._changed.notify()

    def withdraw(self) -> bool:
        """Take back the plan offered last; False when it has begun."""
        with self._changed:
            if self._waiting:
                self._waiting.pop()
                return True
            return False

    def recover(self) -> None:
        with self._changed:
            self._broken = False
            self._changed.notify()

    def stop(self) -> None:
        """Begin no other step; returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self) -> None:
        """After `stop`: wait for the step in progress to end."""
        self._thread.join()

    def _main(self) -> None:
        plan = self._next()
        while plan is not None:
            began = self._clock()
            try:
                landed = _Landed(self._execute(plan), None, self._clock() - began)
            except Exception as error:
                landed = _Landed([], error, self._clock() - began)
            # The next one is under way before anybody hears of this one, so that nobody takes it back in between.
            plan = self._next(wait=False, broken=landed.error is not None)
            self._land(landed)
            if plan is None:
                plan = self._next()

    def _next(self, wait: bool = True, broken: bool = False) -> Any:
        with self._changed:
            self._broken |= broken
            if wait:
                self._changed.wait_for(lambda: self._stopping or (self._waiting and not self._broken))
            if self._stopping or self._broken or not self._waiting:
                return None
            return self._waiting.popleft()


class EngineLoop(Generic[Event, Action]):
    """Runs a core and a runner.

    planner   the core again, if it can plan ahead; then steps run on a thread of their own. Without, a step runs on the
              engine thread, and events wait until it has ended
    perform   called on the engine thread with every action, as soon as the core asks for it. What touches the
              model's memory is done there and then, and the answer is the core's next event; None leaves the action
              to `emit`
    emit      called on the engine thread with the actions of one turn; must not block
    on_crash  called on the engine thread, once per crash, with the error and whether the loop has ended.
              A runner that raises fails the requests of its batch and leaves the loop running, for others
              to finish; a core that raises has lost its books, so the loop ends.
    on_step   called on the engine thread with the seconds each step took
    """

    def __init__(
        self,
        core: Core[Event, Action],
        runner: StepRunner,
        *,
        emit: Callable[[list[Action]], None],
        on_crash: Callable[[BaseException, bool], None],
        on_step: Callable[[float], None] = lambda seconds: None,
        perform: Callable[[Action], Event | None] = lambda action: None,
        planner: Planner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._runner = runner
        self._emit = emit
        self._on_crash = on_crash
        self._on_step = on_step
        self._perform = perform
        self._planner = planner
        self._clock = clock
        self._inbox: SimpleQueue[Event | _Landed | _Followed | None] = SimpleQueue()  # None only wakes the loop
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._steps = _StepThread(runner.execute, self._inbox.put, clock)
        self._in_flight = 0  # steps the core has planned and not heard of
        self.load = core.load()
        self.healthy = True

    def start(self) -> None:
        self._thread.start()

    def post_then(self, event: Event, then: Callable[[], None]) -> None:
        """Hand the core an event, and call `then` on the engine thread once the core has acted on it."""
        self._inbox.put(_Followed(event, then))

    def post(self, event: Event) -> None:
        """Hand the core an event; from any thread, never blocks. Ignored once the loop has ended."""
        self._inbox.put(event)

    def stop(self, timeout_s: float) -> bool:
        """End after the step in progress. False when that step did not finish within `timeout_s`."""
        self._stopping.set()
        # Told here and not by the engine thread, which may hear of the stop only after another step has begun.
        self._steps.stop()
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        busy = False
        try:
            if self._planner is not None:
                self._steps.start()
            while not self._stopping.is_set():
                busy = self._turn(busy)
        except Exception as error:
            self.healthy = False
            self._on_crash(error, True)
        finally:
            if self._planner is not None:
                self._steps.stop()
                self._steps.join()

    def _turn(self, busy: bool) -> bool:
        """Events, timers, then one step of computation, or a plan for one; whether to go on without waiting."""
        core, clock = self._core, self._clock
        actions: list[Action] = []
        for event in self._take_events(wait=not busy):
            if isinstance(event, _Landed):
                actions += self._landed(event)
            elif isinstance(event, _Followed):
                actions += self._carry_out(core.step(clock(), event.event))
                event.then()
            else:
                actions += self._carry_out(core.step(clock(), event))
        deadline = core.next_deadline()
        if deadline is not None and clock() >= deadline:
            actions += self._carry_out(core.step(clock(), Tick()))
        if self._planner is not None:
            self._plan(self._planner)
            self.load = core.load()
            self._hand_out(actions)
            return False
        batch = core.next_batch(clock())
        self.load = core.load()
        # Before the step, not after: an admission must not wait for a forward pass it has no part in.
        self._hand_out(actions)
        if not batch:
            return False
        began = clock()
        try:
            landed = _Landed(self._runner.execute(self._runner.prepare(batch)), None, clock() - began)
        except Exception as error:
            landed = _Landed([], error, 0.0)
        self._in_flight = 1
        self._hand_out(self._landed(landed))
        self.load = core.load()
        return True

    def _plan(self, planner: Planner) -> None:
        """See to it that a step runs and another waits behind it, as far as there is anything to compute."""
        if self._in_flight == 2 and planner.is_outdated() and self._steps.withdraw():
            planner.take_back()
            self._in_flight -= 1
        while self._in_flight < 2 and (batch := self._core.next_batch(self._clock())):
            self._in_flight += 1
            try:
                plan = self._runner.prepare(batch)
            except Exception as error:
                if self._in_flight == 2:
                    # Tried again when it is the only one, and fails alone.
                    planner.take_back()
                    self._in_flight -= 1
                else:
                    self._inbox.put(_Landed([], error, 0.0))
                return
            self._steps.offer(plan)

    def _landed(self, landed: _Landed) -> list[Action]:
        """What comes of the oldest step in flight."""
        self._in_flight -= 1
        if landed.error is None:
            self._on_step(landed.seconds)
            return self._carry_out(self._core.finish(self._clock(), landed.results))
        self.healthy = False
        if self._planner is not None:
            if self._steps.withdraw():
                self._planner.take_back()
                self._in_flight -= 1
            self._steps.recover()
        error = landed.error
        actions = self._carry_out(self._core.step(self._clock(), StepFailed(f"{type(error).__name__}: {error}")))
        self._on_crash(error, False)
        return actions

    def _take_events(self, wait: bool) -> list[Event | _Landed | _Followed]:
        events: list[Event | _Landed | _Followed] = []
        try:
            if wait:
                deadline = self._core.next_deadline()
                limit = IDLE_WAIT_S if deadline is None else min(IDLE_WAIT_S, max(0.0, deadline - self._clock()))
                first = self._inbox.get(timeout=limit)
                events += [] if first is None else [first]
            while len(events) < MAX_EVENTS_PER_TURN:
                event = self._inbox.get_nowait()
                events += [] if event is None else [event]
        except Empty:
            pass
        return events

    def _carry_out(self, actions: list[Action]) -> list[Action]:
        """Perform what belongs on this thread and tell the core how it went; the other actions, in order."""
        rest: list[Action] = []
        left = deque(actions)
        while left:
            action = left.popleft()
            answer = self._perform(action)
            if answer is None:
                rest.append(action)
            else:
                left.extend(self._core.step(self._clock(), answer))
        return rest

    def _hand_out(self, actions: list[Action]) -> None:
        if actions:
            self._emit(actions)
