"""A record as one HTML file that needs nothing beside it, and as one row of figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2

from loadtest import plots
from loadtest.record import Record
from loadtest.summary import QUANTILES, Figures, Summary, summarize

HERE = Path(__file__).parent

ROWS: tuple[tuple[str, str], ...] = (
    ("TTFT", "ttft_ms"),
    ("TPOT", "tpot_ms"),
    ("ITL", "itl_ms"),
    ("whole answer", "total_ms"),
)


def write(record: Record, path: Path) -> Summary:
    """The report of a run. -> its figures."""
    summary = summarize(record)
    page = _template("report.html.j2").render(
        record=record,
        scenario=record.scenario,
        summary=summary,
        verdicts=verdicts(record, summary),
        plots=plots.of_run(record, summary),
        rows=ROWS,
        quantiles=QUANTILES,
    )
    path.write_text(page)
    return summary


def write_comparison(
    names: tuple[str, str], records: tuple[Record, Record], path: Path
) -> list[tuple[str, str, str, str]]:
    """The report about two runs. -> its table: (figure, of the first, of the second, how many times as much)."""
    summaries = [summarize(record) for record in records]
    table = compared(summaries[0], summaries[1])
    page = _template("compare.html.j2").render(
        names=names, records=records, table=table, plots=plots.of_two(names, summaries, records)
    )
    path.write_text(page)
    return table


def compared(first: Summary, second: Summary) -> list[tuple[str, str, str, str]]:
    def line(name: str, a: float, b: float) -> tuple[str, str, str, str]:
        times = f"{b / a:.2f}x" if a and math.isfinite(a) and math.isfinite(b) else ""
        return name, number(a), number(b), times

    a, b = first.all, second.all
    lines = [line("requests", a.sent, b.sent), line("errors", a.errors, b.errors)]
    lines += [line("goodput, requests/s", a.goodput_per_s, b.goodput_per_s)]
    if first.knee_per_s is not None and second.knee_per_s is not None:
        lines.append(line("goodput knee, requests/s", first.knee_per_s, second.knee_per_s))
    pairs = [("", a, b)]
    others = {figures.name: figures for figures in second.traffic}
    pairs += [(f"{one.name}: ", one, others[one.name]) for one in first.traffic if one.name in others]
    for prefix, one, other in pairs:
        for title, field in ROWS:
            for k, q in enumerate(QUANTILES):
                lines.append(
                    line(f"{prefix}{title} p{q * 100:g}, ms", getattr(one, field)[k], getattr(other, field)[k])
                )
    lines.append(line("cached share of prompts", cached_share(a), cached_share(b)))
    lines.append(line("answers that differ", first.checks.different, second.checks.different))
    return lines


def verdicts(record: Record, summary: Summary) -> list[tuple[str, str]]:
    """What the run came to, in sentences: ("good" | "bad" | "plain", sentence)."""
    checks, everything = summary.checks, summary.all
    told = []
    if "interrupted" in record.about:
        told.append(("bad", f"Interrupted {record.about['interrupted']}: what was open then is told as unfinished."))
    if everything.refused and record.scenario.refusals_fit:
        told.append(("plain", f"{everything.refused} of {everything.sent} requests were refused, as too many at once."))
    if summary.failed:
        told.append(("bad", f"{summary.failed} of {everything.sent} requests failed."))
    else:
        told.append(("good", f"No error: {everything.answered} answers came whole, {everything.hung_up} clients left."))
    if checks.same or checks.different:
        told.append(
            (
                "bad" if checks.different else "good",
                f"Equality: {checks.same} of {checks.same + checks.different} answers to words that had been asked "
                "before are what the first answer was, bit for bit.",
            )
        )
    if checks.needles_right or checks.needles_wrong:
        count = checks.needles_right + checks.needles_wrong
        told.append(("plain", f"Needles: {checks.needles_right} of {count} answers name the word that was hidden."))
    if checks.unchecked:
        told.append(("plain", f"{checks.unchecked} whole answers were compared with nothing."))
    if record.pages_balanced is not None:
        told.append(
            ("good", f"Pages balance: nothing is held ({record.pages}).")
            if record.pages_balanced
            else ("bad", f"Pages do not balance: {record.pages}.")
        )
    if (beside := summary.beside) is not None and record.scenario.beside is not None:
        wanted = record.scenario.beside
        if beside.during and beside.otherwise:
            told.append(
                (
                    "good" if beside.times <= wanted.goal else "bad",
                    f"TTFT p99 of {wanted.traffic} is {number(beside.during_ms)} ms while {wanted.during} waits for "
                    f"its first token ({beside.during} requests), {number(beside.otherwise_ms)} ms otherwise "
                    f"({beside.otherwise}): {beside.times:.1f} times, the goal is {wanted.goal:g}.",
                )
            )
        else:
            told.append(("plain", f"Too few requests of {wanted.traffic} to compare with {wanted.during}."))
    told += [("plain", f"At {one['at_s']:.1f} s, {one['strike']}: {one['told']}.") for one in record.strikes]
    own = record.own
    overhead = own.overhead_us
    cost = "over TLS, what an event waits can not be told"
    if overhead:
        median, most = overhead["0.5"], overhead["0.99"]
        cost = f"an event was handled {median:.0f} us after the kernel had received it (p50), {most:.0f} (p99)"
    told.append(
        (
            "plain",
            f"Measuring: {cost}; requests were sent {own.late_ms.get('0.99', 0.0):.1f} ms late (p99); a timer rang "
            f"{own.lag_ms.get('0.99', 0.0):.1f} ms late (p99); {own.cpu_share:.1%} of a core.",
        )
    )
    told += [("bad", f"Measuring was saturated, so distrust the figures: {reason}.") for reason in summary.saturated]
    return told


def row(record: Record, summary: Summary) -> dict[str, Any]:
    """The run's row of bench/results/loadtest.csv. Milliseconds, unless the name says otherwise."""
    everything, checks, beside = summary.all, summary.checks, summary.beside
    return {
        "scenario": record.scenario.name,
        "server": record.about.get("cluster") or record.about.get("server", ""),
        "model": record.about.get("model", ""),
        "seconds": round(record.seconds, 1),
        "requests": everything.sent,
        "errors": summary.failed,
        "refused": everything.refused,
        "hung_up": everything.hung_up,
        "goodput_per_s": round(everything.goodput_per_s, 3),
        "knee_per_s": "" if summary.knee_per_s is None else round(summary.knee_per_s, 3),
        **{f"ttft_p{q * 100:g}_ms": _rounded(everything.ttft_ms[k]) for k, q in enumerate(QUANTILES)},
        "tpot_p50_ms": _rounded(everything.tpot_ms[0]),
        "tpot_p99_ms": _rounded(everything.tpot_ms[2]),
        "itl_p99_ms": _rounded(everything.itl_ms[2]),
        "prompt_tokens": everything.prompt_tokens,
        "cached_tokens": everything.cached_tokens,
        "longest_prompt": max((one.prompt_tokens for one in record.outcomes), default=0),
        "same": checks.same,
        "different": checks.different,
        "needles_right": checks.needles_right,
        "needles_wrong": checks.needles_wrong,
        "pages_balanced": {True: "yes", False: "no", None: ""}[record.pages_balanced],
        "beside_ttft_p99_ms": _rounded(beside.during_ms) if beside else "",
        "otherwise_ttft_p99_ms": _rounded(beside.otherwise_ms) if beside else "",
        "overhead_p99_us": record.own.overhead_us.get("0.99", ""),
        "late_p99_ms": record.own.late_ms.get("0.99", ""),
        "saturated": "yes" if summary.saturated else "no",
        "load_1m": record.about.get("load", ""),
    }


def cached_share(figures: Figures) -> float:
    return figures.cached_tokens / figures.prompt_tokens if figures.prompt_tokens else math.nan


def number(value: float) -> str:
    """With as many digits as are worth reading."""
    if not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _rounded(value: float) -> float | str:
    return round(value, 2) if math.isfinite(value) else ""


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    return environment.get_template(name)
