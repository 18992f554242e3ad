"""The binding of engine/csrc/linears_fp8.cu: products of up to eight tokens with e4m3 matrices, at the speed of memory.

Tokens are two e4m3 terms, which is as good as bf16. Which blocks and warps take a matrix depends on its shape alone, so
a token's result depends on no other token. `few_tokens` asks here first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

TOKENS = 8
MATRICES = 8
"""Of one launch."""
BLOCK = 128
"""Inputs, and rows, that share a scale."""
_THREADS = 512
_STAGE_BYTES = 4096
"""Of weights, in a warpgroup's step."""
_FEWEST, _MOST = 4, 8
"""Steps of a warpgroup's ring."""
_FIXED_BYTES = 11_008
"""Of shared memory, whatever the shape: scales, sums and barriers."""
_SHARED_BYTES = 227 << 10
"""What a block may have on Hopper."""
_HALF = 113 << 10
"""What each of two blocks may have."""
_ALONE = 114 << 10
"""What a block takes at least, so that no multiprocessor gets two. Those of a kernel that begins while others end would
else go where there is room first, two by two, and half of the GPU read the weights: in a step on an H200 wo_a took 19
us, not 12, and the head of guesses 185, not 132."""
_PROCESSORS = 132
_INPUTS_FOR_ONE_TILE = 4096

Matrices = Sequence[tuple[Tensor, Tensor]]
"""Weights [N, K] uint8 and their scales [ceil(N / 128), K / 128] fp32."""


def takes(weights: Sequence[Tensor], groups: int = 1) -> bool:
    """Whether `products` takes these matrices [G * N, K]."""
    inputs = weights[0].shape[1]
    if groups > 1 < len(weights) or any(weight.dtype != torch.uint8 for weight in weights):
        return False
    if shared_bytes(inputs, TOKENS, _FEWEST) > _SHARED_BYTES:
        return False
    planned = plan(tuple(len(weight) for weight in weights), inputs, groups)
    # Where a block has one tile, making terms of many inputs takes longer than halves: 14.2 us for wo_b and four tokens
    # on an H200, where `few_tokens` takes 12.5.
    return planned is not None and (planned[2] > 1 or inputs <= _INPUTS_FOR_ONE_TILE)


def takes_gated(weight: Tensor) -> bool:
    """Whether `gated` takes two such matrices [N, K]."""
    rows, inputs = weight.shape
    return shared_bytes(inputs, TOKENS, _FEWEST) <= _SHARED_BYTES and plan((rows,), inputs, kinds=2) is not None


@lru_cache(maxsize=1024)
def plan(rows: tuple[int, ...], inputs: int, groups: int = 1, kinds: int = 1) -> tuple[int, int, int] | None:
    """(rows of weights in a tile, tiles, tiles of a block) for matrices of so many rows in `groups` groups each, of
    which `kinds` share a tile. Of blocks, one to a multiprocessor, the one with most to read decides.
    """
    best = None
    for width in (32, 16):
        own = width // kinds
        if inputs % (_STAGE_BYTES // width) or any(n % groups or n // groups % own for n in rows):
            continue
        tiles = sum(rows) // own
        share = -(-tiles // _PROCESSORS)
        if best is None or share * width < best[2] * best[0]:
            best = width, tiles, share
    return best


def shared_bytes(inputs: int, tokens: int, stages: int) -> int:
    """Of a block: the ring of weights, and for 128 inputs two terms of four or eight tokens, units and squares."""
    terms = 2 * BLOCK * (TOKENS if tokens > TOKENS // 2 else TOKENS // 2)
    return 4 * stages * _STAGE_BYTES + _FIXED_BYTES + inputs // BLOCK * (TOKENS * 8 + terms)


@lru_cache(maxsize=1024)
def stages(inputs: int, tokens: int) -> int:
    """Steps of a ring: few where the next kernel's block so fits beside this one, else as many as there is room for."""
    fewest = shared_bytes(inputs, tokens, _FEWEST)
    more = 0 if fewest <= _HALF else (_SHARED_BYTES - fewest) // (4 * _STAGE_BYTES)
    return min(_FEWEST + more, _MOST)


def aligned(x: Tensor) -> Tensor:
    """Rows are read by 16 bytes."""
    apart = x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 16
    return x.clone(memory_format=torch.contiguous_format) if apart else x


def products(
    x: Tensor, matrices: Matrices, groups: int = 1, norm: Tensor | None = None, eps: float = 0.0
) -> list[Tensor]:
    """As `few_tokens.products`, where `takes` says so."""
    from engine.kernels.device.cuda import kernel, run

    tokens, inputs = x.shape[0], matrices[0][0].shape[1]
    rows = tuple(len(weight) for weight, _ in matrices)
    (width, tiles, share), ring = _planned(rows, inputs, groups), stages(inputs, tokens)
    x = aligned(x)
    y = torch.empty(tokens * sum(rows), dtype=torch.float32, device=x.device)
    table: list[object] = []
    for weight, scales in matrices:
        table += [weight, scales, ctypes.c_int32(len(weight))]
    table += [0, 0, ctypes.c_int32(0)] * (MATRICES - len(matrices))
    name, normed = ("penumbra_fp8_linears", ()) if norm is None else (
        "penumbra_fp8_linears_normed", (norm, ctypes.c_float(eps))
    )  # fmt: skip
    run(
        kernel("linears_fp8.cu", f"{name}_{width}", _SHARED_BYTES), -(-tiles // share), _THREADS,
        max(_ALONE, shared_bytes(inputs, tokens, ring)), *table, x, ctypes.c_int64(x.stride(0)), *normed, y,
        *map(ctypes.c_int32, (tokens, inputs, sum(rows) // groups, tiles, share, ring)), waits=True,
    )  # fmt: skip
    return [part.view(tokens, -1) for part in y.split([tokens * n for n in rows])]


def gated(x: Tensor, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], limit: float) -> Tensor:
    """As `few_tokens.gated`, where `takes_gated` says so."""
    from engine.kernels.device.cuda import kernel, run

    tokens, (rows, inputs) = x.shape[0], gate[0].shape
    (width, tiles, share), ring = _planned((rows,), inputs, kinds=2), stages(inputs, tokens)
    x = aligned(x)
    y = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    run(
        kernel("linears_fp8.cu", f"penumbra_fp8_gated_{width}", _SHARED_BYTES), -(-tiles // share), _THREADS,
        max(_ALONE, shared_bytes(inputs, tokens, ring)), *gate, *up, ctypes.c_int32(rows), x,
        ctypes.c_int64(x.stride(0)), y, *map(ctypes.c_int32, (tokens, inputs)), ctypes.c_float(limit),
        *map(ctypes.c_int32, (tiles, share, ring)), waits=True,
    )  # fmt: skip
    return y


def _planned(rows: tuple[int, ...], inputs: int, groups: int = 1, kinds: int = 1) -> tuple[int, int, int]:
    planned = plan(rows, inputs, groups, kinds)
    if planned is None:
        raise ValueError(f"matrices of {rows} rows and {inputs} inputs can not be cut into tiles; ask `takes` before")
    return planned
