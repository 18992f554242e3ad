"""The judge, the table and the page; and the core faults themselves, done to a real cluster."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from chaos import report
from chaos.judge import Row
from chaos.run import KINDS
from chaos.streams import Outcome, Verdict, asks
from chaos.table import FAULTS

ROOT = Path(__file__).resolve().parents[2]
CORE = (
    *("F01", "F02", "F03", "F04", "F05", "F06", "F07", "F08", "F13", "F17", "F18", "F23", "F25", "F28", "F36"),
    *("F44", "F45", "F48", "F52"),
)
"""Six of them, F03, F07, F13, F17, F23 and F45, are done to a cluster in tests/cluster/test_losses.py too."""


def seen(ids: list[int], *, done: bool = True, reason: str = "length", error: str = "") -> Outcome:
    return Outcome(ids=ids, done=done, reason=reason, error=error, status=200)


def test_an_answer_is_whole_or_lost_or_doubled_or_altered():
    verdict = Verdict()
    for one in (
        seen([1, 2, 3]),
        seen([1, 2], done=False, error="worker_lost: gone"),
        seen([1, 2, 3], done=False),  # nobody said that it was over
        seen([1, 2, 3, 3]),
        seen([1, 9, 3]),
        seen([1, 2, 3], reason="stop"),
        seen([]),
    ):
        verdict.judge([1, 2, 3], one)
    assert (verdict.streams, verdict.lost, verdict.doubled, verdict.altered) == (7, 4, 1, 1)
    assert verdict.bad == len(verdict.why) == 6
    assert verdict.why[0] == "2 of 3 tokens, status 200, worker_lost: gone"


def test_gaps_are_ordered_before_a_share_of_them_is_taken():
    verdict = Verdict(gaps_s=[float(n) for n in range(100, 0, -1)])
    assert (verdict.gap(0.5), verdict.gap(0.99), Verdict().gap(0.99)) == (51.0, 100.0, 0.0)


def test_the_same_seed_asks_the_same():
    first, second = (asks(9, prompt_tokens=(3, 5), max_tokens=(2,), vocab=50, seed=1) for _ in range(2))
    assert first == second
    assert len(set(first)) == 9
    assert [len(ask.prompt) for ask in first[:3]] == [3, 5, 3]


def test_every_fault_is_done_in_one_way():
    assert [fault.id for fault in FAULTS] == [f"F{n:02}" for n in range(1, 61)]
    for fault in FAULTS:
        ways = [bool(fault.live), bool(fault.tests)]
        assert sum(ways) == 1, f"{fault.id} has {sum(ways)} ways"
        assert not fault.live or fault.where == "silence" or callable(getattr(KINDS[fault.where], fault.live)), fault.id
        for test in fault.tests:
            path, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text() if name else (ROOT / path).exists(), test


def test_the_page_shows_the_last_row_of_each_fault_and_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROWS", tmp_path / "faults.csv")
    monkeypatch.setattr(report, "PAGE", tmp_path / "faults.md")
    report.keep([Row(fault="F07", ok=False, streams=8, measured="3 lost")], "live")
    report.keep([Row(fault="F13", ok=True, streams=8, measured="gap 3 s")], "live")
    report.keep([Row(fault="F07", ok=True, streams=32, measured="gap 1 s")], "live")
    lines = {line.split(" | ")[0]: line for line in report.write().read_text().splitlines() if line.startswith("| F")}
    assert len(lines) == 60
    assert "| live | yes | 32 | gap 1 s (" in lines["| F07"]
    assert "| live | yes | 8 | gap 3 s (" in lines["| F13"]
    assert lines["| F45"].endswith("| live |  |  | not run yet |")
    with (tmp_path / "faults.csv").open() as file:
        assert [row["fault"] for row in csv.DictReader(file)] == ["F07", "F13"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_core_faults_cost_no_answer_and_no_page(record_property, tmp_path):
    words = [sys.executable, "-m", "cli", "chaos", *CORE, "--into", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=3500, check=False)
    record_property("faults", len(CORE))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "faults.csv").open() as file:
        rows = {row["fault"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(CORE)
    for fault in FAULTS:
        if fault.id in CORE:
            row = rows[fault.id]
            assert row["ok"] == "yes", row
            assert int(row["n"]) >= (8 if fault.live else 1), row
            assert not fault.live or "; 0 pages held" in row["measured"], row
