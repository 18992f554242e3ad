"""Several processes on one batch are one process."""

from __future__ import annotations

import csv
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.toy import toy_texts
from tests.training.two_processes import SHARED
from training.initial import initial_model
from training.loop import train
from training.state import states

pytestmark = pytest.mark.timeout(600)  # seconds on a quiet machine
ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_learn_what_one_does_from_the_same_batches(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "tests.training.two_processes"]
    children = [
        subprocess.Popen([*words, str(rank), "2", rendezvous, str(tmp_path / "two")], cwd=ROOT) for rank in range(2)
    ]
    try:
        train(SHARED, tmp_path / "one", texts=toy_texts())
        assert [child.wait(100) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    one, two = (load_file(states(tmp_path / name)[-1] / "state.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    start = initial_model(SHARED.model.config(), SHARED.seed)
    for name, begun in start.parameters.items():
        alone, shared = one[f"parameter/{name}"], two[f"parameter/{name}"]
        assert (shared - alone).norm() <= 0.05 * (alone - begun.detach()).norm(), name
    figures = []
    for name in ("one", "two"):
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            figures.append(list(csv.DictReader(file)))
    for alone, shared in zip(*figures, strict=True):
        assert (alone["step"], alone["tokens"]) == (shared["step"], shared["tokens"])
        for key in ("loss", "draft_loss", "index_loss", "index_recall", "gradient_norm"):
            assert abs(float(alone[key]) - float(shared[key])) <= 1e-3 * abs(float(alone[key])), key
    assert figures[0][0]["busiest"] == figures[1][0]["busiest"]
    assert torch.equal(one["kept/layers.0.ffn.gate.tid2eid"], two["kept/layers.0.ffn.gate.tid2eid"])
