"""Rounding in training against the quantisers that write checkpoints and pools, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.norm_rope import hadamard
from engine.kernels.rows import Kind, RowPool, read_rows, write_rows
from engine.model.publish import quantise_fp8, quantise_mxfp4
from engine.model.weights import dequantise_fp8, dequantise_mxfp4
from training import quantise


def lively(*shape: int) -> Tensor:
    """Values over many powers of two, with zeros, ties between neighbours and whole rows of nothing."""
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-12, 12, (shape[0], 1), generator=g).float())
    x[torch.rand(shape, generator=g) < 0.1] = 0.0
    x[0] = 0.0
    x[1] = torch.tensor([0.25, -0.75, 1.25, 6.0]).repeat(shape[1] // 4)
    return x


def test_fp4_rounds_as_a_checkpoint_of_experts_does():
    stack = torch.stack([lively(64, 96), lively(64, 96).flip(0)])
    want = torch.stack([dequantise_mxfp4(*quantise_mxfp4(w)).float() for w in stack])
    assert torch.equal(quantise.fp4(stack), want)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (24, 64)])
def test_fp8_rounds_as_a_checkpoint_of_matrices_does(shape: tuple[int, int]):
    weight = lively(*shape)
    assert torch.equal(quantise.fp8(weight), dequantise_fp8(*quantise_fp8(weight)).float())


@pytest.mark.parametrize(("kind", "size"), [("latent", 512), ("index", 128)])
def test_rows_round_as_a_pool_does(kind: Kind, size: int):
    rows = lively(64, size)
    item = RowPool.item_bytes_for(64, kind, "v4", size, 64 if kind == "latent" else 0)
    pool = RowPool(torch.zeros(1, item, dtype=torch.uint8), 64, kind, "v4", size, 64 if kind == "latent" else 0)
    write_rows(pool, torch.arange(64), rows)
    ours = quantise.latent_rows(rows, 64) if kind == "latent" else quantise.index_rows(rows)
    assert torch.equal(ours, read_rows(pool, torch.arange(64)))


def test_the_hadamard_rotation_is_the_engines():
    rows = lively(40, 128)
    assert torch.allclose(quantise.hadamard(rows), hadamard(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BF16"])
def test_a_gradient_passes_through_rounding_unchanged(dtype: str):
    weight = lively(128, 64).requires_grad_()
    weights = torch.randn(128, 64)
    rounded = quantise.through(weight, dtype)
    assert not torch.equal(rounded, weight)
    (rounded * weights).sum().backward()
    assert torch.equal(weight.grad, weights)


def test_what_is_stored_in_float32_is_left_alone():
    weight = lively(4, 8)
    assert quantise.through(weight, "F32") is weight
