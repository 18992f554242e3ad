"""One prompt of 900,000 tokens, prefilled and answered by the engine on the default geometry."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench.flat import GREEDY, load_runner, write_default_model
from bench.record import append_rows, commit, load, machine
from engine.batch import Segment, Sequence
from engine.config import KvLayout
from engine.window import WindowPages, most_window_pages, num_pages
from wire.errors import PenumbraError

CHUNK = 512
ANSWER = 16
MEMORY_BOUND = 8 << 30
"""Resident bytes the whole process may take."""


def run(
    *,
    tokens: int = 900_000,
    threads: int = 2,
    layout: KvLayout = "v4",
    budget_minutes: float = 90.0,
    console: Console | None = None,
    save: bool = True,
) -> list[dict[str, object]]:
    """Prefill, decode a few tokens, print tokens/s by depth and append rows to bench/results/long.csv.

    Stops at the budget and reports how far it came. Raises PenumbraError when memory went over the bound or the
    answer could not be drawn.
    """
    console = console or Console()
    band = max(CHUNK, -(-tokens // 9 // CHUNK) * CHUNK)
    rows: list[dict[str, object]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        runner = load_runner(write_default_model(Path(scratch) / "model"), threads, layout, tokens + ANSWER)
        vocab = runner.model_config.vocab_size
        prompt = torch.randint(3, vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        window = WindowPages(runner.pools.swa)
        sequence = Sequence(request_id="long", sampling=GREEDY, slot=runner.pools.slots.allocate(1)[0])
        window.reserve(sequence, most_window_pages(CHUNK))

        def step(part: list[int], sample: bool) -> int:
            end = sequence.length + len(part)
            sequence.pages += runner.pools.full.allocate(num_pages(end) - len(sequence.pages))
            window.cover(sequence, sequence.length, end)
            (drawn,) = runner.run([Segment(sequence=sequence, start=sequence.length, tokens=part, sample=sample)])
            sequence.length = end
            window.trim(sequence)
            if drawn is None:
                return 0
            if not drawn.ok:
                raise PenumbraError(f"logits were not finite after {end:,} tokens; nothing could be drawn.")
            return drawn.token_id

        def finish_band(since: float, start: int) -> None:
            spent = time.monotonic() - since
            rows.append(
                {
                    "kind": "prefill",
                    "from_token": start,
                    "to_token": sequence.length,
                    "tok_s": round((sequence.length - start) / spent, 1),
                    "seconds": round(spent, 1),
                    "resident_mb": _resident_bytes() >> 20,
                    "threads": threads,
                    "kv_layout": layout,
                    "load_1m": load(),
                }
            )

        columns = (
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        since, band_start, token = time.monotonic(), 0, 0
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("prefill", total=tokens)
            for start in range(0, tokens, CHUNK):
                if time.monotonic() - began > budget_minutes * 60:
                    break
                part = prompt[start : start + CHUNK]
                token = step(part, sample=start + len(part) == tokens)
                progress.update(task, completed=sequence.length)
                if sequence.length - band_start >= band or sequence.length == tokens:
                    finish_band(since, band_start)
                    since, band_start = time.monotonic(), sequence.length
        reached = sequence.length
        if band_start < reached:
            finish_band(since, band_start)
        since = time.monotonic()
        for _ in range(ANSWER):
            token = step([token], sample=True)
        decode_s = time.monotonic() - since
    rows.append(
        rows[-1]
        | {
            "kind": "decode",
            "from_token": reached,
            "to_token": reached + ANSWER,
            "tok_s": round(ANSWER / decode_s, 1),
            "seconds": round(decode_s, 2),
            "resident_mb": _resident_bytes() >> 20,
        }
    )
    table = Table("", "tokens", "tok/s", "seconds", "resident MB")
    for row in rows:
        spread = f"{row['from_token']:,} to {row['to_token']:,}"
        table.add_row(str(row["kind"]), spread, *(str(row[name]) for name in ("tok_s", "seconds", "resident_mb")))
    console.print(table)
    minutes = (time.monotonic() - began) / 60
    console.print(f"{reached:,} of {tokens:,} tokens in {minutes:.1f} minutes, loading included")
    console.print(f"{machine()}; {threads} threads; float32; kv_layout {layout}; commit {commit()}")
    if save:
        console.print(f"rows added to {append_rows('long', rows)}")
    if _resident_bytes() > MEMORY_BOUND:
        raise PenumbraError(f"{_resident_bytes():,} bytes were resident, more than {MEMORY_BOUND:,}.")
    return rows


def _resident_bytes() -> int:
    """The most this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
