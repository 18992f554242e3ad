"""One process of a data-parallel toy run: `python -m tests.training.two_processes RANK WORLD RENDEZVOUS OUT`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tests.training.toy import CONFIG, toy_texts
from training.config import Stage
from training.group import joined
from training.loop import train

# Three sequences for two processes: shares of different size must weigh alike, token by token.
SHARED = replace(
    CONFIG,
    stages=(Stage(steps=3, sequence_tokens=192, sequences=3, sparse=True),),
    quantised_from=1.0,  # what is nearly the same may be rounded apart
    log_steps=1,
)


def main(rank: int, world: int, rendezvous: str, out: Path) -> None:
    with joined(rank, world, rendezvous, "cpu") as group:
        train(SHARED, out, texts=toy_texts(), group=group)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
