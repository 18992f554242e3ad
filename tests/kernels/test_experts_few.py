"""FP4 experts of a few tokens out of panels: the source of the CUDA kernels run on the CPU, against fp64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from engine.kernels.device import experts_few
from tests.kernels.cuda_on_cpu import compiled
from tests.kernels.test_few_tokens import F, N, P, call, generator

LIMIT = 10.0
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("experts_few", tmp_path_factory.mktemp("experts"))


@pytest.fixture(params=["in step", "first ahead", "last ahead"])
def library(built: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Warps run in step, or one by one as far as they can: what they do not wait for is not there."""
    built.order(request.param != "in step", request.param == "last ahead")
    return built


def fp4(shape: tuple[int, int, int], g: torch.Generator, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales, and what they mean [E, N, K] in fp64."""
    count, outputs, inputs = shape
    codes = torch.randint(256, (count, outputs, inputs // 2), dtype=torch.uint8, generator=g)
    scales = torch.randint(low, high + 1, (count, outputs, inputs // 32), dtype=torch.uint8, generator=g)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2).long()
    return codes, scales, E2M1[nibbles] * torch.exp2(scales.double() - 127).repeat_interleave(32, 2)


def held(x: Tensor) -> Tensor:
    """x [T, K] as the kernels hold it: two e4m3 terms of a unit of 256 inputs."""
    steps = x.unflatten(1, (-1, experts_few.STEP))
    most = steps.abs().amax(dim=2, keepdim=True)
    unit = torch.exp2(most.clamp(min=2.0**-119).log2().floor() - 7)
    rest, total = steps / unit, torch.zeros_like(steps, dtype=torch.float64)
    for term in range(2):
        part = rest.to(torch.float8_e4m3fn).float()
        total += part.double() * 16.0**-term
        rest = (rest - part) * 16
    return (total * unit.double()).flatten(1)


def products(
    library: ctypes.CDLL, x: Tensor, panels: tuple[Tensor, Tensor], shares: Tensor, work: tuple[Tensor, Tensor],
    inner: int, *, stages: int = 2, grid: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h [P, I] and y [P, D]."""
    (tokens, hidden), pairs = x.shape, len(shares)
    h, y = torch.full((pairs, inner), torch.nan), torch.full((pairs, hidden), torch.nan)
    call(
        library.run_experts,
        [(P, x), (P, panels[0]), (P, panels[1]), (P, shares), (P, work[0]), (P, work[1]), (P, h), (P, y),
         (N, len(work[1])), (N, tokens), (N, pairs // tokens), (N, hidden), (N, inner), (F, LIMIT), (N, stages)],
        grid,
    )  # fmt: skip
    return h, y


def work_of(owner: dict[int, int], pairs: int, empty: int = 1) -> tuple[Tensor, Tensor]:
    """members and owners for {pair: expert}, blocks of up to eight, some of nobody behind them."""
    blocks: list[tuple[int, list[int]]] = []
    for expert in sorted(set(owner.values())):
        mine = sorted(p for p, e in owner.items() if e == expert)
        blocks += [(expert, mine[n : n + 8]) for n in range(0, len(mine), 8)]
    members = torch.full((len(blocks) + empty, 8), pairs, dtype=torch.int32)
    owners = torch.full((len(blocks) + empty,), -1, dtype=torch.int32)
    for n, (expert, mine) in enumerate(blocks):
        owners[n] = expert
        members[n, : len(mine)] = torch.tensor(mine)
    return members, owners


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=LIMIT)
    return gate / (1 + torch.exp(-gate)) * up.clamp(-LIMIT, LIMIT)


def words_of(panels: Tensor) -> Tensor:
    """Panels -> the e2m1 codes of their words: [E, P, step, warp, pair, row, quad, group, half, 8]."""
    words = panels[..., :2048].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    words = words.view(*panels.shape[:-1], 4, 8, 4, 2, 2)
    halves = torch.stack([words & 0x9C9C9C9C, (words << 2 ^ words >> 2) & 0x9C9C9C9C], dim=-1)
    parts = torch.stack([halves >> 8 * byte & 255 for byte in range(4)], dim=-1)
    return (parts >> 7 << 3 | parts >> 2 & 7).flatten(-2)


def test_panels_hold_every_weight_and_scale_where_the_source_looks_for_it() -> None:
    g = generator(1)
    codes, scales, _ = fp4((2, 128, 512), g, 0, 255)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2)
    panels = experts_few.down_panels(codes, scales)
    assert panels.shape == (2, 2, 2, 4, 2176)
    assert panels.numel() == codes.numel() + scales.numel()
    found = words_of(panels)
    kept = panels[..., 2048:].view(2, 2, 2, 4, 2, 2, 8, 4)
    for expert, row, group in [(0, 0, 0), (1, 127, 15), (0, 77, 9), (1, 8, 6), (0, 100, 3)]:
        place = (expert, row // 64, group // 8, row % 64 // 16)
        for quad in range(4):
            inputs = [32 * group + 16 * (n // 4) + 4 * quad + n % 4 for n in range(8)]
            word = found[(*place, group % 8 // 2, row % 8, quad, group % 2, row % 16 // 8)]
            assert word.tolist() == nibbles[expert, row, inputs].tolist()
        assert kept[(*place, group % 8 // 4, row % 16 // 8, row % 8, group % 4)] == scales[expert, row, group]
    up_codes, up_scales, _ = fp4((2, 128, 512), g, 0, 255)
    both = experts_few.gate_up_panels(codes, up_codes, (scales, up_scales))
    assert both.shape == (2, 4, 2, 4, 2176)
    found = words_of(both)
    assert torch.equal(found[1, 2, 1, 3, 1, 5, 2, 1, 0], words_of(panels)[1, 1, 1, 1, 1, 5, 2, 1, 1]), "row 93 of gate"
    up = torch.stack([up_codes & 15, up_codes >> 4], dim=-1).flatten(2)
    assert found[1, 2, 1, 3, 1, 5, 2, 1, 1, :4].tolist() == up[1, 93, 360:364].tolist()


def test_a_word_holds_any_eight_weights() -> None:
    g = generator(2)
    codes = torch.randint(256, (1, 64, 1 << 14), dtype=torch.uint8, generator=g)
    scales = torch.zeros(1, 64, 1 << 10, dtype=torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2)
    found = words_of(experts_few.down_panels(codes, scales))
    # [E, P, step, warp, pair, row, quad, group, half, 2, 4] -> [E, P, warp, half, row, step, pair, group, 2, quad, 4]
    found = found.unflatten(-1, (2, 4)).permute(0, 1, 3, 8, 5, 2, 4, 7, 9, 6, 10)
    assert torch.equal(found.reshape(1, 64, 1 << 15).to(torch.uint8), nibbles)


class Stack:
    """Experts of any codes, as panels and as what they mean."""

    def __init__(self, count: int, hidden: int, inner: int, g: torch.Generator, low: int, high: int) -> None:
        gate, gate_scales, self.gate = fp4((count, inner, hidden), g, low, high)
        up, up_scales, self.up = fp4((count, inner, hidden), g, low, high)
        weight, scales, self.down = fp4((count, hidden, inner), g, low, high)
        gate_scales[0, 0], up_scales[0, 1], scales[0, 2] = 0, 0, 0  # as good as nothing
        self.gate[0, 0], self.up[0, 1], self.down[0, 2] = 0, 0, 0
        self.panels = (
            experts_few.gate_up_panels(gate, up, (gate_scales, up_scales)), experts_few.down_panels(weight, scales)
        )  # fmt: skip


@pytest.mark.parametrize(("low", "high", "stages", "grid"), [(115, 124, 2, 2), (60, 127, 3, 5), (117, 140, 1, 1)])
@pytest.mark.parametrize("tokens", [4, 9])
def test_experts_give_what_their_weights_mean(
    library, low: int, high: int, stages: int, grid: int, tokens: int
) -> None:
    """Every code, scales near and far from each other; blocks of one pair, of three, of eight, and of nobody."""
    g = generator(low)
    hidden, inner, picks = 512, 256, 2
    stack = Stack(4, hidden, inner, g, low, high)
    pairs = tokens * picks
    x = torch.randn(tokens, hidden, generator=g) * 2.0 ** (121 - high)
    x[1] = 0
    x[2, 3] = 3e4 * x[2].abs().max()
    # Expert 2 takes every first pick, of nine in two blocks; expert 0 one pair, 3 three, 1 none.
    owner = dict.fromkeys(range(0, pairs, 2), 2) | {pairs - 1: 0, 1: 3, 5: 3}
    owner |= {4: 3} if tokens == 4 else {7: 3}
    shares = torch.rand(pairs, generator=g)
    library.keep(0)
    work = work_of(owner, pairs)
    h, y = products(library, x, stack.panels, shares, work, inner, stages=stages, grid=grid)
    rows = held(x)
    for pair, expert in owner.items():
        row = rows[pair // picks]
        a, b = stack.gate[expert] @ row, stack.up[expert] @ row
        assert torch.allclose(h[pair].double(), swiglu(a, b), rtol=1e-4, atol=1e-6)
        down, row, share = stack.down[expert], held(h[pair : pair + 1])[0], shares[pair].double()
        assert ((y[pair] - down @ row * share).abs() <= 1e-6 * (down.abs() @ row.abs()) * share).all()
        # Both terms of an activation together are off by no more.
        exact = h[pair].double()
        off = torch.maximum(2.0**-9 * exact.abs(), 2.0**-21 * exact.abs().max())
        assert ((y[pair] - down @ exact * share).abs() <= (down.abs() @ off) * share).all()
    nobody = [p for p in range(pairs) if p not in owner]
    assert torch.cat([h, y], 1)[nobody].isnan().all(), "pairs of nobody are left alone"


@pytest.mark.parametrize("grid", [3, 10])
def test_blocks_with_little_to_do_or_nothing_meet_the_others(library, grid: int) -> None:
    """A pair has eight panels of gate and up, four of down, and a step for one warp of four alone in either."""
    g = generator(7)
    stack = Stack(2, 256, 256, g, 112, 122)
    x = torch.randn(1, 256, generator=g)
    for owner in ({}, {0: 1}):
        h, y = products(library, x, stack.panels, torch.ones(1), work_of(owner, 1), 256, grid=grid)
        assert h.isfinite().all() == y.isfinite().all() == bool(owner)
    assert torch.allclose(y[0].double(), stack.down[1] @ held(h)[0], rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_is_told(library) -> None:
    g = generator(4)
    stack = Stack(2, 256, 256, g, 120, 124)
    x = torch.randn(3, 256, generator=g)
    x[0, 7], x[1, 200] = torch.inf, torch.nan
    _, y = products(library, x, stack.panels, torch.ones(3), work_of({0: 1, 1: 1, 2: 1}, 3), 256)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()


def test_a_panel_of_flash_in_any_company(library) -> None:
    """4096 inputs: each pair gives the same bits alone, among eight, by one block or three, however deep the ring."""
    g = generator(5)
    stack = Stack(2, 4096, 256, g, 112, 122)
    x = torch.randn(8, 4096, generator=g)
    work = work_of(dict.fromkeys(range(8), 1), 8)
    library.keep(0)
    h, y = products(library, x, stack.panels, torch.ones(8), work, 256, stages=4, grid=3)
    expected = torch.stack([swiglu(stack.gate[1] @ row, stack.up[1] @ row) for row in held(x)])
    assert torch.allclose(h.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(y.double(), held(h) @ stack.down[1].T, rtol=1e-4, atol=1e-5)
    for token in (0, 3):
        alone = products(library, x[token : token + 1], stack.panels, torch.ones(1), work_of({0: 1}, 1, 0), 256, grid=1)
        assert torch.equal(alone[0][0], h[token])
        assert torch.equal(alone[1][0], y[token])


def test_the_few_bits_that_wgmma_counts_are_enough(built) -> None:
    """13 bits behind the point in every sum of 32 products, beside which the rounding of tokens costs 1.4e-7."""
    g = generator(6)
    stack = Stack(1, 256, 2048, g, 112, 122)
    x = torch.randn(2, 256, generator=g)
    built.keep(13)
    h, y = products(built, x, stack.panels, torch.ones(2), work_of({0: 0, 1: 0}, 2), 2048)
    built.keep(0)
    for rows, most in ((held(h), 3e-9), (h.double(), 3e-7)):
        expected = rows @ stack.down[0].T
        apart = 1 - 2 * (y.double() * expected).sum() / (y.double().square().sum() + expected.square().sum())
        assert 0 < apart < most


def test_shared_memory_is_what_the_source_lays_out(built) -> None:
    for inputs, stages, pairs in [(4096, 4, 24), (2048, 5, 6), (7168, 3, 384)]:
        assert built.shared_bytes(inputs, stages, pairs) == experts_few.shared_bytes(inputs, stages, pairs)


@pytest.mark.parametrize(("hidden", "inner"), [(4096, 2048), (7168, 3072)])
def test_experts_of_the_official_models_fit_a_block(hidden: int, inner: int) -> None:
    assert experts_few.arranges(hidden, inner)
    for pairs in (6, 48, 384):
        for inputs in (hidden, inner):
            ring = experts_few.stages(inputs, pairs)
            assert ring == 2
            assert experts_few.shared_bytes(inputs, ring, pairs) <= 227 << 10
    assert not experts_few.arranges(192, 256)
