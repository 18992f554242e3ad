"""`chat`, `status` and `doctor` against a running cluster, as an operator types them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.local_cluster import ROOT, LocalCluster, local_cluster


def penumbra(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "cli", *arguments],
        env=environment,
        input=typed,
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_doctor_reads_over_the_pair_and_says_what_carried_it(cluster: LocalCluster) -> None:
    result = penumbra("doctor", "--url", cluster.url, "--probe-bytes", "4MiB")
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = re.findall(r"prefill-0 +decode-0 +(memory|TCP \w+) +([\d.]+) +([\d.]+) ms +([\d.]+) s", result.stdout)
    assert float(row[1]) > 0
    assert float(row[2]) > 0
    assert float(row[3]) > 0
    assert "1 of 1 pairs move pages as they should" in result.stdout
    # Every page that was lent and borrowed is back.
    for worker in cluster.workers():
        assert worker["quarantined_pages"] == 0


def test_doctor_fails_where_rdma_was_expected_and_pages_went_another_way(cluster: LocalCluster) -> None:
    result = penumbra("doctor", "--url", cluster.url, "--probe-bytes", "4MiB", "--expect", "rdma")
    assert result.returncode == 1
    assert "where RDMA was expected" in result.stdout
    assert "slow path" in result.stdout


def test_doctor_finds_nothing_to_say_about_a_worker_nobody_knows(cluster: LocalCluster) -> None:
    result = penumbra("doctor", "--url", cluster.url, "--worker", "prefill-7")
    assert result.returncode == 1
    assert "knows no pair of workers with prefill-7" in result.stdout


def test_status_shows_what_the_router_knows_of_each_worker(cluster: LocalCluster) -> None:
    result = penumbra("status", "--url", cluster.url)
    assert result.returncode == 0, result.stderr
    assert re.search(r"prefill-0 +serving", result.stdout)
    assert re.search(r"decode-0 +serving", result.stdout)
    assert "1 prefill + 1 decode serve" in result.stdout


def test_chat_streams_an_answer_and_says_where_its_time_went(cluster: LocalCluster) -> None:
    result = penumbra("chat", "Hello", "--url", cluster.url, "--max-tokens", "12")
    assert result.returncode == 0, result.stderr
    told = " ".join(result.stdout.split())
    for part in ("first token", "prefill", "first decode", "tokens", "prompt tokens, 0 cached", "answered"):
        assert part in told


def test_a_conversation_goes_on_until_the_input_ends(cluster: LocalCluster) -> None:
    result = penumbra("chat", "--url", cluster.url, "--max-tokens", "4", typed="one\n\ntwo\n")
    assert result.returncode == 0, result.stderr
    prompts = [int(n) for n in re.findall(r"(\d+) prompt tokens", " ".join(result.stdout.split()))]
    assert len(prompts) == 2
    assert prompts[1] > prompts[0]  # the second question came with the first and its answer


@pytest.mark.parametrize("command", ["chat", "status", "doctor"])
def test_a_router_that_is_not_there_is_one_line_and_exit_code_1(command: str) -> None:
    more = ["hello"] if command == "chat" else []
    result = penumbra(command, *more, "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert result.stderr.startswith("error: The router at http://127.0.0.1:9 does not answer")
    assert len(result.stderr.splitlines()) == 1


def test_what_the_router_refuses_is_told_in_its_words(cluster: LocalCluster) -> None:
    result = penumbra("chat", "Hello", "--url", cluster.url, "--temperature", "9")
    assert result.returncode == 1
    assert "temperature" in result.stderr


def test_an_url_that_is_none_is_a_configuration_error(tmp_path: Path) -> None:
    result = penumbra("status", "--url", "nonsense://x", "--home", str(tmp_path))
    assert result.returncode == 78
    assert "--url" in result.stderr


@pytest.mark.long
def test_doctor_tells_tcp_from_memory_by_what_the_kernel_counted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")  # on one machine pages would go through shared memory
    with local_cluster(tmp_path, model) as slow:
        fine = penumbra("doctor", "--url", slow.url)
        assert fine.returncode == 0, fine.stdout + fine.stderr
        assert re.search(r"prefill-0 +decode-0 +TCP \w+", fine.stdout)
        faulty = penumbra("doctor", "--url", slow.url, "--expect", "rdma")
        assert faulty.returncode == 1
        assert re.search(r"pages moved over TCP \w+ where RDMA was expected", faulty.stdout)
