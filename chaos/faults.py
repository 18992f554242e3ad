"""The faults that are done to a running cluster. Each leaves it whole and idle, or raises ChaosFailed."""

from __future__ import annotations

import functools
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import redis

from chaos.cluster import ChaosFailed, LocalCluster, NotHere, is_alive, until
from chaos.judge import CLIENTS, CONT, KILL, KILLED_S, LEAK_S, NOTICED_S, STOP, TERM, Bench, References, Row
from chaos.streams import Ask, Outcome, Reference, Verdict, answer
from deploy.state import fetch_json, restart, scale

CANCELLED_S = 1.0
"""Both sides have heard by then that a client has left, and hold nothing for it."""

CAMPAIGN_S = 3_000.0
HERD = 300
PERSISTENT = 60
"""Times a client of the herd comes back."""
CALM = 1.2
"""Attempts for each request: more would be a storm."""

STARVED_BYTES = 16 << 20
LIMIT, USAGE = "memory.limit_in_bytes", "memory.usage_in_bytes"
MEMORY = Path("/sys/fs/cgroup/memory")


class Local(Bench):
    """What `penumbra up` runs, and what is done to its processes."""

    def __init__(self, cluster: LocalCluster, references: References, points: Path, disk: Path | None) -> None:
        """`points` is the folder of its failpoints, `disk` the root of a small file system, of its own, that the
        cluster's state and logs are on.
        """
        super().__init__(cluster, references)
        self.local, self._points, self._disk = cluster, points, disk

    # Prefill.

    def prefill_killed_in_queue(self) -> Row:
        return self._at("F01", "prefill.run", self.long)

    def prefill_killed_in_prompt(self) -> Row:
        return self._at("F02", "prefill.progress", self.long)

    def prefill_killed_when_ready(self) -> Row:
        return self._at("F03", "prefill.finished", self.long)

    def prefill_killed_in_transfer(self) -> Row:
        """While the decode workers are busy with other answers."""
        with ThreadPoolExecutor(1) as beside:
            busy = beside.submit(self.short.run, self.short.questions[:CLIENTS], CLIENTS)
            time.sleep(1.0)
            verdict = self._strike_at("prefill.offer", self.long)
            verdict.add(busy.result()[0])
        return self.row("F04", verdict)

    def prefill_frozen(self) -> Row:
        """At its first word of progress; thawed when all answers are there."""
        try:
            verdict = self._strike_at("prefill.progress", self.long, "freeze")
        finally:
            self._thaw()
        return self.row("F14", verdict, gap_s=NOTICED_S)

    def prefill_stopped(self) -> Row:
        return self.row("F44", self.strike(self.long, self.send("prefill", TERM), 0))

    # Decode.

    def decode_killed_before_transfer(self) -> Row:
        return self._at("F05", "decode.start", self.long)

    def decode_killed_in_transfer(self) -> Row:
        return self._at("F06", "decode.read", self.long)

    def decode_killed_before_its_end(self) -> Row:
        return self._at("F08", "decode.finished", self.short)

    def decode_killed_at_token(self) -> Row:
        total, noticed_s = Verdict(), list[float]()
        longest = max(ask.max_tokens for ask in self.short.questions)
        for k in (1, 2, longest // 2, longest - 1):
            self.cluster.wait_until_whole()
            total.add(self.strike(self.short, self.hit_and_watch("decode", KILL, noticed_s), k))
            self.watched()
        return self._noticed(self.row("F07", total), noticed_s, KILLED_S)

    def decode_frozen(self) -> Row:
        noticed_s: list[float] = []
        hit = self.hit_and_watch("decode", STOP, noticed_s)
        try:
            verdict = self.strike(self.short, hit, 5)
            self.watched()
        finally:
            self._thaw()
        return self._noticed(self.row("F13", verdict, gap_s=NOTICED_S), noticed_s, NOTICED_S)

    def _noticed(self, row: Row, noticed_s: list[float], bound_s: float) -> Row:
        words = f"{row.measured}; noticed after {max(noticed_s):.2f} s (bound {bound_s:g} s)"
        return replace(row, ok=row.ok and max(noticed_s) <= bound_s, measured=words)

    def _thaw(self) -> None:
        for worker in self.cluster.wanted():
            self.cluster.signal(worker, CONT)

    def decode_stopped(self) -> Row:
        return self.row("F45", self.strike(self.short, self.send("decode", TERM), 5))

    def _at(self, fault: str, point: str, reference: Reference) -> Row:
        return self.row(fault, self._strike_at(point, reference))

    def _strike_at(self, point: str, reference: Reference, action: str = "kill") -> Verdict:
        """The first worker that gets to the failpoint dies there, or stands still."""
        armed = self._points / point
        armed.write_text(action)
        try:
            return reference.run(reference.questions[:CLIENTS], CLIENTS)[0]
        finally:
            reached = not armed.exists()
            armed.unlink(missing_ok=True)
            if not reached:
                raise ChaosFailed(f"nobody got to {point}")

    # Poison.

    def poison(self) -> Row:
        """A prompt of which every worker dies that computes it, and one whose every decode worker dies, each in the
        midst of others: two workers are lost to each, it is refused from then on, and the others are answered.
        """
        total, words = Verdict(), []
        state = self.local.state()
        counts = {"prefill": state.prefill, "decode": state.decode}
        # Somebody is left to answer the others when two have died.
        more = {role: max(3, count) for role, count in counts.items()}
        scale(self.local.folder, state.cluster, more, timeout_s=600.0)
        for point, token, reference in (("prefill.progress", 255, self.long), ("decode.tokens", 256, self.short)):
            deadly = replace(reference.questions[0], prompt=(*reference.questions[0].prompt, token))
            (self._points / point).write_text(f"kill always {token}")
            before = set(self.cluster.pids().values())
            dead: set[int] = set()
            done = threading.Event()

            def count(dead: set[int] = dead, done: threading.Event = done, before: set[int] = before) -> None:
                while not done.wait(0.1):
                    dead |= {pid for pid in before | set(self.cluster.pids().values()) if not is_alive(pid)}

            counter = threading.Thread(target=count)
            counter.start()
            try:
                with ThreadPoolExecutor(1) as beside:
                    poisoned = beside.submit(answer, self.cluster.url, reference.model, deadly)
                    total.add(reference.run(reference.questions[1:CLIENTS], CLIENTS)[0])
                    first = poisoned.result()
                self.cluster.wait_until_whole()
                again = answer(self.cluster.url, reference.model, deadly)
            finally:
                done.set()
                counter.join()
                (self._points / point).unlink()
            if "request_quarantined" not in first.error or "request_quarantined" not in again.error or len(dead) != 2:
                total.altered += 1
                total.why.append(f"{len(dead)} died at {point}; {first.error}; and then: {again.error}")
            words.append(f"{len(dead)} workers died at {point}")
        scale(self.local.folder, state.cluster, counts, timeout_s=600.0)
        return self.row("F33", total, "; ".join(words))

    # Router.

    def router_killed(self) -> Row:
        """Streams must break, and none may say that it is done."""
        _, seen = self.short.run(
            self.short.questions[:CLIENTS], CLIENTS, self.once(5, lambda: self.cluster.signal("router", KILL))
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
        on_token = self.once(5, lambda: self.cluster.signal("router", TERM))
        _, seen = self.short.run(self.short.questions[:CLIENTS], CLIENTS, on_token)
        verdict, refused = Verdict(), 0
        for ask, one in zip(self.short.questions, seen, strict=False):
            if one.status == 503 and "draining" in one.error:
                refused += 1
            else:
                verdict.judge(self.short.of(ask), one)
        return self.row("F10", verdict, f"{refused} came too late and were told so")

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
        on_token = self.once(at, hit) if at else lambda ask, count: True
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
        state = self.local.state()
        counts = {"prefill": state.prefill, "decode": state.decode}
        total = Verdict()
        for more in (1, 0):
            wanted = {role: count + more for role, count in counts.items()}
            scaling = functools.partial(scale, self.local.folder, state.cluster, wanted, timeout_s=600.0)
            total.add(self._while(scaling))
        return self.row("F60", total)

    def rolled(self) -> Row:
        """Every process is replaced, one after another, under load."""
        before, began = self.cluster.pids(), time.monotonic()
        verdict = self._while(lambda: restart(self.local.folder, self.local.state().cluster, timeout_s=600.0))
        more = f"{len(before)} processes replaced in {time.monotonic() - began:.0f} s"
        return self.row("rolling", verdict, more)

    def _while(self, work: Callable[[], object]) -> Verdict:
        """Answers for as long as the work takes. Raises what it raises."""
        total = Verdict()
        with ThreadPoolExecutor(1) as beside:
            working = beside.submit(work)
            while not working.done():
                total.add(self.short.run(self.short.questions[:CLIENTS], CLIENTS)[0])
            working.result()
        return total

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
        member = next(member for member in self.local.state().members if member.name == "redis")
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
        row = self.row("F23", Verdict(streams=left), f"everything free {longest:.1f} s after the last one left")
        return replace(row, ok=row.ok and longest <= CANCELLED_S)

    # The machine.

    def decode_out_of_memory(self) -> Row:
        """The kernel ends a worker whose memory group is full, in mid-answer."""
        name = "decode-0"
        with _memory_group() as group:
            before = self.cluster.pid(name)
            self.cluster.signal(name, KILL)
            # Memory counts for the group a process was in when it took it: in with the next one before it takes any.
            until(lambda: self.cluster.pid(name) != before, 60.0, f"{name} was not started again")
            (group / "cgroup.procs").write_text(str(self.cluster.pid(name)))
            self.cluster.wait_until_whole()
            killed = self.cluster.pid(name)

            def starve() -> None:
                used = int((group / USAGE).read_text())
                (group / LIMIT).write_text(str(used + STARVED_BYTES))
                hungry = f"import time; input(); b = bytearray(b'x') * {4 * STARVED_BYTES}; time.sleep(1)"
                eater = subprocess.Popen([sys.executable, "-c", hungry], stdin=subprocess.PIPE)
                (group / "cgroup.procs").write_text(str(eater.pid))
                threading.Thread(target=eater.communicate, args=(b"\n",)).start()

            verdict = self.strike(self.short, starve, 5)
            until(lambda: self.cluster.pid(name) != killed, 30.0, f"{name} was not killed by the kernel")
            return self.row("F40", verdict)

    def disk_full(self) -> Row:
        """No byte can be written to the logs or the state file, and a worker dies meanwhile."""
        if self._disk is None:
            raise NotHere("needs root, for a file system of its own")
        filler = self._disk / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                for size in (1 << 20, 1):
                    with suppress(OSError):
                        while True:
                            file.write(bytes(size))
            self.cluster.signal(self.cluster.busiest("decode"), KILL)

        def free() -> None:
            time.sleep(3.0)  # the worker is started again on the full disk
            filler.unlink()

        return self.row("F42", self.strike(self.short, fill, 5, undo=free))

    def no_descriptors(self) -> Row:
        """The router can open no more files; then it can again."""
        pid = self.cluster.pid("router")
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        refused = 0

        def exhaust() -> None:
            nonlocal refused
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds(), before[1]))
            for _ in range(4):
                refused += fetch_json(f"{self.cluster.url}/liveness", timeout_s=0.5) is None

        def release() -> None:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

        verdict = self.strike(self.short, exhaust, 5, undo=release)
        released = time.monotonic()
        verdict.add(self.short.run(self.short.questions[:1], 1)[0])
        back_s = time.monotonic() - released - max(verdict.gaps_s[-1], 0.0)
        row = self.row(
            "F43", verdict, f"{refused} of 4 others not answered meanwhile; answering again within {back_s:.1f} s"
        )
        return row

    def everybody_comes_at_once(self) -> Row:
        """The router restarts, and all its clients come back in the same moment; those told to come later do so."""
        before = self.cluster.pid("router")
        self.cluster.signal("router", KILL)
        until(lambda: self.cluster.pid("router") != before, 60.0, "the router was not started again")
        questions = [self.many.questions[i % 4] for i in range(HERD)]
        began = time.monotonic()

        def come(ask: Ask) -> Outcome:
            for _ in range(PERSISTENT):
                heard = answer(self.cluster.url, self.many.model, ask)
                if heard.status not in (0, 503):
                    break
                time.sleep(heard.retry_after_s or random.uniform(0.1, 1.0))
            return heard

        verdict = Verdict()
        with ThreadPoolExecutor(HERD) as clients:
            for ask, heard in zip(questions, clients.map(come, questions), strict=True):
                verdict.judge(self.many.of(ask), heard)
        seconds = time.monotonic() - began
        attempts = 1 + self._retries() / HERD
        more = f"{HERD} clients done in {seconds:.0f} s; {attempts:.2f} attempts for each request that was let in"
        row = self.row("F50", verdict, more)
        return replace(row, ok=row.ok and attempts <= CALM)

    def _retries(self) -> float:
        return sum(n for name, n in self.router().items() if name.startswith("penumbra_request_retries_total"))

    # Many.

    def campaign(
        self, streams: int, kills: int, clients: int, steady_s: float
    ) -> tuple[Verdict, int, dict[str, float]]:
        """Keep `clients` asking, and kill a worker whenever the cluster has been whole for `steady_s`, until there were
        at least so many answers and so many kills. -> (verdict, kills, what moving took in seconds: mean for pages and
        for replay)
        """
        before = self._moves()
        done = threading.Event()
        total, killed, give_up = Verdict(), 0, time.monotonic() + CAMPAIGN_S

        def kill() -> None:
            nonlocal killed
            while not done.wait(steady_s):
                try:
                    self.cluster.wait_until_whole(120.0)
                    if done.is_set():
                        return
                    victims = [worker["worker_id"] for worker in self.cluster.workers()]
                    self.cluster.signal(self._random.choice(victims), KILL)
                    killed += 1
                except (ChaosFailed, IndexError):
                    continue  # not whole yet: nobody is killed meanwhile

        def ask() -> Verdict:
            mine = Verdict()
            while (total.streams + clients < streams or killed < kills) and time.monotonic() < give_up:
                question = self._random.choice(self.many.questions)
                mine.judge(self.many.of(question), answer(self.many.url, self.many.model, question))
                with counting:
                    total.streams += 1
            return mine

        counting = threading.Lock()
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with ThreadPoolExecutor(clients) as pool:
                verdicts = [one.result() for one in [pool.submit(ask) for _ in range(clients)]]
        finally:
            done.set()
            killer.join()
        verdict = Verdict()
        for one in verdicts:
            verdict.add(one)
        after = self._moves()
        return verdict, killed, {name: after[name] - before.get(name, 0.0) for name in after}

    def _moves(self) -> dict[str, float]:
        return {
            name: value for name, value in self.router().items() if name.startswith("penumbra_request_move_seconds_")
        }


def _stays(most: int, ask: Ask, count: int) -> bool:
    """A client that hangs up at so many tokens."""
    return count < most


@contextmanager
def _memory_group() -> Iterator[Path]:
    """A memory group without a limit yet; what is left in it goes back to the root."""
    if not (MEMORY / LIMIT).exists() and not (MEMORY / "cgroup.procs").exists():
        raise NotHere(f"needs a memory group under {MEMORY}")
    group = MEMORY / f"penumbra-chaos-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise NotHere(f"needs a memory group of its own: {error}") from error
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (MEMORY / "cgroup.procs").write_text(pid)
        group.rmdir()
