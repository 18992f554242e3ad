"""Products of up to eight tokens, weights as the checkpoint holds them: the binding of engine/csrc/few_tokens.cu.

Where all matrices of a call are e4m3 of shapes that it takes, `linears_fp8` computes them; all others are computed
here. Which blocks and warps take a matrix depends on its shape alone, so a token's result depends on no other token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from engine.kernels.device import cuda_products, linears_fp8

TOKENS = 8
MATRICES = 8
"""Of one launch."""
_STEP = 128
_NORM_STEP = 256
_PAD_BYTES = 16
_SHARED_BYTES = 227 << 10
"""What a block may have on Hopper."""
_AHEAD = 2
"""Steps whose weights a warp has on their way at once, as in the source."""
_ROW_BYTES = {"bf16": 256, "fp8": 128}
"""Of a row in one step."""
_LEAST_WARPS, _MOST_WARPS = 4, 16
"""Of a block, where a matrix has inputs enough for them and a block memory."""
_REGISTERS = {1: 64, 2: 128}
"""Of a thread that multiplies one tile of rows, or two: the source bounds them."""
_PROCESSORS = 132
_MOST_SPAN = 8
"""Groups of rows that a block does one behind the other."""


def takes(tokens: int, weight: Tensor, groups: int = 1) -> bool:
    """Whether `products` takes this matrix [G * N, K] of bf16 or e4m3."""
    outputs, inputs = weight.shape
    return (
        0 < tokens <= TOKENS
        and cuda_products()
        and weight.dtype in (torch.bfloat16, torch.uint8)
        and inputs % _STEP == 0
        and outputs // groups % 16 == 0
        and _shared(1, _LEAST_WARPS, TOKENS, inputs, "bf16") <= _SHARED_BYTES
    )


def takes_normed(tokens: int, weight: Tensor) -> bool:
    """Whether `products` takes this matrix [N, K] with a norm."""
    return takes(tokens, weight) and weight.shape[1] % _NORM_STEP == 0


def takes_gated(tokens: int, gate: Tensor, up: Tensor) -> bool:
    """Whether `gated` takes these matrices [N, K]."""
    if gate.shape != up.shape or gate.dtype != up.dtype or not takes(tokens, gate):
        return False
    if gate.dtype == torch.uint8:
        return linears_fp8.takes_gated(gate)
    return _shared(2, _LEAST_WARPS, TOKENS, gate.shape[1], "bf16") <= _SHARED_BYTES


def products(
    x: Tensor, matrices: Sequence[tuple[Tensor, Tensor | None]], groups: int = 1, norm: Tensor | None = None,
    eps: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    """x [T, G * K] fp32 times each of up to eight (weight [G * N, K], its scales or None) -> fp32 [T, G * N] of each.

    There is one matrix where there are groups. Each of them, alone, is as `engine.kernels.device.linear.product` says.
    norm [K], of one group: x goes through an RMSNorm of these weights first.
    """
    if groups > 1 < len(matrices):
        raise ValueError(f"{len(matrices)} matrices of {groups} groups each: such are multiplied one by one")
    quantised = [(weight, scales) for weight, scales in matrices if scales is not None]
    if len(quantised) == len(matrices) and linears_fp8.takes([weight for weight, _ in matrices], groups):
        return linears_fp8.products(x, quantised, groups, norm, eps)
    from engine.kernels.device.cuda import kernel, run

    tokens, inputs = x.shape[0], matrices[0][0].shape[1]
    rows = tuple(len(weight) for weight, _ in matrices)
    warps, shared, span = plan(rows, inputs, groups, tokens, _kind(matrices))
    x = linears_fp8.aligned(x)
    y = torch.empty(tokens * sum(rows), dtype=torch.float32, device=x.device)
    table: list[object] = []
    for weight, scales in matrices:
        columns = 0 if scales is None else scales.shape[1]
        table += [weight, 0 if scales is None else scales, ctypes.c_int32(len(weight)), ctypes.c_int32(columns)]
    for _ in range(MATRICES - len(matrices)):
        table += [0, 0, ctypes.c_int32(0), ctypes.c_int32(0)]
    name, normed = (
        ("penumbra_linears", ()) if norm is None else ("penumbra_linears_normed", (norm, ctypes.c_float(eps)))
    )
    run(
        kernel("few_tokens.cu", name, _SHARED_BYTES), sum(-(-n // (16 * span)) for n in rows), 32 * warps, shared,
        *table, x, ctypes.c_int64(x.stride(0)), *normed, y,
        *map(ctypes.c_int32, (tokens, inputs, sum(rows) // groups, span)), waits=True,
    )  # fmt: skip
    return [part.view(tokens, -1) for part in y.split([tokens * n for n in rows])]


def gated(x: Tensor, gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None], limit: float) -> Tensor:
    """x [T, K] -> [T, N]: `engine.kernels.experts.swiglu` of its products with two matrices as of `products`, where
    `takes_gated` says so.
    """
    from engine.kernels.device.cuda import kernel, run

    (weight, scales), (other, other_scales), tokens = gate, up, x.shape[0]
    if scales is not None and other_scales is not None:
        return linears_fp8.gated(x, (weight, scales), (other, other_scales), limit)
    rows, inputs = weight.shape
    warps, shared, span = plan((rows,), inputs, 1, tokens, "bf16", tiles=2)
    x = linears_fp8.aligned(x)
    y = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    run(
        kernel("few_tokens.cu", "penumbra_gated", _SHARED_BYTES), -(-rows // (16 * span)), 32 * warps, shared,
        weight, other, ctypes.c_int32(rows), x, ctypes.c_int64(x.stride(0)), y,
        *map(ctypes.c_int32, (tokens, inputs)), ctypes.c_float(limit), ctypes.c_int32(span), waits=True,
    )  # fmt: skip
    return y


def _kind(matrices: Sequence[tuple[Tensor, Tensor | None]]) -> str:
    return "bf16" if any(scales is None for _, scales in matrices) else "fp8"


@lru_cache(maxsize=1024)
def plan(
    rows: tuple[int, ...], inputs: int, groups: int, tokens: int, kind: str, tiles: int = 1
) -> tuple[int, int, int]:
    """(warps of a block, its bytes of shared memory, its span) for matrices of so many rows in `groups` groups each, of
    which a block multiplies so many tiles side by side.
    """
    runs = [n // groups // 16 for n in rows for _ in range(groups)]
    turns = 1 if sum(runs) <= _PROCESSORS else 2  # of the warps' sums: a block with one group of rows adds up once
    warps = max(1, min(_MOST_WARPS, inputs // _STEP // _AHEAD))
    while warps > _LEAST_WARPS and _shared(tiles, warps, TOKENS, inputs, kind, turns) > _SHARED_BYTES:
        warps = max(_LEAST_WARPS, warps // 2)
    shared = _shared(tiles, warps, tokens, inputs, kind, turns)
    return warps, shared, _span(runs, groups > 1, _resident(_REGISTERS[tiles], warps, shared))


def _resident(registers: int, warps: int, shared: int) -> int:
    """Blocks that the GPU runs at once."""
    return _PROCESSORS * max(1, min(_SHARED_BYTES // (shared + 1024), 65536 // (registers * 32 * warps)))


def _span(runs: list[int], whole: bool, resident: int) -> int:
    """Groups of rows for each block, so that all blocks run at once where they may: a second wave of few would leave
    the GPU idle. `whole`: the span divides every run.
    """
    span = 1
    while (
        span < _MOST_SPAN
        and sum(-(-run // span) for run in runs) > resident
        and not (whole and any(run % (2 * span) for run in runs))
    ):
        span *= 2
    return span


def _shared(tiles: int, warps: int, tokens: int, inputs: int, kind: str, turns: int = 2) -> int:
    """Bytes of shared memory: each warp's ring of steps, the tokens, and the warps' sums for so many turns."""
    ring = warps * _AHEAD * (tiles * 16 * _ROW_BYTES[kind] + 128)
    return ring + tokens * (2 * inputs + _PAD_BYTES) + turns * warps * tiles * tokens * 64
