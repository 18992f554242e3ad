"""A cluster whose checkpoint has a draft layer says what one process says without it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.colocated import generate
from engine.config import EngineConfig
from engine.model.tiny import write_tiny
from engine.runner import Runner
from tests.cluster.local_cluster import local_cluster
from tests.cluster.test_conversations import worker_metrics
from tests.cluster.test_same_bits import mixed_prompts, options
from wire.types import SamplingParams

LENGTHS = (1, 127, 129, 250, 255, 256, 383, 500, 513, 1000)
NEW_TOKENS = 24


def test_answers_with_drafts_are_those_of_one_process_without(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", seed=4, layers=(0, 4, 128, 4), mtp=True)
    alone = Runner.load(EngineConfig(model=model, max_requests=4, kv_memory_bytes=128 << 20, draft=False))
    prompts = mixed_prompts(250, LENGTHS)
    with local_cluster(
        tmp_path, model, "--draft-tokens", "3", "--max-requests", "16", "--kv-memory", "256MiB"
    ) as cluster:

        def ask(i: int) -> dict[str, Any]:
            body = {
                "model": model.name,
                "prompt": prompts[i],
                "max_tokens": NEW_TOKENS,
                "seed": i,
                "ignore_eos": True,
                "logprobs": 2,
                "return_token_ids": True,
                **options(i),
            }
            answer = cluster.post("/v1/completions", body)
            assert answer.status_code == 200, answer.text
            return dict(answer.json()["choices"][0])

        with ThreadPoolExecutor(8) as pool:
            choices = list(pool.map(ask, range(len(prompts))))
        tried = worker_metrics(cluster)["decode"]["penumbra_spec_draft_tokens_total"]
    assert tried > NEW_TOKENS * len(LENGTHS), "a random draft layer is refused nearly always, so most drafts are tried"
    for i, choice in enumerate(choices):
        sampling = SamplingParams(
            max_tokens=NEW_TOKENS, seed=i, ignore_eos=True, logprobs=True, top_logprobs=2, **options(i)
        )
        want = list(generate(alone, prompts[i], sampling, chunk_tokens=256))
        where = f"prompt of {len(prompts[i])} tokens"
        assert choice["token_ids"] == [token.token_id for token in want], where
        assert choice["logprobs"]["token_logprobs"] == [token.logprob for token in want], where
