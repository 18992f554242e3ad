"""How long the prefix tree takes for a prompt: find it, hold what is there, take over what is new.

The tree is filled to a million pages by prompts that grew chunk by chunk, as prefill leaves them. Each measured prompt
shares its first half with one of those. "joined" prompts are old: their inner windows were evicted and their nodes are
long. "chunked" ones are fresh: a window every second page, so a node for every page. No model runs and no page moves.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.record import append_rows, commit, load, machine
from engine.cache.pools import PageAllocator
from engine.cache.shadow_radix import Lease, ShadowRadix
from wire.errors import PenumbraError
from wire.prefix import pack_tokens, packed_page_hashes
from wire.types import PAGE_TOKENS, PageClass

LONGEST_TOKENS = 900_000
CHUNK_PAGES = 2
WINDOWS = 8192


def run(tree_pages: int = 1_000_000, repeats: int = 9, sglang: Path | None = None) -> list[dict[str, object]]:
    """Measure, print a table, append a row per case to bench/results/cache.csv, and return the rows.

    sglang  a Python that can import sglang; its cache is then measured too and both go to bench/results/cache_peer.csv
    """
    longest = LONGEST_TOKENS // PAGE_TOKENS
    full, swa = PageAllocator(tree_pages + 2 * longest + 1), PageAllocator(WINDOWS + 1)
    cache = ShadowRadix(full, swa)
    began = time.perf_counter()
    prompts = []
    while cache.counts(PageClass.FULL).evictable < tree_pages:
        prompts.append(_digests(longest))
        _grow(cache, full, swa, prompts[-1])
        cache.drain_events()
    filled_s = time.perf_counter() - began
    rows: list[dict[str, object]] = []
    for shape in ("joined", "chunked"):
        for pages in (longest // 8, longest // 4, longest // 2, longest):
            seconds: dict[str, list[float]] = {"match": [], "lease": [], "insert": [], "release": []}
            for _ in range(repeats):
                # Old enough to have lost its inner windows, not so old as to be evicted next.
                old = random.choice(prompts[len(prompts) // 2 : -len(prompts) // 10])
                if shape == "chunked":
                    old = _digests(pages)
                    _grow(cache, full, swa, old)
                _one_prompt(cache, full, swa, [*old[: pages // 2], *_digests(pages - pages // 2)], seconds)
                cache.evict(PageClass.FULL, cache.counts(PageClass.FULL).evictable - tree_pages)
                cache.drain_events()
            totals = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
            rows.append(
                {
                    "shape": shape,
                    "tree_pages": tree_pages,
                    "prompt_tokens": pages * PAGE_TOKENS,
                    **{f"{name}_ms": round(1e3 * statistics.median(took), 3) for name, took in seconds.items()},
                    "total_ms": round(1e3 * statistics.median(totals), 3),
                    "worst_ms": round(1e3 * max(totals), 3),
                    "us_per_page": round(1e6 * statistics.median(totals) / pages, 2),
                }
            )
    _print(rows, filled_s)
    append_rows("cache", rows)
    if sglang is not None:
        joined = [row for row in rows if row["shape"] == "joined"]
        append_rows("cache_peer", _beside(sglang, joined, repeats))
    return rows


def _beside(python: Path, rows: list[dict[str, object]], repeats: int) -> list[dict[str, object]]:
    """Rows with SGLang's milliseconds, and what hashing takes us: SGLang compares tokens instead."""
    lengths = [int(str(row["prompt_tokens"])) for row in rows]
    wanted = ",".join(str(length // PAGE_TOKENS) for length in lengths)
    command = [str(python), str(Path(__file__).with_name("sglang_radix.py")), str(rows[0]["tree_pages"]), wanted]
    ran = subprocess.run([*command, str(repeats)], capture_output=True, text=True, timeout=1800)
    if ran.returncode:
        raise PenumbraError(f"{python} did not measure SGLang's cache: {ran.stderr.strip().splitlines()[-1]}")
    theirs = json.loads(ran.stdout.splitlines()[-1])
    beside: list[dict[str, object]] = []
    table = Table("prompt tokens", "ours ms", "and hashing ms", "SGLang ms")
    for row, length in zip(rows, lengths, strict=True):
        packed = pack_tokens(random.choices(range(100_000), k=length))
        began = time.perf_counter()
        packed_page_hashes(packed, b"")
        hashing_ms = round(1e3 * (time.perf_counter() - began), 3)
        sglang_ms = round(theirs[str(length // PAGE_TOKENS)], 3)
        table.add_row(f"{length:,}", str(row["total_ms"]), str(hashing_ms), str(sglang_ms))
        beside.append(
            {
                "prompt_tokens": length,
                "tree_pages": row["tree_pages"],
                "penumbra_ms": row["total_ms"],
                "penumbra_hashing_ms": hashing_ms,
                "sglang_ms": sglang_ms,
                "load_1m": load(),
            }
        )
    Console().print(table)
    return beside


def _digests(pages: int) -> list[bytes]:
    """Of a prompt nobody has sent yet."""
    return [os.urandom(16) for _ in range(pages)]


def _window(cache: ShadowRadix, swa: PageAllocator) -> int:
    cache.evict(PageClass.SWA, 1 - swa.free)
    return swa.allocate(1)[0]


def _grow(cache: ShadowRadix, full: PageAllocator, swa: PageAllocator, digests: list[bytes]) -> None:
    """Insert a prompt as prefill does, a chunk at a time with the window of its last page."""
    cache.evict(PageClass.FULL, len(digests) - full.free)
    pages = full.allocate(len(digests))
    lease: Lease | None = None
    for end in [*range(CHUNK_PAGES, len(digests), CHUNK_PAGES), len(digests)]:
        lease = cache.insert(digests[:end], pages[:end], {end - 1: _window(cache, swa)}, lease)
    if lease is not None:
        lease.release()


def _one_prompt(
    cache: ShadowRadix, full: PageAllocator, swa: PageAllocator, digests: list[bytes], seconds: dict[str, list[float]]
) -> None:
    fresh, window = full.allocate(len(digests)), _window(cache, swa)
    marks = [time.perf_counter()]
    found = cache.match(digests)
    marks.append(time.perf_counter())
    lease = cache.lease(digests, window=False)
    held = lease.items()
    marks.append(time.perf_counter())
    cache.insert(digests, [*held, *fresh[len(held) :]], {len(digests) - 1: window}, lease)
    marks.append(time.perf_counter())
    lease.release()
    marks.append(time.perf_counter())
    assert found.full_pages == len(held) == len(digests) // 2
    full.release(fresh[: len(held)])
    for name, began, ended in zip(seconds, marks, marks[1:], strict=False):
        seconds[name].append(ended - began)


def _print(rows: list[dict[str, object]], filled_s: float) -> None:
    table = Table(
        title=f"Prefix tree of {rows[0]['tree_pages']:,} pages, filled in {filled_s:.1f} s; medians",
        caption=f"{machine()}, commit {commit()}. Goal: 900,000 tokens below 20 ms, linear in pages.",
    )
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=150).print(table)
