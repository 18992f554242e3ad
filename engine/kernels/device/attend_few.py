"""The binding of engine/csrc/attend_few.cu: attention of few tokens, keys split over blocks.

How many splits there are depends on shapes alone. Where a page table is wider than a context the splits share the keys
that there are, and those left over end at once.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO, C128_RATIO
from engine.kernels.device import cuda_products
from engine.kernels.rows import LATENT_DIM, RowPool
from wire.types import PAGE_TOKENS

TOKENS = 64
"""At most. Of more, parts of keys would be many, and Triton reads what each needs by itself."""
_THREADS, _MERGERS, _TILE, _HEADS = 256, 128, 32, 16
"""As in the source; heads of a tile."""
SHARED_BYTES = {1: 95_616, 2: 117_440}
"""Of a block that takes one tile of heads, or two."""
_BLOCKS = {1: 264, 2: 132}
"""At once on a Hopper GPU, likewise."""
_MANY = 32
"""From so many tiles of heads on, of all tokens, a block takes two, for which it reads and decodes a key once."""
_ALIGNED = 16


def takes(heads: int, dim: int, half: bool, window: RowPool, compressed: RowPool | None) -> bool:
    """Whether `attend`, and that of `attend_long`, takes so many heads, and these pools."""
    pools = [window] if compressed is None else [window, compressed]
    return (
        cuda_products()
        and half
        and dim == LATENT_DIM
        and heads % _HEADS == 0
        and window.rows_per_item == PAGE_TOKENS
        and (compressed is None or compressed.rows_per_item in (PAGE_TOKENS // C4_RATIO, PAGE_TOKENS // C128_RATIO))
        and all(
            pool.layout == "v4" and pool.data.data_ptr() % _ALIGNED == 0 and pool.data.stride(0) % _ALIGNED == 0
            for pool in pools
        )
    )


@lru_cache(maxsize=1024)
def plan(tokens: int, heads: int, keys: int) -> tuple[int, int]:
    """(tiles of 16 heads a block, splits of the keys), of which there are so many at most."""
    groups = tokens * heads // _HEADS
    tiles = 2 if groups >= _MANY and heads % (2 * _HEADS) == 0 else 1
    key_tiles = -(-keys // _TILE)
    most = max(1, _BLOCKS[tiles] * tiles // groups)
    return tiles, -(-key_tiles // -(-key_tiles // most))


def attend(
    q: Tensor, sink: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, selected: Tensor | None,
    keys: int, scale: float, freqs: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """As `engine.kernels.sparse_attention.sparse_attention`, into out [T, H, D]; q contiguous, keys as for `plan`."""
    tokens, heads, dim = q.shape
    tiles, splits = plan(tokens, heads, keys)
    parts = torch.empty(tokens, splits, heads, dim, dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty(tokens, splits, heads, dtype=torch.float32, device=q.device) for _ in range(2))
    partial(q, meta, window, compressed, selected, scale, tiles, parts, tops, totals)
    merge(parts, tops, totals, sink, meta.positions, freqs, out)


def partial(
    q: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, selected: Tensor | None, scale: float,
    tiles: int, parts: Tensor, tops: Tensor, totals: Tensor,
) -> None:  # fmt: skip
    """Into parts [T, S, H, D], not yet divided, and tops and totals [T, S, H]: the highest logit of each split's keys,
    and the sum of their weights relative to it; -inf and 0, and nothing in parts, where a split has no keys.

    q [T, H, D] fp32, contiguous; tiles and S as `plan` says.
    """
    from engine.kernels.device.cuda import kernel, run

    tokens, splits, heads, _ = parts.shape
    int32 = ctypes.c_int32
    run(
        kernel("attend_few.cu", f"penumbra_attend_few_{tiles}", SHARED_BYTES[tiles]),
        tokens * splits * (heads // (_HEADS * tiles)), _THREADS, SHARED_BYTES[tiles],
        *inputs(q, meta, window, compressed, selected), parts, tops, totals,
        int32(heads), int32(splits), ctypes.c_float(scale), waits=True,
    )  # fmt: skip


def inputs(
    q: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, selected: Tensor | None
) -> list[object]:
    """What the kernels that make parts take first, those of `attend_long` too: the queries and where their keys lie."""
    int32, int64 = ctypes.c_int32, ctypes.c_int64
    pool: tuple[object, ...] = (0, int64(0), int32(0))
    if compressed is not None:
        bits = compressed.rows_per_item.bit_length() - 1
        pool = (compressed.data, int64(compressed.data.stride(0)), int32(bits))
    return [
        q, meta.positions, meta.segment, meta.page_table, meta.swa_table, 0 if meta.oldest is None else meta.oldest,
        int32(meta.page_table.shape[1]), window.data, int64(window.data.stride(0)), *pool,
        0 if selected is None else selected, int32(0 if selected is None else selected.shape[1]),
    ]  # fmt: skip


def merge(
    parts: Tensor, tops: Tensor, totals: Tensor, sink: Tensor, positions: Tensor, freqs: Tensor | None, out: Tensor
) -> None:
    """What `partial` made -> out [T, H, D], turned back by positions [T] if there are freqs."""
    from engine.kernels.device.cuda import kernel, run

    tokens, splits, heads, _ = parts.shape
    pairs = 0 if freqs is None else freqs.shape[0]
    run(
        kernel("attend_few.cu", "penumbra_attend_merge"), tokens * heads, _MERGERS, 0,
        parts, tops, totals, sink, positions, 0 if freqs is None else freqs, ctypes.c_int32(pairs), out,
        ctypes.c_int32(heads), ctypes.c_int32(splits), waits=True,
    )  # fmt: skip
