"""Work lists of many pairs: the source of the CUDA kernel run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.kernels.cuda_on_cpu import compiled
from tests.kernels.test_few_tokens import N, P, call, generator


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("work_list", tmp_path_factory.mktemp("work"))


@pytest.fixture(params=["in step", "first ahead", "last ahead"])
def library(built: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    built.order(request.param != "in step", request.param == "last ahead")
    return built


@pytest.mark.parametrize(
    ("pairs", "experts", "block", "room"), [(1, 3, 16, 16), (700, 40, 16, 16), (1030, 5, 64, 64), (600, 5, 8, 6)]
)
def test_every_pair_is_a_member_under_its_expert(library, pairs: int, experts: int, block: int, room: int) -> None:
    """In order; full parts and ones that are not, experts of nobody, and parts of nobody behind all others."""
    picks = torch.randint(experts - 1, (pairs,), dtype=torch.int32, generator=generator(pairs))
    picks[: 2 * room] = 1
    parts = min(pairs, experts) + pairs // room
    members = torch.full((parts, block), -7, dtype=torch.int32)
    owners = torch.full((parts,), -7, dtype=torch.int32)
    call(
        library.run_work_list,
        [(P, picks), (P, members), (P, owners), (N, pairs), (N, experts), (N, parts), (N, block), (N, room)],
        experts,
    )  # fmt: skip
    expected = []
    for expert in range(experts):
        mine = (picks == expert).nonzero().flatten().tolist()
        expected += [(expert, mine[n : n + room]) for n in range(0, len(mine), room)]
    expected += [(-1, [])] * (parts - len(expected))
    assert owners.tolist() == [owner for owner, _ in expected]
    assert members.tolist() == [mine + [pairs] * (block - len(mine)) for _, mine in expected]
