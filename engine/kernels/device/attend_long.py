"""The binding of engine/csrc/attend_long.cu: attention by blocks of 64 heads, of few tokens over many keys, which
blocks share, or of any number of tokens, each with blocks of its own.

How many splits there are depends on shapes alone. Where a page table is wider than a context the splits share the keys
that there are, and those left over end at once.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.kernels.device import attend_few
from engine.kernels.rows import RowPool

HEADS = 64
"""Of a block, as in the source."""
SHARED_BYTES = {32: 139_776, 64: 205_568}
"""Of a block that takes so many keys at once, likewise, and MERGE_BYTES of one that merges."""
MERGE_BYTES = 9_280
MERGING_WARPS = {4: 4, 32: 8, 64: 8}
"""Of the kernel for so many splits."""
_THREADS = 256
_MOST_SPLITS = 64
"""That a block of eight warps merges in one go."""
_PAIRS = 32
"""Of channels that `attend_all` turns back, at most."""
BLOCKS = 132
"""At once on a Hopper GPU: one for each of its multiprocessors."""
TILE_COSTS = {32: (0.6, 1.5), 64: (1.2, 2.5)}
"""What a block takes for its first tile of so many keys more than for each; and for all else where it has all keys,
and where parts are merged. What merging adds for 64 heads of a token, by its kernel, and for each of their parts:
measured on an H200, in microseconds."""
WHOLE_COST, SPLIT_COST = 7.5, 5.1
MERGE_COSTS, PART_COST = {4: 0.33, 32: 0.62, 64: 0.62}, 0.02
LEAST_KEYS, FEW_GROUPS = 512, 16
"""With fewer keys `attend_few` is done sooner, for up to so many times 64 heads."""
MANY_KEYS = 2048
"""From so many on the larger tiles are better for prompts too, and 128 heads are better off with FlashMLA, whose blocks
decode a key once for all of them."""


def better(tokens: int, heads: int, keys: int) -> bool:
    """Whether `attend` is to take what `attend_few.takes` says that its own does."""
    return heads % HEADS == 0 and (keys >= LEAST_KEYS or tokens * heads // HEADS > FEW_GROUPS)


@lru_cache(maxsize=1024)
def plan(tokens: int, heads: int, keys: int) -> tuple[int, int]:
    """(keys of a tile, splits of the keys), of which there are so many at most."""
    groups = tokens * heads // HEADS
    if groups > BLOCKS:
        # Blocks follow one another: what counts besides tiles is how soon one is under way.
        return (64 if keys >= MANY_KEYS else 32), 1
    plans = []
    for tile, (first, each) in TILE_COSTS.items():
        tiles = -(-keys // tile)
        least = -(-tiles // min(_MOST_SPLITS, BLOCKS // groups))
        for share in {*range(least, min(tiles, 4 * least) + 1), tiles}:
            splits = -(-tiles // share)
            merge = SPLIT_COST + groups * (MERGE_COSTS[merging(splits)] + PART_COST * splits)
            plans.append((first + share * each + (WHOLE_COST if splits == 1 else merge), tile, splits))
    return min(plans)[1:]


def merging(splits: int) -> int:
    """Which of the kernels that merge takes so many splits: the least that has them all on their way at once."""
    return next((most for most in MERGING_WARPS if splits <= most), max(MERGING_WARPS))


def attend(
    q: Tensor, sink: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, selected: Tensor | None,
    keys: int, scale: float, freqs: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """As `attend_few.attend`, for heads that are a multiple of HEADS."""
    tokens, heads, dim = q.shape
    tile, splits = plan(tokens, heads, keys)
    if splits == 1 and (freqs is None or len(freqs) <= _PAIRS):
        attend_all(q, sink, meta, window, compressed, selected, scale, tile, freqs, out)
        return
    parts = torch.empty(tokens, splits, heads, dim, dtype=torch.float16, device=q.device)
    stats = torch.empty(tokens, splits, heads, 4, dtype=torch.float32, device=q.device)
    partial(q, meta, window, compressed, selected, scale, tile, parts, stats)
    merge(parts, stats, sink, meta.positions, freqs, out)


def attend_all(
    q: Tensor, sink: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, selected: Tensor | None,
    scale: float, tile: int, freqs: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """As `attend`, by blocks that have all keys of a token; up to _PAIRS frequencies."""
    from engine.kernels.device.cuda import kernel, run

    tokens, heads, _ = q.shape
    int32 = ctypes.c_int32
    run(
        kernel("attend_long.cu", f"penumbra_attend_all_{tile}", SHARED_BYTES[tile]), tokens * (heads // HEADS),
        _THREADS, SHARED_BYTES[tile], *attend_few.inputs(q, meta, window, compressed, selected), sink,
        0 if freqs is None else freqs, int32(0 if freqs is None else len(freqs)), out, int32(heads),
        ctypes.c_float(scale), waits=True,
    )  # fmt: skip


def partial(
    q: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, selected: Tensor | None, scale: float,
    tile: int, parts: Tensor, stats: Tensor,
) -> None:  # fmt: skip
    """Into parts [T, S, H, D] fp16 and stats [T, S, H, 4], as the source says; tile and S as `plan` says.

    q [T, H, D] fp32, contiguous.
    """
    from engine.kernels.device.cuda import kernel, run

    tokens, splits, heads, _ = parts.shape
    int32 = ctypes.c_int32
    run(
        kernel("attend_long.cu", f"penumbra_attend_long_{tile}", SHARED_BYTES[tile]),
        tokens * splits * (heads // HEADS), _THREADS, SHARED_BYTES[tile],
        *attend_few.inputs(q, meta, window, compressed, selected), parts, stats, int32(heads), int32(splits),
        ctypes.c_float(scale), waits=True,
    )  # fmt: skip


def merge(parts: Tensor, stats: Tensor, sink: Tensor, positions: Tensor, freqs: Tensor | None, out: Tensor) -> None:
    """What `partial` made -> out [T, H, D], turned back by positions [T] if there are freqs."""
    from engine.kernels.device.cuda import kernel, run

    tokens, splits, heads, _ = parts.shape
    int32, most = ctypes.c_int32, merging(splits)
    run(
        kernel("attend_long.cu", f"penumbra_attend_long_merge_{most}", MERGE_BYTES), tokens * heads * 2,
        32 * MERGING_WARPS[most], MERGE_BYTES,
        parts, stats, sink, positions, 0 if freqs is None else freqs, int32(0 if freqs is None else freqs.shape[0]),
        out, int32(heads), int32(splits), waits=True,
    )  # fmt: skip
