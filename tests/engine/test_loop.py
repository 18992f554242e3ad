"""The engine thread: order of events, steps and actions; timers; crashes; stopping."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from engine.batch import Sampled, Segment, Sequence
from engine.loop import EngineLoop, Load, StepFailed, Tick
from wire.types import SamplingParams

WAIT_S = 10.0
"""Far beyond what any of this takes; only a broken loop waits so long."""


@dataclass
class Countdown:
    """A core that answers `("count", n)` with n steps, each of which adds one token; it names what happens."""

    steps_left: int = 0
    deadline: float | None = None
    ticks: int = 0
    thread_ids: set[int] = field(default_factory=set)

    def step(self, now_s: float, event: tuple[str, int] | Tick | StepFailed) -> list[str]:
        self.thread_ids.add(threading.get_ident())
        match event:
            case ("count", n):
                self.steps_left = n
                return [f"counting {n}"]
            case ("deadline", at):
                self.deadline = float(at)
                return []
            case ("bug", _):
                raise KeyError("lost my books")
            case Tick():
                self.deadline, self.ticks = None, self.ticks + 1
                return [f"tick at {now_s:g}"]
            case StepFailed(error):
                self.steps_left = 0
                return [f"step failed: {error}"]
        raise AssertionError(event)

    def next_batch(self, now_s: float) -> list[Segment]:
        if not self.steps_left:
            return []
        sequence = Sequence(request_id="r", sampling=SamplingParams(max_tokens=1, seed=0), slot=1)
        return [Segment(sequence=sequence, start=0, tokens=[self.steps_left], sample=True)]

    def finish(self, now_s: float, results: list[Sampled | None]) -> list[str]:
        (result,) = results
        assert result is not None
        self.steps_left -= 1
        return [f"token {result.token_id}"]

    def next_deadline(self) -> float | None:
        return self.deadline

    def load(self) -> Load:
        return Load(running=self.steps_left)


class Doubler:
    """A runner whose token is twice the input; it raises for token 13."""

    def prepare(self, batch: list[Segment]) -> list[Segment]:
        return batch

    def execute(self, batch: list[Segment]) -> list[Sampled | None]:
        if batch[0].tokens == [13]:
            raise RuntimeError("no thirteen")
        return [Sampled(token_id=2 * segment.tokens[0], logprob=0.0) for segment in batch]


class Harness:
    def __init__(self) -> None:
        self.now = 100.0
        self.core = Countdown()
        self.actions: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.crashes: queue.SimpleQueue[tuple[BaseException, bool]] = queue.SimpleQueue()
        self.loop: EngineLoop[tuple[str, int], str] = EngineLoop(
            self.core,
            Doubler(),
            emit=self.emit,
            on_crash=lambda error, ended: self.crashes.put((error, ended)),
            clock=lambda: self.now,
        )

    def emit(self, actions: list[str]) -> None:
        for action in actions:
            self.actions.put(action)

    def take(self, n: int) -> list[str]:
        return [self.actions.get(timeout=WAIT_S) for _ in range(n)]


@pytest.fixture
def harness() -> Iterator[Harness]:
    with running(Harness()) as harness:
        yield harness


@contextmanager
def running(harness: Harness) -> Iterator[Harness]:
    harness.loop.start()
    try:
        yield harness
    finally:
        assert harness.loop.stop(WAIT_S)


def test_an_event_becomes_actions_then_steps_until_the_core_is_idle(harness: Harness) -> None:
    harness.loop.post(("count", 3))
    assert harness.take(4) == ["counting 3", "token 6", "token 4", "token 2"]
    harness.loop.post(("count", 1))
    assert harness.take(2) == ["counting 1", "token 2"]


def test_the_core_is_only_ever_touched_by_the_engine_thread(harness: Harness) -> None:
    posters = [threading.Thread(target=harness.loop.post, args=(("count", 1),)) for _ in range(4)]
    for poster in posters:
        poster.start()
    for poster in posters:
        poster.join(WAIT_S)
    assert harness.take(1) == ["counting 1"]
    while harness.actions.get(timeout=WAIT_S) != "token 2":
        pass
    assert len(harness.core.thread_ids) == 1
    assert threading.get_ident() not in harness.core.thread_ids


def test_a_deadline_that_has_passed_on_the_given_clock_becomes_one_tick(harness: Harness) -> None:
    harness.loop.post(("deadline", 105))
    harness.loop.post(("count", 1))
    assert harness.take(2) == ["counting 1", "token 2"]
    harness.now = 105.0
    harness.loop.post(("count", 1))  # wakes the loop, which now finds the deadline passed
    assert sorted(harness.take(3)) == ["counting 1", "tick at 105", "token 2"]
    assert harness.core.ticks == 1


def test_an_idle_loop_wakes_for_a_deadline_without_any_event(harness: Harness) -> None:
    harness.now = 50.0
    harness.loop.post(("deadline", 49))
    assert harness.take(1) == ["tick at 50"]


def test_a_runner_that_raises_fails_its_batch_and_the_loop_goes_on_unhealthy(harness: Harness) -> None:
    harness.loop.post(("count", 13))
    assert harness.take(2) == ["counting 13", "step failed: RuntimeError: no thirteen"]
    error, ended = harness.crashes.get(timeout=WAIT_S)
    assert (str(error), ended) == ("no thirteen", False)
    assert not harness.loop.healthy
    harness.loop.post(("count", 1))
    assert harness.take(2) == ["counting 1", "token 2"]


def test_a_core_that_raises_ends_the_loop_and_says_so(harness: Harness) -> None:
    harness.loop.post(("bug", 0))
    error, ended = harness.crashes.get(timeout=WAIT_S)
    assert isinstance(error, KeyError)
    assert ended
    assert not harness.loop.healthy


def test_the_load_any_thread_reads_is_the_cores_after_its_latest_turn(harness: Harness) -> None:
    assert harness.loop.load == Load()
    harness.loop.post(("count", 13))  # fails at once, so the count goes back to zero
    harness.crashes.get(timeout=WAIT_S)
    harness.loop.post(("count", 2))
    harness.take(5)
    assert harness.loop.stop(WAIT_S)
    assert harness.loop.load == Load(running=0)


def test_stopping_waits_for_the_step_in_progress_and_no_longer() -> None:
    harness = Harness()
    entered, release = threading.Event(), threading.Event()

    class Slow:
        def prepare(self, batch: list[Segment]) -> list[Segment]:
            return batch

        def execute(self, batch: list[Segment]) -> list[Sampled | None]:
            entered.set()
            assert release.wait(WAIT_S)
            return [Sampled(token_id=1, logprob=0.0)]

    loop: EngineLoop[tuple[str, int], str] = EngineLoop(
        harness.core, Slow(), emit=lambda actions: None, on_crash=lambda error, ended: None
    )
    loop.start()
    loop.post(("count", 1_000))
    assert entered.wait(WAIT_S)
    assert not loop.stop(0.0)
    release.set()
    assert loop.stop(WAIT_S)
    assert harness.core.steps_left == 999


# Planning ahead


class Counting(Countdown):
    """A core that plans ahead: `("count", n)` asks for n steps, each segment being told by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.planned = 0
        self.outdated = False
        self.taken_back = 0

    def step(self, now_s: float, event: tuple[str, int] | Tick | StepFailed) -> list[str]:
        match event:
            case ("joins", _):
                self.outdated = True
                return ["joined"]
            case StepFailed(error):
                self.planned, self.steps_left = self.planned - 1, 0
                return [f"step failed: {error}"]
        return super().step(now_s, event)

    def next_batch(self, now_s: float) -> list[Segment]:
        self.outdated = False
        self.steps_left, left = max(0, self.steps_left - 1), self.steps_left
        if not left:
            return []
        self.planned += 1
        sequence = Sequence(request_id="r", sampling=SamplingParams(max_tokens=1, seed=0), slot=1)
        return [Segment(sequence=sequence, start=0, tokens=[left], sample=True)]

    def finish(self, now_s: float, results: list[Sampled | None]) -> list[str]:
        (result,) = results
        assert result is not None
        self.planned -= 1
        return [f"token {result.token_id}"]

    def is_outdated(self) -> bool:
        return self.outdated

    def take_back(self) -> None:
        self.planned -= 1
        self.steps_left += 1
        self.taken_back += 1


class Gated(Doubler):
    """Each step waits to be let through; `prepared` and `begun` say how far the two stages have come."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.prepared: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()

    def prepare(self, batch: list[Segment]) -> list[Segment]:
        self.prepared.put(batch[0].tokens[0])
        return batch

    def execute(self, batch: list[Segment]) -> list[Sampled | None]:
        self.begun.put(batch[0].tokens[0])
        assert self.gate.acquire(timeout=WAIT_S)
        return super().execute(batch)


class Ahead(Harness):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.runner = Counting(), Gated()
        self.loop = EngineLoop(
            self.core,
            self.runner,
            emit=self.emit,
            on_crash=lambda error, ended: self.crashes.put((error, ended)),
            planner=self.core,
            clock=lambda: self.now,
        )


@pytest.fixture
def ahead() -> Iterator[Ahead]:
    harness = Ahead()
    with running(harness):
        yield harness
        harness.runner.gate.release(1_000)


def test_the_next_step_is_prepared_while_one_runs_and_no_more_than_one(ahead: Ahead) -> None:
    ahead.loop.post(("count", 3))
    assert ahead.runner.begun.get(timeout=WAIT_S) == 3
    assert [ahead.runner.prepared.get(timeout=WAIT_S) for _ in range(2)] == [3, 2]
    assert ahead.runner.prepared.empty()
    ahead.runner.gate.release()
    assert ahead.runner.begun.get(timeout=WAIT_S) == 2
    assert ahead.take(2) == ["counting 3", "token 6"]
    assert ahead.runner.prepared.get(timeout=WAIT_S) == 1
    ahead.runner.gate.release(2)
    assert ahead.take(2) == ["token 4", "token 2"]
    assert ahead.core.planned == 0


def test_events_are_heard_while_a_step_runs_and_the_planned_one_is_planned_anew_if_they_change_it(
    ahead: Ahead,
) -> None:
    ahead.loop.post(("count", 2))
    assert ahead.runner.begun.get(timeout=WAIT_S) == 2
    assert [ahead.runner.prepared.get(timeout=WAIT_S) for _ in range(2)] == [2, 1]
    ahead.loop.post(("joins", 0))
    assert ahead.take(2) == ["counting 2", "joined"]
    assert ahead.runner.prepared.get(timeout=WAIT_S) == 1
    assert ahead.core.taken_back == 1
    ahead.runner.gate.release(2)
    assert ahead.take(2) == ["token 4", "token 2"]


def test_a_step_that_fails_takes_the_planned_one_with_it_and_the_next_request_is_served(ahead: Ahead) -> None:
    ahead.loop.post(("count", 13))
    assert [ahead.runner.prepared.get(timeout=WAIT_S) for _ in range(2)] == [13, 12]
    ahead.runner.gate.release()
    assert ahead.take(2) == ["counting 13", "step failed: RuntimeError: no thirteen"]
    assert (ahead.core.taken_back, ahead.core.planned) == (1, 0)
    assert ahead.runner.begun.get(timeout=WAIT_S) == 13
    ahead.runner.gate.release()
    ahead.loop.post(("count", 1))
    assert ahead.take(2) == ["counting 1", "token 2"]
    assert ahead.runner.begun.get(timeout=WAIT_S) == 1
    assert ahead.runner.begun.empty()


def test_stopping_with_a_step_running_and_one_planned_ends_after_the_one(ahead: Ahead) -> None:
    ahead.loop.post(("count", 5))
    assert ahead.runner.begun.get(timeout=WAIT_S) == 5
    assert not ahead.loop.stop(0.0)
    ahead.runner.gate.release()
    assert ahead.loop.stop(WAIT_S)
    assert ahead.runner.begun.empty()
