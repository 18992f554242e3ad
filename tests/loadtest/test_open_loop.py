"""Open loop, against a server that stalls: nobody waits for anybody, and nobody's wait is left out of the figures."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.record import Record
from loadtest.scenario import load
from loadtest.summary import summarize
from loadtest.workload import times
from tests.loadtest.stalling import Stalling, stalling

ROOT = Path(__file__).resolve().parents[2]

SCENARIO = """
name = "stall"
about = "Requests at a server that answers none of them until all have come."
duration_s = 3
drain_s = 40
silence_s = 30

[slo]
ttft_ms = 50
tpot_ms = 1000

[[traffic]]
name = "held"
arrivals = { kind = "poisson", per_s = 10 }
prompt = [{ tokens = 64 }]
answer_tokens = 4
repeat_share = 0.3
tenants = ["blue"]

[[traffic]]
name = "vain"
endpoint = "completions"
arrivals = { kind = "once" }
prompt = [{ tokens = 64 }]
cancel = { share = 0, after_s = 1 }
"""


@pytest.fixture(scope="module", autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and children inherit that."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(tmp_path: Path, server: Stalling, scenario: str, *more: str, **env: str) -> subprocess.Popen[str]:
    (tmp_path / "stall.toml").write_text(scenario)
    words = [str(tmp_path / "stall.toml"), "--url", server.url, "--out", str(tmp_path), *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PENUMBRA_")} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-m", "loadtest", *words], cwd=ROOT, env=environment, text=True, **pipes)


def locust_tells(url: str, of: tuple[str, str], count: int) -> dict[str, Any]:
    """Locust's table once it has so many rows of one kind: (type, name) -> row."""
    deadline = time.monotonic() + 60
    while True:
        told = {
            (row["method"], row["name"]): row for row in httpx.get(f"{url}/stats/requests", timeout=10).json()["stats"]
        }
        if told.get(of, {}).get("num_requests", 0) >= count:
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


def test_a_server_that_stalls_is_sent_all_that_is_due_and_every_wait_counts_from_when_it_was_due(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with stalling() as server:
        process = run(tmp_path, server, SCENARIO, "--web-port", str(port), PENUMBRA_TENANT_KEYS="blue=its-key")
        try:
            (tmp_path / "plan.toml").write_text(SCENARIO)
            scenario = load(str(tmp_path / "plan.toml"))
            held = scenario.of("held")
            due = list(times(held.arrivals, 3.0, f"{scenario.seed}/held"))
            assert len(due) > 20
            # None has been answered when the last one comes: had one waited for another, it would never have come.
            server.wait_for(len(due) + 1)
            server.gate.set()
            told = locust_tells(f"http://127.0.0.1:{port}", ("TTFT", "held"), len(due))
            server.ended.set()  # closes the connection that was to wait in vain
            locust_tells(f"http://127.0.0.1:{port}", ("answer", "vain"), 1)
            deadline = time.monotonic() + 60
            while not (tmp_path / "report.html").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()  # closes its pipe, too
    assert process.returncode == 1, output  # one request failed
    assert {kind for kind, name in told if name == "held"} == {
        "answer",
        "TTFT",
        "TPOT",
        "ITL",
        "goodput",
        "cached tokens",
    }
    assert told["ITL", "held"]["num_requests"] == 3 * len(due)
    assert told["TTFT", "held"]["num_failures"] == 0
    assert told["goodput", "held"]["num_failures"] > 0
    assert set(server.keys) == {"Bearer its-key", None}
    record = Record.load(tmp_path)
    answered = sorted((one for one in record.outcomes if one.traffic == "held"), key=lambda one: one.number)
    assert [one.due_s for one in answered] == due
    assert all(one.whole and one.sent_s >= one.due_s for one in answered)
    # The gate opened after the last one had come, so each has waited since it was due for at least that long.
    for one in answered:
        assert one.first_s is not None
        assert one.first_s >= due[-1]
        assert one.ttft_ms is not None
        assert one.ttft_ms >= (due[-1] - one.due_s) * 1e3
    waits = [(due[-1] - at) * 1e3 for at in due]
    figures = {one.name: one for one in summarize(record).traffic}
    assert figures["held"].ttft_ms[0] >= sorted(waits)[(len(waits) - 1) // 2]
    (vain,) = [one for one in record.outcomes if one.traffic == "vain"]
    assert (vain.error, vain.answer_tokens) == ("broken", 0)
    # Words that were said again got the same answer.
    assert summarize(record).checks.same == len(due) - len({one.asked for one in answered}) > 0
    # Every event was stamped by the kernel, and none was handled before it had come.
    assert record.own.events == 5 * len(due)
    assert 0 < record.own.overhead_us["0.5"] <= record.own.overhead_us["0.99"] <= record.own.overhead_us["1.0"]


def test_who_is_never_answered_is_an_error_with_its_wait_and_who_leaves_is_none(tmp_path):
    scenario = SCENARIO.replace("drain_s = 40", "drain_s = 2").replace("duration_s = 3", "duration_s = 1")
    scenario = scenario.replace("silence_s = 30", "silence_s = 1.5").replace("per_s = 10", "per_s = 5")
    scenario = scenario.replace("share = 0, after_s = 1", "share = 1, after_s = 0.2")
    with stalling() as server:
        process = run(tmp_path, server, scenario)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    record = Record.load(tmp_path)
    held = [one for one in record.outcomes if one.traffic == "held"]
    assert held
    assert {one.error for one in held} <= {"silence", "unfinished"}
    for one in held:
        assert one.ttft_ms == (one.ended_s - one.due_s) * 1e3 > 0
    (left,) = [one for one in record.outcomes if one.traffic == "vain"]
    assert (left.hung_up, left.error) == (True, "")
    summary = summarize(record)
    assert (summary.failed, summary.all.hung_up) == (len(held), 1)
    assert json.loads((tmp_path / "record.json").read_text())["about"]["model"] == "stalling"


def test_a_server_that_is_not_there_ends_in_one_line(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        words = [sys.executable, "-m", "loadtest", "smoke", "--url", f"http://127.0.0.1:{nobody.getsockname()[1]}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert done.stderr.startswith("error: http://127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_a_run_that_is_interrupted_reports_what_there_was_until_then(tmp_path):
    with stalling() as server:
        process = run(tmp_path, server, SCENARIO)
        server.wait_for(6)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    record = Record.load(tmp_path)
    assert len(record.outcomes) >= 6
    assert {one.error for one in record.outcomes} == {"unfinished"}
    assert "interrupted" in record.about
    assert (tmp_path / "report.html").exists()
