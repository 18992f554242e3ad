"""FP8 linears of a few tokens by warpgroups: the source of the CUDA kernels run on the CPU, against fp64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from engine.kernels.device import linears_fp8
from engine.kernels.experts import swiglu
from tests.kernels.cuda_on_cpu import compiled
from tests.kernels.test_few_tokens import F, L, N, P, call, generator

EPS = 1e-6


class Described(ctypes.Structure):
    _fields_ = (("weights", P), ("scales", P), ("rows", N))


def described(matrices: list[tuple[Tensor, Tensor]]) -> ctypes.Array[Described]:
    return (Described * 8)(*(Described(w.data_ptr(), s.data_ptr(), len(w)) for w, s in matrices))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("linears_fp8", tmp_path_factory.mktemp("fp8"))


@pytest.fixture(params=["in step", "first ahead", "last ahead"])
def library(built: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Warps run in step, or one by one as far as they can: what they do not wait for is not there."""
    built.order(request.param != "in step", request.param == "last ahead")
    return built


def matrix(outputs: int, inputs: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every e4m3 code that is a number, scales of a wide range."""
    weight = torch.randint(256, (outputs, inputs), dtype=torch.uint8, generator=g)
    weight[weight & 0x7F == 0x7F] = 0x01
    scales = torch.exp2(torch.randint(-9, 9, (-(-outputs // 128), inputs // 128), generator=g).float())
    return weight, scales * (1 + torch.rand(scales.shape, generator=g))


def meant(weight: Tensor, scales: Tensor) -> Tensor:
    wide = scales.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)
    return weight.view(torch.float8_e4m3fn).double() * wide.double()


def held(x: Tensor) -> Tensor:
    """x [T, K] as the kernels hold it: two e4m3 terms of a unit of 128 inputs of a token."""
    blocks = x.unflatten(1, (-1, 128))
    most = blocks.abs().amax(dim=2, keepdim=True)
    unit = torch.exp2(most.clamp(min=2.0**-119).log2().floor() - 7)
    first = (blocks / unit).to(torch.float8_e4m3fn).float()
    second = ((blocks / unit - first) * 16).to(torch.float8_e4m3fn).float()
    return ((first.double() + second.double() / 16) * unit.double()).flatten(1)


def products(
    library: ctypes.CDLL, x: Tensor, matrices: list[tuple[Tensor, Tensor]], groups: int = 1, *, width: int = 32,
    share: int = 1, norm: Tensor | None = None, stages: int = 4,
) -> list[Tensor]:  # fmt: skip
    rows = [len(weight) for weight, _ in matrices]
    table = described(matrices)
    y = torch.full((len(x) * sum(rows),), torch.nan)
    faults = call(
        library.run_linears,
        [(P, x), (P, norm), (P, y), (P, ctypes.addressof(table)), (L, x.stride(0)), (N, len(x)),
         (N, matrices[0][0].shape[1]), (N, sum(rows) // groups), (N, sum(rows) // width), (N, share), (N, stages),
         (N, width), (F, EPS)],
    )  # fmt: skip
    assert faults == 0
    return [part.view(len(x), -1) for part in y.split([len(x) * n for n in rows])]


def gated(
    library: ctypes.CDLL, x: Tensor, both: list[tuple[Tensor, Tensor]], limit: float, *, width: int, share: int
) -> Tensor:
    rows, inputs = both[0][0].shape
    table = described(both)
    y = torch.full((len(x), rows), torch.nan)
    faults = call(
        library.run_gated,
        [(P, x), (P, y), (P, ctypes.addressof(table)), (L, x.stride(0)), (N, len(x)), (N, inputs),
         (N, rows * 2 // width), (N, share), (N, 4), (N, width), (F, limit)],
    )  # fmt: skip
    assert faults == 0
    return y


def grouped(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    parts = zip(x.split(weight.shape[1], 1), weight.split(len(weight) // groups), strict=True)
    return torch.cat([part @ rows.T for part, rows in parts], dim=1)


def tokens_of(count: int, inputs: int, g: torch.Generator) -> Tensor:
    """[T, K], rows that lie apart, one value beside which others are small."""
    x = torch.randn(count, inputs + 4, generator=g)[:, :inputs]
    x[0, 5] = 3000.0
    return x


def check(got: Tensor, x: Tensor, matrix: tuple[Tensor, Tensor], groups: int) -> None:
    """A product with the weights as they are, of tokens as they are held, which is near that of the tokens."""
    weight, scales = matrix
    dense = meant(weight, scales)
    rounded = torch.cat([held(part) for part in x.split(weight.shape[1], 1)], dim=1)
    size = grouped(x.double().abs(), dense.abs(), groups)
    assert ((got - grouped(rounded, dense, groups)).abs() <= 1e-6 * size).all()
    assert ((got - grouped(x.double(), dense, groups)).abs() <= 2.0**-9 * size).all()


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "groups", "width", "share"),
    [(1, 32, 128, 1, 32, 1),      # one warpgroup has inputs, the others none
     (3, 160, 640, 1, 32, 2),     # some have a step more than others; a block with less than its share
     (8, 192, 1024, 1, 32, 6),    # a ring that goes round through many tiles
     (5, 96, 3200, 1, 32, 2),     # tokens staged in several goes, the last one of few inputs
     (2, 224, 256, 1, 32, 7),     # tiles of a warpgroup each, and others of which some have no part
     (8, 256, 256, 2, 32, 8),     # groups with inputs of their own, both of one block
     (4, 96, 768, 2, 16, 3),      # one group ends within a block's share
     (2, 144, 256, 1, 16, 4), (6, 48, 2304, 1, 16, 3)],
)  # fmt: skip
def test_a_product_is_that_of_the_weights_as_they_are(
    library, tokens: int, outputs: int, inputs: int, groups: int, width: int, share: int
) -> None:
    g = generator(outputs + inputs)
    x, weight = tokens_of(tokens, groups * inputs, g), matrix(outputs, inputs, g)
    check(products(library, x, [weight], groups, width=width, share=share)[0], x, weight, groups)


@pytest.mark.parametrize("width", [16, 32])
def test_matrices_that_share_a_launch_give_what_each_gives_alone(library, width: int) -> None:
    """Tiles of one matrix follow those of another in a block; there are as many matrices as there may be."""
    g = generator(9)
    x = torch.randn(5, 512, generator=g)
    matrices = [matrix(n, 512, g) for n in (32, 160, 64, 32, 32, 96, 32, 64)]
    together = products(library, x, matrices, width=width, share=5)
    for got, one in zip(together, matrices, strict=True):
        alone = products(library, x, [one], width=width)[0]
        assert ((got - alone).abs() <= 1e-6 * (x.double().abs() @ meant(*one).abs().T)).all()


@pytest.mark.parametrize(("width", "inputs"), [(16, 768), (32, 896)])
def test_a_tokens_product_depends_on_no_other_token(library, width: int, inputs: int) -> None:
    g = generator(3)
    x = torch.randn(8, inputs, generator=g)
    one = matrix(160, inputs, g)
    for share in (2, 5):
        together = products(library, x, [one], width=width, share=share)[0]
        for token in (0, 3, 4, 7):
            alone = products(library, x[token : token + 1], [one], width=width, share=share)[0]
            assert torch.equal(alone[0], together[token])
        assert torch.equal(products(library, x[2:7], [one], width=width, share=share)[0], together[2:7])


@pytest.mark.parametrize("width", [16, 32])
def test_a_ring_may_be_of_any_length(library, width: int) -> None:
    g = generator(width)
    x, one = torch.randn(3, 2560, generator=g), matrix(160, 2560, g)
    wanted = products(library, x, [one], width=width, share=5)[0]
    for stages in (2, 5, 8):
        assert torch.equal(products(library, x, [one], width=width, share=5, stages=stages)[0], wanted)


@pytest.mark.parametrize(
    ("tokens", "inputs", "width", "share"),
    [(1, 256, 16, 1), (3, 768, 16, 4), (8, 1024, 32, 3), (5, 1536, 32, 5), (7, 640, 32, 2)],
)
def test_tokens_are_normed_on_their_way_to_a_product(library, tokens: int, inputs: int, width: int, share: int) -> None:
    """In columns of a wider matrix, of very different lengths."""
    g = generator(inputs)
    lengths = torch.exp2(torch.arange(tokens).float() * 5 - 12)
    x = (torch.randn(tokens, inputs + 8, generator=g) * lengths[:, None])[:, 4 : inputs + 4]
    norm = 1 + 0.3 * torch.randn(inputs, generator=g)
    matrices = [matrix(96, inputs, g), matrix(32, inputs, g)]
    found = products(library, x, matrices, width=width, share=share, norm=norm)
    root = torch.rsqrt(x.double().square().mean(1, keepdim=True) + EPS)
    for got, one in zip(found, matrices, strict=True):
        dense = meant(*one)
        size = (x * norm).double().abs() @ dense.abs().T * root
        assert ((got - held(x * norm) @ dense.T * root).abs() <= 1e-6 * size).all()
    for token in {0, tokens - 1}:
        alone = products(library, x[token : token + 1], matrices, width=width, share=share, norm=norm)
        for one, together in zip(alone, found, strict=True):
            assert torch.equal(one[0], together[token]), "a token's norm depends on no other token"


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "width", "share"),
    [(1, 16, 128, 32, 1), (3, 160, 640, 32, 4), (8, 48, 1024, 16, 3), (4, 136, 256, 16, 2)],
)
def test_a_gate_is_applied_to_the_sums_it_is_made_of(
    library, tokens: int, outputs: int, inputs: int, width: int, share: int
) -> None:
    g = generator(outputs)
    x = torch.randn(tokens, inputs + 4, generator=g)[:, :inputs]
    both = [(weight & 0xBF, 0.5 + torch.rand(scales.shape, generator=g)) for weight, scales in (
        matrix(outputs, inputs, g) for _ in range(2))]  # fmt: skip
    limit = 3.0
    gate, up = (held(x) @ meant(*one).T for one in both)
    assert (gate > limit).any()
    assert (up.abs() > limit).any()
    got = gated(library, x, both, limit, width=width, share=share)
    assert torch.allclose(got.double(), swiglu(gate, up, limit), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_is_told(library) -> None:
    g = generator(4)
    x = torch.randn(4, 512, generator=g)
    x[0, 7], x[1, 200], x[2, 511] = torch.inf, torch.nan, -torch.inf
    one = matrix(32, 512, g)
    for norm in (None, torch.ones(512)):
        got = products(library, x, [one], norm=norm)[0]
        assert not got[:3].isfinite().any()
        assert got[3].isfinite().all()
    x[3] = 0
    assert (products(library, x, [one])[0][3] == 0).all()


def test_the_few_bits_that_wgmma_counts_are_enough(built) -> None:
    """13 bits behind the point in every sum of 32 products cost less than what two terms round away, 3e-7."""
    g = generator(6)
    built.order(0, 0)
    weight, scales = matrix(64, 1024, g)
    x = torch.randn(4, 1024, generator=g)
    built.keep(13)
    got = products(built, x, [(weight, scales)], share=2)[0].double()
    built.keep(0)

    def apart(expected: Tensor) -> float:
        return float(1 - 2 * (got * expected).sum() / (got.square().sum() + expected.square().sum()))

    dense = meant(weight, scales)
    assert 0 < apart(held(x) @ dense.T) < 1e-8
    assert apart(x.double() @ dense.T) < 1e-6


def test_shared_memory_is_what_the_source_lays_out(built) -> None:
    for inputs, tokens, most in [(1024, 4, 4), (4096, 4, 4), (4096, 8, 8), (8192, 1, 8), (8192, 8, 5)]:
        stages = linears_fp8.stages(inputs, tokens)
        assert stages == most
        assert (
            built.shared_bytes(inputs, tokens, stages) == linears_fp8.shared_bytes(inputs, tokens, stages) <= 227 << 10
        )


def test_every_matrix_of_the_official_models_is_cut_evenly() -> None:
    """Flash's and Pro's: the block that reads most reads little more than its share."""
    flash = [((32_768, 8192), 1024, 1), ((32_768,), 1024, 1), ((8192,), 4096, 8),
             ((4096,), 2048, 1), ((129_280,), 4096, 1)]  # fmt: skip
    pro = [((65_536, 8192), 1536, 1), ((16_384,), 4096, 16), ((7168,), 3072, 1), ((129_280,), 7168, 1)]
    for rows, inputs, groups in flash + pro:
        assert linears_fp8.takes([torch.empty(n, inputs, dtype=torch.uint8, device="meta") for n in rows], groups)
        width, tiles, share = linears_fp8.plan(rows, inputs, groups)
        assert tiles * width == sum(rows)
        assert share * width * 132 <= 1.2 * sum(rows)
    for inner, hidden, most in ((2048, 4096, 1.04), (3072, 7168, 1.04)):
        width, tiles, share = linears_fp8.plan((inner,), hidden, kinds=2)
        assert tiles * width == 2 * inner
        assert share * width * 132 <= most * 2 * inner
    few = [torch.empty(n, 4096, dtype=torch.uint8, device="meta") for n in (1536, 512)]
    assert linears_fp8.takes(few)
    assert linears_fp8.plan((2048,), 4096) == (16, 128, 1)
    assert not linears_fp8.takes([few[0].to(torch.bfloat16), few[1]]), "of which each has to be e4m3"
    assert linears_fp8.takes([torch.empty(48, 256, dtype=torch.uint8, device="meta")])
    assert not linears_fp8.takes([torch.empty(48, 384, dtype=torch.uint8, device="meta")])
    assert not linears_fp8.takes([torch.empty(4096, 8192, dtype=torch.uint8, device="meta")]), (
        "halves are sooner made of so many inputs for one tile a block"
    )
    assert not linears_fp8.takes([torch.empty(64, 16_384, dtype=torch.uint8, device="meta")]), (
        "eight tokens fit no block"
    )
