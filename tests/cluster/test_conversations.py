"""Conversations on a cluster that keeps prefixes on both sides: every answer is what it would be with nothing kept."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.cache.pools import item_bytes
from engine.colocated import generate
from engine.config import EngineConfig, KvLayout
from engine.runner import Runner
from tests.cluster.local_cluster import LocalCluster, local_cluster, parse_metrics
from wire.types import PageClass, SamplingParams

REQUESTS = 6  # at once on one worker
FULL_PAGES = 24  # the conversations below come to three times as many
Spoken = tuple[list[int], SamplingParams, list[int], list[float]]


def kv_memory(runner: Runner, layout: KvLayout) -> int:
    """Bytes that leave FULL_PAGES full pages on a worker."""
    sizes = item_bytes(runner.model_config, layout)
    fixed = (REQUESTS + 1) * 2 * sizes[PageClass.STATE] + (4 * REQUESTS + 1) * sizes[PageClass.SWA]
    return fixed + (FULL_PAGES + 1) * sizes[PageClass.FULL]


def converse(cluster: LocalCluster, model: Path, seed: int) -> list[Spoken]:
    """Four turns behind a beginning that others share, some of them broken off by the client."""
    rng = random.Random(seed)
    shared = random.Random(seed % 2)
    text = [shared.randrange(3, 250) for _ in range(900)]
    spoken = []
    for turn in range(4):
        text = text + [rng.randrange(3, 250) for _ in range(rng.choice([1, 130, 400]))]
        sampling = SamplingParams(
            max_tokens=rng.choice([3, 40, 150]),
            seed=turn,
            temperature=rng.choice([0.0, 0.9]),
            ignore_eos=True,
            logprobs=True,
            top_logprobs=1,
        )
        body: dict[str, Any] = {
            "model": model.name,
            "prompt": text,
            "max_tokens": sampling.max_tokens,
            "seed": turn,
            "temperature": sampling.temperature,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
        }
        patience = rng.choice([0.05, 0.4]) if rng.random() < 0.2 else 200.0
        try:
            answer = cluster.post("/v1/completions", body, timeout=patience)
        except httpx.TimeoutException:
            continue
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        spoken.append((text, sampling, choice["token_ids"], choice["logprobs"]["token_logprobs"]))
        text = text + choice["token_ids"]
    return spoken


def worker_metrics(cluster: LocalCluster) -> dict[str, dict[str, float]]:
    """Samples by role, of one worker each."""
    return {
        worker["role"]: parse_metrics(httpx.get(f"http://{worker['http_address']}/metrics", timeout=10).text)
        for worker in cluster.workers()
    }


def wait_until_home(cluster: LocalCluster, within_s: float = 20) -> dict[str, dict[str, float]]:
    """Metrics from the moment on when no request holds a page: all are free, or prefixes that nobody uses."""
    deadline = time.monotonic() + within_s
    while True:
        metrics = worker_metrics(cluster)
        held = {
            (role, name): count
            for role, samples in metrics.items()
            for name, count in samples.items()
            if name.startswith("penumbra_pages{") and ('"used"' in name or '"quarantined"' in name) and count
        }
        if not held:
            return metrics
        assert time.monotonic() < deadline, f"still held after {within_s} s: {held}"
        time.sleep(0.1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["v4", pytest.param("exact", marks=pytest.mark.long)])
def test_reuse_eviction_and_preemption_never_change_a_bit_of_an_answer(
    model: Path, tmp_path: Path, layout: KvLayout
) -> None:
    runner = Runner.load(EngineConfig(model=model, kv_layout=layout, max_requests=4, kv_memory_bytes=256 << 20))
    flags = ("--kv-layout", layout, "--kv-memory", str(kv_memory(runner, layout)), "--max-requests", str(REQUESTS))
    with local_cluster(tmp_path / "home", model, *flags) as cluster, ThreadPoolExecutor(8) as pool:
        spoken = [turn for turns in pool.map(lambda i: converse(cluster, model, i), range(8)) for turn in turns]
        metrics = wait_until_home(cluster)
    assert len(spoken) >= 16
    for role in ("prefill", "decode"):
        assert metrics[role]["penumbra_prefix_cache_hits_total"] >= 10 * 768
    for text, sampling, token_ids, logprobs in spoken:
        alone = list(generate(runner, text, sampling, chunk_tokens=512))
        where = f"prompt of {len(text)} tokens"
        assert token_ids == [sampled.token_id for sampled in alone], where
        assert logprobs == [sampled.logprob for sampled in alone], where


@pytest.mark.timeout(240)
def test_a_cluster_told_to_keep_nothing_says_the_same_and_finds_nothing(
    cluster: LocalCluster, model: Path, tmp_path: Path
) -> None:
    rng = random.Random(20)
    body = {
        "model": model.name,
        "prompt": [rng.randrange(3, 250) for _ in range(1500)],
        "max_tokens": 20,
        "seed": 4,
        "ignore_eos": True,
        "logprobs": 1,
    }

    def ask(where: LocalCluster) -> tuple[dict[str, Any], int]:
        answer = where.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0], answer.json()["usage"]["prompt_cache_hit_tokens"]

    kept = [ask(cluster), ask(cluster)]
    with local_cluster(tmp_path / "home", model, "--no-prefix-cache") as forgetful:
        fresh = [ask(forgetful), ask(forgetful)]
        metrics = wait_until_home(forgetful)
    assert [hits for _, hits in kept] == [0, 1280]
    assert [hits for _, hits in fresh] == [0, 0]
    assert kept[0][0] == kept[1][0] == fresh[0][0] == fresh[1][0]
    for role in ("prefill", "decode"):
        assert metrics[role]["penumbra_prefix_cache_hits_total"] == 0
        assert metrics[role]['penumbra_pages{page_class="full",state="cached"}'] == 0
