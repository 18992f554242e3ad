"""Whole runs at toy size on the CPU: they learn, go on where they stopped, and share their work."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.toy import CONFIG, Run
from training.data import Texts
from training.loop import train
from training.state import states
from wire.errors import CheckpointError

pytestmark = pytest.mark.timeout(600)  # the run they look at takes seconds on a quiet machine


def test_fifty_steps_bring_the_losses_down(fifty_steps: Run) -> None:
    seen = fifty_steps.seen
    assert [m.step for m in seen] == list(range(1, 51))
    assert fifty_steps.trainer.tokens == seen[-1].tokens == 50 * 384
    assert 5.5 < seen[0].loss < 6.5, "at first every one of the 384 tokens is about as likely: ln 384 = 5.95"
    last = seen[-10:]
    assert sum(m.loss for m in last) / 10 < 3.5
    assert sum(m.draft_loss for m in last) / 10 < 4.0
    assert sum(m.draft_accept for m in last) / 10 > 0.1
    dense = [m.index_loss for m in seen[:30]]
    assert sum(dense[-5:]) < 0.9 * sum(dense[:5])
    with (fifty_steps.directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(5, 51, 5))
    assert float(rows[-1]["loss"]) == pytest.approx(seen[-1].loss, rel=1e-4)
    assert 0.3 < float(rows[-1]["index_recall"]) <= 1.0
    assert 1.0 <= float(rows[-1]["busiest"]) < 4.0


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "state.safetensors")


def test_thirty_steps_and_twenty_more_are_fifty_steps_bit_for_bit(
    texts: Texts, fifty_steps: Run, tmp_path: Path
) -> None:
    """The second half starts in another directory, from nothing but the checkpoint."""
    half, whole = states(fifty_steps.directory)
    assert (half.name, whole.name) == ("step-00000030", "step-00000050")
    shutil.copytree(half, tmp_path / half.name)
    train(CONFIG, tmp_path, texts=texts)
    want, got = tensors_of(whole), tensors_of(tmp_path / whole.name)
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []
    assert {name.partition("/")[0] for name in want} == {"parameter", "kept", "optimiser"}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(35, 51, 5))


def test_a_run_directory_is_not_continued_by_another_run(texts: Texts, tmp_path: Path) -> None:
    train(CONFIG, tmp_path / "run", texts=texts, until=1)
    with pytest.raises(CheckpointError, match="belongs to a run with another seed"):
        train(replace(CONFIG, seed=1), tmp_path / "run", texts=texts)
    (states(tmp_path / "run")[-1] / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        train(CONFIG, tmp_path / "run", texts=texts)
