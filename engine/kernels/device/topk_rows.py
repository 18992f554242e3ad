"""Lightning TopK: the binding of engine/csrc/topk_rows.cu, and the maxima it starts from."""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.topk_rows import TILE

_THREADS = 1024
_SHARED_BYTES = 4 * 32768 + 4 * 2048 + 2 * 4096 + 4 * 4 * 32 + 16
"""`struct Shared` of the source."""
MAX_PICKS = 2048
_TILE = tl.constexpr(TILE)


@triton.jit(do_not_specialize=["tiles"])
def _maxima(scores, lengths, maxima, score_row, tiles, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    at = tile[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
    seen = at < tl.load(lengths + row)
    values = tl.load(scores + row * score_row + at, mask=seen, other=float("-inf"))
    values = tl.where(values == values, values, float("inf"))
    tl.store(maxima + row * tiles + tile, tl.max(values, axis=1), mask=tile < tiles)


def topk_rows(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    """As `engine.kernels.topk_rows.topk_rows`."""
    scores = scores.contiguous()
    return choose(scores, maxima_of(scores, lengths), lengths - 1, 1, k)


def maxima_of(scores: Tensor, lengths: Tensor) -> Tensor:
    """scores [T, R] fp32, of which row t has lengths[t] -> [T, ceil(R / 64)]: of every 64 scores."""
    rows, width = scores.shape
    tiles = triton.cdiv(width, TILE)
    maxima = torch.empty(rows, tiles, dtype=torch.float32, device=scores.device)
    if rows and width:
        _maxima[(rows, triton.cdiv(tiles, 16))](scores, lengths, maxima, scores.stride(0), tiles, TILES=16)
    return maxima


def choose(scores: Tensor, maxima: Tensor, positions: Tensor, ratio: int, k: int) -> Tensor:
    """The k best of row t's first (positions[t] + 1) // ratio scores, whose maxima over 64 are known.

    scores [T, R] and maxima [T, >= ceil(R / 64)] float32, rows in one piece; positions [T] int64 -> [T, k] int32.
    """
    from engine.kernels.device.cuda import kernel, run

    if not 1 <= k <= MAX_PICKS:
        raise ValueError(f"k = {k}; the GPU kernel picks 1 to {MAX_PICKS} of a row")
    out = torch.empty(scores.shape[0], k, dtype=torch.int32, device=scores.device)
    if scores.shape[0]:
        run(
            kernel("topk_rows.cu", "penumbra_topk_rows", _SHARED_BYTES), scores.shape[0], _THREADS, _SHARED_BYTES,
            scores, ctypes.c_int64(scores.stride(0)), maxima, ctypes.c_int64(maxima.stride(0)), positions,
            ctypes.c_int32(ratio), ctypes.c_int32(k), out, waits=True,
        )  # fmt: skip
    return out
