"""Rounding as the served model rounds, and through it the gradient as if nothing were rounded.

The arithmetic is that of the project's quantisers followed by the loader or the row pools, in few tensor operations
and on any device; tests/training/test_quantise.py compares them bit for bit.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.rows import AMAX_FLOOR, E4M3_MAX, GROUP
from engine.model.survey import FP4_BLOCK, FP8_BLOCK

_FP4_FLOOR = 6 * 2.0**-126
_FP4_MAX = 6.0


def through(weight: Tensor, dtype: str) -> Tensor:
    """A parameter as a checkpoint that stores it as `dtype` (safetensors' word) gives it back; gradients pass.

    I8 is MXFP4 and takes any number of leading axes; F8_E4M3 a matrix; F32 is left alone.
    """
    if dtype == "I8":
        return straight(weight, fp4(weight.detach()))
    if dtype == "F8_E4M3":
        return straight(weight, fp8(weight.detach()))
    if dtype == "BF16":
        return straight(weight, weight.detach().to(torch.bfloat16).float())
    return weight


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    result: Tensor = _Straight.apply(value, rounded)
    return result


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fp4(weight: Tensor) -> Tensor:
    """[..., I] through E2M1 with a power of two for each 32 inputs."""
    groups = weight.unflatten(-1, (-1, FP4_BLOCK))
    scale = _power_of_two(groups.abs().amax(-1, keepdim=True).clamp(min=_FP4_FLOOR), _FP4_MAX)
    return (_e2m1(groups / scale) * scale).flatten(-2)


def fp8(weight: Tensor) -> Tensor:
    """[O, I] through E4M3 with a power of two for each 128 x 128 block, or for all along an uneven axis."""
    rows, columns = weight.shape
    blocks = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = blocks.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    largest = blocks.abs().amax((1, 3), keepdim=True).clamp(min=AMAX_FLOOR)
    for axis, size in ((0, rows), (2, columns)):
        if size % FP8_BLOCK:
            largest = largest.amax(axis, keepdim=True)
    scale = _power_of_two(largest, E4M3_MAX)
    return (_e4m3(blocks / scale) * scale).flatten(2).flatten(0, 1)[:rows, :columns]


def latent_rows(rows: Tensor, rope_dim: int) -> Tensor:
    """[..., K] as a latent pool gives them back: E4M3 in groups of 64, the trailing rope channels in bfloat16."""
    values = rows.detach()
    nope, rope = values[..., :-rope_dim], values[..., -rope_dim:]
    rounded = torch.cat([_rows(nope, GROUP), rope.to(torch.bfloat16).float()], dim=-1)
    return straight(rows, rounded)


def index_rows(rows: Tensor) -> Tensor:
    """[..., J] as a pool of index keys gives them back: E4M3 with one power of two a row."""
    return straight(rows, _rows(rows.detach(), rows.shape[-1]))


def hadamard(x: Tensor) -> Tensor:
    """[..., J] times the Sylvester matrix over sqrt(J), J a power of two: the engine's rotation, differentiable."""
    size, half = x.shape[-1], 1
    rows = x
    while half < size:
        a, b = rows.unflatten(-1, (-1, 2, half)).unbind(-2)
        rows = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return rows * size**-0.5


def _rows(values: Tensor, group: int) -> Tensor:
    groups = values.unflatten(-1, (-1, group))
    scale = _power_of_two(groups.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR), E4M3_MAX)
    return (_e4m3(groups / scale) * scale).flatten(-2)


def _power_of_two(largest: Tensor, limit: float) -> Tensor:
    """The smallest power of two that brings `largest` within `limit`."""
    mantissa, exponent = torch.frexp(largest / limit)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _e2m1(x: Tensor) -> Tensor:
    """To the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6; of two as near, the smaller."""
    bounds, values = _e2m1_grid(x.device)
    return torch.copysign(values[torch.bucketize(x.abs(), bounds)], x)


@functools.cache
def _e2m1_grid(device: torch.device) -> tuple[Tensor, Tensor]:
    """Bounds between, and magnitudes of, the eight codes; sent to a device once, as a captured pass can not send."""
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)
    return bounds, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device)
