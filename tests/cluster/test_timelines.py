"""One truth about where the time goes: what usage, spans and metrics of a real cluster say of the same requests."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from router.timeline import PARTS
from tests.cluster.local_cluster import LocalCluster
from tests.wire.collector import Collector

LONG_TOKENS = 8_000
SALTS = (f"timelines-{i}" for i in itertools.count())


def body(cluster: LocalCluster, num_tokens: int, salt: str, **more: Any) -> dict[str, Any]:
    rng = random.Random(num_tokens)
    return {
        "model": "tiny-v4",
        "prompt": [rng.randrange(3, 250) for _ in range(num_tokens)],
        "max_tokens": 4,
        "ignore_eos": True,
        "cache_salt": salt,
        "return_timeline": True,
    } | more


def sums_up(timeline: dict[str, Any]) -> None:
    """The parts are of one clock and sum to the whole. What the prefill worker's clock says of its part fits inside:
    it began after the router had seen the admission, and ended before the last offer was anywhere else.
    """
    total, prefill = timeline["ttft_ms"], timeline["prefill_worker"]
    assert sum(timeline[f"{part}_ms"] for part in PARTS) == pytest.approx(total, rel=0.02)
    assert min(timeline[f"{part}_ms"] for part in PARTS) >= 0
    assert prefill["queue_ms"] + prefill["compute_ms"] <= timeline["prefill_ms"] + 1
    assert timeline["retry_ms"] == 0
    assert timeline["tokens_ms"] > 0


def test_the_parts_sum_to_the_time_to_first_token_cold_cached_and_long(cluster: LocalCluster):
    salt = next(SALTS)
    cold, cached, long = (
        cluster.post("/v1/completions", body(cluster, n, salt)).json() for n in (2_000, 2_000, LONG_TOKENS)
    )
    for answer in (cold, cached, long):
        sums_up(answer["usage"]["timeline"])
    assert cold["usage"]["prompt_cache_hit_tokens"] == 0
    assert cached["usage"]["prompt_cache_hit_tokens"] > 0
    # Computing is what a long prompt waits for, and what a cached one is spared: a difference of orders of magnitude.
    spent = [a["usage"]["timeline"]["prefill_worker"]["compute_ms"] for a in (cold, cached, long)]
    assert spent[1] < spent[0] < spent[2]
    assert long["usage"]["timeline"]["prefill_ms"] > long["usage"]["timeline"]["ttft_ms"] / 2


def test_the_clients_first_token_comes_no_sooner_than_the_timeline_says_and_the_metrics_agree(cluster: LocalCluster):
    before = cluster.metrics()
    began, first, usage = time.monotonic(), None, None
    with httpx.stream(
        "POST", f"{cluster.url}/v1/completions", json=body(cluster, 1_500, next(SALTS), stream=True), timeout=300
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.monotonic() - began
                usage = json.loads(line[6:]).get("usage") or usage
    timeline = usage["timeline"]
    sums_up(timeline)
    assert timeline["ttft_ms"] <= first * 1e3
    after = cluster.metrics()
    for part in PARTS:
        names = [f'penumbra_stage_duration_seconds_{of}{{stage="{part}"}}' for of in ("count", "sum")]
        count, seconds = (after[name] - before.get(name, 0) for name in names)
        assert count == 1
        assert seconds * 1e3 == pytest.approx(timeline[f"{part}_ms"], abs=0.01)
    ttft = "penumbra_time_to_first_token_seconds_sum"
    assert (after[ttft] - before[ttft]) * 1e3 == pytest.approx(timeline["ttft_ms"], abs=0.01)


def test_a_long_prompt_shows_its_progress_up_to_the_end(cluster: LocalCluster):
    request = body(cluster, LONG_TOKENS, next(SALTS), stream=True, return_progress=True)
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=request, timeout=300) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    shown = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    processed = [progress["processed"] for progress in shown]
    assert len(processed) >= 3
    assert processed == sorted(processed)
    assert processed[-1] == LONG_TOKENS
    assert {progress["total"] for progress in shown} == {LONG_TOKENS}
    assert shown[-1]["eta_ms"] == 0
    assert all(progress["eta_ms"] > 0 for progress in shown if 0 < progress["processed"] < LONG_TOKENS)
    # Nothing of it behind the first token.
    assert ["prompt_progress" in chunk for chunk in chunks] == [True] * len(shown) + [False] * (
        len(chunks) - len(shown)
    )


def test_one_trace_spans_router_prefill_and_decode_with_the_right_parents(cluster: LocalCluster, collector: Collector):
    trace_id, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{caller}-01"}
    asked = body(cluster, 600, next(SALTS))
    answer = httpx.post(f"{cluster.url}/v1/completions", json=asked, headers=headers, timeout=300).json()

    def ours() -> list[Any]:
        return [span for span in list(collector.spans) if span.trace_id.hex() == trace_id]

    wanted = {
        "POST /v1/completions": "penumbra-router",
        "Decode.Start": "penumbra-router",
        "Prefill.Run": "penumbra-router",
        "wire.v1.Decode/Start": "penumbra-decode",
        "wire.v1.Prefill/Run": "penumbra-prefill",
        "wire.v1.Pages/Claim": "penumbra-prefill",
        **dict.fromkeys((*PARTS, "tokens"), "penumbra-router"),
    }
    wait_for(lambda: len(ours()) >= len(wanted))
    found = {span.name: span for span in ours()}
    assert {name: collector.service_of[span.span_id] for name, span in found.items()} == wanted
    parents = {
        "Decode.Start": "POST /v1/completions",
        "Prefill.Run": "POST /v1/completions",
        "wire.v1.Decode/Start": "Decode.Start",
        "wire.v1.Prefill/Run": "Prefill.Run",
        "wire.v1.Pages/Claim": "wire.v1.Decode/Start",
        **dict.fromkeys((*PARTS, "tokens"), "POST /v1/completions"),
    }
    assert found["POST /v1/completions"].parent_span_id.hex() == caller
    for name, parent in parents.items():
        assert found[name].parent_span_id == found[parent].span_id, name

    timeline = answer["usage"]["timeline"]
    for part in PARTS:
        length = found[part].end_time_unix_nano - found[part].start_time_unix_nano
        assert length / 1e6 == pytest.approx(timeline[f"{part}_ms"], abs=0.1)
    told = collector.attributes(found["wire.v1.Decode/Start"])
    assert told["transfer_us"] / 1e3 == pytest.approx(timeline["transfer_ms"], abs=0.1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
