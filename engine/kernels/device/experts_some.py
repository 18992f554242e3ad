"""The binding of engine/csrc/experts_some.cu: the FP4 experts of more tokens, out of the panels of `experts_few`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.device.experts_few import STEP, STEP_BYTES

BLOCKS = (16, 32, 64)
"""Pairs that a part of the work may have room for."""
_THREADS, _TERM_THREADS = 544, 256
_FIXED_BYTES = 256
"""Of shared memory, before the ring."""
_SHARED_BYTES = 227 << 10
_MOST_STAGES = 4
"""Of a block's ring, for which there is place for barriers of eight."""
_FOURS = 4


def room(pairs: int, count: int) -> int:
    """For how many pairs a part of so many, of so many experts, has room. Results do not depend on it.

    A product has as many columns as the part needs, so that only memory is lost where there are fewer pairs.
    """
    return next((block for block in BLOCKS[:-1] if pairs <= block // 2 * count), BLOCKS[-1])


def stages(block: int) -> int:
    """The steps that a block's memory has room for. Results do not depend on it."""
    return min(_MOST_STAGES, (_SHARED_BYTES - shared_bytes(block, 0)) // (shared_bytes(block, 1) - _FIXED_BYTES))


def shared_bytes(block: int, stages: int) -> int:
    return _FIXED_BYTES + stages * (2 * STEP * block + _FOURS * 4 * STEP_BYTES)


def products(
    x: Tensor, panels: tuple[Tensor, Tensor], weights: Tensor, members: Tensor, owners: Tensor, limit: float, h: Tensor,
    parts: Tensor, ring: int | None = None, grid: int | None = None,
) -> None:  # fmt: skip
    """parts [P, D] fp32: weights[pair] * down(h[pair]), by way of h [P, I] fp32: swiglu(gate x, up x) of every pair.

    x [T, D] fp32; panels of gate and up, and of down; members [B * block] and owners [B] int32, as
    `experts.work_list` makes them for one of `BLOCKS`: the blocks that have an owner come first.
    ring: stages, as `stages` says unless told. grid: blocks of threads, as many as multiprocessors unless told. Bits
    depend on none of these.
    """
    from engine.kernels.device.cuda import kernel, run

    (tokens, hidden), (pairs, inner), count = x.shape, h.shape, owners.shape[0]
    block = members.shape[0] // count
    ring = stages(block) if ring is None else ring
    grid = torch.cuda.get_device_properties(x.device).multi_processor_count if grid is None else grid
    counter = torch.empty(1, dtype=torch.int32, device=x.device)
    numbers = [ctypes.c_int32(n) for n in (count, pairs, hidden, inner, block)]

    def terms_of(rows: Tensor, shares: Tensor | int, picks: int) -> tuple[Tensor, Tensor]:
        inputs = rows.shape[1]
        columns = torch.empty(count * block * 2 * inputs, dtype=torch.uint8, device=x.device)
        units = torch.empty(count * block, dtype=torch.float32, device=x.device)
        run(
            kernel("experts_some.cu", "penumbra_experts_terms"), count * block // 8, _TERM_THREADS, 32,
            rows, shares, members, owners, columns, units, counter, *map(ctypes.c_int32, (pairs, picks, inputs, block)),
            waits=True,
        )  # fmt: skip
        return columns, units

    columns, units = terms_of(x, 0, pairs // tokens)
    run(
        kernel("experts_some.cu", "penumbra_experts_gate_up", _SHARED_BYTES), grid, _THREADS, shared_bytes(block, ring),
        panels[0], columns, units, members, owners, counter, h, *numbers, ctypes.c_float(limit), ctypes.c_int32(ring),
        waits=True,
    )  # fmt: skip
    columns, units = terms_of(h, weights, 1)
    run(
        kernel("experts_some.cu", "penumbra_experts_down", _SHARED_BYTES), grid, _THREADS, shared_bytes(block, ring),
        panels[1], columns, units, members, owners, counter, parts, *numbers, ctypes.c_int32(ring), waits=True,
    )  # fmt: skip
