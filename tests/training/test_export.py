"""What training wrote, read by others: transformers' own loader, and the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from engine.model.deepseek_v4 import DeepseekV4
from engine.model.mtp import DraftLayer
from engine.model.weights import load_checkpoint
from router.config import ModelFacts
from router.text import Text
from tests.engine.paged import Paged
from tests.training.toy import Run, toy_texts
from training.export import export, load_run
from training.model import Numerics, Transformer
from wire.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.timeout(600)  # the run they look at takes seconds on a quiet machine


@pytest.fixture(scope="module")
def exported(fifty_steps: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    model, tokenizer, step = load_run(fifty_steps.directory)
    assert step == 50
    out = tmp_path_factory.mktemp("exported") / "toy"
    export(model, tokenizer, out)
    return model, out


def ids_of(length: int) -> Tensor:
    text = toy_texts().held_out[:length]
    assert len(text) == length
    return torch.tensor(text, dtype=torch.int64)[None]


def trained_logits(model: Transformer, ids: Tensor) -> Tensor:
    run = model.begin(Numerics(quantised=True))
    with torch.no_grad():
        return run.logits(run.hidden(run.streams(ids)))


# The library's loader calls parts of torch that torch itself calls old.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_loads_the_checkpoint_and_finds_our_logits(exported: tuple[Transformer, Path]) -> None:
    model, out = exported
    theirs = DeepseekV4ForCausalLM.from_pretrained(
        out,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
    ).float()
    ids = ids_of(300)
    with torch.inference_mode():
        want = theirs(ids, use_cache=False).logits
    got = trained_logits(model, ids)
    assert got.std() > 1.0, "a model that has learned to prefer"
    assert (got - want).abs().max() <= 1e-4


def test_the_engine_finds_the_trainers_logits(exported: tuple[Transformer, Path]) -> None:
    model, out = exported
    checkpoint = load_checkpoint(out, draft=True)
    engine = DeepseekV4(checkpoint.config, checkpoint.tensors)
    DraftLayer(engine, checkpoint.tensors)
    assert not checkpoint.tensors, "the draft layer is whole and nothing is left over"
    ids = ids_of(300)
    got = Paged(engine, "exact").prefill(ids[0], 100)
    assert (got - trained_logits(model, ids)[0]).abs().max() <= 1e-4


def test_the_router_reads_the_tokenizer(exported: tuple[Transformer, Path]) -> None:
    _, out = exported
    facts = ModelFacts.load(out)
    text = Text(out, facts, ("toy",), thinking=False)
    try:
        ids = text.encode("Once upon a time there was a fox.", add_special_tokens=True)
    finally:
        text.close()
    assert ids[0] == 0
    assert len(ids) < 15, "words that were read often are few tokens"


def test_an_export_never_writes_over_what_is_there(exported: tuple[Transformer, Path]) -> None:
    model, out = exported
    with pytest.raises(ConfigError, match="exists"):
        export(model, "{}", out)


def test_a_directory_without_a_run_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no training run"):
        load_run(tmp_path)
