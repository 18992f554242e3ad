"""Reports in a real browser: the pictures are there, hold what was measured, and can be read, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from loadtest.record import Own, Record
from loadtest.report import write, write_comparison
from loadtest.scenario import load
from tests.loadtest.pages import plots_of
from tests.loadtest.records import a_run, outcome


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_has_all_its_pictures_and_none_is_empty(browser: Browser, tmp_path: Path, scheme: str) -> None:
    write(a_run(), tmp_path / "report.html")
    found = plots_of(browser, tmp_path / "report.html", "load-report", scheme)
    assert list(found) == ["latency", "goodput", "contexts", "timeline", "times", "pages", "transfers", "errors"]
    for name, plot in found.items():
        assert plot["width"] > 300, name
        assert plot["height"] > 150, name
        assert plot["marks"] > 10, name
    words = {name: " ".join(map(str, plot["words"])) for name, plot in found.items()}
    assert "p99" in words["latency"]
    assert "knee: " in words["goodput"]
    assert "half or more in cache" in words["contexts"]
    assert "prefill compute" in words["timeline"]
    assert "decode-killed" in words["times"]
    assert "decode-0 used" in words["pages"]
    assert "decode-0: 59.0 MB" in words["transfers"]
    assert "503 overloaded" in words["errors"]


def test_a_report_of_another_server_says_what_there_is_nothing_to_see_of(browser: Browser, tmp_path: Path) -> None:
    run = Record(scenario=load("smoke"), about={}, outcomes=[outcome(n, n / 2) for n in range(20)], own=Own())
    write(run, tmp_path / "report.html")
    found = plots_of(browser, tmp_path / "report.html", "load-elsewhere")
    assert list(found) == ["latency", "goodput", "contexts", "times"]
    text = (tmp_path / "report.html").read_text()
    for sentence in (
        "This server tells no timeline of its requests.",
        "This server does not tell what pages it holds.",
        "No request failed.",
    ):
        assert sentence in text


def test_a_report_of_a_run_in_which_nothing_was_answered_is_still_one(browser: Browser, tmp_path: Path) -> None:
    outcomes = [outcome(n, n / 2, None, error="connect", status=0, message="<refused>") for n in range(6)]
    write(Record(scenario=load("smoke"), about={}, outcomes=outcomes), tmp_path / "report.html")
    assert "errors" in plots_of(browser, tmp_path / "report.html", "load-nothing")
    assert "&lt;refused&gt;" in (tmp_path / "report.html").read_text()


def test_a_comparison_draws_both_runs(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    table = write_comparison(("before", "after"), (a_run(), a_run(seed=2, slower=2.0)), path)
    assert ("requests", "120", "120", "1.00x") in table
    found = plots_of(browser, path, "load-compare")
    assert list(found) == ["latency", "goodput", "ttft", "tpot"]
    assert all({"before", "after"} <= set(map(str, plot["words"])) for plot in found.values())
