"""Striking a cluster while it answers, and what became of the answers and the pages."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from chaos.cluster import Cluster
from chaos.streams import Ask, Reference, Verdict

LEAK_S = 15.0
"""Everything a fault left behind is back by then."""

NOTICED_S = 5.0
"""A stream is never silent for longer, whoever froze or vanished."""

KILLED_S = 2.0
"""And so quickly a router knows that a worker was killed."""
WATCHED_S = 30.0

CLIENTS = 8
VOCAB = 250

KILL, STOP, CONT, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one fault did: `ok` when its promise held for all `streams`."""

    fault: str
    ok: bool
    streams: int
    measured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """`long` asks long prompts, which spend seconds in prefill; `short` ones spend theirs in decode; `many` are quickly
    answered.
    """

    many: Reference
    short: Reference
    long: Reference


class Bench:
    """A cluster, what it answers undisturbed, and the ways to disturb it."""

    def __init__(self, cluster: Cluster, references: References) -> None:
        self.cluster = cluster
        self.many, self.short, self.long = (
            reference.at(cluster.url) for reference in (references.many, references.short, references.long)
        )
        self._retried = 0.0
        self._watching: list[threading.Thread] = []
        self._random = random.Random(7)

    def strike(
        self, reference: Reference, hit: Callable[[], None], at: int, *, undo: Callable[[], None] = lambda: None
    ) -> Verdict:
        """All of `reference`'s answers at once; `hit` when the first has `at` tokens, or at once with 0."""
        once = threading.Lock()

        def on_token(ask: Ask, count: int) -> bool:
            if count >= at and once.acquire(blocking=False):
                hit()
            return True

        try:
            if at == 0 and once.acquire(blocking=False):
                threading.Timer(0.35, hit).start()
            verdict, _ = reference.run(reference.questions[:CLIENTS], CLIENTS, on_token)
        finally:
            undo()
        return verdict

    def row(self, fault: str, verdict: Verdict, more: str = "", *, gap_s: float = math.inf) -> Row:
        """Wait for the cluster to be whole and idle again, and say how it went. No stream may have been silent for
        longer than `gap_s` once it had begun.
        """
        time.sleep(1.0)  # who was just killed may look alive for a moment
        whole_s = self.cluster.wait_until_whole()
        idle_s = self.cluster.wait_until_idle(LEAK_S)
        retried = sum(
            value for name, value in self.router().items() if name.startswith("penumbra_request_retries_total")
        )
        words = [f"{max(0.0, retried - self._retried):.0f} attempts failed"]
        self._retried = retried
        gap = max(verdict.gaps_s, default=0.0)
        words += [f"longest gap {gap:.2f} s", f"whole after {whole_s:.0f} s", "0 pages held"]
        if idle_s > 1:
            words.append(f"idle after {idle_s:.1f} s")
        if verdict.why:
            words.append(f"{verdict.bad} not as they should be, first: {verdict.why[0]}")
        words += [more] if more else []
        return Row(fault=fault, ok=not verdict.bad and gap <= gap_s, streams=verdict.streams, measured="; ".join(words))

    def hit_and_watch(self, role: str, number: signal.Signals, noticed_s: list[float]) -> Callable[[], None]:
        """Sends the signal to the busiest worker of the role, and adds how long the router took it to serve."""

        def hit() -> None:
            name = self.cluster.busiest(role)
            self.cluster.signal(name, number)
            began = time.monotonic()

            def serves() -> bool:
                return any(w["worker_id"] == name and w["state"] == "serving" for w in self.cluster.workers())

            def watch() -> None:
                while serves() and time.monotonic() - began < WATCHED_S:
                    time.sleep(0.02)
                noticed_s.append(time.monotonic() - began)

            watching = threading.Thread(target=watch)
            watching.start()
            self._watching.append(watching)

        return hit

    def watched(self) -> None:
        """Wait for those that watch."""
        while self._watching:
            self._watching.pop().join()

    def send(self, role: str, number: signal.Signals) -> Callable[[], None]:
        return lambda: self.cluster.signal(self.cluster.busiest(role), number)

    def once(self, at: int, hit: Callable[[], None]) -> Callable[[Ask, int], bool]:
        once = threading.Lock()

        def on_token(ask: Ask, count: int) -> bool:
            if count >= at and once.acquire(blocking=False):
                hit()
            return True

        return on_token

    def router(self) -> dict[str, float]:
        return self.cluster.samples(self.cluster.url.removeprefix("http://"))
