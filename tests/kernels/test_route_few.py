"""Routing of a few tokens: the source of the CUDA kernels run on the CPU, against its twin and a plain list of work."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kernels.device import INTERPRETED, route_few, use_cuda_products
from engine.kernels.experts import route_hashed, route_scored
from engine.kernels.linear import Matrix
from tests.kernels.cuda_on_cpu import compiled

SCALING = 2.5
P, N, F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("route_few", tmp_path_factory.mktemp("route"))


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def call(function, *fields: tuple[type, object]) -> None:
    """Call with a struct of these (type, value) fields."""
    struct = type("Call", (ctypes.Structure,), {"_fields_": [(f"f{n}", kind) for n, (kind, _) in enumerate(fields)]})
    function(ctypes.byref(struct(*(v.data_ptr() if isinstance(v, Tensor) else v for _, v in fields))))


def gate_parts(library: ctypes.CDLL, x: Tensor, gate: Tensor) -> Tensor:
    (tokens, size), experts = x.shape, len(gate)
    parts = torch.full((-(-size // 1024), tokens, experts), torch.nan)
    call(
        library.run_gate, (P, x), (P, gate), (P, parts), (N, tokens), (N, experts), (N, size),
        (N, route_few.most(tokens)),
    )  # fmt: skip
    return parts


@dataclass
class Routed:
    picks: Tensor
    weights: Tensor
    members: Tensor  # [blocks, 8]
    owners: Tensor


def route(
    library: ctypes.CDLL, parts: Tensor, k: int, bias: Tensor | None = None, table: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Routed:  # fmt: skip
    splits, tokens, experts = parts.shape
    picks, weights = torch.full((tokens, k), -9, dtype=torch.int32), torch.full((tokens, k), torch.nan)
    count = route_few.blocks(tokens, experts, k)
    members, owners = (torch.full(shape, -9, dtype=torch.int32) for shape in ((count, 8), (count,)))
    call(
        library.run_route, *((P, t) for t in (parts, bias, table, token_ids, picks, weights, members, owners)),
        *((N, n) for n in (splits, tokens, experts, k, count, route_few.values(experts))), (F, SCALING),
    )  # fmt: skip
    check_work(picks, members, owners)
    return Routed(picks, weights, members, owners)


def check_work(picks: Tensor, members: Tensor, owners: Tensor) -> None:
    """The list of work is that of a plain loop over the experts."""
    room, pairs, flat = min(len(picks), 8), picks.numel(), picks.flatten().tolist()
    blocks: list[tuple[int, list[int]]] = []
    for expert in sorted(set(flat)):
        mine = [pair for pair, pick in enumerate(flat) if pick == expert]
        blocks += [(expert, mine[i : i + room]) for i in range(0, len(mine), room)]
    spare = len(owners) - len(blocks)
    assert owners.tolist() == [expert for expert, _ in blocks] + [-1] * spare
    places = [mine + [pairs] * (8 - len(mine)) for _, mine in blocks]
    assert members.tolist() == places + [[pairs] * 8] * spare


def identity(tokens: int) -> Tensor:
    return torch.eye(max(tokens, 4))[:tokens]


def scored(z: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the twin makes of these products, which are a gate's for tokens that are unit vectors."""
    gate = torch.zeros(z.shape[1], max(len(z), 4))
    gate[:, : len(z)] = z.T
    return route_scored(identity(len(z)), Matrix.prepare(gate), bias, k, SCALING)


@pytest.mark.parametrize(
    ("tokens", "experts", "size"),
    [(1, 12, 128), (3, 8, 1152), (5, 16, 2048), (8, 20, 1024), (9, 12, 128), (29, 20, 1152), (64, 8, 128)],
)
def test_a_products_parts_add_up_to_it(library, tokens: int, experts: int, size: int) -> None:
    x, gate = draw(tokens, size), draw(experts, size, seed=1)
    got = gate_parts(library, x, gate).double().sum(0)
    # Of a sum's terms, in halves of halves: far fewer roundings than there are terms.
    allowed = 2**-21 * (x.double().abs() @ gate.double().abs().T)
    assert ((got - x.double() @ gate.double().T).abs() <= allowed).all()


def test_a_token_has_the_same_bits_in_any_company(library) -> None:
    x, gate, bias = draw(64, 1152), draw(40, 1152, seed=1), draw(40, seed=2)
    parts = gate_parts(library, x, gate)
    together = route(library, parts, 6, bias)
    for tokens in (*range(1, 10), 31, 63):
        some = x[64 - tokens :].contiguous()
        fewer = gate_parts(library, some, gate)
        assert torch.equal(fewer, parts[:, 64 - tokens :])
        got = route(library, fewer, 6, bias)
        assert torch.equal(got.picks, together.picks[64 - tokens :])
        assert torch.equal(got.weights, together.weights[64 - tokens :])


@pytest.mark.parametrize(("experts", "splits"), [(8, 1), (200, 2), (256, 4), (384, 7), (1000, 3)])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 6), (2, 8), (5, 6), (7, 1), (8, 8), (9, 6), (64, 8)])
def test_the_best_experts_are_picked_and_weighed_as_by_the_twin(
    library, experts: int, splits: int, tokens: int, k: int
) -> None:
    parts = draw(splits, tokens, experts, seed=experts, scale=3.0)
    bias = draw(experts, seed=1, scale=0.5)
    z = sum(parts, torch.zeros(tokens, experts))
    picks, weights = scored(z, bias, k)
    got = route(library, parts, k, bias)
    assert torch.equal(got.picks, picks)
    assert torch.allclose(got.weights, weights, rtol=1e-6, atol=1e-6)


def test_weights_are_right_wherever_the_products_lie(library) -> None:
    z = torch.stack([torch.linspace(-60, 60, 256), torch.linspace(-4, 1, 256), torch.linspace(-1e-3, 1e-3, 256)])
    exact = torch.nn.functional.softplus(z.double(), threshold=100).sqrt()
    table = torch.stack([torch.tensor([i, 255 - i, i // 2, 7, 100, 255, 128, 64]) for i in range(0, 256, 13)])
    for row in range(len(table)):
        got = route(library, z[None], 8, table=table, token_ids=torch.full((3,), row))
        chosen = exact[:, table[row]]
        expected = chosen / chosen.sum(1, keepdim=True) * SCALING
        assert torch.allclose(got.weights.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("experts", [40, 256])
def test_of_equal_scores_the_lower_expert_is_picked(library, experts: int) -> None:
    z = torch.randint(3, (6, experts), generator=torch.Generator().manual_seed(3)).float()
    z[4] = 1.0
    z[5] = -200.0
    bias = torch.zeros(experts)
    bias[1::2] = -0.0
    picks, weights = scored(z, bias, 6)
    got = route(library, z[None], 6, bias)
    assert torch.equal(got.picks, picks)
    assert got.picks[4].tolist() == got.picks[5].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(got.weights, weights, rtol=1e-6, atol=1e-6)


def test_a_token_that_is_not_a_number_picks_experts_and_leaves_the_others_alone(library) -> None:
    z, bias = draw(3, 256), draw(256, seed=1)
    alone = route(library, z[None, 2:].contiguous(), 6, bias)
    z[0], z[1, 77] = torch.nan, torch.nan
    got = route(library, z[None], 6, bias)
    assert got.picks[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert got.picks[1, 0] == 77
    assert got.weights[:2].isnan().all()
    assert torch.equal(got.picks[2:], alone.picks)
    assert torch.equal(got.weights[2:], alone.weights)
    # Steering that rules experts out rules each of them out alone.
    bias[:] = -torch.inf
    bias[9] = 0.0
    assert route(library, draw(1, 1, 256), 4, bias).picks.tolist() == [[9, 0, 1, 2]]


@pytest.mark.parametrize("tokens", [*range(1, 10), 32, 57])
@pytest.mark.parametrize("k", [1, 6, 8])
def test_hashed_tokens_go_where_the_table_says_even_twice(library, tokens: int, k: int) -> None:
    experts, g = 16, torch.Generator().manual_seed(tokens)
    z = draw(tokens, experts, seed=k)
    table = torch.randint(experts, (100, k), generator=g)
    table[:50, : k // 2 + 1] = 3  # an expert may have more pairs than there are tokens, and than a block has places
    token_ids = torch.randint(100, (tokens,), generator=g)
    token_ids[0] = 5
    gate = torch.zeros(experts, max(tokens, 4))
    gate[:, :tokens] = z.T
    picks, weights = route_hashed(identity(tokens), Matrix.prepare(gate), table, token_ids, SCALING)
    got = route(library, z[None], k, table=table, token_ids=token_ids)
    assert torch.equal(got.picks, picks)
    assert torch.allclose(got.weights, weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("k", [1, 6, 8, 16])
def test_the_list_of_work_is_whole_where_all_tokens_go_to_the_same_experts(library, tokens: int, k: int) -> None:
    bias = torch.zeros(64)
    bias[20 : 20 + k] = 100.0
    got = route(library, draw(1, tokens, 64), k, bias)
    assert sorted(set(got.picks.flatten().tolist())) == list(range(20, 20 + k))
    assert got.owners.tolist() == [*range(20, 20 + k), *[-1] * (len(got.owners) - k)]
    # All pairs are of one expert: as many blocks as picks, each full.
    got = route(library, draw(1, tokens, 64), k, table=torch.full((1, k), 63), token_ids=torch.zeros(tokens).long())
    assert got.owners.tolist() == [63] * k + [-1] * (len(got.owners) - k)


@pytest.mark.parametrize("spread", [False, True])
def test_the_list_of_work_is_whole_where_blocks_are_as_many_as_there_can_be(library, spread: bool) -> None:
    """One pair more than full blocks of every expert, or all pairs of experts of their own as far as they go."""
    tokens, k, experts = 64, 8, 40
    pairs = torch.arange(tokens * k)
    owner = pairs % experts if spread else (pairs // 9).clamp(max=experts - 1)
    got = route(library, draw(1, tokens, experts), k, table=owner.view(tokens, k), token_ids=torch.arange(tokens))
    assert (got.owners >= 0).sum() <= route_few.blocks(tokens, experts, k) == experts + 64
    assert len(set(got.owners.tolist()) - {-1}) == experts


@pytest.mark.skipif(INTERPRETED, reason="no CUDA C++ under Triton's interpreter")
def test_only_few_tokens_of_a_gate_in_fp32_are_taken() -> None:
    gate = torch.zeros(256, 256)
    assert not route_few.takes(1, gate, 6)
    use_cuda_products(True)
    try:
        assert all(route_few.takes(tokens, gate, 6) for tokens in range(1, 65))
        assert route_few.takes(32, gate, 16)
        assert not any(route_few.takes(tokens, gate, 6) for tokens in (0, 65))
        assert not route_few.takes(33, gate, 16)
        assert not route_few.takes(1, gate.bfloat16(), 6)
        assert not route_few.takes(1, gate[:, :64], 6)
        assert not route_few.takes(1, gate[:4], 6)
        assert not route_few.takes(1, gate, 17)
    finally:
        use_cuda_products(False)
