"""A conversation that goes on: what a follow-up on a long resident context costs, beside what it has to cost.

A whole cluster, one conversation. Its first prompt is cold; each later turn sends everything said so far and a few
thousand new tokens. What a turn has to cost is the model's own time for the tokens that nobody has computed yet, at
that depth, and the part of the transfer that computing does not hide. The workers measure both; the client measures
the whole wait.
"""

from __future__ import annotations

import random

from rich.console import Console
from rich.table import Table

from bench.cluster import BYTE_TOKENS, Cluster, cluster
from bench.record import append_rows, commit, load, machine
from engine.config import KvLayout
from wire.types import PAGE_TOKENS

ANSWER = 32


def run(
    *,
    tokens: int = 131_072,
    follow_up: int = 4096,
    turns: int = 3,
    threads: int = 2,
    layout: KvLayout = "v4",
    console: Console | None = None,
    save: bool = True,
) -> list[dict[str, object]]:
    """Measure on a cluster of its own, print a table and append a row a turn to bench/results/reuse.csv."""
    console = console or Console(width=150)
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    said = [rng.randrange(*BYTE_TOKENS) for _ in range(tokens)]
    with cluster("--threads", str(threads), "--kv-layout", layout) as ours:
        ours.ask([rng.randrange(*BYTE_TOKENS) for _ in range(300)])  # connects the pair
        for turn in range(1 + turns):
            with console.status(f"turn {turn}: {len(said):,} tokens"):
                row, answer = _turn(ours, said)
            cold = rows[0] if rows else row
            row |= {
                "moved_of_cold": round(float(str(row["moved_mb"])) / float(str(cold["moved_mb"])), 3),
                "times_faster_than_cold": round(float(str(cold["ttft_s"])) / float(str(row["ttft_s"])), 1),
                "threads": threads,
                "kv_layout": layout,
                "load_1m": load(),
            }
            rows.append({"turn": turn} | row)
            said += answer
            # To the end of a page: what moves is then whole pages.
            fresh = follow_up - (len(said) + follow_up) % PAGE_TOKENS
            said += [rng.randrange(*BYTE_TOKENS) for _ in range(fresh)]
    table = Table(
        *("turn", "prompt", "computed", "TTFT s", "computing s", "exposed ms", "TTFT / (both)", "moved MB", "of cold"),
        "faster than cold",
    )
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("turn", "prompt_tokens", "computed_tokens", "ttft_s", "computing_s")),
            *(str(row[name]) for name in ("exposed_ms", "ttft_of_floor", "moved_mb", "moved_of_cold")),
            f"{row['times_faster_than_cold']}x",
        )
    console.print(table)
    console.print(f"{machine()}; {threads} threads; float32; kv_layout {layout}; commit {commit()}", highlight=False)
    if save:
        console.print(f"rows added to {append_rows('reuse', rows)}")
    return rows


def _turn(ours: Cluster, prompt: list[int]) -> tuple[dict[str, object], list[int]]:
    """One request, and what the workers counted meanwhile."""

    def counted() -> tuple[float, float, int]:
        return ours.metric("prefill", "penumbra_step_time_seconds_sum"), ours.exposed_s(), ours.moved_bytes()

    before = counted()
    answer = ours.ask(prompt, ANSWER)
    computing_s, exposed_s, moved = (now - then for now, then in zip(counted(), before, strict=True))
    row: dict[str, object] = {
        "prompt_tokens": len(prompt),
        "computed_tokens": len(prompt) - answer.cached_tokens,
        "ttft_s": round(answer.ttft_s, 3),
        "computing_s": round(computing_s, 3),
        "exposed_ms": round(exposed_s * 1e3, 1),
        "ttft_of_floor": round(answer.ttft_s / (computing_s + exposed_s), 3),
        "moved_mb": round(moved / 1e6, 2),
    }
    return row, answer.tokens
