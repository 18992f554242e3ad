"""Row kernels: norm, rotation and the Hadamard turn of one row at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device.codec import hadamard_row, rotated
from engine.kernels.device.early import await_previous, early

_MAX_ROW = 1 << 15
"""Values a program holds in registers; hidden sizes end far below."""


@triton.jit
def _norm_rotate(
    x, y, weight, positions, freqs, x_row, rows_per_token, size, eps, sign,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    await_previous()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < size
    values = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        values = values * tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
        if WEIGHT:
            values = tl.load(weight + at, mask=inside, other=0.0) * values
    if PAIRS > 0:
        values = rotated(values, tl.load(positions + row // rows_per_token), freqs, SIZE, PAIRS, sign)
    tl.store(y + row * size + at, values, mask=inside)


@triton.jit
def _hadamard(x, y, scale, SIZE: tl.constexpr, STEPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    tl.store(y + row * SIZE + at, hadamard_row(tl.load(x + row * SIZE + at), SIZE, STEPS) * scale)


def norm_rotate(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    positions: Tensor | None,
    freqs: Tensor | None,
    inverse: bool,
) -> Tensor:
    """As `engine.kernels.norm_rope._norm_rotate`, shapes checked there."""
    size = x.shape[-1]
    pairs = 0 if freqs is None or positions is None else freqs.shape[0]
    block = triton.next_power_of_2(size)
    if block > _MAX_ROW or (pairs and (block != size or pairs & (pairs - 1))):
        raise ValueError(
            f"rows of {size} values with {2 * pairs} rotated channels: the GPU kernel rotates powers of two, and holds "
            f"rows of up to {_MAX_ROW} values."
        )
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows = x.numel() // max(size, 1)
    if rows:
        _norm_rotate[(rows,)](
            x, y, weight, positions, freqs, x.stride(-2) if x.dim() > 1 else size,
            max(rows // x.shape[0], 1) if x.dim() > 1 else 1, size, eps or 0.0, -1.0 if inverse else 1.0,
            SIZE=block, PAIRS=pairs, NORM=eps is not None, WEIGHT=weight is not None,
            num_warps=4 if block <= 2048 else 8, **early(),
        )  # fmt: skip
    return y


def hadamard(x: Tensor) -> Tensor:
    """As `engine.kernels.norm_rope.hadamard`."""
    size = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _hadamard[(x.numel() // size,)](x, y, size**-0.5, SIZE=size, STEPS=size.bit_length() - 1, num_warps=1)
    return y
