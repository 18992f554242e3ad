"""A scenario played against a server, as a Locust run: one Locust user plays all of it, since in an open loop who comes
has nothing to do with who came before. Each arrival has a greenlet of its own and is told to Locust as it ends.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gevent
import gevent.subprocess
import locust.stats
import orjson
from gevent.event import AsyncResult, Event
from gevent.pool import Group
from locust import User, task
from locust.env import Environment
from locust.runners import LocalRunner

from loadtest.client import Server
from loadtest.prose import Prose
from loadtest.record import UNFINISHED, Outcome, Own, Record, judge
from loadtest.scenario import Scenario, Traffic
from loadtest.summary import keeps, quantiles
from loadtest.watch import Watch
from loadtest.workload import Asked, Job, Writer, job, named, times

TICK_S = 0.02
"""Between two rings of the timer whose lateness is this process's lag."""
LEAD_S = 0.5
"""Before second 0, in which whatever is due then is written."""
STRIKE_S = 120.0
CALIBRATION_CHARS = 400_000
"""Passages differ: of 20,000 characters the mean is 2% off, which is 18,000 tokens of 900,000."""


@dataclass(slots=True)
class Live:
    """What a progress bar shows."""

    sent: int = 0
    open: int = 0
    ttft_ms: array[float] = field(default_factory=lambda: array("d"))
    tpot_ms: array[float] = field(default_factory=lambda: array("d"))
    errors: int = 0
    kept: int = 0  # answers that kept the SLO


class Run:
    """One play of a scenario. `play` does it; `record` is whole once it has returned."""

    def __init__(
        self,
        scenario: Scenario,
        server: Server,
        about: dict[str, str],
        *,
        strike: str | None,
        tell: Callable[[Outcome], None],
    ) -> None:
        """`strike` is the command that does a fault when its name is put behind it; `tell` hears of each outcome.

        Raises Unanswered when the server does not tell how long its tokens are.
        """
        self.scenario, self.server = scenario, server
        server.clock = self.clock
        self.record = Record(scenario=scenario, about=about)
        self.live = Live()
        self.watch = Watch(server, self.clock)
        self._strike, self._tell = strike, tell
        prose = Prose()
        self._writer = Writer(scenario, prose, server.chars_per_token(prose.text("calibration", CALIBRATION_CHARS)))
        self._began = time.monotonic()
        self._over = {traffic.name: Event() for traffic in scenario.traffic}
        self._asking = Group()
        self._lag_ms = array("d")

    def clock(self) -> float:
        """Seconds since the run's start."""
        return time.monotonic() - self._began

    def play(self) -> None:
        """Ask everything, wait for the answers, and look at what the server still holds. Killed in the middle, it has
        recorded what there was until then.
        """
        self._began, cpu = time.monotonic() + LEAD_S, time.process_time()
        beside = [gevent.spawn_later(LEAD_S, self._ring)]
        beside += [gevent.spawn_later(LEAD_S, self.watch.run, self.scenario.watch_s)]
        beside += [gevent.spawn(self._do, fault.at_s, fault.strike) for fault in self.scenario.faults]
        arriving = [gevent.spawn(self._arrive, traffic) for traffic in self.scenario.traffic]
        try:
            gevent.joinall(arriving, raise_error=True)
            self._asking.join(timeout=self._left_s())
        finally:
            gevent.killall(arriving)
            self._asking.kill()  # what is still open is told as unfinished
            gevent.killall(beside)
            self._conclude(time.process_time() - cpu)
        self.record.pages_balanced, self.record.pages = self.watch.balance()

    def _conclude(self, cpu_s: float) -> None:
        record = self.record
        record.seconds = self.clock()
        record.samples = self.watch.samples
        judge(record.outcomes)
        record.own = Own(
            events=self.server.costs.events,
            overhead_us=quantiles(self.server.costs.overhead_us),
            late_ms=quantiles([(one.sent_s - one.due_s) * 1e3 for one in record.outcomes if one.sent_s]),
            lag_ms=quantiles(self._lag_ms),
            cpu_share=round(cpu_s / max(record.seconds, 1e-9), 4),
        )

    def _left_s(self) -> float:
        """Until every answer has had its time."""
        return max(0.0, self.scenario.duration_s + self.scenario.drain_s - self.clock())

    def _arrive(self, traffic: Traffic) -> None:
        """Send what is due, never waiting for an answer."""
        mine = Group()
        stop = self._over[traffic.until] if traffic.until else None
        moments = times(traffic.arrivals, self.scenario.window(traffic), f"{self.scenario.seed}/{traffic.name}")
        for number, at_s in enumerate(moments):
            due = traffic.start_s + at_s
            if self._left_s() == 0:
                break  # whoever this traffic lasts as long as has had its time
            # Made before it is due: a prompt of a million tokens takes tens of milliseconds to write.
            one = job(self.scenario, traffic, number, due)
            asked = self._writer.first(one)
            body = self._body(one, [asked.text])
            wait = due - self.clock()
            if stop is not None and stop.wait(max(0.0, wait)):
                break
            if stop is None and wait > 0:
                gevent.sleep(wait)
            self.live.sent += 1
            greenlet = gevent.spawn(self._converse, one, asked, body)
            mine.add(greenlet)
            self._asking.add(greenlet)
        if traffic.until is None:
            mine.join(timeout=self._left_s())
        self._over[traffic.name].set()

    def _converse(self, one: Job, asked: Asked, body: bytes) -> None:
        """One arrival to its end: a request, or a session's turns one after another."""
        said = [asked.text]
        outcome, answer = self._ask(one, 0, one.due_s, asked, body)
        for turn, think_s in enumerate(one.think_s, 1):
            if not outcome.whole:
                return  # nobody talks on about an answer that did not come
            if not (one.again and turn % 2):  # else the same is asked once more
                asked = self._writer.later(one, turn)
                said += [answer, asked.text]
            due = outcome.ended_s + think_s
            body = self._body(one, said)
            gevent.sleep(max(0.0, due - self.clock()))
            self.live.sent += 1
            outcome, answer = self._ask(one, turn, due, asked, body)

    def _body(self, one: Job, said: list[str]) -> bytes:
        """A request about all that was said: the user's words and the answers to them in turn."""
        traffic = one.traffic
        body: dict[str, Any] = {"model": self.server.model}
        if traffic.endpoint == "chat":
            roles = ("user", "assistant")
            body["messages"] = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
        else:
            body["prompt"] = "\n\n".join(said)
        body |= {
            "max_tokens": traffic.answer_tokens,
            "temperature": traffic.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.server.is_penumbra:
            body |= {"return_timeline": True, "return_token_ids": True}
        return orjson.dumps(body | traffic.body)

    def _ask(self, one: Job, turn: int, due_s: float, asked: Asked, body: bytes) -> tuple[Outcome, str]:
        outcome = Outcome(
            traffic=one.traffic.name,
            number=one.number,
            turn=turn,
            tenant=one.tenant,
            due_s=due_s,
            expect=asked.expect,
            asked=hashlib.sha256(body).hexdigest()[:16] if one.traffic.temperature == 0 else "",
        )
        self.record.outcomes.append(outcome)
        self.live.open += 1
        answer = ""
        try:
            answer = self.server.ask(
                outcome,
                "/v1/chat/completions" if one.traffic.endpoint == "chat" else "/v1/completions",
                body,
                silence_s=self.scenario.silence_s,
                slow_bytes_per_s=one.slow_bytes_per_s,
                hang_up_after_s=one.cancel_after_s,
                hang_up_after_pieces=one.cancel_after_pieces,
            )
        except gevent.GreenletExit:
            outcome.error, outcome.ended_s = UNFINISHED, self.clock()
            raise
        finally:
            if outcome.expect and outcome.whole:
                outcome.right = outcome.expect == named(answer)
            self.live.open -= 1
            self._count(outcome)
            self._tell(outcome)
        return outcome, answer

    def _count(self, outcome: Outcome) -> None:
        live = self.live
        live.errors += bool(outcome.error)
        live.kept += keeps(self.scenario.slo, outcome)
        if outcome.counts and outcome.ttft_ms is not None:
            live.ttft_ms.append(outcome.ttft_ms)
        if outcome.counts and outcome.tpot_ms is not None:
            live.tpot_ms.append(outcome.tpot_ms)

    def _ring(self) -> None:
        """A timer that rings every TICK_S; how late it does is how long this process was busy or had to wait."""
        while True:
            began = time.monotonic()
            gevent.sleep(TICK_S)
            self._lag_ms.append(max(0.0, (time.monotonic() - began - TICK_S) * 1e3))

    def _do(self, at_s: float, name: str) -> None:
        gevent.sleep(max(0.0, at_s - self.clock()))
        told = "there is no cluster here that could be struck"
        if self._strike is not None:
            done = gevent.subprocess.run(
                [*shlex.split(self._strike), name], capture_output=True, text=True, timeout=STRIKE_S, check=False
            )
            told = (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"
        self.record.strikes.append({"at_s": round(self.clock(), 3), "strike": name, "told": told})


def tell_locust(environment: Environment, scenario: Scenario) -> Callable[[Outcome], None]:
    """Outcomes as events of Locust: its page, its tables and whatever listens to it show them under these types.

    answer (whole time), TTFT, TPOT, ITL and `timeline <part>` in ms; `cached tokens` as a count; goodput with the TTFT,
    and as a failure where the SLO was missed.
    """
    fire: Callable[..., None] = environment.events.request.fire

    def told(outcome: Outcome) -> None:
        def event(kind: str, value: float, fault: str = "") -> None:
            fire(
                request_type=kind,
                name=outcome.traffic,
                response_time=value,
                response_length=outcome.answer_tokens,
                exception=RuntimeError(fault) if fault else None,
                context={},
            )

        event("answer", (outcome.ended_s - outcome.due_s) * 1e3, outcome.error)
        if outcome.ttft_ms is not None:
            event("TTFT", outcome.ttft_ms)
        if outcome.tpot_ms is not None:
            event("TPOT", outcome.tpot_ms)
        for gap in outcome.gaps_ms:
            event("ITL", gap)
        if outcome.whole and outcome.counts:
            event("goodput", outcome.ttft_ms or 0.0, "" if keeps(scenario.slo, outcome) else "SLO missed")
            event("cached tokens", outcome.cached_tokens)
        for part, value in outcome.timeline.items():
            event(f"timeline {part}", value)

    return told


def start(environment: Environment, run: Run) -> tuple[LocalRunner, AsyncResult[None]]:
    """Have Locust start the play. -> its runner, and what is set when the play is over, or fails as it failed."""
    over: AsyncResult[None] = AsyncResult()

    class Player(User):
        @task
        def everything(self) -> None:
            try:
                run.play()
            except Exception as error:
                over.set_exception(error)
            else:
                over.set(None)
            gevent.sleep(float("inf"))  # until the runner ends it: a task that returns is begun again

    environment.user_classes = [Player]
    runner = environment.create_local_runner()
    runner.start(1, spawn_rate=1)
    gevent.spawn(locust.stats.stats_history, runner)
    return runner, over
