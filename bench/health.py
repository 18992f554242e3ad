"""What health costs while long prompts go through: a probe that is late gets a healthy router restarted.

The prompts go all the way, to an engine that answers at once: reading, tokenizing and sending them on is measured.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.fixed_delay import Pace
from bench.record import append_rows, commit, load, machine
from deploy.redis import EmbeddedRedis, free_port
from engine.model.tiny import tokenizer_json

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = 10
BODY = {"model": "model", "max_tokens": 1, "seed": Pace(delay_ms=1).seed}
PROBE_EVERY_S = 0.01
READY_S = 120.0


def run(tokens: int = 900_000) -> None:
    """Print the table and append it to bench/results/health.csv."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as redis:
        model = Path(folder) / "model"
        model.mkdir()
        config = {"vocab_size": 320, "max_position_embeddings": 1 << 20, "bos_token_id": 0, "eos_token_id": 1}
        (model / "config.json").write_text(json.dumps(config))
        (model / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        port = free_port()
        command = [sys.executable, "-m", "cli", "router", "--model", str(model), "--redis", redis.url]
        engine = subprocess.Popen(
            [sys.executable, "-m", "bench.fixed_delay", "grpc", redis.url], stdout=subprocess.PIPE, cwd=ROOT
        )
        router = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
        try:
            # One id for each byte of text, whatever the text: half of the prompts come as text, half as ids.
            bodies = [
                json.dumps(BODY | {"prompt": "x" * tokens if i % 2 else [7] * tokens}).encode() for i in range(PROMPTS)
            ]
            for i, body in enumerate(bodies):
                (Path(folder) / f"{i}.json").write_bytes(body)
            calm, busy, seconds = asyncio.run(_measure(f"http://127.0.0.1:{port}", Path(folder), len(bodies)))
        finally:
            for process in (router, engine):
                process.terminate()
                process.wait(30)
    rows = []
    for case, probes in (("nothing else to do", calm), (f"{PROMPTS} prompts on their way", busy)):
        ordered = sorted(probes)
        rows.append(
            {
                "case": case,
                "tokens": tokens,
                "probes": len(ordered),
                "median_ms": round(statistics.median(ordered) * 1e3, 2),
                "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))] * 1e3, 2),
                "most_ms": round(ordered[-1] * 1e3, 2),
                "all_prompts_s": round(seconds, 2),
                "load": load(),
            }
        )
    table = Table(title=f"GET /health; {machine()}; commit {commit()}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    append_rows("health", rows)


async def _measure(url: str, folder: Path, num_bodies: int) -> tuple[list[float], list[float], float]:
    """Seconds of each probe, alone and beside the prompts; and how long those took in all."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                if (await client.get("/readiness")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"the router is not ready after {READY_S:g} s")
            await asyncio.sleep(0.1)
        # The figures are the router's: a full collection here takes longer than most of its answers.
        gc.collect()
        gc.freeze()
        calm = [await _probe(client) for _ in range(100)]
        began = time.monotonic()
        # By a process of their own: what it costs to send them must not look like what it costs to answer a probe.
        posting = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.health", url),
            *(str(folder / f"{i}.json") for i in range(num_bodies)),
            cwd=ROOT,
        )
        done = asyncio.create_task(posting.wait())
        busy = []
        while not done.done():
            busy.append(await _probe(client))
        if done.result() != 0:
            raise RuntimeError("not every prompt got its answer")
        return calm, busy, time.monotonic() - began


async def _post(url: str, bodies: list[bytes]) -> None:
    """All at once."""
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        posts = [client.post("/v1/completions", content=body, headers=headers) for body in bodies]
        for answer in await asyncio.gather(*posts):
            assert answer.json()["usage"]["completion_tokens"] == 1, answer.text[:300]


async def _probe(client: httpx.AsyncClient) -> float:
    await asyncio.sleep(PROBE_EVERY_S)
    began = time.perf_counter()
    answer = await client.get("/health")
    assert answer.status_code == 200
    return time.perf_counter() - began


if __name__ == "__main__":
    asyncio.run(_post(sys.argv[1], [Path(path).read_bytes() for path in sys.argv[2:]]))
