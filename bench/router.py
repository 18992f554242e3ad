"""What a router costs: ours in front of a fixed-delay gRPC engine, others in front of an equivalent HTTP engine.

All are driven by the same client, in turns within one run, beside the HTTP engine without a router, whose times are
what "added" is measured against. The engine's delay is the same for all. Ours is charged for tokenizing, for two gRPC
calls to each request and for making the text; the others pass bytes on.

The others are installed from PyPI into an environment of their own under build/, the first time they are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httptools
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from bench.fixed_delay import Pace
from bench.record import append_rows, commit, load, machine
from deploy.redis import EmbeddedRedis, free_port
from engine.model.tiny import tokenizer_json

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"sglang-router": "0.3.2", "vllm-router": "0.1.17"}
VOCAB_SIZE = 129_280
MAX_CONTEXT = 1 << 20
DELAY_MS = 5
READY_S = 60.0
PROMPTS = {16: 300, 4_096: 150, 900_000: 8}  # tokens -> requests that are timed, one after the other
STREAMS, STREAM_TOKENS = 32, 256
BURSTS = ((1, 20), (4, 20), (STREAM_TOKENS, 0))  # so many tokens are ready together, each so many milliseconds
PARALLEL, PARALLEL_REQUESTS = 16, 800
LEAST_CPU_S, MOST_ROUNDS = 0.2, 10
"""CPU time is told in steps of 10 ms: streams are repeated until there is enough of it."""


@dataclass(slots=True)
class Target:
    """Something that completes prompts. `process` is the router's, whose CPU time counts; None: no router."""

    name: str
    port: int
    process: psutil.Process | None
    takes_ids: bool = True  # or text only

    def cpu_s(self) -> float:
        if self.process is None:
            return 0.0
        family = [self.process, *self.process.children(recursive=True)]
        return sum(t.user + t.system for t in (process.cpu_times() for process in family))


# The client


@dataclass(slots=True)
class Answer:
    """Times are seconds since the request was written."""

    status: int = 0
    first_s: float = 0.0  # its first bytes
    done_s: float = 0.0
    body: bytearray = field(default_factory=bytearray)


class Connection(asyncio.Protocol):
    """One kept-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._parser: Any = None
        self._written = 0.0

    @classmethod
    async def open(cls, target: Target) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", target.port)
        return connection

    async def post(self, body: bytes) -> Answer:
        assert self._transport is not None
        self._answer, self._done = Answer(), asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self._written = time.perf_counter()
        self._transport.writelines([head.encode(), body])
        async with asyncio.timeout(120):
            answer = await self._done
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {bytes(answer.body[:500])!r}")
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio and httptools call these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's classes

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        assert self._answer is not None
        if not self._answer.body:
            self._answer.first_s = time.perf_counter() - self._written
        self._answer.body += data

    def on_message_complete(self) -> None:
        assert self._answer is not None
        assert self._done is not None
        self._answer.done_s = time.perf_counter() - self._written
        self._answer.status = self._parser.get_status_code()
        self._done.set_result(self._answer)


def body_of(target: Target, prompt_tokens: int, max_tokens: int, **more: Any) -> bytes:
    """Token ids, so that all do the same work: text would be tokenized in our router, but in the engines behind theirs.
    A router that takes none gets them as a text of as many bytes.
    """
    rng = random.Random(prompt_tokens)
    ids = [rng.randrange(3, VOCAB_SIZE) for _ in range(prompt_tokens)]
    body = {
        "prompt": ids if target.takes_ids else ",".join(map(str, ids)),
        "model": "fixed",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        **({"seed": Pace(delay_ms=DELAY_MS).seed} | more),
    }
    return json.dumps(body, separators=(",", ":")).encode()


# The measurements


async def latencies(targets: list[Target], prompt_tokens: int, count: int) -> list[dict[str, object]]:
    """One request at a time, each target in turn: whole answers of one token, and the first chunk of a stream."""
    rows: list[dict[str, object]] = []
    for stream in (False, True):
        more = {"stream": True} if stream else {}
        bodies = [body_of(target, prompt_tokens, 1, **more) for target in targets]
        connections = [await Connection.open(target) for target in targets]
        times: dict[str, list[float]] = {target.name: [] for target in targets}
        for i in range(count + max(2, count // 10)):
            for target, connection, body in zip(targets, connections, bodies, strict=True):
                answer = await connection.post(body)
                if i >= max(2, count // 10):  # what comes before warms up
                    times[target.name].append(answer.first_s if stream else answer.done_s)
        for connection in connections:
            connection.close()
        base = statistics.median(times[targets[0].name])
        for target in targets[1:]:
            ordered = sorted(times[target.name])
            rows.append(
                _row(
                    target,
                    "first chunk of a stream" if stream else "whole answer",
                    prompt_tokens,
                    count=count,
                    added_p50_ms=round((statistics.median(ordered) - base) * 1e3, 3),
                    added_p99_ms=round((ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] - base) * 1e3, 3),
                )
            )
    return rows


async def decisions(ours: Target, prompt_tokens: int, count: int) -> list[dict[str, object]]:
    """How long our router takes to choose the workers, as its own timeline tells it; and what comes before."""
    connection = await Connection.open(ours)
    body = body_of(ours, prompt_tokens, 1, return_timeline=True)
    parts: dict[str, list[float]] = {"receive": [], "tokenize": [], "route": []}
    for _ in range(count):
        timeline = json.loads((await connection.post(body)).body)["usage"]["timeline"]
        for part, found in parts.items():
            found.append(timeline[f"{part}_ms"])
    connection.close()
    return [
        _row(
            ours,
            {"receive": "reading the body", "tokenize": "token ids and page digests", "route": "decision"}[part],
            prompt_tokens,
            count=count,
            added_p50_ms=round(statistics.median(found), 3),
            added_p99_ms=round(sorted(found)[int(0.99 * len(found))], 3),
        )
        for part, found in parts.items()
    ]


async def requests_per_core(target: Target, prompt_tokens: int, count: int) -> dict[str, object]:
    """Whole answers of one token at once, over a few connections, as fast as they come."""
    body = body_of(target, prompt_tokens, 1)
    connections = [await Connection.open(target) for _ in range(PARALLEL)]
    left = iter(range(count))

    async def work(connection: Connection) -> None:
        for _ in left:
            await connection.post(body)

    await asyncio.gather(*(connection.post(body) for connection in connections))
    began, cpu = time.perf_counter(), target.cpu_s()
    await asyncio.gather(*(work(connection) for connection in connections))
    took, used = time.perf_counter() - began, target.cpu_s() - cpu
    for connection in connections:
        connection.close()
    case = f"whole answers, {PARALLEL} at once"
    return _row(target, case, prompt_tokens, count=count, per_s=round(count / took), per_core_s=round(count / used))


async def tokens_per_core(target: Target, burst: int, gap_ms: int) -> dict[str, object]:
    """Streams at once, in each of which `burst` tokens are ready together each `gap_ms`."""
    pace = Pace(delay_ms=DELAY_MS, burst=burst, gap_ms=gap_ms)
    body = body_of(target, 16, STREAM_TOKENS, stream=True, seed=pace.seed)
    connections = [await Connection.open(target) for _ in range(STREAMS)]
    began, cpu, rounds, used = time.perf_counter(), target.cpu_s(), 0, 0.0
    while used < LEAST_CPU_S and rounds < MOST_ROUNDS:
        answers = await asyncio.gather(*(connection.post(body) for connection in connections))
        rounds, used = rounds + 1, target.cpu_s() - cpu
    took = time.perf_counter() - began
    for connection, answer in zip(connections, answers, strict=True):
        connection.close()
        events = [json.loads(line[6:]) for line in bytes(answer.body).splitlines() if line.startswith(b"data: {")]
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == "a" * STREAM_TOKENS, f"{target.name} streamed {len(text)} characters of {STREAM_TOKENS}"
    count = rounds * STREAMS * STREAM_TOKENS
    case = f"tokens of {STREAMS} streams, {burst} ready together" + (f" each {gap_ms} ms" if gap_ms else "")
    return _row(target, case, 16, count=count, per_s=round(count / took), per_core_s=round(count / max(used, 0.01)))


def _row(target: Target, case: str, prompt_tokens: int, **figures: object) -> dict[str, object]:
    columns = dict.fromkeys(("count", "added_p50_ms", "added_p99_ms", "per_s", "per_core_s"), "")
    return {"router": target.name, "case": case, "prompt_tokens": prompt_tokens} | columns | figures | {"load": load()}


# The processes


@contextlib.contextmanager
def _process(*command: str | Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{process.args!r} ended before it served")
    return line


async def _until_answers(target: Target, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(OSError, RuntimeError):
            connection = await Connection.open(target)
            try:
                await connection.post(body_of(target, 16, 1))
                return
            finally:
                connection.close()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{target.name} does not answer after {READY_S:g} s. {_end_of(log)}")
        await asyncio.sleep(0.2)


def _end_of(log: Path) -> str:
    return log.read_text()[-2_000:]


def peer_environment(console: Console) -> Path:
    """The python of the environment that holds the other routers; made when it is not there."""
    folder = ROOT / "build" / "bench-router"
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version}" for name, version in PEERS.items()]
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text() != "\n".join(wanted):
        console.print(f"installing {', '.join(wanted)} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, timeout=900)
        stamp.write_text("\n".join(wanted))
    return python


def _checkpoint(folder: Path) -> Path:
    """What a router reads of one: no weights."""
    folder.mkdir()
    config = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return folder


@contextlib.asynccontextmanager
async def _targets(folder: Path, redis_url: str, peers: Path | None) -> AsyncIterator[list[Target]]:
    """The HTTP engine, our router, and the others."""
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str | Path) -> subprocess.Popen[str]:
            return stack.enter_context(_process(*command, log=folder / f"{name}.log"))

        engine = _address(start("engine-http", sys.executable, "-m", "bench.fixed_delay", "http"))
        _address(start("engine-grpc", sys.executable, "-m", "bench.fixed_delay", "grpc", redis_url))
        targets = [Target("none", int(engine.rpartition(":")[2]), None)]
        commands: dict[str, list[str | Path]] = {
            "penumbra": [
                *(sys.executable, "-m", "cli", "router", "--model", _checkpoint(folder / "fixed")),
                *("--served-model-name", "fixed", "--redis", redis_url, "--log-level", "warning"),
            ]
        }
        if peers is not None:
            shared = ("--worker-urls", f"http://{engine}", "--policy", "round_robin", "--log-level", "error")
            commands["sglang-router"] = [peers, "-m", "sglang_router.launch_router", *shared]
            commands["vllm-router"] = [peers, "-m", "vllm_router.launch_router", *shared[:4]]
        for name, command in commands.items():
            port = free_port()
            metrics = () if name == "penumbra" else ("--prometheus-port", str(free_port()))
            process = start(name, *command, "--port", str(port), *metrics)
            targets.append(Target(name, port, psutil.Process(process.pid), takes_ids=name != "sglang-router"))
        for target in targets:
            await _until_answers(target, folder / f"{target.name}.log")
        yield targets


def run(*, peers: bool = True, long: bool = True) -> None:
    """Print the table and append it to bench/results/router.csv."""
    console = Console(width=150)
    python = peer_environment(console) if peers else None
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as redis:
        rows = uvloop.run(_measure(Path(folder), redis.url, python, long))
    table = Table(title=f"engine delay {DELAY_MS} ms; {machine()}; load {load()}; commit {commit()}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    console.print(f"appended to {append_rows('router', rows)}")


async def _measure(folder: Path, redis_url: str, peers: Path | None, long: bool) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    async with _targets(folder, redis_url, peers) as targets:
        for prompt_tokens, count in PROMPTS.items():
            if prompt_tokens < 100_000 or long:
                rows += await latencies(targets, prompt_tokens, count)
                rows += await decisions(targets[1], prompt_tokens, count)
        for target in targets[1:]:
            for prompt_tokens, share in ((16, 1), (4_096, 4)):
                rows.append(await requests_per_core(target, prompt_tokens, PARALLEL_REQUESTS // share))
            for burst, gap_ms in BURSTS:
                rows.append(await tokens_per_core(target, burst, gap_ms))
    return rows
