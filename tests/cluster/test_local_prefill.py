"""A decode process that computes prompts itself, where that is faster and where nobody else is left: the same bits."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from engine.colocated import generate
from engine.config import EngineConfig
from engine.runner import Runner
from tests.cluster.local_cluster import LocalCluster, local_cluster
from tests.cluster.test_same_bits import mixed_prompts
from wire.types import SamplingParams

NEW_TOKENS = 8
LENGTHS = (1, 128, 300, 513, 900, 2_049)


def ask(cluster: LocalCluster, model: Path, prompt: list[int], seed: int) -> tuple[dict[str, Any], str]:
    """The whole answer, and where its prompt was computed and why."""
    body = {
        **{"model": model.name, "prompt": prompt, "max_tokens": NEW_TOKENS, "seed": seed, "ignore_eos": True},
        **{"logprobs": 2, "return_token_ids": True},
    }
    answer = cluster.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    decision, reason, *_ = answer.headers["x-penumbra-placement"].split("; ")
    return answer.json(), f"{decision} {reason}"


@pytest.mark.timeout(400)
def test_answers_are_the_same_wherever_their_prompts_are_computed(model: Path, tmp_path: Path) -> None:
    runner = Runner.load(EngineConfig(model=model, max_requests=4, kv_memory_bytes=256 << 20))
    prompts = mixed_prompts(250, LENGTHS)

    def check(answer: dict[str, Any], prompt: list[int], seed: int) -> None:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, seed=seed, ignore_eos=True, logprobs=True, top_logprobs=2)
        alone = list(generate(runner, prompt, sampling, chunk_tokens=256))
        choice = answer["choices"][0]
        assert choice["token_ids"] == [one.token_id for one in alone], len(prompt)
        assert choice["logprobs"]["token_logprobs"] == [one.logprob for one in alone], len(prompt)

    flags = ("--local-prefill-tokens", "600", "--on-no-prefill", "local")
    with local_cluster(tmp_path / "home", model, *flags) as cluster:
        where = {}
        for seed, prompt in enumerate(prompts):
            answer, where[len(prompt)] = ask(cluster, model, prompt, seed)
            check(answer, prompt, seed)
        assert {where[n] for n in (900, 2_049)} == {"disaggregated reason=long"}
        assert {where[n] for n in (1, 128, 300, 513)} <= {"local reason=short", "disaggregated reason=faster"}
        placed = {name: n for name, n in cluster.metrics().items() if name.startswith("penumbra_placement_total{")}
        assert sum(placed.values()) >= len(prompts)  # attempts: on a busy machine one may be made again

        # Nobody left but the decode worker: it does everything, from what it holds already as well.
        os.kill(cluster.pid("prefill-0"), signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 60
            while {w["worker_id"]: w["state"] for w in cluster.workers()}.get("prefill-0") == "serving":
                assert time.monotonic() < deadline, "the stopped prefill worker is still taken to serve"
                time.sleep(0.1)
            for seed, prompt in enumerate(prompts[2:], start=50):
                longer = prompt + prompts[3][:40]
                answer, reason = ask(cluster, model, longer, seed)
                check(answer, longer, seed)
                assert reason == "local reason=no_prefill"
        finally:
            os.kill(cluster.pid("prefill-0"), signal.SIGCONT)
