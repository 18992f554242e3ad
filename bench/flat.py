"""Decode speed from 4K to 900K tokens of context on the default geometry, and where the time goes.

The context is not prefilled: its compressed rows are random and written straight into the pools, which costs decode
exactly what real rows would. `bench/long.py` prefills for real.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.record import append_rows, commit, load, machine
from engine.batch import Segment, Sequence, StepMeta
from engine.cache.pools import KvPools, item_bytes
from engine.config import C4_RATIO, C128_RATIO, EngineConfig, KvLayout
from engine.kernels.index_topk import index_topk
from engine.kernels.rows import RowPool, write_rows
from engine.kernels.sparse_attention import sparse_attention
from engine.model.survey import survey
from engine.model.tiny import write_tiny
from engine.runner import Runner
from engine.window import WindowPages, most_window_pages, num_pages
from wire.types import PageClass, SamplingParams

GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0)
WARM_UP = 3
FILL_ROWS = 1 << 14


def write_bench_model(directory: Path) -> Path:
    """The benchmark model: small and random, with heads and pages as in production."""
    return write_tiny(directory, seed=0, layers=(0, 0, 4, 128, 4, 128), hidden=256, heads=4, index_heads=4, experts=16)


def load_runner(model: Path, threads: int, layout: KvLayout, tokens: int) -> Runner:
    """A runner whose pools hold one sequence of `tokens` tokens and little more."""
    config = survey(model).config
    assert config is not None, "a checkpoint of our own making"
    bytes_of = item_bytes(config, layout)
    slots = 2
    full = (num_pages(tokens) + 2) * bytes_of[PageClass.FULL]
    fixed = 2 * slots * bytes_of[PageClass.STATE] + (4 * slots + 1) * bytes_of[PageClass.SWA]
    engine = EngineConfig(
        model=model,
        kv_layout=layout,
        threads=threads,
        max_requests=slots,
        kv_memory_bytes=full + 2 * fixed,
        draft=False,
    )
    return Runner.load(engine)


def fill(pool: RowPool, items: list[int], generator: torch.Generator) -> None:
    """Random rows of unit variance in every row of these items."""
    n = pool.rows_per_item
    rows = (torch.tensor(items)[:, None] * n + torch.arange(n)).flatten()
    values = torch.randn(min(FILL_ROWS, len(rows)), pool.dim, generator=generator)
    for part in rows.split(FILL_ROWS):
        write_rows(pool, part, values[: len(part)])


def run(
    *,
    lengths: tuple[int, ...] = (4096, 65536, 262144, 900000),
    decode_tokens: int = 24,
    threads: int = 2,
    layout: KvLayout = "v4",
    console: Console | None = None,
    save: bool = True,
) -> list[dict[str, object]]:
    """Measure, print a table and append rows to bench/results/flat.csv. Times are medians."""
    console = console or Console()
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        runner = load_runner(write_bench_model(Path(scratch) / "model"), threads, layout, max(lengths) + 512)
        pools, window = runner.pools, WindowPages(runner.pools.swa)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("filling the pools with random rows")
            pages = pools.full.allocate(num_pages(max(lengths) + 512))
            for kind in (pools.c4, pools.index, pools.c128):
                for pool in kind.values():
                    fill(pool, pages, generator)
            for length in lengths:
                progress.update(task, description=f"decode at {length:,} tokens")
                sequence = Sequence(request_id="flat", sampling=GREEDY, slot=1, pages=pages, length=length)
                window.reserve(sequence, most_window_pages(1) + 1)
                window.cover(sequence, max(0, length - 256), length)
                for pool in pools.window.values():
                    fill(pool, [item for item in sequence.swa_pages if item], generator)
                rows.append(
                    {"context_tokens": length, "threads": threads, "kv_layout": layout, "load_1m": load()}
                    | _measure(runner, window, sequence, decode_tokens)
                )
                pools.swa.release(window.drop(sequence))
    table = Table(
        "context",
        "decode tok/s",
        "of shortest",
        "ms/token",
        "index scan ms",
        "scan GB/s",
        "memcpy GB/s",
        "scan/memcpy",
        "C128 ms",
        "rest ms",
    )
    first = float(str(rows[0]["decode_tok_s"]))
    for row in rows:
        f = {name: float(str(row[name])) for name in row if name != "kv_layout"}
        table.add_row(
            f"{row['context_tokens']:,}", f"{f['decode_tok_s']:,.0f}", f"{f['decode_tok_s'] / first:.2f}",
            f"{f['step_ms']:.2f}", f"{f['scan_ms']:.2f}", f"{f['scan_gb_s']:.1f}", f"{f['memcpy_gb_s']:.1f}",
            f"{f['scan_gb_s'] / f['memcpy_gb_s']:.0%}", f"{f['c128_ms']:.2f}",
            f"{f['step_ms'] - f['scan_ms'] - f['c128_ms']:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "random rows in place of a prefilled prompt; scan and C128 attention are summed over layers and measured alone"
    )
    console.print(f"{machine()}; {threads} threads; float32; kv_layout {layout}; commit {commit()}")
    if save:
        console.print(f"rows added to {append_rows('flat', rows)}")
    return rows


def _measure(runner: Runner, window: WindowPages, sequence: Sequence, decode_tokens: int) -> dict[str, object]:
    config, pools = runner.model_config, runner.pools
    length = sequence.length
    steps, token = [], 1
    for _ in range(WARM_UP + decode_tokens):
        window.cover(sequence, sequence.length, sequence.length + 1)
        began = time.perf_counter()
        (drawn,) = runner.run([Segment(sequence=sequence, start=sequence.length, tokens=[token], sample=True)])
        steps.append(time.perf_counter() - began)
        assert drawn is not None
        assert drawn.ok
        token = drawn.token_id
        sequence.length += 1
        window.trim(sequence)
    # The two parts that grow with the context, alone.
    meta = StepMeta.of([Segment(sequence=sequence, start=length, tokens=[1], sample=False)])
    q = torch.randn(1, config.index_heads, config.index_head_dim)
    w = torch.randn(1, config.index_heads)
    c4, c128 = config.layers_of(C4_RATIO), config.layers_of(C128_RATIO)
    scan_s = _median_s(lambda: [index_topk(q, w, pools.index[n], meta, config.index_topk) for n in c4])
    queries, sink = torch.randn(1, config.num_heads, config.head_dim), torch.zeros(config.num_heads)

    def attend() -> None:
        for n in c128:
            sparse_attention(
                queries, sink, meta, pools.window[n], pools.c128[n], C128_RATIO, None, config.head_dim**-0.5
            )

    scanned = len(c4) * ((length + 1) // C4_RATIO) * _index_row_bytes(pools, c4)
    copied = torch.ones(max(scanned, 1), dtype=torch.uint8)
    target = torch.empty_like(copied)
    copy_s = _median_s(lambda: target.copy_(copied))
    step_s = statistics.median(steps[WARM_UP:])
    return {
        "decode_tok_s": round(1 / step_s, 1),
        "step_ms": round(step_s * 1e3, 3),
        "scan_ms": round(scan_s * 1e3, 3),
        "scan_gb_s": round(scanned / scan_s / 1e9, 2),
        "memcpy_gb_s": round(scanned / copy_s / 1e9, 2),
        "c128_ms": round(_median_s(attend) * 1e3, 3),
    }


def _index_row_bytes(pools: KvPools, layers: tuple[int, ...]) -> int:
    pool = pools.index[layers[0]]
    return pool.data.shape[1] // pool.rows_per_item


def _median_s(work: Callable[[], object], times: int = 9) -> float:
    work()
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)
