"""The binding of engine/csrc/linears_some.cu: products of up to 512 tokens with e4m3 matrices, read once for 128 each.

Tokens are two e4m3 terms, which is as good as bf16. How a matrix is cut depends on its shape alone, so a token's result
depends on no other token. Up to eight tokens `few_tokens` has kernels that take less time. From 33 tokens on, where the
L2 is what takes most, two blocks share terms.

Measured on an H200, in us, for 16 / 32 / 64 / 128 / 255 tokens; of matrices widened for cuBLAS 255 take the last:
    1536 x 4096, in 8 parts              8 /  8 / 10 / 12 / 20   17
    32768 x 1024                        13 / 13 / 16 / 24 / 41   63
    8192 x 4096, 8 groups, in 2 parts   14 / 15 / 20 / 29 / 53   77
    4096 x 8192, in 4 parts             14 / 14 / 17 / 24 / 42   65
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from engine.kernels.device import cuda_products
from engine.kernels.device.linears_fp8 import Matrices, aligned

TOKENS = 512
"""Each token more costs more here than in cuBLAS: from some 700 on, widening a matrix for that is paid for."""
MATRICES = 8
"""Of one launch."""
BLOCK = 128
"""Inputs, and rows, that share a scale."""
_TILE = 32
"""Tokens of a product."""
_TERMS_BYTES = 8192
"""Of a tile of tokens, for 128 inputs."""
_WEIGHTS_BYTES = 16_384
"""Of 128 rows, for 128 inputs."""
_STAGES = {1: 8, 2: 6, 4: 4}
"""Of a block's ring, by the tiles of tokens that it has."""
_THREADS = 352
_SPLITTERS = 256
_ADDERS = 256
_PROCESSORS = 132
_MOST_PARTS = 16


def takes(tokens: int, weights: Sequence[Tensor], groups: int = 1) -> bool:
    """Whether `products` takes these matrices [G * N, K]."""
    return (
        0 < tokens <= TOKENS
        and cuda_products()
        and len(weights) <= (MATRICES if groups == 1 else 1)
        and all(
            weight.dtype == torch.uint8
            and weight.shape[1] % BLOCK == 0
            and len(weight) % (groups * BLOCK) == 0
            for weight in weights
        )
    )  # fmt: skip


@lru_cache(maxsize=1024)
def parts_of(rows: int, inputs: int) -> int:
    """Into how many parts the inputs of matrices of so many rows are cut, for blocks enough to read at full speed.

    In us: 128 x 128 weights for each of the 132 multiprocessors take 0.5 to come, and one kernel more for adding the
    parts 2, and its time to read what was written for some 64 tokens.
    """
    steps = inputs // BLOCK

    def cost(parts: int) -> float:
        rounds = -(-(rows // BLOCK * parts) // _PROCESSORS)
        adding = 2 + rows * parts * 64 * 8 / 3e6 if parts > 1 else 0
        return 0.5 * rounds * -(-steps // parts) + adding

    return min(range(1, min(steps, _MOST_PARTS) + 1), key=cost)


def tiles_of(tokens: int, per_group: int) -> tuple[int, int, int]:
    """(tiles of tokens of a block, all of them, some of which may have no token, blocks that share them) for groups of
    so many rows of weights: two neighbouring blocks have to be of one group.
    """
    own = 1 if tokens <= _TILE or per_group % (2 * BLOCK) else 2 if tokens <= 2 * _TILE else 4
    return own, -(-tokens // (own * _TILE)) * own, 1 if own == 1 else 2


def shared_bytes(own: int) -> int:
    """Of a block: a ring of weights, terms and units with two barriers a stage."""
    stage = _WEIGHTS_BYTES + own * (_TERMS_BYTES + _TILE * 4) + 16
    return _STAGES[own] * stage


def products(
    x: Tensor, matrices: Matrices, groups: int = 1, norm: Tensor | None = None, eps: float = 0.0
) -> list[Tensor]:
    """As `few_tokens.products`, where `takes` says so."""
    from engine.kernels.device.cuda import kernel, run

    tokens, inputs = x.shape[0], matrices[0][0].shape[1]
    rows, steps, blocks = sum(len(weight) for weight, _ in matrices), inputs // BLOCK, groups * inputs // BLOCK
    own, tiles, together = tiles_of(tokens, rows // groups)
    x = aligned(x)
    terms = torch.empty(blocks * tiles * _TERMS_BYTES, dtype=torch.uint8, device=x.device)
    units = torch.empty(blocks * tiles * _TILE, dtype=torch.float32, device=x.device)
    made = terms, units, ctypes.c_int32(tiles)
    row = ctypes.c_int64(x.stride(0))
    if norm is None:
        run(
            kernel("linears_some.cu", "penumbra_some_terms"), tokens * -(-blocks // (_SPLITTERS // 32)), _SPLITTERS, 0,
            x, row, *made, ctypes.c_int32(blocks), waits=True,
        )  # fmt: skip
    else:
        run(
            kernel("linears_some.cu", "penumbra_some_terms_normed"), tokens, 32 * min(blocks, 32), 128,
            x, row, norm, ctypes.c_float(eps), *made, ctypes.c_int32(blocks), waits=True,
        )  # fmt: skip
    table: list[object] = []
    for weight, scales in matrices:
        table += [weight, scales, ctypes.c_int32(len(weight))]
    table += [0, 0, ctypes.c_int32(0)] * (MATRICES - len(matrices))
    parts = parts_of(rows, inputs)
    items = rows // BLOCK // together * parts * (tiles // own)
    cut = map(ctypes.c_int32, (tokens, rows, steps, parts, rows // groups, items))
    sums = torch.empty(parts, tokens * rows, dtype=torch.float32, device=x.device)
    run(
        kernel("linears_some.cu", f"penumbra_some_products_{own}", shared_bytes(own)),
        min(items * together, _PROCESSORS), _THREADS, shared_bytes(own), *table, *made, sums, *cut, waits=True,
    )  # fmt: skip
    y = sums[0]
    if parts > 1:
        y = torch.empty_like(sums[0])
        count = tokens * rows // 4
        run(
            kernel("linears_some.cu", "penumbra_some_added"), -(-count // _ADDERS), _ADDERS, 0,
            sums, y, ctypes.c_int64(count), ctypes.c_int32(parts), waits=True,
        )  # fmt: skip
    return [part.view(tokens, -1) for part in y.split([tokens * len(weight) for weight, _ in matrices])]
