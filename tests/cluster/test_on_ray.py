"""A cluster whose workers Ray places: real Ray, one node, and everything it started ends with it."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.cluster.local_cluster import LocalCluster, local_cluster
from tests.cluster.test_losses import penumbra, settle, stream_ids

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason='Ray is not installed: make install EXTRAS="ray"'
    ),
]
TOKENS = 400


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    # jsonschema, which every process of Ray imports, compiles a grammar where rfc3987_syntax is installed: 2 s of CPU
    # in each of six. The dev extra brings it and a real installation does not, and Ray gives its agents 15 s.
    lean = tmp_path_factory.mktemp("lean")
    (lean / "rfc3987_syntax.py").write_text("raise ImportError('left out, as in a real installation')\n")
    # What Ray counts, not what they use: five workers find a place on a node of two CPUs.
    with local_cluster(
        tmp_path_factory.mktemp("home"),
        model,
        *("--on", "ray", "--worker-cpus", "0.4", "--grace-s", "30"),
        packages=lean,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, model: Path) -> list[int]:
    return stream_ids(cluster, model, TOKENS)


def parent(cluster: LocalCluster, name: str) -> psutil.Process:
    found = psutil.Process(cluster.pid(name)).parent()
    assert found is not None
    return found


def wait_for(condition: Callable[[], bool], cluster: LocalCluster) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.2)


def test_every_worker_has_an_actor_for_a_parent_and_nothing_listens_beyond_this_machine(
    cluster: LocalCluster, undisturbed: list[int]
) -> None:
    assert len(undisturbed) == TOKENS
    assert {name for name in cluster.members} == {"prefill-0", "decode-0", "router", "redis"}
    for name in ("prefill-0", "decode-0"):
        assert parent(cluster, name).name().startswith("ray::Keeper"), parent(cluster, name)
    rays = [
        process
        for process in psutil.Process(cluster.supervisor.pid).children(recursive=True)
        if process.name().startswith("ray") or process.name() == "gcs_server"
    ]
    listening = {c.laddr.ip for p in rays for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert listening
    assert (cluster.folder / "ray.token").stat().st_mode & 0o077 == 0


def test_both_pools_grow_and_shrink_while_it_answers_and_no_answer_is_lost(
    cluster: LocalCluster, model: Path, undisturbed: list[int]
) -> None:
    answered = 0
    with ThreadPoolExecutor(4) as clients:
        for counts in (("prefill=2", "decode=3"), ("prefill=1", "decode=1")):
            scaling = clients.submit(penumbra, cluster, "scale", *counts, "--on", "ray")
            while not scaling.done() or answered == 0:
                for answer in [clients.submit(stream_ids, cluster, model, TOKENS) for _ in range(3)]:
                    assert answer.result() == undisturbed
                    answered += 1
            assert scaling.result() == " ".join(counts) + "\n"
    assert answered >= 6
    assert sorted(cluster.members) == ["decode-0", "prefill-0", "redis", "router"]
    settle(cluster)


def test_a_worker_dies_with_its_actor_and_comes_back_in_the_middle_of_an_answer(
    cluster: LocalCluster, model: Path, undisturbed: list[int]
) -> None:
    penumbra(cluster, "scale", "decode=2", "--on", "ray")
    hit: dict[str, psutil.Process] = {}

    def kill(count: int) -> None:
        if count >= 40 and not hit:
            name = cluster.busiest("decode")
            hit[name] = psutil.Process(cluster.pid(name))
            parent(cluster, name).kill()

    assert stream_ids(cluster, model, TOKENS, kill) == undisturbed
    ((name, worker),) = hit.items()
    wait_for(lambda: cluster.members.get(name, worker.pid) not in (0, worker.pid), cluster)
    cluster.wait_until_whole()
    assert not worker.is_running()
    assert f"{name} ended by itself" in (cluster.folder / "up.log").read_text()
    assert stream_ids(cluster, model, TOKENS) == undisturbed
    settle(cluster)


def test_a_worker_that_ray_finds_no_place_for_is_told_of_and_can_be_taken_back(
    cluster: LocalCluster, model: Path, undisturbed: list[int]
) -> None:
    with pytest.raises(AssertionError, match="has not got to"):
        penumbra(cluster, "scale", "decode=6", "--on", "ray", "--timeout-s", "15")
    wait_for(lambda: "to spare" in (cluster.folder / "up.log").read_text(), cluster)
    penumbra(cluster, "scale", "decode=1", "--on", "ray")
    assert stream_ids(cluster, model, TOKENS) == undisturbed


def test_nothing_is_left_of_a_cluster_or_of_ray_when_the_supervisor_is_killed(cluster: LocalCluster) -> None:
    family = psutil.Process(cluster.supervisor.pid).children(recursive=True)
    assert any(process.name() == "raylet" for process in family)
    agents = {process for process in family if process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")}
    os.kill(cluster.supervisor.pid, signal.SIGKILL)
    _, late = psutil.wait_procs(family, timeout=60)
    # Ray's own agents first try to tell a control service that is gone as well, for a minute and more.
    assert set(late) <= agents
    _, alive = psutil.wait_procs(late, timeout=300)
    assert not alive
