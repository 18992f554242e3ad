"""Things that go away: Redis, and clients. Nothing stops, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster.local_cluster import ROOT, LocalCluster, local_cluster, parse_metrics


def stream_ids(cluster: LocalCluster, model: Path, tokens: int, on_token: object = None) -> list[int]:
    """Token ids of one long streamed answer; calls on_token(number of tokens so far) as they come."""
    import json

    body = {
        "model": model.name,
        "prompt": "tell me",
        "max_tokens": tokens,
        "seed": 4,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    ids: list[int] = []
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    ids += choice.get("token_ids") or []
                if callable(on_token):
                    on_token(len(ids))
    return ids


@pytest.mark.timeout(240)
def test_killing_redis_in_mid_stream_changes_nothing(model: Path, tmp_path: Path) -> None:
    with local_cluster(tmp_path / "home", model) as cluster:
        undisturbed = stream_ids(cluster, model, 400)
        killed: list[float] = []

        def kill(count: int) -> None:
            if count >= 40 and not killed:
                os.kill(cluster.pid("redis"), signal.SIGKILL)
                killed.append(time.monotonic())

        assert stream_ids(cluster, model, 400, kill) == undisturbed
        assert killed, "Redis was killed while the stream ran"
        # New requests go on without Redis, and still do when the records of its last moment have expired.
        while time.monotonic() < killed[0] + 5:
            assert stream_ids(cluster, model, 20) == undisturbed[:20]
            time.sleep(0.5)


def held_pages(cluster: LocalCluster) -> dict[str, float]:
    """Samples that say pages, claims or requests are held, over every worker; empty when nothing is."""
    held = {}
    for worker in cluster.workers():
        samples = parse_metrics(httpx.get(f"http://{worker['http_address']}/metrics", timeout=10).text)
        for name, value in samples.items():
            if value and (
                ('state="used"' in name or 'state="quarantined"' in name)
                or name.startswith(("penumbra_num_requests_", "penumbra_claims"))
            ):
                held[f"{worker['worker_id']} {name}"] = value
    return held


def resources(cluster: LocalCluster) -> dict[str, tuple[int, int]]:
    """(file descriptors, threads) of every process of the cluster."""
    return {
        name: (psutil.Process(pid).num_fds(), psutil.Process(pid).num_threads())
        for name, pid in cluster.members.items()
        if name != "redis"
    }


def tasks(cluster: LocalCluster) -> dict[str, float]:
    """Asyncio tasks of the router and of every worker, the one that answers included."""
    doors = {"router": cluster.url} | {w["worker_id"]: f"http://{w['http_address']}" for w in cluster.workers()}
    return {
        name: parse_metrics(httpx.get(f"{door}/metrics", timeout=10).text)["penumbra_asyncio_tasks"]
        for name, door in doors.items()
    }


@pytest.mark.timeout(300)
def test_a_hundred_cancels_leave_no_page_task_or_descriptor_behind(cluster: LocalCluster, model: Path) -> None:
    rng = random.Random(11)

    async def one(client: httpx.AsyncClient, i: int) -> None:
        """Leave at any moment: before the first byte, during prefill, during transfer, while tokens come."""
        body = {
            "model": model.name,
            "prompt": [rng.randrange(3, 250) for _ in range(rng.choice([1, 300, 1500]))],
            "max_tokens": 300,
            "seed": i,
            "stream": i % 2 == 0,
            "ignore_eos": True,
        }
        try:
            async with asyncio.timeout(rng.choice([0.01, 0.05, 0.2, 0.5, 1.0])):
                answer = await client.post(f"{cluster.url}/v1/completions", json=body)
                assert answer.status_code in (200, 503)
        except TimeoutError:
            pass

    async def many(n: int) -> None:
        limits = httpx.Limits(max_connections=16, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            gate = asyncio.Semaphore(10)

            async def gated(i: int) -> None:
                async with gate:
                    await one(client, i)

            async with asyncio.TaskGroup() as tasks:
                for i in range(n):
                    tasks.create_task(gated(i))

    asyncio.run(many(10))  # whatever is opened once and kept, is open now
    settle(cluster)
    before, tasks_before = resources(cluster), tasks(cluster)
    asyncio.run(many(100))
    settle(cluster)
    # Keep-alive connections come and go by a few; a task for each of a hundred requests would show.
    assert all(now <= tasks_before[name] + 8 for name, now in tasks(cluster).items()), (tasks_before, tasks(cluster))
    # Work and pages are back. Descriptors may take a moment longer: closed sockets linger in the event loop's turn.
    deadline = time.monotonic() + 15
    while any(after[0] > before[name][0] for name, after in resources(cluster).items()):
        assert time.monotonic() < deadline, (before, resources(cluster))
        time.sleep(0.5)
    assert all(after[1] <= before[name][1] + 2 for name, after in resources(cluster).items()), (
        before,
        resources(cluster),
    )
    good = {"model": model.name, "prompt": "still here?", "max_tokens": 3}
    assert cluster.post("/v1/completions", good).status_code == 200


def settle(cluster: LocalCluster) -> None:
    """Wait until no worker holds anything; at most 20 s, the claim's grace included."""
    deadline = time.monotonic() + 20
    while held := held_pages(cluster):
        assert time.monotonic() < deadline, held
        time.sleep(0.3)


@pytest.mark.timeout(600)
def test_an_answer_survives_any_worker_that_dies_freezes_or_leaves(model: Path, tmp_path: Path) -> None:
    """Workers come and go under one client after another; every answer is the same."""
    with local_cluster(tmp_path / "home", model, "--decode", "2") as cluster:
        # Long enough that it still runs when the client, on a busy machine, gets to strike.
        undisturbed = stream_ids(cluster, model, 2_500)
        for role, number in (
            ("decode", signal.SIGKILL),
            ("prefill", signal.SIGKILL),
            ("decode", signal.SIGSTOP),
            ("decode", signal.SIGTERM),
        ):
            cluster.wait_until_whole()
            hit: list[str] = []
            struck: list[int] = []

            def strike(
                count: int, role: str = role, number: int = number, hit: list[str] = hit, struck: list[int] = struck
            ) -> None:
                if count >= 20 and not hit:
                    hit.append(cluster.busiest(role))
                    struck.append(cluster.pid(hit[0]))
                    os.kill(struck[0], number)

            try:
                assert stream_ids(cluster, model, 2_500, strike) == undisturbed, f"{number.name} of {role}"
                assert hit, "nobody was hit while the stream ran"
            finally:
                if hit and number is signal.SIGSTOP:
                    os.kill(struck[0], signal.SIGCONT)
            if number is not signal.SIGSTOP:
                deadline = time.monotonic() + 120
                while cluster.pid(hit[0]) == struck[0]:  # it has not been started again
                    assert time.monotonic() < deadline, cluster.logs()
                    time.sleep(0.2)
        cluster.wait_until_whole()
        settle(cluster)
        moved = sum(n for name, n in cluster.metrics().items() if name.startswith("penumbra_request_retries_total{"))
        assert moved >= 2  # who drains may be done before the answer has to move


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_cluster_grows_and_shrinks_while_it_answers(model: Path, tmp_path: Path) -> None:
    with local_cluster(tmp_path / "home", model) as cluster, ThreadPoolExecutor(3) as clients:
        undisturbed = stream_ids(cluster, model, 400)
        for counts in (("prefill=2", "decode=2"), ("prefill=1", "decode=1")):
            answers = [clients.submit(stream_ids, cluster, model, 400) for _ in range(3)]
            assert penumbra(cluster, "scale", *counts) == " ".join(counts) + "\n"
            assert [answer.result() for answer in answers] == [undisturbed] * 3
        assert sorted(cluster.members) == ["decode-0", "prefill-0", "redis", "router"]
        settle(cluster)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_process_is_replaced_while_the_cluster_answers(model: Path, tmp_path: Path) -> None:
    """Nobody is refused, and nothing breaks off: routers hand their sockets on, workers their answers."""
    with (
        local_cluster(tmp_path / "home", model, "--routers", "2", "--grace-s", "60") as cluster,
        ThreadPoolExecutor(4) as clients,
    ):
        undisturbed = stream_ids(cluster, model, 200)
        before = cluster.members
        restarting = clients.submit(penumbra, cluster, "restart", timeout_s=800)
        asked = 0
        while not restarting.done():
            for answer in [clients.submit(stream_ids, cluster, model, 200) for _ in range(3)]:
                assert answer.result() == undisturbed
                asked += 1
        assert restarting.result() == f"restarted: {' '.join(sorted(before))}\n"
        assert asked > 3
        after = cluster.members
        assert after.keys() == before.keys() == {"decode-0", "prefill-0", "redis", "router", "router-1"}
        assert not set(after.values()) & set(before.values())
        settle(cluster)


def penumbra(cluster: LocalCluster, *words: str, timeout_s: float = 200) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cli", *words, "--cluster", "test", "--home", str(cluster.folder.parents[1])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr + cluster.logs()
    return done.stdout
