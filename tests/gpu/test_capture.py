"""Parts of a step are captured whatever else goes on: where another could not be, where garbage holds old graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.steps import _Memory, _Part

pytestmark = pytest.mark.gpu


def twos() -> Tensor:
    return torch.ones(4, device="cuda") * 2


def test_behind_a_capture_that_failed_others_are_captured() -> None:
    memory = _Memory()
    seen: list[float] = []

    def looks() -> float:
        seen.append(twos().sum().item())  # the host waits, which nothing that is captured may
        return seen[-1]

    looking, fine = _Part(looks, memory), _Part(twos, memory)
    for _ in range(4):
        assert looking() == 8
        assert fine().tolist() == [2, 2, 2, 2]
    assert len(seen) == 4
    assert looking._graph is None
    assert fine._graph is not None


def test_graphs_that_are_garbage_stay_until_a_capture_is_over() -> None:
    memory = _Memory()

    def old() -> None:
        part = _Part(twos, memory)
        part(), part()
        assert part._graph is not None
        part.itself = part  # type: ignore[attr-defined]

    def busy() -> Tensor:
        old_ones = [[n] for n in range(200_000)]  # so many that garbage would be collected
        return twos() * len(old_ones)

    part = _Part(busy, memory)
    part()
    for _ in range(8):
        old()
    assert part().tolist() == [400_000] * 4
    assert part._graph is not None
