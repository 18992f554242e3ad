"""Pictures of a record, as SVG that lies in the page itself and takes the page's ink, light or dark."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from loadtest.record import Record
from loadtest.summary import KEPT_SHARE, PARTS, QUANTILES, Summary

INK = "#010203"
"""Stands for the page's text colour, which no series has."""
HUES = ("#3b82c4", "#d9822b", "#4c9f70", "#c4527a", "#8a6fc8", "#b59a2b", "#5aa9b8", "#a0695a", "#7a8894", "#7f9c3a",
        "#a86fb0")  # fmt: skip
"""Series in order; each is told from both backgrounds."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "penumbra",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=HUES),
}


@dataclass(frozen=True, slots=True)
class Plot:
    name: str
    title: str
    says: str  # what is to be seen, for who can not see it
    svg: str  # empty: there was nothing to draw, and `says` tells why


def of_run(record: Record, summary: Summary) -> list[Plot]:
    return [
        _latency(summary),
        _goodput(summary),
        _contexts(summary),
        _timeline(summary),
        _over_time(record),
        _pages(record),
        _transfers(record),
        _errors(summary),
    ]


def of_two(names: Sequence[str], summaries: Sequence[Summary], records: Sequence[Record]) -> list[Plot]:
    def latency(axes: Axes) -> None:
        for name, summary in zip(names, summaries, strict=True):
            loads = sorted((window.offered_per_s, window.ttft_ms[2]) for window in summary.windows if window.due)
            axes.plot(*_columns(loads), "o-", linewidth=0.6, label=name)
        _labels(axes, "offered requests/s", "TTFT p99, ms", log=True)

    def goodput(axes: Axes) -> None:
        for name, summary in zip(names, summaries, strict=True):
            loads = sorted((window.offered_per_s, window.goodput_per_s) for window in summary.windows if window.due)
            axes.plot(*_columns(loads), "o-", linewidth=0.6, label=name)
        _labels(axes, "offered requests/s", "goodput, requests/s")

    def spread(values: Callable[[Any], float | None], label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for name, record in zip(names, records, strict=True):
                found = sorted(v for one in record.outcomes if one.counts and (v := values(one)) is not None)
                if found:
                    axes.step(found, [(n + 1) / len(found) for n in range(len(found))], where="post", label=name)
            _labels(axes, label, "share of requests")
            _log(axes.xaxis, axes.set_xscale)

        return draw

    have = all(any(window.due for window in summary.windows) for summary in summaries)
    return [
        _plot("latency", "Latency against offered load", "TTFT p99 of both runs by offered load.", have and latency),
        _plot("goodput", "Goodput against offered load", "Goodput of both runs by offered load.", have and goodput),
        _plot(
            "ttft",
            "Time to first token",
            "Share of requests by TTFT.",
            have and spread(lambda one: one.ttft_ms, "TTFT, ms"),
        ),
        _plot(
            "tpot",
            "Time per later token",
            "Share of requests by TPOT.",
            have and spread(lambda one: one.tpot_ms, "TPOT, ms"),
        ),
    ]


def _latency(summary: Summary) -> Plot:
    windows = sorted((window for window in summary.windows if window.due), key=lambda window: window.offered_per_s)

    def draw(axes: Axes) -> None:
        for k, q in enumerate(QUANTILES):
            axes.plot(
                [w.offered_per_s for w in windows],
                [w.ttft_ms[k] for w in windows],
                "o-",
                linewidth=0.6,
                label=f"p{q * 100:g}",
            )
        _labels(axes, "offered requests/s", "TTFT, ms", log=True)

    says = "Time to first token, counted from when each request was due, by the load of its part of the run."
    return _plot("latency", "Latency against offered load", says, windows and draw)


def _goodput(summary: Summary) -> Plot:
    windows = sorted((window for window in summary.windows if window.due), key=lambda window: window.offered_per_s)
    knee = summary.knee_per_s

    def draw(axes: Axes) -> None:
        loads = [window.offered_per_s for window in windows]
        axes.plot([0, max(loads)], [0, max(loads)], ":", color=INK, alpha=0.5, label="all offered")
        axes.plot(loads, [window.goodput_per_s for window in windows], "o-", linewidth=0.6, label="goodput")
        if knee is not None:
            more = "or more" if summary.knee_is_bound else ""
            axes.axvline(knee, color=HUES[1], label=f"knee: {knee:.2f}/s {more}".strip())
        _labels(axes, "offered requests/s", "requests/s that kept the SLO")

    says = f"The knee is the most load up to which {KEPT_SHARE:.0%} kept the SLO" + (
        "; no part of this run did." if knee is None else f": {knee:.2f} requests/s."
    )
    return _plot("goodput", "Goodput and its knee", says, windows and draw)


def _contexts(summary: Summary) -> Plot:
    contexts = summary.contexts

    def draw(axes: Axes) -> None:
        for name, marker, hue, of in (
            ("cold", "o", HUES[0], [context.cold_ms for context in contexts]),
            ("half or more in cache", "^", HUES[1], [context.cached_ms for context in contexts]),
        ):
            points = [(k, value) for k, values in enumerate(of) for value in values]
            if points:
                axes.scatter(*_columns(points), 14, alpha=0.6, marker=marker, color=hue, label=name)
        axes.set_xticks(range(len(contexts)), [f"{_short(context.tokens)}" for context in contexts])
        axes.set_xlim(-0.6, len(contexts) - 0.4)
        _labels(axes, "prompt tokens, up to", "TTFT, ms", log=True)

    return _plot(
        "contexts", "TTFT by context length", "Each answer's TTFT by the length of its prompt.", contexts and draw
    )


def _timeline(summary: Summary) -> Plot:
    contexts = [context for context in summary.contexts if context.parts_ms]

    def draw(axes: Axes) -> None:
        places = range(len(contexts))
        below = [0.0] * len(contexts)
        for k, part in enumerate(PARTS):
            # On a scale that begins at 0, and each bar as high as 1: long and short prompts differ a thousandfold.
            shares = [context.parts_ms[k] / max(sum(context.parts_ms), 1e-9) for context in contexts]
            axes.bar(places, shares, 0.6, bottom=below, color=HUES[k % len(HUES)], label=part)
            below = [low + share for low, share in zip(below, shares, strict=True)]
        names = [f"{_short(context.tokens)}\n{_ms(sum(context.parts_ms))}" for context in contexts]
        axes.set_xticks(list(places), names)
        axes.set_xlim(-0.6, max(2, len(contexts)) - 0.4)
        _labels(axes, "prompt tokens, up to; the mean TTFT below", "share of the TTFT", outside=True)

    says = "What the time to first token consisted of on average, as the server's own timeline tells."
    nothing = "This server tells no timeline of its requests."
    return _plot("timeline", "Where the time to first token went", says, contexts and draw, nothing)


def _over_time(record: Record) -> Plot:
    names = [traffic.name for traffic in record.scenario.traffic]
    seen = [one for one in record.outcomes if one.counts and one.ttft_ms is not None]

    def draw(axes: Axes) -> None:
        for name in names:
            points = [(one.due_s, one.ttft_ms or 0.0) for one in seen if one.traffic == name]
            if points:
                axes.scatter(*_columns(points), 10, alpha=0.6, label=name)
        for strike in record.strikes:
            axes.axvline(strike["at_s"], color=HUES[3], linestyle="--", label=strike["strike"])
        _labels(axes, "seconds into the run", "TTFT, ms", log=True)

    return _plot("times", "TTFT as the run went", "Each request's TTFT by when it was due, and faults.", seen and draw)


def _pages(record: Record) -> Plot:
    workers = list(dict.fromkeys((sample.role, sample.worker) for sample in record.samples))

    def draw(axes: Axes) -> None:
        for k, (_, worker) in enumerate(workers):
            mine = [sample for sample in record.samples if sample.worker == worker]
            at = [sample.at_s for sample in mine]
            hue = HUES[k % len(HUES)]
            axes.plot(at, [sample.pages["used"] for sample in mine], color=hue, label=f"{worker} used")
            axes.plot(at, [sample.pages["cached"] for sample in mine], "--", color=hue, label=f"{worker} cached")
            if any(sample.pages["quarantined"] for sample in mine):
                axes.plot(at, [s.pages["quarantined"] for s in mine], ":", color=hue, label=f"{worker} quarantined")
        _labels(axes, "seconds into the run", "pages of 256 tokens", outside=True)

    nothing = "This server does not tell what pages it holds."
    return _plot("pages", "Pages over time", "Pages that requests and caches hold.", workers and draw, nothing)


def _transfers(record: Record) -> Plot:
    workers = list(dict.fromkeys(sample.worker for sample in record.samples if sample.role == "decode"))

    def draw(axes: Axes) -> None:
        for worker in workers:
            mine = [sample for sample in record.samples if sample.worker == worker]
            # A worker that was started again counts from zero.
            moved = [max(0, b.read_bytes - a.read_bytes) for a, b in itertools.pairwise(mine)]
            spans = [max(b.at_s - a.at_s, 1e-9) for a, b in itertools.pairwise(mine)]
            rates = [size / span / 1e6 for size, span in zip(moved, spans, strict=True)]
            axes.step([b.at_s for b in mine[1:]], rates, where="pre", label=f"{worker}: {sum(moved) / 1e6:,.1f} MB")
        axes.set_ylim(bottom=0)
        _labels(axes, "seconds into the run", "pages read, MB/s")

    nothing = "This server does not tell what pages it moves."
    return _plot("transfers", "Transfers over time", "Page bytes that decode workers read.", workers and draw, nothing)


def _errors(summary: Summary) -> Plot:
    def draw(axes: Axes) -> None:
        kinds = [kind for kind, _ in summary.errors][::-1]
        counts = [count for _, count in summary.errors][::-1]
        for k, count in enumerate(axes.barh(kinds, counts, 0.6, color=HUES[3])):
            axes.annotate(f" {counts[k]}", (count.get_width(), k), va="center")
        axes.set_ylim(-0.6, max(4, len(kinds)) - 0.4)
        axes.set_xlabel("requests")

    return _plot("errors", "Errors by kind", "Requests that failed.", summary.errors and draw, "No request failed.")


def _plot(name: str, title: str, says: str, draw: Any, nothing: str = "Nothing was asked.") -> Plot:
    if not draw:
        return Plot(name, title, nothing, "")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Ids are of one picture; the page holds several.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Plot(name, title, says, svg.replace("<svg ", f'<svg role="img" aria-label="{title}. {says}" ', 1))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _labels(axes: Axes, x: str, y: str, *, log: bool = False, outside: bool = False) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log:
        _log(axes.yaxis, axes.set_yscale)
    if outside:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    else:
        axes.legend(fontsize=8)


def _log(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """A scale on which a doubling looks the same everywhere, with plain numbers on it; not for less than a decade."""
    low, high = axis.get_data_interval()
    if low > 0 and high >= 10 * low:
        set_scale("log")
        axis.set_major_formatter(lambda value, _: f"{value:,g}")


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def _ms(value: float) -> str:
    return f"{value / 1e3:,.1f} s" if value >= 1e3 else f"{value:.0f} ms" if math.isfinite(value) else ""
