"""FP8 linears of some tens of tokens by warpgroups: the source of the CUDA kernels run on the CPU, against fp64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from engine.kernels.device import linears_some, use_cuda_products
from tests.kernels.cuda_on_cpu import compiled
from tests.kernels.test_few_tokens import F, L, N, P, call, generator
from tests.kernels.test_linears_fp8 import check, described, held, matrix, meant, tokens_of

EPS = 1e-6


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("linears_some", tmp_path_factory.mktemp("some"))


@pytest.fixture(params=["in step", "first ahead", "last ahead"])
def library(built: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Warps run in step, or one by one as far as they can: what they do not wait for is not there."""
    built.order(request.param != "in step", request.param == "last ahead")
    return built


def products(
    library: ctypes.CDLL, x: Tensor, matrices: list[tuple[Tensor, Tensor]], groups: int = 1, *, parts: int = 1,
    grid: int = 3, norm: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    rows, inputs, tokens = [len(weight) for weight, _ in matrices], matrices[0][0].shape[1], len(x)
    own, tiles, together = linears_some.tiles_of(tokens, sum(rows) // groups)
    blocks, items = inputs // 128 * groups, sum(rows) // 128 // together * parts * (tiles // own)
    terms = torch.full((blocks * tiles * 8192,), 0x7F, dtype=torch.uint8)
    units = torch.full((blocks * tiles * 32,), torch.nan)
    sums = torch.full((parts, tokens * sum(rows)), torch.nan)
    table = described(matrices)
    fields = [
        (P, x), (P, norm), (P, terms), (P, units), (P, sums), (P, ctypes.addressof(table)), (L, x.stride(0)),
        (N, tokens), (N, inputs), (N, groups), (N, tiles), (N, own), (N, sum(rows)), (N, parts),
        (N, together * min(grid, items)), (N, items), (F, EPS),
    ]  # fmt: skip
    assert call(library.run_terms, fields) == 0
    assert call(library.run_products, fields) == 0
    y = sums[0]
    if parts > 1:
        y = torch.full_like(y, torch.nan)
        assert call(library.run_added, [(P, sums), (P, y), (L, y.numel() // 4), (N, parts)]) == 0
    return [part.view(tokens, -1) for part in y.split([tokens * n for n in rows])]


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "groups", "parts", "grid"),
    [(9, 128, 128, 1, 1, 1),      # one stage
     (32, 256, 1408, 1, 1, 1),    # a ring that goes round, from one item to the next
     (17, 128, 640, 1, 2, 2),     # parts of two lengths
     (24, 256, 256, 2, 1, 1),     # groups with inputs of their own
     (33, 512, 1024, 1, 1, 1), (64, 256, 1152, 1, 3, 2), (40, 512, 256, 2, 1, 1), (40, 256, 256, 2, 1, 1),
     (65, 256, 1408, 1, 2, 1),    # two blocks share terms, through a ring that goes round
     (128, 512, 256, 1, 1, 1), (130, 256, 384, 1, 1, 2), (255, 256, 128, 1, 1, 1),
     (70, 512, 256, 2, 1, 1), (70, 256, 256, 2, 1, 2), (130, 128, 384, 1, 1, 2)],
)  # fmt: skip
def test_a_product_is_that_of_the_weights_as_they_are(
    library, tokens: int, outputs: int, inputs: int, groups: int, parts: int, grid: int
) -> None:
    g = generator(outputs + inputs)
    x, weight = tokens_of(tokens, groups * inputs, g), matrix(outputs, inputs, g)
    check(products(library, x, [weight], groups, parts=parts, grid=grid)[0], x, weight, groups)


@pytest.mark.parametrize("tokens", [20, 50])
def test_matrices_that_share_a_launch_give_what_each_gives_alone(built, tokens: int) -> None:
    """There are as many matrices as there may be."""
    g = generator(9)
    built.order(0, 0)
    x = torch.randn(tokens, 256, generator=g)
    matrices = [matrix(n, 256, g) for n in (128, 256, 128, 128, 128, 384, 128, 256)]
    together = products(built, x, matrices, parts=2, grid=5)
    for got, one in zip(together, matrices, strict=True):
        assert torch.equal(got, products(built, x, [one], parts=2)[0])


def test_a_tokens_product_depends_on_no_other_token(built) -> None:
    g = generator(3)
    built.order(1, 0)
    x = torch.randn(140, 640, generator=g)
    one = matrix(256, 640, g)
    together = products(built, x, [one], parts=2)[0]
    for some in (slice(3, 4), slice(30, 62), slice(70, 120), slice(10, 131)):
        assert torch.equal(products(built, x[some], [one], parts=2, grid=1)[0], together[some])


@pytest.mark.parametrize(("tokens", "inputs"), [(9, 128), (33, 640), (12, 4352)])
def test_tokens_are_normed_on_their_way_to_a_product(library, tokens: int, inputs: int) -> None:
    """In columns of a wider matrix, of very different lengths; a warp has several blocks of inputs, or one."""
    g = generator(inputs)
    lengths = torch.exp2(torch.arange(tokens).float() - 12)
    x = (torch.randn(tokens, inputs + 8, generator=g) * lengths[:, None])[:, 4 : inputs + 4]
    norm = 1 + 0.3 * torch.randn(inputs, generator=g)
    one = matrix(128, inputs, g)
    got = products(library, x, [one], norm=norm)[0]
    root = torch.rsqrt(x.double().square().mean(1, keepdim=True) + EPS)
    dense = meant(*one)
    size = (x * norm).double().abs() @ dense.abs().T * root
    assert ((got - held(x * norm) @ dense.T * root).abs() <= 1e-6 * size).all()


def test_what_is_not_finite_is_told(built) -> None:
    g = generator(4)
    built.order(0, 0)
    x = torch.randn(10, 512, generator=g)
    x[0, 7], x[1, 200], x[2, 511] = torch.inf, torch.nan, -torch.inf
    one = matrix(128, 512, g)
    for norm in (None, torch.ones(512)):
        got = products(built, x, [one], norm=norm)[0]
        assert not got[:3].isfinite().any()
        assert got[3:].isfinite().all()
    x[3] = 0
    assert (products(built, x, [one])[0][3] == 0).all()


def test_the_few_bits_that_wgmma_counts_are_enough(built) -> None:
    """13 bits behind the point in every chain of 128 products cost less than what two terms round away, 3e-7."""
    g = generator(6)
    built.order(0, 0)
    weight, scales = matrix(128, 1024, g)
    x = torch.randn(12, 1024, generator=g)
    built.keep(13)
    got = products(built, x, [(weight, scales)])[0].double()
    built.keep(0)

    def apart(expected: Tensor) -> float:
        return float(1 - 2 * (got * expected).sum() / (got.square().sum() + expected.square().sum()))

    dense = meant(weight, scales)
    print(apart(held(x) @ dense.T), apart(x.double() @ dense.T))
    assert 0 < apart(held(x) @ dense.T) < 3e-8
    assert apart(x.double() @ dense.T) < 1e-6


def test_shared_memory_is_what_the_source_lays_out(built) -> None:
    for own in (1, 2, 4):
        assert built.shared_bytes(own) == linears_some.shared_bytes(own) <= 227 << 10


def test_every_matrix_of_the_official_models_is_cut_into_blocks_enough() -> None:
    """Flash's and Pro's: all multiprocessors read, and none much more than its share."""
    for rows, inputs, parts in ((32_768, 1024, 1), (8192, 4096, 2), (4096, 8192, 4), (1536, 4096, 8), (4096, 4096, 4),
                                (65_536, 1536, 1), (16_384, 4096, 1), (7168, 3072, 2), (129_280, 4096, 1)):  # fmt: skip
        assert linears_some.parts_of(rows, inputs) == parts
    assert linears_some.parts_of(128, 128) == 1
    assert [linears_some.tiles_of(tokens, 256) for tokens in (9, 32, 33, 64, 65, 128, 129, 255)] == [
        (1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2), (4, 4, 2), (4, 4, 2), (4, 8, 2), (4, 8, 2)]  # fmt: skip
    assert linears_some.tiles_of(255, 128) == (1, 8, 1)


def test_what_is_taken() -> None:
    def takes(tokens: int, rows: int, inputs: int, groups: int = 1, dtype: torch.dtype = torch.uint8) -> bool:
        return linears_some.takes(tokens, [torch.empty(rows, inputs, dtype=dtype, device="meta")], groups)

    assert not takes(16, 128, 128)
    use_cuda_products(True)
    try:
        assert takes(16, 128, 128)
        assert takes(512, 7168, 16_384)
        assert takes(9, 8192, 4096, 8)
        assert not takes(513, 128, 128)
        assert not takes(0, 128, 128)
        assert not takes(16, 192, 128), "rows under two scales"
        assert not takes(16, 128, 192)
        assert not takes(16, 256, 128, 4), "groups that share a tile"
        assert not takes(16, 128, 128, dtype=torch.bfloat16)
    finally:
        use_cuda_products(False)
