"""The binding of engine/csrc/few_tokens.cu: products of up to eight tokens, weights as the checkpoint holds them.

Which blocks and warps take a matrix depends on its shape alone, so a token's result depends on no other token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from engine.kernels.device import cuda_products

TOKENS = 8
MATRICES = 8
"""Of one launch."""
_STEP = 128
_PAD_BYTES = 16
_SHARED_BYTES = 227 << 10
"""What a block may have on Hopper."""
_AHEAD = {"bf16": 2, "fp8": 2, "fp4": 4}
"""Steps whose weights a warp has on their way at once, `AHEAD` of the source."""
_ROW_BYTES = {"bf16": 256, "fp8": 128, "fp4": 64}
"""Of a row in one step."""
_LEAST_WARPS, _MOST_WARPS = 4, 16
"""Of a block, where a matrix has inputs enough for them; fewer where its rows or its tokens need the room."""
_EXPERT_WARPS = 8
_FULL = 132 * 32
"""Warps that keep a Hopper GPU busy twice over: more than that only wait for each other."""


def takes(tokens: int, weight: Tensor, groups: int = 1) -> bool:
    """Whether `products` takes this matrix [G * N, K] of bf16 or e4m3."""
    outputs, inputs = weight.shape
    return (
        0 < tokens <= TOKENS
        and cuda_products()
        and weight.dtype in (torch.bfloat16, torch.uint8)
        and inputs % _STEP == 0
        and outputs // groups % 16 == 0
        and _shared(2, _LEAST_WARPS, TOKENS, inputs, "bf16") <= _SHARED_BYTES
    )


def takes_experts(gate: Tensor, down: Tensor, pairs: int) -> bool:
    """Whether `gate_up` and `down` take FP4 experts of codes [E, I, D / 2] and [E, D, I / 2], and are worth it for so
    many pairs: an expert is read once for eight of its pairs.
    """
    count, inner, hidden = gate.shape[0], gate.shape[1], down.shape[1]
    return (
        cuda_products()
        and inner % _STEP == 0
        and hidden % _STEP == 0
        and pairs <= TOKENS // 2 * count
        and _shared(2, _EXPERT_WARPS, TOKENS, max(hidden, inner), "fp4") <= _SHARED_BYTES
    )


def products(x: Tensor, matrices: Sequence[tuple[Tensor, Tensor | None]], groups: int = 1) -> list[Tensor]:
    """x [T, G * K] fp32 times each of up to eight (weight [G * N, K], its scales or None) -> fp32 [T, G * N] of each.

    Each of them, alone, is as `engine.kernels.device.linear.product` says.
    """
    from engine.kernels.device.cuda import kernel, run

    tokens, inputs = x.shape[0], matrices[0][0].shape[1]
    rows = [len(weight) for weight, _ in matrices]
    whole = all(count // groups % 32 == 0 for count in rows)
    tiles, warps = plan(sum(rows), inputs, whole, any(scales is None for _, scales in matrices))
    y = torch.empty(tokens * sum(rows), dtype=torch.float32, device=x.device)
    table: list[object] = []
    for weight, scales in matrices:
        columns = 0 if scales is None else scales.shape[1]
        at = ctypes.c_void_p(0) if scales is None else scales
        table += [weight, at, ctypes.c_int32(len(weight)), ctypes.c_int32(columns)]
    for _ in range(MATRICES - len(matrices)):
        table += [ctypes.c_void_p(0), ctypes.c_void_p(0), ctypes.c_int32(0), ctypes.c_int32(0)]
    run(
        kernel("few_tokens.cu", f"penumbra_linears_{tiles}", _SHARED_BYTES), sum(rows) // (16 * tiles), 32 * warps,
        max(_shared(tiles, warps, tokens, inputs, "fp8" if scales is not None else "bf16") for _, scales in matrices),
        *table, x, ctypes.c_int64(x.stride(0)), y, *map(ctypes.c_int32, (tokens, inputs, sum(rows) // groups)),
    )  # fmt: skip
    return [part.view(tokens, -1) for part in y.split([tokens * count for count in rows])]


@lru_cache(maxsize=1024)
def plan(outputs: int, inputs: int, whole: bool, bf16: bool) -> tuple[int, int]:
    """(tiles of 16 rows a block, warps that share its inputs) for so many rows; `whole`: they come by 32."""
    tiles = 2 if outputs >= 4096 and whole else 1
    kind = "bf16" if bf16 else "fp8"
    warps = max(1, min(_MOST_WARPS, inputs // _STEP // _AHEAD[kind]))
    while warps > _LEAST_WARPS and (
        outputs // (16 * tiles) * warps > _FULL or _shared(tiles, warps, TOKENS, inputs, kind) > _SHARED_BYTES
    ):
        warps = max(_LEAST_WARPS, warps // 2)
    return tiles, warps


def _expert_warps(inputs: int) -> int:
    return max(1, min(_EXPERT_WARPS, inputs // _STEP // _AHEAD["fp4"]))


def _shared(tiles: int, warps: int, tokens: int, inputs: int, kind: str) -> int:
    """Bytes of shared memory: each warp's ring of steps, then the tokens."""
    ring = warps * _AHEAD[kind] * (tiles * 16 * _ROW_BYTES[kind] + 128)
    return ring + tokens * (2 * inputs + _PAD_BYTES)


def gate_up(
    x: Tensor, gate: Tensor, up: Tensor, scales: tuple[Tensor, Tensor], most: int, members: Tensor, owners: Tensor,
    pairs: int, limit: float, h: Tensor,
) -> None:  # fmt: skip
    """h [P, I] fp32: swiglu(gate x, up x) of every pair.

    x [T, D] fp32; gate, up [E, I, D / 2] uint8 with UE8M0 scales [E, I, D / 32], of which `most` is the largest;
    members [B * 8] and owners [B] int32: pairs (token * k + pick) by expert, `pairs` and -1 where there is none.
    """
    from engine.kernels.device.cuda import kernel, run

    tokens, hidden = x.shape
    inner, blocks = gate.shape[1], owners.shape[0]
    warps = _expert_warps(hidden)
    run(
        kernel("few_tokens.cu", "penumbra_gate_up", _SHARED_BYTES), blocks * (inner // 16), 32 * warps,
        _shared(2, warps, min(tokens, TOKENS), hidden, "fp4"),
        x, gate, scales[0], up, scales[1], ctypes.c_int32(most), members, owners, h,
        *map(ctypes.c_int32, (pairs, pairs // tokens, hidden, inner)), ctypes.c_float(limit),
    )  # fmt: skip


def down(
    h: Tensor, weight: Tensor, scales: Tensor, most: int, weights: Tensor, members: Tensor, owners: Tensor, pairs: int,
    tokens: int, parts: Tensor,
) -> None:  # fmt: skip
    """parts [P, D] fp32: weights[pair] * down(h[pair]); weight [E, D, I / 2] as in `gate_up`."""
    from engine.kernels.device.cuda import kernel, run

    inner, hidden, blocks = h.shape[1], weight.shape[1], owners.shape[0]
    warps = _expert_warps(inner)
    run(
        kernel("few_tokens.cu", "penumbra_down", _SHARED_BYTES), blocks * (hidden // 32), 32 * warps,
        _shared(2, warps, min(tokens, TOKENS), inner, "fp4"),
        h, weight, scales, ctypes.c_int32(most), weights, members, owners, parts,
        *map(ctypes.c_int32, (pairs, hidden, inner)),
    )  # fmt: skip
