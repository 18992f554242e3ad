"""The binding of engine/csrc/experts_few.cu: the FP4 experts of a few tokens, whose weights lie in panels.

A panel is 64 rows in steps of 256 inputs, as the source says; `gate_up_panels` and `down_panels` make them of what a
checkpoint holds, byte for byte as large. `experts_some` reads panels too, for more tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

STEP = 256
STEP_BYTES = 2176
"""Of 16 rows: 4-bit codes, and a scale for 32 of them."""
_CORE_BYTES = 144
_WARPS, _THREADS = 16, 512
_FIXED_BYTES = 19_840
"""Of shared memory, whatever the shape: scales, sums, barriers and shares of the work."""
_SHARED_BYTES = 227 << 10
_MOST_STAGES = 2
"""Of a warp's ring, for which there is place for barriers of eight. At 1, 4 and 8 tokens on an H200 two were faster
than three, four or five, when each product was a kernel of its own."""
_LISTED = 4096
"""Pairs that a block keeps a list of, at most."""
_MOST_PAIRS, _FEW_TOKENS = 4, 8
"""Of an expert, on average, that `products` reads weights for as fast as `experts_some`; tokens it always takes."""


def arranges(hidden: int, inner: int) -> bool:
    """Whether experts of this size can lie in panels."""
    return hidden % STEP == 0 and inner % STEP == 0 and stages(max(hidden, inner), _LISTED) >= 2


def takes(tokens: int, pairs: int, count: int) -> bool:
    """Whether `products` is to take so many pairs of so many experts, rather than `experts_some`."""
    return tokens <= _FEW_TOKENS or pairs <= min(_MOST_PAIRS * count, _LISTED)


def stages(inputs: int, pairs: int) -> int:
    """The steps of a warp that a block's memory has room for. Results do not depend on it."""
    return min(_MOST_STAGES, (_SHARED_BYTES - shared_bytes(inputs, 0, pairs)) // (_WARPS * STEP_BYTES))


def shared_bytes(inputs: int, stages: int, pairs: int) -> int:
    return _FIXED_BYTES + _WARPS * stages * STEP_BYTES + inputs // 16 * _CORE_BYTES + inputs // STEP * 16 + 16 * pairs


def gate_up_panels(gate: Tensor, up: Tensor, scales: tuple[Tensor, Tensor]) -> Tensor:
    """gate, up [E, I, D / 2] uint8 and their scales [E, I, D / 32] -> [E, I / 32, D / 256, 4, 2176] uint8.

    A warp's upper eight rows are gate's, its lower eight the same ones of up.
    """

    def rows(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([t.unflatten(1, (-1, 4, 8)) for t in (first, second)], dim=3)

    return _panels(lambda e: (rows(gate[e], up[e]), rows(scales[0][e], scales[1][e])), gate, gate.shape[1] // 32)


def down_panels(weight: Tensor, scales: Tensor) -> Tensor:
    """[E, D, I / 2] uint8 and its scales [E, D, I / 32] -> [E, D / 64, I / 256, 4, 2176] uint8."""
    return _panels(
        lambda e: (weight[e].unflatten(1, (-1, 4, 2, 8)), scales[e].unflatten(1, (-1, 4, 2, 8))),
        weight, weight.shape[1] // 64,
    )  # fmt: skip


def _panels(rows: Callable[[slice], tuple[Tensor, Tensor]], codes: Tensor, panels: int) -> Tensor:
    """rows(experts) -> codes [E, P, 4, 2, 8, K / 2] and scales [E, P, 4, 2, 8, K / 32]: warp, upper or lower, row."""
    count, steps = codes.shape[0], codes.shape[2] * 2 // STEP
    made = torch.empty(count, panels, steps, 4, STEP_BYTES, dtype=torch.uint8, device=codes.device)
    few = max(1, (32 << 20) // codes[0].numel())  # experts at once: what lies between is some times as large
    for first in range(0, count, few):
        some = slice(first, first + few)
        part, scale = rows(some)
        # [E, P, warp, half, row, step, pair of groups, group, quad] -> [E, P, step, warp, pair, row, quad, group, half]
        words = _words(part).unflatten(-2, (steps, 4, 2)).permute(0, 1, 5, 2, 6, 4, 8, 7, 3)
        made[some, ..., :2048] = words.contiguous().view(torch.uint8).view(*made[some].shape[:-1], 2048)
        # [E, P, warp, half, row, step, half of step, 4 groups] -> [E, P, step, warp, half of step, half, row, groups]
        made[some, ..., 2048:] = scale.unflatten(-1, (steps, 2, 4)).permute(0, 1, 5, 2, 6, 3, 4, 7).flatten(4)
    return made


def _words(codes: Tensor) -> Tensor:
    """Codes [..., K / 2] -> words [..., K / 32, 4] int32 of eight weights: inputs 4 q + 0..3 and 16 + 4 q + 0..3."""
    quads = codes.unflatten(-1, (-1, 2, 4, 2)).int()
    quads = quads[..., 0] | quads[..., 1] << 8
    first, second = quads.unbind(-2)
    words = torch.zeros_like(first)
    chained = torch.zeros_like(first)  # bit 1 of the byte above
    for byte in (3, 2, 1, 0):
        n, m = first >> 4 * byte & 15, second >> 4 * byte & 15
        fifth = (m >> 3) ^ chained
        chained = (m >> 1 & 1) ^ fifth
        made = (n & 8) << 4 | (n & 7) << 2 | fifth << 5 | chained << 1
        made |= ((m >> 2) ^ n) << 6 & 64 | (m ^ n >> 2) & 1
        words |= made << 8 * byte
    return words


def products(
    x: Tensor, panels: tuple[Tensor, Tensor], weights: Tensor, members: Tensor, owners: Tensor, limit: float, h: Tensor,
    parts: Tensor, ring: int | None = None, grid: int | None = None,
) -> None:  # fmt: skip
    """parts [P, D] fp32: weights[pair] * down(h[pair]), by way of h [P, I] fp32: swiglu(gate x, up x) of every pair.

    x [T, D] fp32; panels of gate and up, and of down; members [B * 8] and owners [B] int32: pairs
    (token * k + pick) by expert, `pairs` and -1 where there is none.
    ring: steps of a warp on their way at once, as `stages` says unless told. grid: blocks, as many as multiprocessors
    unless told. They wait for each other: so there must not be more, and a process has these kernels on one stream.
    Bits depend on neither.
    """
    from engine.kernels.device.cuda import kernel, run

    (tokens, hidden), (pairs, inner), blocks = x.shape, h.shape, owners.shape[0]
    ring = stages(max(hidden, inner), pairs) if ring is None else ring
    grid = torch.cuda.get_device_properties(x.device).multi_processor_count if grid is None else grid
    run(
        kernel("experts_few.cu", "penumbra_experts_few", _SHARED_BYTES), grid, _THREADS,
        shared_bytes(max(hidden, inner), ring, pairs), x, *panels, weights, members, owners, h, parts,
        *map(ctypes.c_int32, (blocks, tokens, pairs // tokens, hidden, inner)), ctypes.c_float(limit),
        ctypes.c_int32(ring), waits=True,
    )  # fmt: skip
