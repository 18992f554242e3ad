"""What of a prompt's transfer the client waits for: a whole cluster, one cold prompt at a time.

Pages are read while later chunks are computed, so only what follows the last chunk delays the first token. The decode
worker times that, from the last offer to the first token sent; the client times the whole wait.
"""

from __future__ import annotations

import random

from rich.console import Console
from rich.table import Table

from bench.cluster import BYTE_TOKENS, cluster
from bench.record import append_rows, commit, load, machine


def run(
    lengths: tuple[int, ...] = (1024, 8192, 65536), console: Console | None = None, save: bool = True
) -> list[dict[str, object]]:
    """Measure on a cluster of its own, print a table and append rows to bench/results/exposed.csv."""
    console = console or Console()
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    with cluster() as ours:
        ours.ask([rng.randrange(*BYTE_TOKENS) for _ in range(300)])  # connects the pair
        for length in lengths:
            before = ours.exposed_s()
            with console.status(f"a cold prompt of {length:,} tokens"):
                answer = ours.ask([rng.randrange(*BYTE_TOKENS) for _ in range(length)])
            exposed_s = ours.exposed_s() - before
            rows.append(
                {
                    "prompt_tokens": length,
                    "ttft_s": round(answer.ttft_s, 3),
                    "exposed_ms": round(exposed_s * 1e3, 2),
                    "exposed_of_ttft": f"{exposed_s / answer.ttft_s:.4f}",
                    "load_1m": load(),
                }
            )
    table = Table("prompt tokens", "TTFT s", "exposed ms", "of TTFT")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("prompt_tokens", "ttft_s", "exposed_ms", "exposed_of_ttft")))
    console.print(table)
    console.print(f"{machine()}; commit {commit()}", highlight=False)
    if save:
        append_rows("exposed", rows)
    return rows
