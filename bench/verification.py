"""What checking pages costs of a first token: the checksums of a prompt's pages, twice, beside the time to token 0.

The time to the first token is a client's, of a cold prompt on a whole cluster. The checksums are timed apart, on the
same pools in this process and with one thread, as a prefill worker computes them before it offers a page and a decode
worker after it has read it. In a cluster most of that is hidden behind the next chunk; here all of it counts.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cluster import BYTE_TOKENS, cluster
from bench.flat import write_bench_model
from bench.record import append_rows, commit, load, machine
from engine.config import EngineConfig
from engine.runner import Runner
from wire.types import PAGE_TOKENS, PageClass

REPEATS = 9
MOST_SHARE = 0.03
"""Of the time to the first token, what checking may cost."""


def run(
    lengths: tuple[int, ...] = (1024, 8192, 65536), console: Console | None = None, save: bool = True
) -> list[dict[str, object]]:
    """Measure, print a table and append rows to bench/results/verification.csv."""
    console = console or Console()
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_bench_model(Path(folder) / "bench-model")
        with cluster("--model", str(model)) as ours:
            ours.ask([rng.randrange(*BYTE_TOKENS) for _ in range(300)])  # connects the pair
            first_s = {
                length: ours.ask([rng.randrange(*BYTE_TOKENS) for _ in range(length)]).ttft_s for length in lengths
            }
        runner = Runner.load(EngineConfig(model=model, threads=1))
        for length, ttft_s in first_s.items():
            full = -(-length // PAGE_TOKENS)
            # Besides its full pages a prompt has the window behind its end, in two pages, and a slot's state.
            pages = {PageClass.FULL: range(1, full + 1), PageClass.SWA: range(1, 3), PageClass.STATE: range(2, 4)}
            check_s = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                for page_class, items in pages.items():
                    exported = runner.pools.export_pages(page_class, items)
                    assert not runner.pools.import_pages(page_class, items, exported)
                check_s.append(time.perf_counter() - began)
            median_s = statistics.median(check_s)
            rows.append(
                {
                    "prompt_tokens": length,
                    "ttft_s": round(ttft_s, 3),
                    "check_ms": round(1000 * median_s, 3),
                    "check_of_ttft": f"{median_s / ttft_s:.5f}",
                    "load_1m": load(),
                }
            )
    table = Table("prompt tokens", "TTFT s", "checking ms", "of TTFT")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("prompt_tokens", "ttft_s", "check_ms", "check_of_ttft")))
    console.print(table)
    worst = max(float(str(row["check_of_ttft"])) for row in rows)
    console.print(f"{100 * worst:.2f}% at most, {100 * MOST_SHARE:.0f}% allowed; {machine()}; commit {commit()}")
    if save:
        append_rows("verification", rows)
    return rows
