"""What the model thought of the prompt, through a whole cluster: as one process computes it in one step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.batch import Segment, Sequence
from engine.config import EngineConfig
from engine.kernels.sample import score
from engine.runner import Runner
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.test_same_bits import mixed_prompts

ALTERNATIVES = 3


@pytest.fixture(scope="module")
def alone(model: Path) -> Runner:
    return Runner.load(EngineConfig(model=model, max_requests=2, kv_memory_bytes=64 << 20))


def scores_of(runner: Runner, prompt: list[int]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Of each token from the second on: all rows of logits of one step, in one process."""
    pools, n = runner.pools, -(-len(prompt) // 256)
    sequence = Sequence(
        request_id="",
        sampling=None,  # type: ignore[arg-type]  # nothing is drawn
        slot=1,
        pages=pools.full.allocate(n),
        swa_pages=pools.swa.allocate(n),
    )
    whole = Segment(sequence=sequence, start=0, tokens=prompt, sample=False)
    logits = runner.logits([whole], torch.arange(len(prompt) - 1)).numpy()
    pools.full.release(sequence.pages)
    pools.swa.release(sequence.swa_pages)
    return [(one.logprob, one.top) for one in score(logits, prompt[1:], ALTERNATIVES)]


def test_log_probabilities_of_a_prompt_are_those_of_one_process(
    cluster: LocalCluster, model: Path, alone: Runner
) -> None:
    """Of a prompt of several chunks, and asked twice: nothing of it may come from a cache."""
    for prompt in mixed_prompts(250, (2, 300, 700)):
        want = scores_of(alone, prompt)
        body = {"model": model.name, "prompt": prompt, "max_tokens": 2, "temperature": 0, "return_token_ids": True}
        plain = cluster.post("/v1/completions", body | {"logprobs": ALTERNATIVES}).json()["choices"][0]
        for _ in range(2):
            answer = cluster.post("/v1/completions", body | {"prompt_logprobs": ALTERNATIVES})
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert choice["token_ids"] == plain["token_ids"]
            first, *told = choice["prompt_logprobs"]
            assert first is None
            assert len(told) == len(want)
            for entries, token_id, (logprob, top) in zip(told, prompt[1:], want, strict=True):
                got = {int(i): entry["logprob"] for i, entry in entries.items()}
                assert got == pytest.approx(dict(top) | {token_id: logprob}, abs=0)


def test_an_echoed_prompt_is_told_like_the_answer(cluster: LocalCluster, model: Path, alone: Runner) -> None:
    prompt = [3 + byte for byte in b"What comes before the answer, said again. " * 9]
    body = {"model": model.name, "prompt": prompt, "max_tokens": 3, "temperature": 0, "logprobs": 2}
    plain = cluster.post("/v1/completions", body).json()["choices"][0]
    (choice,) = cluster.post("/v1/completions", body | {"echo": True}).json()["choices"]
    assert choice["text"] == "What comes before the answer, said again. " * 9 + plain["text"]
    told, said = choice["logprobs"], plain["logprobs"]
    n = len(prompt)
    assert told["token_logprobs"] == [
        None,
        *(logprob for logprob, _ in scores_of(alone, prompt)),
        *said["token_logprobs"],
    ]
    assert told["tokens"][n:] == said["tokens"]
    assert told["top_logprobs"][0] is None
    assert told["top_logprobs"][n:] == said["top_logprobs"]
    assert told["text_offset"][:n] == list(range(n))


def test_a_prompt_too_long_to_be_told_is_refused_with_its_numbers(cluster: LocalCluster, model: Path) -> None:
    body = {"model": model.name, "prompt": [7] * 4097, "max_tokens": 1, "prompt_logprobs": 0}
    answer = cluster.post("/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_logprobs"
    assert "at most 4096 tokens, and this one has 4097" in answer.json()["error"]["message"]
