"""What of a prompt's transfer the client waits for: a whole cluster, one cold prompt at a time.

Pages are read while later chunks are computed, so only what follows the last chunk delays the first token. The decode
worker times that, from the last offer to the first token sent; the client times the whole wait.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.record import append_rows, commit, load, machine
from deploy.local import ClusterState, cluster_folder, fetch_json, stop

EXPOSED = "penumbra_kv_transfer_exposed_seconds_sum"
CLUSTER = "bench-exposed"
BYTE_TOKENS = (3, 259)
"""Ids of the bundled tokenizer that are plain bytes."""


def run(
    lengths: tuple[int, ...] = (1024, 8192, 65536), console: Console | None = None, save: bool = True
) -> list[dict[str, object]]:
    """Measure on a cluster of its own, print a table and append rows to bench/results/exposed.csv."""
    console = console or Console()
    with tempfile.TemporaryDirectory() as scratch:
        home, began = Path(scratch), time.perf_counter()
        up = [sys.executable, "-m", "cli", "up", "--detach", "--port", "0", "--cluster", CLUSTER, "--home", str(home)]
        subprocess.run(up, check=True, stdout=subprocess.DEVNULL, timeout=300)
        folder = cluster_folder(home, CLUSTER)
        try:
            state = ClusterState.load(folder)
            assert state is not None, "a detached cluster leaves a state file"
            console.print(f"cluster ready after {time.perf_counter() - began:.1f} s, its model written first")
            rng = random.Random(0)
            _ask(state, [rng.randrange(*BYTE_TOKENS) for _ in range(300)])  # connects the pair
            rows = []
            for length in lengths:
                prompt = [rng.randrange(*BYTE_TOKENS) for _ in range(length)]
                before = _exposed_s(state)
                with console.status(f"a cold prompt of {length:,} tokens"):
                    ttft_s = _ask(state, prompt)
                exposed_s = _exposed_s(state) - before
                rows.append(
                    {
                        "prompt_tokens": length,
                        "ttft_s": round(ttft_s, 3),
                        "exposed_ms": round(exposed_s * 1e3, 2),
                        "exposed_of_ttft": f"{exposed_s / ttft_s:.4f}",
                        "load_1m": load(),
                    }
                )
        finally:
            stop(folder)
    table = Table("prompt tokens", "TTFT s", "exposed ms", "of TTFT")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("prompt_tokens", "ttft_s", "exposed_ms", "exposed_of_ttft")))
    console.print(table)
    console.print(f"{machine()}; commit {commit()}", highlight=False)
    if save:
        append_rows("exposed", rows)
    return rows


def _ask(state: ClusterState, prompt: list[int]) -> float:
    """Seconds from sending the prompt to the first event of its streamed answer."""
    body = {"model": state.model, "prompt": prompt, "max_tokens": 2, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{state.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=1800) as answer:
        answer.readline()
        took = time.perf_counter() - began
        answer.read()
    return took


def _exposed_s(state: ClusterState) -> float:
    """Exposed seconds so far, over every decode worker of the cluster."""
    total = 0.0
    for worker in fetch_json(f"{state.url}/workers", timeout_s=10)["workers"]:
        if worker["role"] == "decode":
            with urllib.request.urlopen(f"http://{worker['http_address']}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            total += sum(float(line.split()[-1]) for line in lines if line.startswith(EXPOSED))
    return total
