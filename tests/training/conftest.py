"""One run at toy size, for all that look at what comes out of one."""

from __future__ import annotations

import pytest

from tests.training.toy import CONFIG, Run, toy_texts
from training.data import Texts
from training.loop import Metrics, train


@pytest.fixture(scope="session")
def texts() -> Texts:
    return toy_texts()


@pytest.fixture(scope="session")
def fifty_steps(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run with the rounding of a real one: 30 steps of dense warm-up, then 20 sparse."""
    directory, seen = tmp_path_factory.mktemp("fifty") / "run", list[Metrics]()
    return Run(directory, train(CONFIG, directory, texts=texts, report=seen.append), seen)
