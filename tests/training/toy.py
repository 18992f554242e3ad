"""A run of seconds: a model of every kind of layer, and a little text of our own."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from training import tasks
from training.config import Data, ModelShape, Optimiser, Stage, TrainConfig
from training.corpora import Corpus
from training.data import Texts
from training.loop import Metrics, Trainer
from training.tokenizer import train_tokenizer

SHAPE = ModelShape(
    layers=(4, 128),
    hidden_size=64,
    vocab_size=384,
    num_heads=2,
    head_dim=32,
    rope_dim=8,
    q_lora_rank=32,
    o_lora_rank=16,
    index_heads=32,  # with few, many scores are exactly 0, and others break the tie otherwise
    index_head_dim=16,
    index_topk=16,
    experts=4,
    moe_intermediate_size=32,
)
CONFIG = TrainConfig(
    model=SHAPE,
    stages=(
        Stage(steps=30, sequence_tokens=128, sequences=3, needles=0.0),
        Stage(steps=20, sequence_tokens=192, sequences=2, sparse=True),
    ),
    data=Data(text=0.3),
    optimiser=Optimiser(muon_rate=0.02, adam_rate=0.01, warmup_steps=5),
    dtype="float32",
    log_steps=5,
    save_steps=30,
)


def toy_texts() -> Texts:
    rng = random.Random("toy")
    pieces = ["\n\n".join(tasks.tale(rng) for _ in range(8)) for _ in range(20)]
    corpus = Corpus("made up", "1", tuple(pieces[2:]), tuple(pieces[:2]))
    return Texts([corpus], train_tokenizer(corpus.train, SHAPE.vocab_size), CONFIG.data)


def toy(**changes: object) -> TrainConfig:
    return replace(CONFIG, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    directory: Path
    trainer: Trainer
    seen: list[Metrics]
