"""bench/results/step.csv as a picture: what a decode step takes by context, beside what its bytes take to read."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from bench.record import RESULTS
from deploy.plan import step_bytes
from engine.config import FLASH
from wire.errors import ConfigError

_COLOURS = {1: "tab:blue", 4: "tab:red"}
_STYLES = {"cuda": "-", "triton": "--"}
_KINDS = {"cuda": "CUDA C++", "triton": "Triton alone"}


def draw_steps(steps: Path = RESULTS / "step.csv", out: Path = RESULTS / "step.svg") -> Path:
    """One sequence, steps of one and four tokens: the newest rows of each GPU and kind of kernels.

    Raises ConfigError without matplotlib, or where there are no such rows.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("Pictures need matplotlib. It comes with the load extra: make install EXTRAS=load.") from None
    lines: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    bandwidth: dict[str, float] = {}
    with steps.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["batch"] == "1" and int(row["tokens"]) in _COLOURS and row["layers"] == str(FLASH.num_layers):
                key = row["device"], row["kernels"], int(row["tokens"])
                lines[key][int(row["context"])] = float(row["step_ms"])
                bandwidth[row["device"]] = float(row["copy_tb_s"]) * 1e12
    if not lines:
        raise ConfigError(f"{steps} has no step of one sequence of the whole model. `penumbra bench step` makes some.")
    with matplotlib.rc_context({"svg.hashsalt": "steps", "svg.fonttype": "none"}):  # the same file every time
        figure = Figure(figsize=(4.6 * len(bandwidth), 4.4), layout="constrained")
        panels = figure.subplots(1, len(bandwidth), sharey=True, squeeze=False)[0]
        for axes, device in zip(panels, sorted(bandwidth), strict=True):
            for (name, kernels, tokens), points in sorted(lines.items()):
                if name == device:
                    contexts = sorted(points)
                    of = "1 token" if tokens == 1 else f"{tokens} tokens"
                    axes.plot(
                        contexts, [points[c] for c in contexts], _STYLES[kernels], color=_COLOURS[tokens], marker="o",
                        markersize=3, label=f"{of}, {_KINDS[kernels]}",
                    )  # fmt: skip
            for tokens, colour in _COLOURS.items():
                contexts = [4_096, 65_536, 262_144, 900_000]
                floors = [floor_s(tokens, context, bandwidth[device]) * 1e3 for context in contexts]
                axes.plot(contexts, floors, ":", color=colour, label=f"{tokens}: its bytes at a copy's speed")
            axes.set_title(device)
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, ["4K", "64K", "256K", "900K"])
            axes.set_xlabel("tokens of context")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, loc="upper left")
        most = max(max(points.values()) for points in lines.values())
        panels[0].set_ylim(0, 1.4 * most)  # the legends lie above
        panels[0].set_ylabel("ms of a decode step, 43 layers of V4-Flash")
        figure.savefig(out, metadata={"Date": None})
    return out


def floor_s(tokens: int, context: int, bytes_s: float) -> float:
    """Seconds to read what a step of `tokens` tokens of one sequence reads once: its weights, and its context."""
    rows = step_bytes(FLASH, 1, context) - step_bytes(FLASH, 1, 0)
    return (step_bytes(FLASH, tokens, 0) + rows) / bytes_s
