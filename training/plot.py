"""metrics.csv as a picture, where matplotlib is installed (the train extra)."""

from __future__ import annotations

import csv
from pathlib import Path

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss, nats a token", ("loss", "draft_loss")),
    ("indexers' divergence from attention, nats", ("index_loss",)),
    ("share", ("draft_accept", "index_recall")),
    ("busiest expert over the mean", ("busiest",)),
)


def plot(metrics: Path, out: Path) -> bool:
    """Draw every figure over the tokens read; False without matplotlib or figures."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return False
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for name in names:
            axes.plot(tokens, [float(row[name]) for row in rows], label=name)
        axes.set_title(title)
        axes.set_xlabel("million tokens")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=110)
    return True
