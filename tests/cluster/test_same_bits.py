"""A prefill and a decode process together say exactly what one process says alone: tokens and logprobs, to the bit."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.colocated import generate
from engine.config import EngineConfig
from engine.runner import Runner
from tests.cluster.local_cluster import LocalCluster, local_cluster
from wire.types import SamplingParams

NEW_TOKENS = 12


def mixed_prompts(vocab: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, vocab) for _ in range(n)] for n in lengths]


# Around every boundary there is (4, 128, 256, the window, a chunk), and long enough for the indexer to choose.
SHORT = (1, 2, 3, 4, 5, 100, 126, 127, 128, 129, 130, 255, 256, 257, 258, 383, 384, 385, 511, 512, 513, 640, 641)
LONG = (767, 768, 1000, 1023, 1025, 1500, 2049, 3000, 8000)


def options(i: int) -> dict[str, Any]:
    """Ways to draw, in turn."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.7},
        {"temperature": 1.1, "top_k": 20, "min_p": 0.02, "presence_penalty": 1.5, "repetition_penalty": 0.9},
    ]
    return ways[i % len(ways)]


def check_same_bits(cluster: LocalCluster, model: Path, layout: str, lengths: tuple[int, ...]) -> None:
    runner = Runner.load(EngineConfig(model=model, kv_layout=layout, max_requests=4, kv_memory_bytes=256 << 20))  # type: ignore[arg-type]
    prompts = mixed_prompts(250, lengths)

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
        return dict(answer.json())

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    for i, answer in enumerate(answers):
        sampling = SamplingParams(
            max_tokens=NEW_TOKENS, seed=i, ignore_eos=True, logprobs=True, top_logprobs=2, **options(i)
        )
        alone = list(generate(runner, prompts[i], sampling, chunk_tokens=256))
        choice = answer["choices"][0]
        where = f"prompt of {len(prompts[i])} tokens"
        assert choice["token_ids"] == [s.token_id for s in alone], where
        assert choice["logprobs"]["token_logprobs"] == [s.logprob for s in alone], where
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["prompt_tokens"] == len(prompts[i])
        assert answer["usage"]["completion_tokens"] == NEW_TOKENS


@pytest.mark.timeout(600)
def test_one_prefill_and_one_decode_equal_one_process_packed(cluster: LocalCluster, model: Path) -> None:
    check_same_bits(cluster, model, "v4", SHORT + LONG)


@pytest.mark.timeout(600)
def test_two_prefills_and_two_decodes_equal_one_process_exact(model: Path, tmp_path: Path) -> None:
    flags = ("--prefill", "2", "--decode", "2", "--kv-layout", "exact")
    with local_cluster(tmp_path / "home", model, *flags) as cluster:
        check_same_bits(cluster, model, "exact", SHORT[::2] + LONG[::2])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "workers"), [("v4", 2), ("exact", 1), ("exact", 2)])
def test_every_layout_and_shape_equals_one_process(model: Path, tmp_path: Path, layout: str, workers: int) -> None:
    flags = ("--prefill", str(workers), "--decode", str(workers), "--kv-layout", layout)
    with local_cluster(tmp_path / "home", model, *flags) as cluster:
        check_same_bits(cluster, model, layout, SHORT + LONG)
