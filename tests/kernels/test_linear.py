from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.kernels.linear import Matrix, grouped_linear, linear, pack, unpack

BATCHES = [*range(1, 18), 64, 256]


def weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)


def rows(t: int, *size: int) -> torch.Tensor:
    return torch.randn(t, *size, generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(1, 7), (24, 64), (130, 100), (64, 1024)])
def test_a_product_is_the_sum_over_inputs(engine: str, n: int, k: int, dtype: torch.dtype) -> None:
    w = weight(n, k, dtype)
    matrix = Matrix.prepare(w)
    for t in (1, 2, 3, 5, 6, 7, 12, 13, 97):
        x = rows(t, k)
        exact = x.double() @ w.double().T
        torch.testing.assert_close(linear(x, matrix).double(), exact, rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(24, 256), (130, 100), (512, 256)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_every_batch(
    engine: str, with_threads: Callable[[int], None], threads: int, n: int, k: int, dtype: torch.dtype
) -> None:
    matrix, x = Matrix.prepare(weight(n, k, dtype)), rows(256, k)
    with_threads(1)
    alone = torch.cat([linear(x[i : i + 1], matrix) for i in range(0, 256, 15)])
    with_threads(threads)
    for t in BATCHES:
        assert torch.equal(linear(x[:t], matrix)[::15], alone[: (t + 14) // 15]), f"{t} rows"
    # Other neighbours, other places.
    mixed = torch.cat([rows(5, k) * 100, x[15:16], rows(3, k)])
    assert torch.equal(linear(mixed, matrix)[5], alone[1])


def test_a_broken_row_breaks_no_other(engine: str) -> None:
    matrix, x = Matrix.prepare(weight(40, 64)), rows(7, 64)
    good = linear(x, matrix)
    x[3] = torch.nan
    broken = linear(x, matrix)
    assert broken[3].isnan().all()
    keep = [0, 1, 2, 4, 5, 6]
    assert torch.equal(broken[keep], good[keep])


@pytest.mark.parametrize(("groups", "n"), [(2, 20), (4, 64), (3, 33)])
def test_each_group_meets_its_own_inputs_alone(engine: str, groups: int, n: int) -> None:
    w, x = weight(groups * n, 48), rows(9, groups, 48)
    got = grouped_linear(x, Matrix.prepare(w), groups)
    blocks = w.double().view(groups, n, 48)
    exact = torch.einsum("tgk,gnk->tgn", x.double(), blocks).flatten(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    alone = torch.cat([grouped_linear(x[i : i + 1], Matrix.prepare(w), groups) for i in range(9)])
    assert torch.equal(alone, got)


def test_rows_may_lie_apart(engine: str) -> None:
    matrix, wide = Matrix.prepare(weight(40, 64)), rows(9, 192)
    assert torch.equal(linear(wide[:, 64:128], matrix), linear(wide[:, 64:128].contiguous(), matrix))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 3), (32, 16), (3, 45, 20)])
def test_packing_loses_nothing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(unpack(pack(w), shape[-2]), w.float())


def test_no_rows_make_no_rows(engine: str) -> None:
    assert linear(torch.empty(0, 64), Matrix.prepare(weight(40, 64))).shape == (0, 40)


def test_a_matrix_refuses_what_does_not_fit_it() -> None:
    matrix = Matrix.prepare(weight(40, 64))
    with pytest.raises(ValueError, match=r"does not fit a \[40, 64\] matrix"):
        linear(torch.randn(2, 63), matrix)
    with pytest.raises(ValueError, match="3 groups"):
        grouped_linear(torch.randn(2, 3, 64), matrix, 3)
    with pytest.raises(ValueError, match="Dequantise"):
        Matrix.prepare(torch.zeros(4, 4, dtype=torch.int8))


def test_activations_of_another_dtype_are_refused(native_only: None) -> None:
    with pytest.raises(ValueError, match="float32"):
        linear(torch.randn(2, 64).bfloat16(), Matrix.prepare(weight(40, 64)))
