"""Training on a GPU: a pass replayed as a graph is the pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.training.toy import CONFIG, toy_texts
from training.config import Stage
from training.data import Batches, Texts
from training.group import Group
from training.initial import initial_model
from training.loop import Metrics, Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def texts() -> Texts:
    return toy_texts()


def seen(texts: Texts, *, capture: bool) -> list[Metrics]:
    """Two stages, the first in two parts of different size, with and without watching."""
    stages = (
        Stage(steps=4, sequence_tokens=128, sequences=4, micro_sequences=3),
        Stage(steps=4, sequence_tokens=192, sequences=2, sparse=True),
    )
    config = replace(CONFIG, stages=stages, device="cuda", dtype="bfloat16", capture=capture)
    trainer = Trainer(config, initial_model(config.model.config(), config.seed, config.device), Group())
    batches = Batches(texts, config).from_step(0)
    return [trainer.take(next(batches), observe=step % 2 == 1) for step in range(config.steps)]


def test_steps_replayed_as_graphs_learn_what_steps_launched_kernel_by_kernel_do(texts: Texts) -> None:
    eager, captured = (seen(texts, capture=capture) for capture in (False, True))
    assert len(eager) == len(captured) == 8
    for one, other in zip(eager, captured, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=5e-3), f"step {one.step}"
        assert other.index_loss == pytest.approx(one.index_loss, rel=5e-2, abs=1e-3)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=5e-2)
    assert captured[-1].loss < captured[0].loss
