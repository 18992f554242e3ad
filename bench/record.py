"""One benchmark run: where it ran, and a row per figure in bench/results/."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WRITTEN = (":(exclude,top)bench/results", ":(exclude,top)docs/faults.md")


def machine() -> str:
    """CPU model and core count, as a reader of the figures needs them."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {os.cpu_count()} cores"


def load() -> float:
    """Processes that wanted to run over the last minute: above the core count, figures say more about them than us."""
    return round(os.getloadavg()[0], 2)


def commit() -> str:
    """The commit measured, with `+` when the tree had changes that were not written by a measurement; `unknown` outside
    a checkout.
    """
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/", *WRITTEN],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")


def append_rows(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Add rows to bench/results/<name>.csv, each stamped with date, commit and machine."""
    path = RESULTS / f"{name}.csv"
    stamp = {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine()}
    fresh = not path.exists()
    RESULTS.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*stamp, *rows[0]])
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow(stamp | dict(row))
    return path
