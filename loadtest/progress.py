"""A run as it goes: a bar with live percentiles on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import gevent
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from loadtest.scenario import Scenario
from loadtest.summary import quantile

if TYPE_CHECKING:
    from loadtest.play import Run

REFRESH_S = 0.5
LINE_S = 10.0
LAST = 500
"""Percentiles are of so many answers, the last ones."""


@contextlib.contextmanager
def showing(scenario: Scenario, run: Run) -> Iterator[None]:
    console = Console()
    # Until the last traffic that ends by the clock; others may last longer, and then the bar waits full.
    ends_s = max((t.start_s + (scenario.window(t) or 0.0) for t in scenario.traffic), default=scenario.duration_s)
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn(scenario.name),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}"),
        )
        with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
            bar = progress.add_task(scenario.name, total=ends_s, told="")

            def draw() -> None:
                progress.update(bar, completed=min(ends_s, run.clock()), told=told(run), refresh=True)

            with _every(REFRESH_S, draw):
                yield
    else:
        with _every(LINE_S, lambda: print(f"{run.clock():6.0f} s  {told(run)}", flush=True)):
            yield


@contextlib.contextmanager
def _every(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    def loop() -> None:
        while True:
            gevent.sleep(seconds)
            do()

    greenlet = gevent.spawn(loop)
    try:
        yield
    finally:
        greenlet.kill()


def told(run: Run) -> str:
    live = run.live
    parts = [f"sent {live.sent}", f"open {live.open}"]
    for name, values in (("TTFT", live.ttft_ms), ("TPOT", live.tpot_ms)):
        last = values[-LAST:]
        if last:
            parts.append(f"{name} p50 {quantile(last, 0.5):.0f} p99 {quantile(last, 0.99):.0f} ms")
    if ended := live.sent - live.open:
        parts.append(f"SLO kept by {live.kept / ended:.0%}")
    parts.append(f"errors {live.errors}")
    return ", ".join(parts)
