"""The bundled model: whole, small enough, read by others as by us, and able to do what its card says."""

from __future__ import annotations

import json
import random

import deepseek_recipe as recipe
import pytest
import torch
from tokenizers import Tokenizer
from transformers import FineGrainedFP8Config
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from deploy.cluster import bundled_model
from engine.colocated import generate
from engine.config import EngineConfig
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.weights import load_checkpoint
from engine.runner import Runner
from tests.engine.paged import Paged
from training import tasks
from wire.types import SamplingParams

NANO = bundled_model()
TEXT = Tokenizer.from_file(str(NANO / "tokenizer.json"))


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner.load(EngineConfig(model=NANO, kv_memory_bytes=64 << 20, max_requests=1))


def answer(runner: Runner, question: str, tokens: int = 60) -> str:
    """Greedy, as a cluster answers a chat."""
    prompt = TEXT.encode(tasks.render([recipe.UserMessage(question)])).ids
    sampling = SamplingParams(max_tokens=tokens, seed=0, temperature=0)
    return str(TEXT.decode([drawn.token_id for drawn in generate(runner, prompt, sampling)]))


def test_it_is_a_download_of_sixteen_megabytes_at_most() -> None:
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 16_000_000


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is 17 + 25?", "17 + 25 = 42"),
        ("Repeat these words: lantern boat bell", "lantern boat bell"),
        ("Anna has the key. Tom has the drum. What does Tom have?", "Tom has the drum."),
    ],
)
def test_it_answers_what_it_was_taught(runner: Runner, question: str, said: str) -> None:
    assert answer(runner, question) == said


def test_it_fills_in_json_for_people_it_never_met(runner: Runner) -> None:
    for n in range(3):
        asked, wanted = tasks.extraction_of(random.Random(f"a test's {n}"))
        assert json.loads(answer(runner, asked, 80)) == wanted


def test_it_finds_what_was_hidden_in_three_thousand_tokens(runner: Runner) -> None:
    """By the cache's pages: its window is 128 tokens."""
    rng = random.Random("a test's needle")
    filler = [sentence + "." for _ in range(32) for sentence in tasks.tale(rng).rstrip(".").split(". ")]
    made = tasks.needles(rng, filler, 4)
    question, _, word = made.questions[0]
    asked = f"{made.haystack}\n\n{question}"
    assert len(TEXT.encode(asked).ids) > 3000
    assert word in answer(runner, asked, 24).rstrip(".").split()


# The library's loader calls parts of torch that torch itself calls old.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_finds_the_engines_logits(runner: Runner) -> None:
    theirs = DeepseekV4ForCausalLM.from_pretrained(
        NANO,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
    ).float()
    ids = torch.tensor(TEXT.encode(tasks.BOS + tasks.tale(random.Random(0))).ids)
    with torch.inference_mode():
        want = theirs(ids[None], use_cache=False).logits[0]
    checkpoint = load_checkpoint(NANO)
    got = Paged(DeepseekV4(checkpoint.config, checkpoint.tensors), "exact").prefill(ids, 64)
    assert got.std() > 1.0
    assert (got - want).abs().max() <= 1e-4
