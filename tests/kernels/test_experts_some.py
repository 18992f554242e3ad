"""FP4 experts of more tokens out of panels: the source of the CUDA kernels run on the CPU, against fp64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from engine.kernels.device import experts_some
from tests.kernels.cuda_on_cpu import compiled
from tests.kernels.test_experts_few import LIMIT, Stack, swiglu
from tests.kernels.test_few_tokens import F, N, P, call, generator


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("experts_some", tmp_path_factory.mktemp("experts"))


@pytest.fixture(params=["in step", "first ahead", "last ahead"])
def library(built: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Warps run in step and multiply at once, or one by one as far as they can, and multiply as late as they may."""
    built.order(request.param != "in step", request.param == "last ahead")
    return built


def held(x: Tensor) -> Tensor:
    """x [T, K] as the kernels hold it: two e4m3 terms of a unit that a token has."""
    unit = torch.exp2(x.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-119).log2().floor() - 7)
    first = (x / unit).to(torch.float8_e4m3fn).float()
    second = (x / unit - first).to(torch.float8_e4m3fn).float()
    return (first.double() + second.double()) * unit.double()


def products(
    library: ctypes.CDLL, x: Tensor, panels: tuple[Tensor, Tensor], shares: Tensor, work: tuple[Tensor, Tensor],
    inner: int, *, stages: int = 2, grid: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h [P, I] and y [P, D]."""
    (tokens, hidden), pairs = x.shape, len(shares)
    parts, block = work[0].shape
    h, y = torch.full((pairs, inner), torch.nan), torch.full((pairs, hidden), torch.nan)
    columns = [torch.full((parts * block * 2 * inputs,), 0xFF, dtype=torch.uint8) for inputs in (hidden, inner)]
    units = torch.full((2, parts * block), torch.nan)
    call(
        library.run_experts,
        [(P, x), (P, panels[0]), (P, panels[1]), (P, shares), (P, work[0]), (P, work[1]), (P, columns[0]),
         (P, columns[1]), (P, units[0]), (P, units[1]), (P, h), (P, y), (N, parts), (N, pairs), (N, pairs // tokens),
         (N, hidden), (N, inner), (N, block), (F, LIMIT), (N, stages)],
        grid,
    )  # fmt: skip
    return h, y


def work_of(owner: dict[int, int], pairs: int, block: int, empty: int = 1) -> tuple[Tensor, Tensor]:
    """members and owners for {pair: expert}, some blocks of nobody behind them."""
    blocks: list[tuple[int, list[int]]] = []
    for expert in sorted(set(owner.values())):
        mine = sorted(p for p, e in owner.items() if e == expert)
        blocks += [(expert, mine[n : n + block]) for n in range(0, len(mine), block)]
    members = torch.full((len(blocks) + empty, block), pairs, dtype=torch.int32)
    owners = torch.full((len(blocks) + empty,), -1, dtype=torch.int32)
    for n, (expert, mine) in enumerate(blocks):
        owners[n] = expert
        members[n, : len(mine)] = torch.tensor(mine)
    return members, owners


@pytest.mark.parametrize(
    ("low", "high", "block", "stages", "grid"), [(115, 124, 64, 3, 2), (60, 127, 32, 2, 5), (117, 128, 16, 1, 1)]
)
def test_experts_give_what_their_weights_mean(library, low: int, high: int, block: int, stages: int, grid: int) -> None:
    """Every code, scales near and far from each other; products of 16, 32 and 64 columns, of one pair and of 70."""
    g = generator(low)
    hidden, inner, picks, tokens = 512, 256, 2, 70
    stack = Stack(4, hidden, inner, g, low, high)
    pairs = tokens * picks
    x = torch.randn(tokens, hidden, generator=g) * 2.0 ** (121 - high)
    x[1] = 0
    x[2, 3] = 3e3 * x[2].abs().max()
    x[3] *= 1e-30
    # Expert 2 takes every first pick; expert 0 one pair, 3 seventeen, 1 none.
    owner = dict.fromkeys(range(0, pairs, 2), 2) | {pairs - 1: 0} | dict.fromkeys(range(1, 35, 2), 3)
    shares = torch.rand(pairs, generator=g)
    library.keep(0)
    h, y = products(library, x, stack.panels, shares, work_of(owner, pairs, block), inner, stages=stages, grid=grid)
    rows, middle = held(x), held(h.nan_to_num())
    for pair, expert in owner.items():
        row = rows[pair // picks]
        a, b = stack.gate[expert] @ row, stack.up[expert] @ row
        assert torch.allclose(h[pair].double(), swiglu(a, b), rtol=1e-4, atol=1e-6)
        down, row, share = stack.down[expert], middle[pair], shares[pair].double()
        assert ((y[pair] - down @ row * share).abs() <= 1e-6 * (down.abs() @ row.abs()) * share).all()
        # Both terms of an activation together are off by no more.
        exact = h[pair].double()
        off = torch.maximum(2.0**-9 * exact.abs(), 2.0**-18 * exact.abs().max())
        assert ((y[pair] - down @ exact * share).abs() <= (down.abs() @ off) * share).all()
    nobody = [p for p in range(pairs) if p not in owner]
    assert torch.cat([h, y], 1)[nobody].isnan().all(), "pairs of nobody are left alone"


def test_no_work_at_all(library) -> None:
    stack = Stack(2, 256, 256, generator(7), 112, 122)
    h, y = products(library, torch.ones(1, 256), stack.panels, torch.ones(1), work_of({}, 1, 16), 256)
    assert torch.cat([h, y], 1).isnan().all()


def test_what_is_not_finite_is_told(library) -> None:
    g = generator(4)
    stack = Stack(2, 256, 256, g, 120, 124)
    x = torch.randn(3, 256, generator=g)
    x[0, 7], x[1, 200] = torch.inf, torch.nan
    _, y = products(library, x, stack.panels, torch.ones(3), work_of({0: 1, 1: 1, 2: 1}, 3, 16), 256)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()


def test_a_token_gives_the_same_bits_in_any_company(library) -> None:
    """1024 inputs: alone, among 33, in parts of any size, by one block of threads or three, however deep the ring."""
    g = generator(5)
    stack = Stack(2, 1024, 256, g, 112, 122)
    x = torch.randn(33, 1024, generator=g)
    library.keep(13)
    everybody = dict.fromkeys(range(33), 1)
    h, y = products(library, x, stack.panels, torch.ones(33), work_of(everybody, 33, 64), 256, stages=3, grid=3)
    again = products(library, x, stack.panels, torch.ones(33), work_of(everybody, 33, 32), 256, stages=1, grid=1)
    assert torch.equal(again[0], h)
    assert torch.equal(again[1], y)
    for token in (0, 32):
        alone = products(library, x[token : token + 1], stack.panels, torch.ones(1), work_of({0: 1}, 1, 16, 0), 256)
        assert torch.equal(alone[0][0], h[token])
        assert torch.equal(alone[1][0], y[token])


def test_the_few_bits_that_wgmma_counts_are_enough(built) -> None:
    """13 bits behind the point in every sum of 64 products, beside which the rounding of tokens costs more."""
    g = generator(6)
    stack = Stack(1, 256, 2048, g, 112, 122)
    x = torch.randn(2, 256, generator=g)
    built.keep(13)
    h, y = products(built, x, stack.panels, torch.ones(2), work_of({0: 0, 1: 0}, 2, 16), 2048)
    built.keep(0)
    for rows, most in ((held(h), 3e-8), (h.double(), 3e-7)):
        expected = rows @ stack.down[0].T
        apart = 1 - 2 * (y.double() * expected).sum() / (y.double().square().sum() + expected.square().sum())
        assert 0 < apart < most


def test_shared_memory_is_what_the_source_lays_out(built) -> None:
    for block in experts_some.BLOCKS:
        for stages in (1, 3):
            assert built.shared_bytes(block, stages) == experts_some.shared_bytes(block, stages)
        assert experts_some.stages(block) >= 3
        assert experts_some.shared_bytes(block, experts_some.stages(block)) <= 227 << 10


def test_parts_have_room_for_what_most_experts_have() -> None:
    assert [experts_some.room(pairs, 64) for pairs in (96, 512, 513, 1024, 1536, 12_288)] == [16, 16, 32, 32, 64, 64]
