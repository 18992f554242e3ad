"""Products of a few tokens with quantised matrices: the source of the CUDA kernels run on the CPU, against fp64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from engine.kernels.device import few_tokens
from engine.kernels.experts import swiglu
from engine.kernels.norm_rope import rms_norm
from tests.kernels.cuda_on_cpu import compiled


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("few_tokens", tmp_path_factory.mktemp("few"))


P, N, L, F = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float


def call(function, fields: list[tuple[object, object]], *more: int) -> int:
    """Call with a struct of these (type, value) fields."""
    kinds = [(f"f{n}", kind) for n, (kind, _) in enumerate(fields)]
    struct = type("Call", (ctypes.Structure,), {"_fields_": kinds})
    values = [value.data_ptr() if isinstance(value, Tensor) else value for _, value in fields]
    return int(function(ctypes.byref(struct(*values)), *map(ctypes.c_uint, more)))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Described(ctypes.Structure):
    _fields_ = (("weights", P), ("scales", P), ("rows", N), ("columns", N))


def described(matrices: list[tuple[Tensor, Tensor | None]], count: int) -> ctypes.Array[Described]:
    return (Described * count)(*(
        Described(w.data_ptr(), None if s is None else s.data_ptr(), len(w), 0 if s is None else s.shape[1])
        for w, s in matrices
    ))  # fmt: skip


def products(
    library: ctypes.CDLL, x: Tensor, matrices: list[tuple[Tensor, Tensor | None]], groups: int, warps: int,
    span: int = 1, norm: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    inputs = matrices[0][0].shape[1]
    rows = [len(weight) for weight, _ in matrices]
    table = described(matrices, 8)
    y = torch.full((len(x) * sum(rows),), torch.nan)
    call(
        library.run_linears,
        [(P, x), (P, norm), (P, y), (P, ctypes.addressof(table)), (L, x.stride(0)), (N, len(x)), (N, inputs),
         (N, sum(rows) // groups), (N, span), (F, 1e-6)],
        32 * warps,
    )  # fmt: skip
    return [part.view(len(x), -1) for part in y.split([len(x) * n for n in rows])]


def product(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, scales: Tensor | None, groups: int, warps: int, span: int = 1
) -> Tensor:
    return products(library, x, [(weight, scales)], groups, warps, span)[0]


def test_matrices_of_both_kinds_share_a_launch(library) -> None:
    g = generator(9)
    x = torch.randn(5, 256, generator=g)
    matrices = [
        (torch.randint(0x70, (32, 256), dtype=torch.uint8, generator=g), torch.rand(1, 2, generator=g)),
        (torch.randn(16, 256, generator=g).bfloat16(), None),
        (torch.randint(0x70, (144, 256), dtype=torch.uint8, generator=g), torch.rand(2, 2, generator=g)),
        *((torch.randn(16, 256, generator=g).bfloat16(), None) for _ in range(5)),
    ]
    together = products(library, x, matrices, 1, 2, span=4)  # a block's last rows end with their matrix
    for got, (weight, scales) in zip(together, matrices, strict=True):
        assert torch.equal(got, product(library, x, weight, scales, 1, 2))


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "groups", "warps", "span"),
    [(1, 32, 128, 1, 1, 1), (1, 64, 640, 1, 4, 2), (3, 256, 384, 1, 2, 3), (8, 64, 1024, 1, 4, 1),
     (5, 256, 256, 2, 1, 4), (2, 320, 512, 1, 4, 8)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_product_is_that_of_the_weights_as_they_are(
    library, kind, tokens, outputs, inputs, groups, warps, span
) -> None:
    """Uneven shares of the inputs for the warps, groups with inputs of their own, every e4m3 code."""
    g = generator(outputs + inputs)
    rows = torch.randn(tokens, groups * inputs + 4, generator=g)
    x = rows[:, : groups * inputs]
    if kind == "bf16":
        weight, scales = torch.randn(outputs, inputs, generator=g).bfloat16(), None
        meant, rounded = weight.double(), x.bfloat16().double()
    else:
        weight = torch.randint(256, (outputs, inputs), dtype=torch.uint8, generator=g)
        weight[weight & 0x7F == 0x7F] = 0x01  # a NaN is no weight; the smallest there is, is one
        scales = torch.exp2(torch.randint(-9, 9, (-(-outputs // 128), inputs // 128), generator=g).float())
        wide = scales.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1).double()
        meant, rounded = weight.view(torch.float8_e4m3fn).double() * wide, x.half().double()
    got = product(library, x, weight, scales, groups, warps, span)
    parts = zip(rounded.split(inputs, 1), meant.split(outputs // groups), strict=True)
    expected = torch.cat([part @ rows.T for part, rows in parts], dim=1)
    size = torch.cat([a.abs() @ b.abs().T for a, b in zip(
        rounded.split(inputs, 1), meant.split(outputs // groups), strict=True)], dim=1)  # fmt: skip
    assert ((got - expected).abs() <= 1e-6 * size).all()


def test_a_tokens_product_depends_on_no_other_token(library) -> None:
    g = generator(3)
    x = torch.randn(8, 512, generator=g)
    weight = torch.randint(0x70, (64, 512), dtype=torch.uint8, generator=g)
    scales = torch.ones(1, 4)
    together = product(library, x, weight, scales, 1, 4)
    for token in range(8):
        assert torch.equal(product(library, x[token : token + 1], weight, scales, 1, 4)[0], together[token])


@pytest.mark.parametrize(
    ("tokens", "inputs", "warps"), [(1, 256, 1), (3, 768, 2), (8, 1024, 4), (5, 1536, 6), (7, 512, 3)]
)
def test_tokens_are_normed_on_their_way_to_a_product(library, tokens: int, inputs: int, warps: int) -> None:
    """In columns of a wider matrix, of very different lengths, several pieces for a thread and threads without one."""
    g = generator(inputs)
    lengths = torch.exp2(torch.arange(tokens).float() * 5 - 12)
    x = (torch.randn(tokens, inputs + 8, generator=g) * lengths[:, None])[:, 4 : inputs + 4]
    norm = 1 + 0.3 * torch.randn(inputs, generator=g)
    fp8 = torch.randint(0x70, (48, inputs), dtype=torch.uint8, generator=g), torch.rand(1, inputs // 128, generator=g)
    bf16 = torch.randn(16, inputs, generator=g).bfloat16()
    matrices = [fp8, (bf16, None)]
    found = products(library, x, matrices, 1, warps, 2, norm)
    normed = rms_norm(x, norm, 1e-6)
    # An operand may be rounded to the neighbour of what the reference's is rounded to.
    for got, plain in zip(found, products(library, normed, matrices, 1, warps, 2), strict=True):
        assert torch.allclose(got, plain, rtol=0, atol=float(2e-4 * plain.norm() / tokens**0.5))
    for token in range(tokens):
        alone = products(library, x[token : token + 1], matrices, 1, warps, 1, norm)
        for one, together in zip(alone, found, strict=True):
            assert torch.equal(one[0], together[token]), "a token's norm depends on no other token"


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "warps", "span"), [(1, 16, 128, 1, 1), (3, 160, 640, 2, 4), (8, 48, 1024, 4, 2)]
)
def test_a_gate_is_applied_to_the_sums_it_is_made_of(library, tokens, outputs, inputs, warps, span) -> None:
    g = generator(outputs)
    x = torch.randn(tokens, inputs + 4, generator=g)[:, :inputs]
    both: list[tuple[Tensor, Tensor | None]] = [
        (torch.randn(outputs, inputs, generator=g).bfloat16(), None) for _ in range(2)
    ]
    y, limit = torch.full((tokens, outputs), torch.nan), 3.0
    table = described(both, 2)
    call(
        library.run_gated,
        [(P, x), (P, y), (P, ctypes.addressof(table)), (L, x.stride(0)), (N, tokens), (N, inputs), (N, span),
         (F, limit)],
        32 * warps,
    )  # fmt: skip
    gate, up = products(library, x, both, 1, warps)
    assert (gate > limit).any()
    assert (up.abs() > limit).any()
    assert torch.allclose(y, swiglu(gate, up, limit), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.uint8, torch.bfloat16])
def test_every_matrix_of_the_official_models_is_taken_and_fits_a_block(monkeypatch, kind) -> None:
    """Flash's and Pro's, eight tokens: the longest inputs leave the fewest warps."""
    monkeypatch.setattr(few_tokens, "cuda_products", lambda: True)
    flash = [(1536, 4096), (32768, 1024), (8192, 4096), (4096, 8192), (4096, 2048), (64, 4096), (129_280, 4096)]
    pro = [(2048, 7168), (65_536, 1536), (7168, 3072), (6144, 7168), (129_280, 7168)]
    for outputs, inputs in flash + pro:
        assert few_tokens.takes(8, torch.empty(outputs, inputs, dtype=kind, device="meta"))
        for tokens in (1, 8):
            name = "bf16" if kind == torch.bfloat16 else "fp8"
            warps, shared, span = few_tokens.plan((outputs,), inputs, 1, tokens, name)
            assert 4 <= warps <= 16
            assert shared <= 227 << 10
            assert span in (1, 2, 4, 8)
    for inner, hidden in ((2048, 4096), (3072, 7168)):
        shared = torch.empty(inner, hidden, dtype=kind, device="meta")
        assert few_tokens.takes_gated(8, shared, shared)
        for tokens in (1, 8):
            warps, memory, _ = few_tokens.plan((inner,), hidden, 1, tokens, name, tiles=2)
            assert 4 <= warps <= 16
            assert memory <= 227 << 10
    for low in (1024, 1536):
        assert few_tokens.takes_normed(8, torch.empty(32_768, low, dtype=kind, device="meta"))
    assert not few_tokens.takes_normed(8, torch.empty(64, 384, dtype=kind, device="meta")), "sums are of 256 inputs"
    assert not few_tokens.takes(9, torch.empty(64, 4096, dtype=kind, device="meta"))
    assert not few_tokens.takes(8, torch.empty(64, 1 << 14, dtype=kind, device="meta")), (
        "tokens alone would fill a block"
    )
