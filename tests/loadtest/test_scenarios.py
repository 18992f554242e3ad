"""Shipped scenarios, each on a cluster of its own as a newcomer starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cluster import bundled_model
from loadtest.record import Record
from loadtest.scenario import SHIPPED
from loadtest.summary import summarize
from tests.cluster.local_cluster import local_cluster

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def run(tmp_path: Path, scenario: str, *more: str, cluster: str = "none") -> Record:
    """Without an error, with equal answers and balanced pages."""
    words = [scenario, "--out", str(tmp_path), "--no-save", "--cluster", cluster, *more]
    done = subprocess.run(
        [sys.executable, "-m", "cli", "loadtest", "run", *words],
        cwd=ROOT,
        env={**os.environ, "PENUMBRA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3500,
        check=False,
    )
    # Beside other work measuring may be saturated: that is said, and is no fault of the answers.
    assert done.returncode in (0, 4), done.stdout + done.stderr
    record = Record.load(tmp_path)
    summary = summarize(record)
    assert (summary.failed, summary.checks.different) == (0, 0)
    assert summary.checks.same > 0
    assert record.pages_balanced is True
    return record


def test_smoke_ends_with_a_report_and_no_error(tmp_path):
    record = run(tmp_path, "smoke")
    assert 60 <= record.seconds < 60 + record.scenario.drain_s + 5
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_killing_a_worker_of_each_kind_loses_and_alters_no_answer(tmp_path):
    record = run(tmp_path, "kill-one")
    assert [one["strike"] for one in record.strikes] == ["decode-killed", "prefill-killed"]
    for one, role in zip(record.strikes, ("decode", "prefill"), strict=True):
        assert re.fullmatch(rf"{role}-[01] \(pid \d+\) got SIGKILL", one["told"])


def test_the_long_mix_in_small_keeps_its_prefix_and_its_answers(tmp_path):
    text = (
        (SHIPPED / "mixed-900k.toml").read_text().replace("900_000", "16_000").replace("start_s = 300", "start_s = 20")
    )
    (tmp_path / "mixed.toml").write_text(text)
    record = run(tmp_path, str(tmp_path / "mixed.toml"))
    document = [one for one in record.outcomes if one.traffic == "document"]
    assert len(document) == 21
    assert document[0].cached_tokens < 1000
    assert all(one.cached_tokens > 15_000 for one in document[1:])
    # Over the cached prefix, each answer that was asked for again is the one before it.
    assert [one.same for one in document] == [None, *[True, None] * 10]
    beside = summarize(record).beside
    assert beside is not None
    assert beside.during > 0
    assert beside.otherwise > 0


def test_a_cluster_that_is_up_is_joined_and_left_up(tmp_path):
    with local_cluster(tmp_path, bundled_model()) as up:
        before = up.members
        record = run(tmp_path, "smoke", "--duration-s", "10", cluster="test")
        assert record.about["cluster"] == "1 prefill, 1 decode; it was up already"
        assert up.members == before
        assert up.post("/v1/completions", {"model": "nano", "prompt": "Once", "max_tokens": 2}).status_code == 200
        sent = sum(value for name, value in up.metrics().items() if name.startswith("penumbra_http_requests_total"))
        assert sent >= len(record.outcomes)
