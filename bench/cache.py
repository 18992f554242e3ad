"""How long the prefix tree takes for a prompt: find it, hold what is there, take over what is new.

The tree is filled to a million pages by prompts that grew chunk by chunk, as prefill leaves them. Each measured prompt
shares its first half with one of those. "joined" prompts are old: their inner windows were evicted and their nodes are
long. "chunked" ones are fresh: a window every second page, so a node for every page. No model runs and no page moves.
"""

from __future__ import annotations

import os
import random
import statistics
import time

from rich.console import Console
from rich.table import Table

from bench.record import append_rows, commit, machine
from engine.cache.pools import PageAllocator
from engine.cache.shadow_radix import Lease, ShadowRadix
from wire.types import PAGE_TOKENS, PageClass

LONGEST_TOKENS = 900_000
CHUNK_PAGES = 2
WINDOWS = 8192


def run(tree_pages: int = 1_000_000, repeats: int = 9) -> list[dict[str, object]]:
    """Measure, print a table, append a row per case to bench/results/cache.csv, and return the rows."""
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
    return rows


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
