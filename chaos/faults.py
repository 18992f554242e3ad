"""The faults that are done to a running cluster. Each leaves it whole and idle, or raises ChaosFailed."""

from __future__ import annotations

import functools
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from chaos.cluster import ChaosFailed, Cluster
from chaos.streams import Ask, Reference, Verdict
from deploy import local

LEAK_S = 15.0
"""Everything a fault left behind is back by then."""

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


class Bench:
    """A cluster, what it answers undisturbed, and the ways to disturb it."""

    def __init__(self, cluster: Cluster, many: Reference, short: Reference, long: Reference) -> None:
        """`long` asks long prompts, which spend seconds in prefill; `short` ones spend theirs in decode; `many` are
        quickly answered.
        """
        self.cluster, self.many, self.short, self.long = cluster, many, short, long
        self._retried = 0.0
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

    def row(self, fault: str, verdict: Verdict, more: str = "") -> Row:
        """Wait for the cluster to be whole and idle again, and say how it went."""
        time.sleep(1.0)  # who was just killed may look alive for a moment
        whole_s = self.cluster.wait_until_whole()
        idle_s = self.cluster.wait_until_idle(LEAK_S)
        retried = sum(
            value for name, value in self._router().items() if name.startswith("penumbra_request_retries_total")
        )
        words = [f"{max(0.0, retried - self._retried):.0f} attempts failed"]
        self._retried = retried
        words += [f"longest gap {max(verdict.gaps_s, default=0):.2f} s", f"whole after {whole_s:.0f} s", "0 pages held"]
        if idle_s > 1:
            words.append(f"idle after {idle_s:.1f} s")
        if verdict.why:
            words.append(f"{verdict.bad} not as they should be, first: {verdict.why[0]}")
        words += [more] if more else []
        return Row(fault=fault, ok=not verdict.bad, streams=verdict.streams, measured="; ".join(words))

    def send(self, role: str, number: signal.Signals) -> Callable[[], None]:
        return lambda: self.cluster.signal(self.cluster.busiest(role), number)

    # Prefill.

    def prefill_killed_in_queue(self) -> Row:
        return self.row("F01", self.strike(self.long, self.send("prefill", KILL), 0))

    def prefill_killed_in_prompt(self) -> Row:
        return self.row("F02", self.strike(self.long, self.send("prefill", KILL), 0))

    def prefill_killed_when_ready(self) -> Row:
        return self.row("F03", self.strike(self.short, self.send("prefill", KILL), 1))

    def prefill_killed_beside_load(self) -> Row:
        return self.row("F04", self.strike(self.long, self.send("prefill", KILL), 1))

    def prefill_frozen(self) -> Row:
        return self._frozen("F14", "prefill", self.long, 0)

    def prefill_stopped(self) -> Row:
        return self.row("F44", self.strike(self.long, self.send("prefill", TERM), 0))

    # Decode.

    def decode_killed_in_prompt(self) -> Row:
        return self.row("F05", self.strike(self.long, self.send("decode", KILL), 0))

    def decode_killed_in_transfer(self) -> Row:
        return self.row("F06", self.strike(self.long, self.send("decode", KILL), 1))

    def decode_killed_at_token(self) -> Row:
        total = Verdict()
        longest = max(ask.max_tokens for ask in self.short.questions)
        for k in (1, 2, longest // 2, longest - 1):
            self.cluster.wait_until_whole()
            verdict = self.strike(self.short, self.send("decode", KILL), k)
            total.streams += verdict.streams
            total.lost, total.doubled, total.altered = (
                total.lost + verdict.lost,
                total.doubled + verdict.doubled,
                total.altered + verdict.altered,
            )
            total.gaps_s += verdict.gaps_s
            total.why += verdict.why
        return self.row("F07", total)

    def decode_frozen(self) -> Row:
        return self._frozen("F13", "decode", self.short, 5)

    def decode_stopped(self) -> Row:
        return self.row("F45", self.strike(self.short, self.send("decode", TERM), 5))

    def _frozen(self, fault: str, role: str, reference: Reference, at: int) -> Row:
        frozen: list[str] = []

        def freeze() -> None:
            frozen.append(self.cluster.busiest(role))
            self.cluster.signal(frozen[0], STOP)

        def thaw() -> None:
            for name in frozen:
                self.cluster.signal(name, CONT)

        return self.row(fault, self.strike(reference, freeze, at, undo=thaw))

    # Router.

    def router_killed(self) -> Row:
        """Streams must break, and none may say that it is done."""
        _, seen = self.short.run(
            self.short.questions[:CLIENTS], CLIENTS, self._once(5, lambda: self.cluster.signal("router", KILL))
        )
        verdict = Verdict(streams=len(seen))
        for ask, one in zip(self.short.questions, seen, strict=False):
            whole = one.ids == self.short.of(ask)
            if one.ids != self.short.of(ask)[: len(one.ids)] or (one.done and not whole):
                verdict.altered += 1
                verdict.why.append(f"{len(one.ids)} tokens and done={one.done}: {one.error}")
        broken = sum(not one.done for one in seen)
        return self.row("F09", verdict, f"{broken} of {len(seen)} streams broke, none of them with [DONE]")

    def router_stopped(self) -> Row:
        """What it had must end whole; what came too late for it must be told so before anything else."""
        on_token = self._once(5, lambda: self.cluster.signal("router", TERM))
        _, seen = self.short.run(self.short.questions[:CLIENTS], CLIENTS, on_token)
        verdict, refused = Verdict(), 0
        for ask, one in zip(self.short.questions, seen, strict=False):
            if one.status == 503 and "draining" in one.error:
                refused += 1
            else:
                verdict.judge(self.short.of(ask), one)
        return self.row("F10", verdict, f"{refused} came too late and were told so")

    def _once(self, at: int, hit: Callable[[], None]) -> Callable[[Ask, int], bool]:
        once = threading.Lock()

        def on_token(ask: Ask, count: int) -> bool:
            if count >= at and once.acquire(blocking=False):
                hit()
            return True

        return on_token

    # All of a kind.

    def no_prefill(self) -> Row:
        return self._nobody("F11", "prefill", 0)

    def no_decode(self) -> Row:
        return self._nobody("F12", "decode", 5)

    def _nobody(self, fault: str, role: str, at: int) -> Row:
        """Every answer is whole or ends in a clean error; how long the errors took."""

        def hit() -> None:
            for worker in self.cluster.workers(role):
                self.cluster.signal(worker["worker_id"], KILL)

        if at == 0:
            hit()
        on_token = self._once(at, hit) if at else lambda ask, count: True
        _, seen = self.short.run(self.short.questions[:CLIENTS], CLIENTS, on_token)
        verdict = Verdict(streams=len(seen))
        for ask, one in zip(self.short.questions, seen, strict=False):
            right = one.ids == self.short.of(ask)[: len(one.ids)]
            clean = one.status == 503 or (one.status == 200 and bool(one.error) and not one.done)
            if not right or (len(one.ids) < ask.max_tokens and not clean):
                verdict.altered += 1
                verdict.why.append(f"{len(one.ids)} tokens, status {one.status}, {one.error}")
        whole = sum(one.done for one in seen)
        slowest = max(one.seconds for one in seen)
        more = f"{whole} answers whole, {len(seen) - whole} clean errors, the last after {slowest:.1f} s"
        return self.row(fault, verdict, more)

    def everybody_restarts(self) -> Row:
        for worker in self.cluster.workers():
            self.cluster.signal(worker["worker_id"], KILL)
        time.sleep(2.0)  # they are seen to be gone
        self.cluster.wait_until_whole()
        return self.row("F52", self.short.run(self.short.questions[:CLIENTS], CLIENTS)[0])

    def scaled(self) -> Row:
        state = self.cluster.state()
        counts = {"prefill": state.prefill, "decode": state.decode}
        total = Verdict()
        for more in (1, 0):
            wanted = {role: count + more for role, count in counts.items()}
            scaling = threading.Thread(
                target=local.scale, args=(self.cluster.folder, state.cluster, wanted), kwargs={"timeout_s": 600.0}
            )
            scaling.start()
            while scaling.is_alive():
                verdict, _ = self.short.run(self.short.questions[:CLIENTS], CLIENTS)
                total.streams += verdict.streams
                total.lost, total.altered = total.lost + verdict.bad, total.altered
                total.why += verdict.why
                total.gaps_s += verdict.gaps_s
        return self.row("F60", total)

    # Redis.

    def redis_killed(self) -> Row:
        return self.row("F17", self.strike(self.short, lambda: self.cluster.signal("redis", KILL), 5))

    def redis_flushed(self) -> Row:
        return self.row("F18", self.strike(self.short, lambda: self._redis("FLUSHALL"), 5))

    def redis_paused(self) -> Row:
        return self.row("F19", self.strike(self.short, lambda: self._redis("CLIENT", "PAUSE", "5000", "ALL"), 2))

    def redis_full(self) -> Row:
        verdict = self.strike(
            self.short,
            lambda: self._redis("CONFIG", "SET", "maxmemory", "1"),
            2,
            undo=lambda: self._redis("CONFIG", "SET", "maxmemory", "0"),
        )
        return self.row("F22", verdict)

    def _redis(self, *words: str) -> None:
        member = next(member for member in self.cluster.state().members if member.name == "redis")
        process = member.process()
        if process is None:
            raise ChaosFailed("Redis is gone before anything was done to it.")
        port = next(c.laddr.port for c in process.net_connections("tcp") if c.status == "LISTEN")
        with redis.Redis(port=port, socket_timeout=10.0) as client:
            client.execute_command(*words)

    # Clients.

    def clients_leave(self) -> Row:
        """Hang up at every stage, and measure how long anything is held for them."""
        longest = 0.0
        left = 0
        for reference, at in ((self.long, 0), (self.long, 1), (self.short, 1), (self.short, 5)):
            stages = reference.questions[:CLIENTS]
            reference.run(stages, CLIENTS, functools.partial(_stays, max(at, 1)))
            left += len(stages)
            longest = max(longest, self.cluster.wait_until_idle(LEAK_S))
        return self.row("F23", Verdict(streams=left), f"everything free {longest:.1f} s after the last one left")

    # Many.

    def campaign(self, streams: int, clients: int, steady_s: float) -> tuple[Verdict, int, dict[str, float]]:
        """Keep `clients` asking until `streams` have been answered, and kill a worker whenever the cluster has been
        whole for `steady_s`. -> (verdict, kills, what moving took in seconds: mean for pages and for replay)
        """
        before = self._moves()
        questions = [self._random.choice(self.many.questions) for _ in range(streams)]
        done = threading.Event()
        kills = 0

        def kill() -> None:
            nonlocal kills
            while not done.wait(steady_s):
                try:
                    self.cluster.wait_until_whole(120.0)
                    if done.is_set():
                        return
                    victims = [worker["worker_id"] for worker in self.cluster.workers()]
                    self.cluster.signal(self._random.choice(victims), KILL)
                    kills += 1
                except (ChaosFailed, IndexError):
                    continue  # not whole yet: nobody is killed meanwhile

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            verdict, _ = self.many.run(questions, clients)
        finally:
            done.set()
            killer.join()
        after = self._moves()
        moved = {name: after[name] - before.get(name, 0.0) for name in after}
        return verdict, kills, moved

    def _router(self) -> dict[str, float]:
        return self.cluster.samples(self.cluster.url.removeprefix("http://"))

    def _moves(self) -> dict[str, float]:
        return {
            name: value for name, value in self._router().items() if name.startswith("penumbra_request_move_seconds_")
        }


def _stays(most: int, ask: Ask, count: int) -> bool:
    """A client that hangs up at so many tokens."""
    return count < most
