"""What health costs while long prompts are being tokenized: a probe that is late gets a healthy router restarted."""

from __future__ import annotations

import asyncio
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

from bench.record import append_rows, commit, load, machine
from deploy.redis import EmbeddedRedis, free_port
from engine.model.tiny import tokenizer_json

PROMPTS = 10
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
        router = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
        try:
            # One id for each byte of text, whatever the text: half of the prompts come as text, half as ids.
            bodies = [
                json.dumps({"model": "model", "prompt": "x" * tokens if i % 2 else [7] * tokens}).encode()
                for i in range(PROMPTS)
            ]
            calm, busy, seconds = asyncio.run(_measure(f"http://127.0.0.1:{port}", bodies))
        finally:
            router.terminate()
            router.wait(30)
    rows = []
    for case, probes in (("nothing else to do", calm), (f"{PROMPTS} prompts being tokenized", busy)):
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


async def _measure(url: str, bodies: list[bytes]) -> tuple[list[float], list[float], float]:
    """Seconds of each probe, alone and beside the prompts; and how long those took in all."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                await client.get("/health")
                break
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        calm = [await _probe(client) for _ in range(100)]
        began = time.monotonic()
        headers = {"content-type": "application/json"}
        posts = [asyncio.create_task(client.post("/v1/completions", content=body, headers=headers)) for body in bodies]
        busy = []
        while not all(post.done() for post in posts):
            busy.append(await _probe(client))
        for post in posts:
            # There is no worker, and a router says so after it has tokenized.
            assert post.result().json()["error"]["code"] == "no_workers", post.result().text[:300]
        return calm, busy, time.monotonic() - began


async def _probe(client: httpx.AsyncClient) -> float:
    await asyncio.sleep(PROBE_EVERY_S)
    began = time.perf_counter()
    answer = await client.get("/health")
    assert answer.status_code == 200
    return time.perf_counter() - began
