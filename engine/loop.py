"""The engine thread: the one owner of a worker's model, pools and scheduler.

Everyone else talks to it by message: `post` puts an event in its inbox, `emit` hands actions out. The core
that it drives decides without I/O; this file is the only place where its decisions meet a clock, a queue and
a model.
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
        """What to compute now; empty when there is nothing. Answered by `finish`, or by StepFailed."""

    def finish(self, now_s: float, results: list[Any]) -> list[Action]:
        """Results of the last batch, one per segment, of the kind its runner gives."""

    def next_deadline(self) -> float | None:
        """When to send the next Tick; after a Tick it lies in the future."""

    def load(self) -> Load: ...


class StepRunner(Protocol):
    def run(self, batch: list[Segment]) -> list[Any]: ...


class EngineLoop(Generic[Event, Action]):
    """Runs a core and a runner on one thread.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._runner = runner
        self._emit = emit
        self._on_crash = on_crash
        self._on_step = on_step
        self._perform = perform
        self._clock = clock
        self._inbox: SimpleQueue[Event | None] = SimpleQueue()  # None only wakes the loop
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.load = core.load()
        self.healthy = True

    def start(self) -> None:
        self._thread.start()

    def post(self, event: Event) -> None:
        """Hand the core an event; from any thread, never blocks. Ignored once the loop has ended."""
        self._inbox.put(event)

    def stop(self, timeout_s: float) -> bool:
        """End after the step in progress. False when that step did not finish within `timeout_s`."""
        self._stopping.set()
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        busy = False
        try:
            while not self._stopping.is_set():
                busy = self._turn(busy)
        except Exception as error:
            self.healthy = False
            self._on_crash(error, True)

    def _turn(self, busy: bool) -> bool:
        """Events, timers, then one step of computation; whether there was one."""
        core, clock = self._core, self._clock
        actions: list[Action] = []
        for event in self._take_events(wait=not busy):
            actions += self._carry_out(core.step(clock(), event))
        deadline = core.next_deadline()
        if deadline is not None and clock() >= deadline:
            actions += self._carry_out(core.step(clock(), Tick()))
        batch = core.next_batch(clock())
        self.load = core.load()
        # Before the step, not after: an admission must not wait for a forward pass it has no part in.
        self._hand_out(actions)
        if not batch:
            return False
        started = clock()
        try:
            results = self._runner.run(batch)
        except Exception as error:
            self.healthy = False
            self._hand_out(self._carry_out(core.step(clock(), StepFailed(f"{type(error).__name__}: {error}"))))
            self._on_crash(error, False)
        else:
            self._on_step(clock() - started)
            self._hand_out(self._carry_out(core.finish(clock(), results)))
        self.load = core.load()
        return True

    def _take_events(self, wait: bool) -> list[Event]:
        events: list[Event] = []
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
