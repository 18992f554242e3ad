"""What the router spends on a long prompt before placing it: page digests, and a look into the mirror."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from bench.record import append_rows, commit, machine
from router.mirror import PrefixMirror
from wire.events import PageSnapshot, cut, decode_snapshot, encode_snapshot
from wire.prefix import namespace, pack_tokens, packed_page_hashes

RUNS = 21
WORKERS = 8
VOCAB_SIZE = 129_280


def run(tokens: int = 900_000) -> None:
    """Print the table and append it to bench/results/prefix.csv."""
    rng = random.Random(0)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(tokens))
    space = namespace("model")
    packed = pack_tokens(prompt)
    digests = cut(packed_page_hashes(packed, space))
    snapshot = PageSnapshot(1, 1, frozenset(digests))
    data = encode_snapshot(snapshot)
    mirror = PrefixMirror()
    mirror.follow({f"w{i}": 1 for i in range(WORKERS)})
    for i in range(WORKERS):
        mirror.load(f"w{i}", snapshot)
    cases: dict[str, Callable[[], object]] = {
        "prompt packed for the wire": lambda: pack_tokens(prompt),
        "digests of the packed prompt's pages": lambda: cut(packed_page_hashes(packed, space)),
        f"held by each of {WORKERS} workers, all of them holding it whole": lambda: [
            mirror.resident_tokens(f"w{i}", digests) for i in range(WORKERS)
        ],
        "snapshot of as many pages, written": lambda: encode_snapshot(snapshot),
        "snapshot of as many pages, read": lambda: decode_snapshot(data),
    }
    rows = []
    for case, work in cases.items():
        seconds = sorted(_timed(work) for _ in range(RUNS))
        rows.append(
            {
                "case": case,
                "tokens": tokens,
                "pages": len(digests),
                "median_ms": round(statistics.median(seconds) * 1e3, 3),
                "best_ms": round(seconds[0] * 1e3, 3),
            }
        )
    table = Table(title=f"{tokens:,} tokens, {len(digests):,} pages, one thread; {machine()}; commit {commit()}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    console.print(table)
    console.print(f"appended to {append_rows('prefix', rows)}")


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
