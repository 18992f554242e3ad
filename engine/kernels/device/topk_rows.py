"""Lightning TopK: the binding of engine/csrc/topk_rows.cu, and the maxima it starts from."""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.topk_rows import TILE

SHARED_BYTES = 90_928
"""`struct Shared` of the source."""
MAX_PICKS = 2048
WHOLE = 65_536
"""Scores of a row that can be read whole, so that it needs no maxima."""
_TILE = tl.constexpr(TILE)
_MULTIPROCESSORS = 132
"""Of a Hopper GPU."""


@triton.jit(do_not_specialize=["tiles"])
def _maxima(scores, lengths, maxima, score_row, tiles, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    at = tile[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
    seen = at < tl.load(lengths + row)
    values = tl.load(scores + row * score_row + at, mask=seen, other=float("-inf"))
    values = tl.where(values == values, values, float("inf"))
    tl.store(maxima + row * tiles + tile, tl.max(values, axis=1), mask=tile < tiles)


def plan(rows: int, k: int) -> int:
    """Threads of a block, which takes a row: 256, 512 or 1,024.

    More wait for memory together, fewer for one another: measured, more are better until two blocks want to share a
    multiprocessor. And so many make up groups of scores enough for so many picks.
    """
    return 512 if k <= 1024 and rows > _MULTIPROCESSORS else 1024


def topk_rows(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    """As `engine.kernels.topk_rows.topk_rows`."""
    scores = scores.contiguous()
    if scores.shape[1] % TILE or scores.data_ptr() % 16:
        scores = torch.nn.functional.pad(scores, (0, -scores.shape[1] % TILE or TILE))  # a copy
    maxima = maxima_of(scores, lengths) if scores.shape[1] > WHOLE else None
    return choose(scores, maxima, lengths - 1, 1, k)


def maxima_of(scores: Tensor, lengths: Tensor) -> Tensor:
    """scores [T, R] fp32, of which row t has lengths[t] -> [T, ceil(R / 64)]: of every 64 scores."""
    rows, width = scores.shape
    tiles = triton.cdiv(width, TILE)
    maxima = torch.empty(rows, tiles, dtype=torch.float32, device=scores.device)
    if rows and width:
        _maxima[(rows, triton.cdiv(tiles, 16))](scores, lengths, maxima, scores.stride(0), tiles, TILES=16)
    return maxima


def choose(
    scores: Tensor, maxima: Tensor | None, positions: Tensor, ratio: int, k: int, threads: int | None = None
) -> Tensor:
    """The k best of row t's first (positions[t] + 1) // ratio scores, whose maxima over 64 are known.

    scores [T, R] and maxima [T, >= R / 64] float32, rows in one piece; positions [T] int64 -> [T, k] int32. R is a
    multiple of 64, ratio a power of two. Without maxima rows of up to 65,536 scores are as fast, longer ones slow.
    """
    from engine.kernels.device.cuda import kernel, run

    if not 1 <= k <= MAX_PICKS:
        raise ValueError(f"k = {k}; the GPU kernel picks 1 to {MAX_PICKS} of a row")
    row = scores.stride(0) if len(scores) > 1 else scores.shape[1]
    if scores.shape[1] % TILE or row % 4 or scores.data_ptr() % 16 or ratio < 1 or ratio & (ratio - 1):
        raise ValueError(
            f"scores {list(scores.shape)} at {scores.data_ptr():#x}, {ratio} positions each: the GPU kernel reads rows "
            f"of whole tiles of {TILE} that begin at multiples of 16 bytes, and divides positions by a power of two"
        )
    out = torch.empty(scores.shape[0], k, dtype=torch.int32, device=scores.device)
    if scores.shape[0]:
        threads = threads or plan(len(scores), k)
        run(
            kernel("topk_rows.cu", f"penumbra_topk_rows_{threads}", SHARED_BYTES), len(scores), threads, SHARED_BYTES,
            scores, ctypes.c_int32(row), 0 if maxima is None else maxima,
            ctypes.c_int32(0 if maxima is None else maxima.stride(0)), positions,
            ctypes.c_int32(ratio.bit_length() - 1), ctypes.c_int32(k), out, waits=True,
        )  # fmt: skip
    return out
