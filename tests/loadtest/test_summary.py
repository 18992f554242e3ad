"""Figures of a record: none left out that should count, none counted that should not."""

from __future__ import annotations

import math

import pytest

from loadtest.record import Own, Record, judge
from loadtest.report import compared, row, verdicts
from loadtest.scenario import ScenarioError, Slo, load, parse
from loadtest.summary import keeps, quantile, saturated, summarize
from tests.loadtest.records import a_run, outcome
from tests.loadtest.test_scenario import LEAST, traffic

SLO = Slo(ttft_ms=500, tpot_ms=50, long_tokens=1000, long_ttft_ms=9000)


def record(outcomes, **more) -> Record:
    return Record(scenario=load("smoke"), about={}, seconds=1.0, outcomes=list(outcomes), **more)


def test_latency_counts_from_when_a_request_was_due_and_not_from_when_it_was_sent():
    late = outcome(due_s=1.0, ttft_s=2.5, sent_s=3.0)
    assert late.ttft_ms == 2500
    assert summarize(record([late])).all.ttft_ms == (2500, 2500, 2500)


@pytest.mark.parametrize("error", ["unfinished", "silence", "408 queue_timeout", "stream queue_timeout"])
def test_who_waits_in_vain_is_in_the_latencies_with_that_wait(error):
    answered = [outcome(n) for n in range(9)]
    vain = outcome(9, ttft_s=None, error=error, ended_s=30.0)
    figures = summarize(record([*answered, vain])).all
    assert figures.ttft_ms == pytest.approx((100, 100, 30_000))
    assert figures.errors == 1


def test_who_is_refused_at_once_makes_no_latency_better():
    refused = [outcome(n, ttft_s=None, error="503 overloaded", status=503) for n in range(50)]
    figures = summarize(record([outcome(99, ttft_s=2.0), *refused])).all
    assert figures.ttft_ms == (2000, 2000, 2000)
    assert (figures.errors, figures.refused, figures.kept) == (50, 50, 0)


def test_refusals_are_no_failures_where_the_scenario_is_out_for_them():
    outcomes = [
        outcome(0, status=429, error="429 slow_down"),
        outcome(1, error="stream queue_timeout"),
        outcome(2, error="broken"),
    ]
    assert summarize(Record(scenario=load("chat-2k"), about={}, outcomes=outcomes)).failed == 3
    assert summarize(Record(scenario=load("overload-3x"), about={}, outcomes=outcomes)).failed == 1


def test_clients_that_leave_or_dawdle_count_in_no_latency_and_in_no_goodput():
    figures = summarize(record([outcome(0), outcome(1, 1.0, 9.0, slow=True), outcome(2, 2.0, 9.0, hung_up=True)])).all
    assert (figures.sent, figures.hung_up, figures.errors, figures.kept) == (3, 1, 0, 1)
    assert figures.ttft_ms == pytest.approx((100, 100, 100))


@pytest.mark.parametrize(
    ("kept", "one"),
    [
        (True, outcome(ttft_s=0.5)),
        (False, outcome(ttft_s=0.501)),
        (False, outcome(last_s=0.1 + 4 * 0.051)),
        (False, outcome(error="no [DONE]")),
        (True, outcome(ttft_s=8.0, prompt_tokens=1000)),
        (False, outcome(ttft_s=9.5, prompt_tokens=1000)),
        (True, outcome(answer_tokens=1)),
    ],
)
def test_an_answer_keeps_the_slo_when_it_is_whole_and_in_time(kept, one):
    assert keeps(SLO, one) is kept


def test_the_knee_is_the_most_load_up_to_which_the_slo_is_kept():
    # Twelve parts of a minute with 1 to 12 requests each; from 7 on nobody is in time.
    outcomes = [
        outcome(n, 5.0 * part + 5.0 * n / (part + 1), 0.1 if part < 6 else 60.0)
        for part in range(12)
        for n in range(part + 1)
    ]
    outcomes.append(outcome(999, 60.0, 60.0))
    summary = summarize(record(outcomes))
    assert summary.knee_per_s == pytest.approx(6 / 5)
    assert not summary.knee_is_bound
    assert summarize(record(outcomes[:21])).knee_is_bound
    assert summarize(record([outcome(n, n, 60.0) for n in range(30)])).knee_per_s is None


def test_the_same_words_must_get_the_same_answer_and_only_whole_answers_are_compared():
    outcomes = [
        outcome(0, asked="a", answer="1", ended_s=1.0),
        outcome(1, asked="a", answer="1", ended_s=2.0),
        outcome(2, asked="a", answer="2", ended_s=3.0),
        outcome(3, asked="a", answer="9", ended_s=4.0, hung_up=True),
        outcome(4, asked="b", answer="5", ended_s=5.0),
        outcome(5, asked="", answer="7", ended_s=6.0),  # drawn at a temperature
        outcome(6, asked="b", answer="5", ended_s=0.5),
    ]
    judge(outcomes)
    assert [one.same for one in outcomes] == [None, True, False, None, True, None, None]
    checks = summarize(record(outcomes)).checks
    assert (checks.same, checks.different, checks.unchecked) == (2, 1, 3)


def test_needles_are_counted_apart_from_equality():
    summary = summarize(record([outcome(0, right=True), outcome(1, right=False), outcome(2, right=False, same=True)]))
    assert (summary.checks.needles_right, summary.checks.needles_wrong, summary.checks.unchecked) == (1, 2, 0)
    told = [sentence for _, sentence in verdicts(record([]), summary)]
    assert "Needles: 1 of 3 answers name the word that was hidden." in told


def test_requests_beside_a_long_prompt_are_told_from_those_before_and_after_it():
    scenario = parse(
        LEAST | {"traffic": [traffic(), traffic(name="long")], "beside": {"traffic": "a", "during": "long"}}, "test"
    )
    outcomes = [
        outcome(0, 10.0, 20.0, traffic="long", ended_s=40.0),
        outcome(1, 5.0, 0.1, traffic="a"),
        outcome(2, 15.0, 0.3, traffic="a"),
        outcome(3, 35.0, 7.0, traffic="a"),  # beside the answer: neither one nor the other
        outcome(4, 50.0, 0.2, traffic="a"),
    ]
    beside = summarize(Record(scenario=scenario, about={}, outcomes=outcomes)).beside
    assert beside is not None
    assert (beside.during, beside.otherwise) == (1, 2)
    assert (beside.during_ms, beside.otherwise_ms) == pytest.approx((300, 200))
    assert beside.times == pytest.approx(1.5)


def test_measuring_that_is_slow_beside_what_it_measures_is_said_to_be_saturated():
    fine = Own(overhead_us={"0.5": 900.0, "0.99": 9000.0}, late_ms={"0.99": 9.0}, cpu_share=0.5)
    outcomes = [outcome(n, gaps_ms=[60.0]) for n in range(9)]  # TTFT 100 ms, gaps 60 ms: bounds 10 and 6 ms
    assert saturated(fine, outcomes) == ()
    for own, told in (
        (Own(late_ms={"0.99": 10.5}), "requests were sent up to 10.5 ms late (p99), more than 10.0 ms"),
        (Own(overhead_us={"0.99": 10_500.0}), "events lay 10.5 ms before they were handled (p99), more than 10.0 ms"),
        (Own(overhead_us={"0.5": 6_500.0}), "events lay 6.5 ms before they were handled (p50), more than 6.0 ms"),
        (Own(cpu_share=0.95), "measuring took 95% of a core, and it has only one"),
    ):
        assert saturated(own, outcomes) == (told,)


def test_quantiles_are_values_that_were_measured():
    assert [quantile(range(1, 101), q) for q in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert quantile([7.0], 0.99) == 7.0
    assert math.isnan(quantile([], 0.5))


def test_a_record_is_the_same_after_having_been_kept(tmp_path):
    run = a_run()
    run.save(tmp_path / "record.json")
    assert Record.load(tmp_path) == run
    (tmp_path / "record.json").write_text('{"version": 0}')
    with pytest.raises(ScenarioError, match="is not the record of a load test: it is of another version"):
        Record.load(tmp_path)


def test_a_row_and_a_comparison_hold_what_the_summary_says():
    run, slower = a_run(), a_run(slower=2.0)
    summary = summarize(run)
    figures = row(run, summary)
    assert [figures[name] for name in ("scenario", "requests", "errors", "refused", "hung_up")] == [
        "smoke",
        120,
        0,
        1,
        1,
    ]
    assert (figures["same"], figures["different"]) == (58, 0)
    assert figures["ttft_p99_ms"] == round(summary.all.ttft_ms[2], 2)
    table = {name: (first, second, times) for name, first, second, times in compared(summary, summarize(slower))}
    assert table["requests"] == ("120", "120", "1.00x")
    assert table["TTFT p50, ms"][2] == "2.00x"
    assert table["answers that differ"] == ("0", "0", "")
