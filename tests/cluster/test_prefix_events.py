"""Workers tell which prefixes they hold, the router knows, and Redis may die in between."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.local_cluster import LocalCluster, local_cluster

PROMPT_TOKENS = 1_400  # five whole pages, and room for the answer in the sixth


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 250) for _ in range(PROMPT_TOKENS)]


def ask(cluster: LocalCluster, model: Path, ids: list[int], salt: str | None = None) -> dict[str, int]:
    """The usage of one short answer."""
    body = {"model": model.name, "prompt": ids, "max_tokens": 4, "seed": 1, "ignore_eos": True, "cache_salt": salt}
    answer = cluster.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["usage"])


def wait_for_pages(cluster: LocalCluster, num_pages: int, within_s: float = 20) -> None:
    """Until the router's mirror shows so many pages of each worker."""
    deadline = time.monotonic() + within_s
    while (mirrored := [worker["mirrored_pages"] for worker in cluster.workers()]) != [num_pages] * 2:
        assert time.monotonic() < deadline, f"the router knows of {mirrored} pages, not {num_pages} on each worker"
        time.sleep(0.05)


@pytest.mark.timeout(240)
def test_the_router_knows_what_workers_hold_and_still_does_after_redis_came_back_empty(
    model: Path, tmp_path: Path
) -> None:
    with local_cluster(tmp_path / "home", model) as cluster:
        assert ask(cluster, model, prompt(1))["prompt_cache_hit_tokens"] == 0
        wait_for_pages(cluster, 5)
        again = ask(cluster, model, prompt(1))
        assert (again["prompt_cache_hit_tokens"], again["prompt_cache_miss_tokens"]) == (1_280, 120)
        assert again["prompt_tokens_details"] == {"cached_tokens": 1_280}
        assert ask(cluster, model, prompt(1), salt="mine")["prompt_cache_hit_tokens"] == 0
        wait_for_pages(cluster, 10)

        os.kill(cluster.pid("redis"), signal.SIGKILL)
        assert ask(cluster, model, prompt(2))["prompt_cache_hit_tokens"] == 0
        assert ask(cluster, model, prompt(1), salt="mine")["prompt_cache_hit_tokens"] == 1_280
        wait_for_pages(cluster, 15)
