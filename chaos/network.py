"""Faults of networks, of Redis behind one, and pairs of faults. Each leaves the cluster whole and idle, or raises."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import redis

from chaos.cluster import until
from chaos.hosts import Host, Hosts, deafen, plug
from chaos.judge import CLIENTS, CONT, KILL, NOTICED_S, STOP, TERM, Bench, References, Row
from chaos.proxy import Proxy
from chaos.streams import Ask, Outcome, Verdict, answer
from deploy.redis import EmbeddedRedis

PARTITION_S = 30.0
BETWEEN_S = 2.0
"""The second fault of a pair follows the first by then."""
AWAY_S = 6.0
"""What is frozen, cut off or held back stays so for as long: longer than a lease."""


class Proxied(Bench):
    """Workers behind proxies, and two routers."""

    def __init__(self, cluster: Hosts, references: References, server: EmbeddedRedis) -> None:
        super().__init__(cluster, references)
        self.hosts, self._server = cluster, server

    def redis_partitioned(self) -> Row:
        """A worker, then the router, then everybody is cut off from Redis, while answers go on."""
        some = (
            [self.hosts.hosts["decode-0"].redis],
            [self.hosts.redis],
            self.hosts.to_redis(),
        )
        total, began = Verdict(), time.monotonic()
        for proxies in some:
            until_s = time.monotonic() + PARTITION_S / len(some)
            _hold(proxies, True)
            try:
                while time.monotonic() < until_s:
                    total.add(self.short.run(self.short.questions[:CLIENTS], CLIENTS)[0])
            finally:
                _hold(proxies, False)
        return self.row("F20", total, f"cut off for {time.monotonic() - began:.0f} s in all")

    def redis_fails_over(self) -> Row:
        """The replica misses the last second: a worker that died meanwhile is still in it, its next life is not."""
        with EmbeddedRedis() as replica:
            with redis.Redis(port=replica.port, socket_timeout=10.0) as client:
                client.replicaof("127.0.0.1", str(self._server.port))
                until(lambda: client.info("replication")["master_link_status"] == "up", 10.0, "no replica")

                def fail_over() -> None:
                    client.replicaof("NO", "ONE")
                    self.cluster.signal(self.cluster.busiest("decode"), KILL)
                    self.cluster.mend()
                    time.sleep(1.0)
                    self._server.stop()
                    for proxy in self.hosts.to_redis():
                        proxy.target = ("127.0.0.1", replica.port)
                        self.hosts.network.reset(proxy)

                verdict = self.strike(self.short, fail_over, 5)
                row = self.row("F21", verdict)
            # Who comes after finds an empty server where the first one was.
            self._server.start()
            for proxy in self.hosts.to_redis():
                proxy.target = ("127.0.0.1", self._server.port)
                self.hosts.network.reset(proxy)
        self.cluster.wait_until_whole()
        return row

    def one_request_at_two_routers(self) -> Row:
        """The same requests, by the same names and keys, at both; a worker dies in the middle."""
        strike = self.once(5, self.send("decode", KILL))

        def ask(number: int) -> tuple[Ask, Outcome]:
            question = self.short.questions[number // 2]
            headers = {"x-request-id": f"twice-{number // 2}", "Idempotency-Key": f"twice-{number // 2}"}
            url = self.hosts.urls[number % 2]
            heard = answer(
                url, self.short.model, question, lambda n: strike(question, n), headers=headers, salt="twice"
            )
            return question, heard

        verdict = Verdict()
        with ThreadPoolExecutor(CLIENTS) as clients:
            for question, heard in clients.map(ask, range(CLIENTS)):
                verdict.judge(self.short.of(question), heard)
        return self.row("F49", verdict)

    def a_peer_is_slow(self) -> Row:
        """One prefill worker takes a second for every piece it sends or gets; answers that run do not wait for it."""
        slow = self.hosts.hosts["prefill-0"].doors
        quiet, _ = self.short.run(self.short.questions[:4], 4)
        with ThreadPoolExecutor(2) as both:
            running = both.submit(self.short.run, self.short.questions[:4], 4)
            for door in slow:
                door.delay_s = 1.0
            try:
                late = both.submit(self.many.run, self.many.questions[:8], 4)
                beside, (others, _) = running.result()[0], late.result()
            finally:
                for door in slow:
                    door.delay_s = 0.0
        gap = max(beside.gaps_s)
        beside.add(others)
        more = f"longest gap of running answers {gap:.2f} s, without the slow peer {max(quiet.gaps_s):.2f} s"
        return self.row("F54", beside, more)

    # Pairs.

    def pairs(self, count: int, seed: int) -> Row:
        """So many pairs of faults, the second up to 2 s after the first, drawn by the seed. One worker of each role at
        most is hit, so every answer must be whole.
        """
        rng = random.Random(seed)
        total, wrong = Verdict(), []
        for number in range(count):
            faults = self._faults(rng)
            first, second = rng.sample(faults, 2)
            pause = rng.uniform(0.0, BETWEEN_S)
            reference = rng.choice((self.short, self.long))

            def hit(first: _Fault = first, second: _Fault = second, pause: float = pause) -> None:
                first.do()
                threading.Timer(pause, second.do).start()

            verdict = self.strike(reference, hit, rng.choice((0, 1, 5)))
            time.sleep(pause)  # a short answer may have ended before the second
            what = f"{first.name} + {second.name} ({number})"
            print(f"  {what}: {verdict.bad} of {verdict.streams} wrong", flush=True)
            if verdict.bad:
                wrong.append(what)
            total.add(verdict)
            self.cluster.wait_until_whole()
            self.cluster.wait_until_idle(AWAY_S + 15.0)
        more = f"{count} pairs, seed {seed}" + (f"; wrong: {', '.join(wrong)}" if wrong else "")
        return self.row("pairs", total, more)

    def _faults(self, rng: random.Random) -> list[_Fault]:
        """Every fault there is, each with its victim."""
        faults = []
        for role in ("prefill", "decode"):
            name = f"{role}-{rng.randrange(2)}"
            host = self.hosts.hosts[name]
            for word, number in (("kill", KILL), ("stop", TERM)):
                faults.append(_Fault(f"{word} {name}", partial(self.cluster.signal, name, number)))
            faults.append(_Fault(f"freeze {name}", partial(self._freeze, name)))
            faults.append(_Fault(f"reset {name}", partial(self._reset, host)))
            faults.append(_Fault(f"half-open {name}", partial(self._away, host.doors)))
            faults.append(_Fault(f"{name} without Redis", partial(self._away, (host.redis,))))
        faults.append(_Fault("Redis flushed", self._flush))
        faults.append(_Fault("Redis held", partial(self._away, self.hosts.to_redis())))
        return faults

    def _freeze(self, name: str) -> None:
        self.cluster.signal(name, STOP)
        threading.Timer(AWAY_S, self.cluster.signal, (name, CONT)).start()

    def _reset(self, host: Host) -> None:
        for door in host.doors:
            self.hosts.network.reset(door)

    def _away(self, proxies: Sequence[Proxy]) -> None:
        _hold(proxies, True)
        threading.Timer(AWAY_S, _hold, (proxies, False)).start()

    def _flush(self) -> None:
        with redis.Redis(port=self._server.port, socket_timeout=10.0) as client:
            client.flushall()


@dataclass(frozen=True, slots=True)
class _Fault:
    """One of a pair. What it takes away it gives back by itself."""

    name: str
    do: Callable[[], None]


class Apart(Bench):
    """Workers in namespaces of their own, with clocks that began at other times."""

    def __init__(self, cluster: Hosts, references: References) -> None:
        super().__init__(cluster, references)
        self.hosts = cluster

    def half_open(self) -> Row:
        """A decode worker's cable is cut in mid-answer: no FIN, no RST, no acknowledgement."""
        cut: list[Host] = []

        def cut_off() -> None:
            cut.append(self.hosts.hosts[self.cluster.busiest("decode")])
            plug(cut[0], connected=False)

        def plug_in() -> None:
            for host in cut:
                plug(host, connected=True)

        return self.row("F15", self.strike(self.short, cut_off, 5, undo=plug_in), gap_s=NOTICED_S)

    def one_way(self) -> Row:
        """What one prefill worker sends to one decode worker is lost; the other way is as it was."""
        prefill, decode = self.hosts.hosts["prefill-0"], self.hosts.hosts["decode-0"]
        deafen(prefill, decode, hears=False)
        try:
            verdict, seen = self.long.run(self.long.questions[:CLIENTS], CLIENTS)
        finally:
            deafen(prefill, decode, hears=True)
        return self.row("F16", verdict, f"the slowest answer took {max(one.seconds for one in seen):.1f} s")

    def clocks_differ(self) -> Row:
        """Answers, and one of them moves, over workers whose clocks are days apart."""
        verdict = self.strike(self.long, self.send("decode", KILL), 1)
        ahead = ", ".join(f"{host.name} {host.clock_s / 3600:.0f} h" for host in self.hosts.hosts.values())
        return self.row("F32", verdict, f"monotonic clocks ahead: {ahead}")


def _hold(proxies: Sequence[Proxy], held: bool) -> None:
    for proxy in proxies:
        proxy.hold(held)
