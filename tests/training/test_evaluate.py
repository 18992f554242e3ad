"""`penumbra eval` on a toy model: every figure is there, and those that can be known are right."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import evaluate, record
from engine.config import EngineConfig
from engine.runner import Runner
from tests.training.toy import Run, toy_texts
from training.data import Texts
from training.export import export, load_run
from training.model import Numerics

pytestmark = pytest.mark.timeout(600)  # the run it looks at takes seconds on a quiet machine


@pytest.fixture(scope="module")
def exported(fifty_steps: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer, _ = load_run(fifty_steps.directory)
    out = tmp_path_factory.mktemp("evaluated") / "toy"
    export(model, tokenizer, out)
    return out


def test_a_model_is_measured_beside_its_baseline_and_its_trainer(
    exported: Path, fifty_steps: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Texts, "read", classmethod(lambda *_, **__: toy_texts()))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    rows = evaluate.run(
        exported, trained=fifty_steps.directory, lengths=(400, 600), needles=2, questions=2, text_tokens=1000,
        layout="exact", threads=1, console=Console(file=io.StringIO()),
    )  # fmt: skip
    found = {(str(row["measure"]), str(row["at"])): float(str(row["value"])) for row in rows}
    trainer, served = found["perplexity of the trainer", "bfloat16"], found["perplexity", "held out"]
    assert 2 < served < 100, "far from guessing among 384"
    assert abs(served / trainer - 1) < 0.1
    assert 1 < found["perplexity of 5-grams", "held out"] < 384
    assert 0.8 < found["same likeliest token", "bfloat16"] <= 1.0
    assert 0 < found["logit error, mean", "bfloat16"] < 0.5
    assert all(0 <= found["draft accepted", f"place {n}"] <= 1 for n in (1, 2, 3))
    assert 1 <= found["accept length", "depth 3"] <= 4
    assert {"JSON valid", "JSON right", "needles found"} <= {measure for measure, _ in found}
    assert {at for measure, at in found if measure == "needles found"} == {"400", "600"}
    with (tmp_path / "eval.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_an_answer_with_drafts_is_the_answer_without(exported: Path) -> None:
    texts = toy_texts()
    runner = Runner.load(EngineConfig(model=exported, kv_layout="exact", kv_memory_bytes=64 << 20, max_requests=1))
    at, prompt = evaluate.Engine(runner), texts.tokenizer.encode("<｜begin▁of▁sentence｜>Once upon a time").ids
    plain, kept = at.answer(prompt, 40)
    drafted, counts = at.answer(prompt, 40, depth=3)
    assert kept == []
    assert drafted == plain
    assert 3 <= len(plain) <= 40
    assert len(counts) + sum(counts) >= len(plain) - 4, "every step but the first verifies what was guessed before it"
    assert runner.pools.full.free == runner.pools.full.capacity


def test_the_engine_reads_a_text_as_the_trainer_does(exported: Path, fifty_steps: Run) -> None:
    runner = Runner.load(EngineConfig(model=exported, kv_layout="exact", kv_memory_bytes=64 << 20, max_requests=1))
    ids = toy_texts().held_out[:400].tolist()
    run = load_run(fifty_steps.directory)[0].begin(Numerics(quantised=True))
    with torch.no_grad():
        want = run.logits(run.hidden(run.streams(torch.tensor([ids]))))[0]
    assert (evaluate.Engine(runner).logits(ids) - want).abs().max() < 1e-4
