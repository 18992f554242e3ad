"""More load than a cluster can carry, offered by clients that do not wait for one another."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from chaos.cluster import running
from chaos.judge import VOCAB, Row

PROMPT_TOKENS, ANSWER_TOKENS = 64, 32
FIRST_S, TOKEN_S = 4.0, 0.25
"""The service level: the first token by then, and each further one so long after the last, on average."""

PATIENCE_S = 30.0
REFUSED = (408, 429, 503)
LEVELS = (2, 4, 8, 16, 32, 64)
"""Clients at once while the peak is looked for."""
LEVEL_S = 8.0
TIMES, PRESSED_S, AFTER_S = 3.0, 60.0, 25.0
CALM_SHARE = 0.7
"""Of the peak, offered afterwards."""

GOODPUT_SHARE, REJECT_S, RECOVERY_S = 0.9, 0.05, 15.0
"""What must hold."""

STILL_S = 0.02
"""So late a timer of the measuring process may ring on a machine that it shares with all it measures."""

FLAGS = ("--queue-timeout-s", "2", "--prefill-backlog-s", "2")
"""What an operator with this service level sets: who would wait for longer is told so at once."""


@dataclass(slots=True)
class Visit:
    """One request of a client. Times in seconds; `at` on the monotonic clock."""

    at: float
    status: int = 0  # 0: the connection failed
    headers_s: float = 0.0
    first_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0
    told_when: bool = False  # with Retry-After
    held_up: bool = False  # this process itself stood still meanwhile, so its times are not the cluster's

    @property
    def good(self) -> bool:
        in_time = self.total_s - self.first_s <= TOKEN_S * (ANSWER_TOKENS - 1)
        return self.tokens == ANSWER_TOKENS and self.first_s <= FIRST_S and in_time


@dataclass(slots=True, kw_only=True)
class Overload:
    """What was seen, and the rows about it."""

    peak_per_s: float
    clients: int  # with which the peak was found
    offered_per_s: float
    pressed: list[Visit] = field(repr=False)
    recovery_s: float  # infinite if it never came
    slowest_first_s: float

    def saturated(self) -> Row:
        rejected = [visit for visit in self.pressed if visit.status in REFUSED]
        told = sum(visit.told_when for visit in rejected)
        odd = Counter(visit.status for visit in self.pressed if visit.status not in (200, *REFUSED))
        timed = [visit for visit in rejected if not visit.held_up]
        p99 = share(0.99, [visit.headers_s for visit in timed])
        words = f"{len(rejected)} of {len(self.pressed)} refused, {told} of them with Retry-After, in p50 "
        words += f"{1000 * share(0.5, [v.headers_s for v in timed]):.0f} ms, p99 {1000 * p99:.0f} ms "
        words += f"(bound {1000 * REJECT_S:.0f} ms), without the {len(rejected) - len(timed)} during which the client "
        words += f"itself stood still for {1000 * STILL_S:.0f} ms; answered otherwise: {dict(odd) or 'none'}"
        ok = not odd and told == len(rejected) > 0 and p99 <= REJECT_S
        return Row(fault="F41", ok=ok, streams=len(self.pressed), measured=words)

    def recovered(self) -> Row:
        good = sum(visit.good for visit in self.pressed) / PRESSED_S
        ratio = good / self.peak_per_s
        words = (
            f"goodput {good:.1f}/s at {self.offered_per_s:.1f}/s offered for {PRESSED_S:.0f} s, {100 * ratio:.0f}% of "
        )
        words += f"the peak of {self.peak_per_s:.1f}/s with {self.clients} clients (bound {100 * GOODPUT_SHARE:.0f}%); "
        words += f"first token p99 {self.slowest_first_s:.1f} s; back to normal {self.recovery_s:.0f} s after "
        words += f"(bound {RECOVERY_S:.0f} s); good: {PROMPT_TOKENS} tokens read and {ANSWER_TOKENS} drawn, the first "
        words += f"within {FIRST_S:g} s, the others {1000 * TOKEN_S:.0f} ms apart on average"
        ok = ratio >= GOODPUT_SHARE and self.recovery_s <= RECOVERY_S
        return Row(fault="F51", ok=ok, streams=len(self.pressed), measured=words)


def overloaded(home: Path, model: Path) -> Overload:
    """Find the peak of a cluster of its own, offer three times that for a minute, and then less than it."""
    with running(home, model, 1, 1, *FLAGS) as cluster:
        gc.disable()  # a collection of what was measured so far holds up what is being measured
        try:
            return asyncio.run(_measure(cluster.url, model.name))
        finally:
            gc.enable()


async def _measure(url: str, model: str) -> Overload:
    rng = random.Random(5)
    await _closed(url, model, rng, 2, 3.0)  # whatever is done once, is done now
    found = []
    for clients in LEVELS:
        visits, seconds = await _closed(url, model, rng, clients, LEVEL_S)
        found.append((sum(visit.good for visit in visits) / seconds, clients))
        print(f"  {clients} clients: {found[-1][0]:.1f} good answers a second", flush=True)
    peak, clients = max(found)
    visits = await _open(url, model, rng, ((TIMES * peak, PRESSED_S), (CALM_SHARE * peak, AFTER_S)))
    calm_at = visits[0].at + PRESSED_S
    pressed = [visit for visit in visits if visit.at < calm_at]
    after = [visit for visit in visits if visit.at >= calm_at]
    firsts = [visit.first_s for visit in pressed if visit.tokens]
    return Overload(
        peak_per_s=peak,
        clients=clients,
        offered_per_s=len(pressed) / PRESSED_S,
        pressed=pressed,
        recovery_s=_recovery(calm_at, after),
        slowest_first_s=share(0.99, firsts),
    )


def _recovery(began: float, visits: Sequence[Visit]) -> float:
    """Seconds until all but a twentieth of those who came from then on were served well."""
    late = [visit.at - began for visit in visits if not visit.good]
    for bad_at in [0.0, *(at + 0.01 for at in late)]:
        rest = [visit for visit in visits if visit.at - began >= bad_at]
        if rest and sum(not visit.good for visit in rest) <= 0.05 * len(rest):
            return bad_at
    return float("inf")


async def _closed(url: str, model: str, rng: random.Random, clients: int, seconds: float) -> tuple[list[Visit], float]:
    """So many clients, one request after another each; -> (visits, seconds until the last was over)."""
    began = time.monotonic()
    visits = []

    async def client() -> None:
        while time.monotonic() < began + seconds:
            visits.append(await _visit(url, model, rng))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    return visits, time.monotonic() - began


async def _open(url: str, model: str, rng: random.Random, phases: Sequence[tuple[float, float]]) -> list[Visit]:
    """Clients come at random, so many a second for so many seconds in each phase, whatever became of those before."""
    visits: list[asyncio.Task[Visit]] = []
    still: list[tuple[float, float]] = []
    due = began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(_stood_still(still))
        for per_s, seconds in phases:
            began += seconds
            while due < began:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                visits.append(tasks.create_task(_visit(url, model, rng)))
                due += rng.expovariate(per_s)
        await asyncio.wait(visits)
        watch.cancel()
    for visit in (told := [visit.result() for visit in visits]):
        visit.held_up = any(begin < visit.at + visit.headers_s and end > visit.at for begin, end in still)
    return told


async def _stood_still(seen: list[tuple[float, float]]) -> None:
    """Note when this process came late to a timer, by STILL_S and more."""
    while True:
        asleep = time.monotonic()
        await asyncio.sleep(0.005)
        if (awake := time.monotonic()) - asleep >= STILL_S:
            seen.append((asleep, awake))


async def _visit(url: str, model: str, rng: random.Random) -> Visit:
    body = json.dumps(
        {
            "model": model,
            "prompt": [rng.randrange(3, VOCAB) for _ in range(PROMPT_TOKENS)],
            "max_tokens": ANSWER_TOKENS,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    parts, visit = urlsplit(url), Visit(time.monotonic())
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            headers = await reader.readuntil(b"\r\n\r\n")
            visit.headers_s = time.monotonic() - visit.at
            visit.status = int(headers.split(b" ", 2)[1])
            visit.told_when = b"\r\nretry-after:" in headers.lower()
            await _read(reader, visit)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
        pass  # what there is of the visit says so
    finally:
        if writer is not None:
            writer.close()
    visit.total_s = time.monotonic() - visit.at
    return visit


async def _read(reader: asyncio.StreamReader, visit: Visit) -> None:
    async for line in reader:
        if visit.status == 200 and line.startswith(b"data: {"):
            event = json.loads(line[6:])
            for choice in event.get("choices", ()):
                if fresh := len(choice.get("token_ids") or ()):
                    visit.tokens += fresh
                    visit.first_s = visit.first_s or time.monotonic() - visit.at


def share(of: float, values: Sequence[float]) -> float:
    """The value that this share of them stays below; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(of * len(ordered)))] if ordered else 0.0
