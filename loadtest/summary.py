"""What a record says in figures. Pure: the same record, the same figures."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.record import Outcome, Own, Record
from loadtest.scenario import Slo

QUANTILES = (0.5, 0.9, 0.99)
PARTS = (
    "receive", "tokenize", "queue", "route", "retry", "admit", "prefill queue", "prefill compute", "prefill other",
    "transfer", "first_decode",
)  # fmt: skip
"""The server's timeline to the first token, in order, with what the prefill worker tells of its own part of it."""

NUM_WINDOWS = 12
KEPT_SHARE = 0.95
"""The knee is the most load up to which so many of the answers kept the SLO."""

OWN_SHARE = 0.1
"""Measuring may add so much of what it measures; above that the figures say more of the measuring process."""
OWN_LEAST_MS = 5.0
OWN_CPU_SHARE = 0.9


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least `q` of the values do not exceed. NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def quantiles(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {str(q): round(ordered[max(0, math.ceil(q * len(ordered)) - 1)], 3) for q in (0.5, 0.99, 1.0)}


def keeps(slo: Slo, outcome: Outcome) -> bool:
    """Whether an answer came whole and as soon as promised."""
    if not outcome.whole or not outcome.counts or outcome.ttft_ms is None:
        return False
    bound = slo.ttft_ms if outcome.prompt_tokens < slo.long_tokens else (slo.long_ttft_ms or math.inf)
    return outcome.ttft_ms <= bound and (outcome.tpot_ms is None or outcome.tpot_ms <= slo.tpot_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one traffic, or of all."""

    name: str
    sent: int
    answered: int  # whole
    hung_up: int
    errors: int
    refused: int  # of the errors
    goodput_per_s: float
    kept: int
    ttft_ms: tuple[float, ...]  # at QUANTILES
    tpot_ms: tuple[float, ...]
    itl_ms: tuple[float, ...]
    total_ms: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Requests that were due in one part of the run."""

    begin_s: float
    offered_per_s: float
    goodput_per_s: float
    kept: int
    due: int  # those that leave or dawdle by themselves are no part of it
    ttft_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Whole answers to prompts of about one length: from half of `tokens` to it."""

    tokens: int
    cold_ms: tuple[float, ...]  # TTFT of each that found less than half of its prompt in a cache
    cached_ms: tuple[float, ...]
    parts_ms: tuple[float, ...]  # the server's timeline on average, in the order of PARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideFigures:
    during_ms: float  # TTFT p99
    otherwise_ms: float
    during: int  # requests
    otherwise: int

    @property
    def times(self) -> float:
        return self.during_ms / self.otherwise_ms if self.otherwise_ms else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """Answers that could be checked, and what came of it."""

    needles_right: int
    needles_wrong: int
    same: int
    different: int
    unchecked: int  # whole answers that were neither


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    all: Figures
    traffic: tuple[Figures, ...]
    windows: tuple[Window, ...]
    knee_per_s: float | None  # None: no window kept the SLO
    knee_is_bound: bool  # the most load offered was kept: the knee lies above it
    contexts: tuple[Context, ...]
    errors: tuple[tuple[str, int], ...]  # kind, count; the most frequent first
    checks: Checks
    beside: BesideFigures | None
    saturated: tuple[str, ...]  # why the figures are not to be trusted; empty: they are
    failed: int  # errors, without refusals where the scenario is out for them


def summarize(record: Record) -> Summary:
    scenario, outcomes = record.scenario, record.outcomes
    span = max((one.due_s for one in outcomes), default=0.0)
    everything = _figures("all", outcomes, scenario.slo, span)
    parts = tuple(
        _figures(traffic.name, [one for one in outcomes if one.traffic == traffic.name], scenario.slo, span)
        for traffic in scenario.traffic
    )
    windows = _windows(outcomes, scenario.slo, span)
    knee = _knee(windows)
    most = max((window.offered_per_s for window in windows), default=0.0)
    whole = [one for one in outcomes if one.whole]
    return Summary(
        all=everything,
        traffic=parts,
        windows=windows,
        knee_per_s=knee,
        knee_is_bound=knee is not None and knee >= most,
        contexts=_contexts(whole),
        errors=tuple(Counter(one.error for one in outcomes if one.error).most_common()),
        checks=Checks(
            needles_right=sum(one.right is True for one in whole),
            needles_wrong=sum(one.right is False for one in whole),
            same=sum(one.same is True for one in whole),
            different=sum(one.same is False for one in whole),
            unchecked=sum(one.right is None and one.same is None for one in whole),
        ),
        beside=_beside(record),
        saturated=saturated(record.own, outcomes),
        failed=everything.errors - (everything.refused if scenario.refusals_fit else 0),
    )


def saturated(own: Own, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Why measuring was a part of what was measured: each reason with its figures."""
    ttft = [one.ttft_ms for one in outcomes if one.counts and one.ttft_ms is not None]
    gaps = [gap for one in outcomes if one.counts for gap in one.gaps_ms]
    reasons = []
    bound = max(OWN_LEAST_MS, OWN_SHARE * quantile(ttft, 0.5)) if ttft else OWN_LEAST_MS
    if (late := own.late_ms.get("0.99", 0.0)) > bound:
        reasons.append(f"requests were sent up to {late:.1f} ms late (p99), more than {bound:.1f} ms")
    if (overhead := own.overhead_us.get("0.99", 0.0) / 1e3) > bound:
        reasons.append(f"events lay {overhead:.1f} ms before they were handled (p99), more than {bound:.1f} ms")
    bound = max(OWN_LEAST_MS, OWN_SHARE * quantile(gaps, 0.5)) if gaps else OWN_LEAST_MS
    if (overhead := own.overhead_us.get("0.5", 0.0) / 1e3) > bound:
        reasons.append(f"events lay {overhead:.1f} ms before they were handled (p50), more than {bound:.1f} ms")
    if own.cpu_share > OWN_CPU_SHARE:
        reasons.append(f"measuring took {own.cpu_share:.0%} of a core, and it has only one")
    return tuple(reasons)


def _figures(name: str, outcomes: Sequence[Outcome], slo: Slo, span_s: float) -> Figures:
    whole = [one for one in outcomes if one.whole]
    counted = [one for one in outcomes if one.counts]
    kept = sum(keeps(slo, one) for one in counted)
    return Figures(
        name=name,
        sent=len(outcomes),
        answered=len(whole),
        hung_up=sum(one.hung_up for one in outcomes),
        errors=sum(bool(one.error) for one in outcomes),
        refused=sum(one.refused for one in outcomes),
        goodput_per_s=kept / span_s if span_s else 0.0,
        kept=kept,
        ttft_ms=_at([one.ttft_ms for one in counted if one.ttft_ms is not None]),
        tpot_ms=_at([one.tpot_ms for one in counted if one.tpot_ms is not None]),
        itl_ms=_at([gap for one in counted for gap in one.gaps_ms]),
        total_ms=_at([(one.ended_s - one.due_s) * 1e3 for one in counted if one.whole]),
        prompt_tokens=sum(one.prompt_tokens for one in outcomes),
        cached_tokens=sum(one.cached_tokens for one in outcomes),
        answer_tokens=sum(one.answer_tokens for one in outcomes),
    )


def _at(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(quantile(values, q) for q in QUANTILES)


def _windows(outcomes: Sequence[Outcome], slo: Slo, span_s: float) -> tuple[Window, ...]:
    if not span_s:
        return ()
    width = span_s / NUM_WINDOWS
    parts: dict[int, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        parts[min(NUM_WINDOWS - 1, int(one.due_s / width))].append(one)
    windows = []
    for k in range(NUM_WINDOWS):
        due = [one for one in parts[k] if one.counts]
        kept = sum(keeps(slo, one) for one in due)
        windows.append(
            Window(
                begin_s=k * width,
                offered_per_s=len(parts[k]) / width,
                goodput_per_s=kept / width,
                kept=kept,
                due=len(due),
                ttft_ms=_at([one.ttft_ms for one in due if one.ttft_ms is not None]),
            )
        )
    return tuple(windows)


def _knee(windows: Sequence[Window]) -> float | None:
    """The most load such that of all answers under at most that load, enough kept the SLO."""
    knee, kept, due = None, 0, 0
    for window in sorted(windows, key=lambda window: window.offered_per_s):
        kept, due = kept + window.kept, due + window.due
        if due and kept >= KEPT_SHARE * due:
            knee = window.offered_per_s
    return knee


def _contexts(whole: Sequence[Outcome]) -> tuple[Context, ...]:
    groups: dict[int, list[Outcome]] = defaultdict(list)
    for one in whole:
        if one.prompt_tokens and one.counts and one.ttft_ms is not None:
            groups[1 << max(0, one.prompt_tokens - 1).bit_length()].append(one)
    return tuple(
        Context(
            tokens=tokens,
            cold_ms=tuple(one.ttft_ms or 0.0 for one in group if 2 * one.cached_tokens < one.prompt_tokens),
            cached_ms=tuple(one.ttft_ms or 0.0 for one in group if 2 * one.cached_tokens >= one.prompt_tokens),
            parts_ms=_mean_parts(group),
        )
        for tokens, group in sorted(groups.items())
    )


def _mean_parts(group: Sequence[Outcome]) -> tuple[float, ...]:
    told = [one.timeline for one in group if one.timeline]
    if not told:
        return ()
    sums = {part: sum(timeline.get(part, 0.0) for timeline in told) / len(told) for part in (*PARTS, "prefill")}
    sums["prefill other"] = max(0.0, sums["prefill"] - sums["prefill queue"] - sums["prefill compute"])
    return tuple(sums[part] for part in PARTS)


def _beside(record: Record) -> BesideFigures | None:
    wanted = record.scenario.beside
    if wanted is None:
        return None
    waits = [
        (one.sent_s, one.ended_s if one.first_s is None else one.first_s)
        for one in record.outcomes
        if one.traffic == wanted.during and one.turn == 0
    ]
    busy = [(one.sent_s, one.ended_s) for one in record.outcomes if one.traffic == wanted.during]
    during, otherwise = [], []
    for one in record.outcomes:
        if one.traffic != wanted.traffic or one.ttft_ms is None:
            continue
        if any(begin <= one.due_s < end for begin, end in waits):
            during.append(one.ttft_ms)
        elif not any(begin <= one.due_s < end for begin, end in busy):
            otherwise.append(one.ttft_ms)
    return BesideFigures(
        during_ms=quantile(during, 0.99),
        otherwise_ms=quantile(otherwise, 0.99),
        during=len(during),
        otherwise=len(otherwise),
    )
