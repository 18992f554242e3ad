"""The binding of engine/csrc/index_scores.cu: the indexer's scores, by e4m3 products."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from engine.kernels.device import cuda_products
from engine.kernels.rows import INDEX_DIM, RowPool

TOKENS = 64
"""That a block looks at, at most: the next ones have blocks of their own."""
TOGETHER = 4
"""Neighbouring tokens that share a read of the keys, at most."""
LEAST_PAGES = 1024
"""Of keys for each token, all tokens' together: fewer are scored sooner by Triton's kernel, a block for each page."""
_HEADS, _PAGE = 64, 64
_TILE, _SCALES, _FIXED = 8192, 256, 1960
"""Bytes, as in the source: a page's keys or a token's queries; their scales or weights; `struct Fixed`."""
_SENDERS = 4
_SHARED_BYTES = 232_448
"""A block's, at most. A kernel is asked for with that, whatever a plan needs, for what was asked for last holds."""
LEAST_BLOCKS = 4
"""Of each TOKENS, where there are as many as fill a GPU by themselves."""
_MULTIPROCESSORS = 132
"""Of a Hopper GPU, each with one block."""
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Plan:
    blocks: int  # of each TOKENS
    together: int  # tokens of a request that read its keys at once: 1, 2 or 4
    warpgroups: int = 4  # that multiply: 2 or 4
    stages: int = 12  # pages on their way, or being multiplied: 4 to 24, a multiple of 4

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + 32 * _SENDERS

    @property
    def shared_bytes(self) -> int:
        return (self.stages + 2 * self.together) * (_TILE + _SCALES) + _FIXED


def takes(tokens: int, heads: int, pages: int, pool: RowPool) -> bool:
    """Whether `score` takes so many tokens and heads, a table of so many pages, and this pool."""
    return (
        tokens * pages >= LEAST_PAGES
        and cuda_products()
        and heads == _HEADS
        and (pool.layout, pool.dim, pool.rows_per_item) == ("v4", INDEX_DIM, _PAGE)
        and pool.data.data_ptr() % _ALIGNED == 0
        and pool.data.stride(0) % _ALIGNED == 0
        and min(tokens, TOKENS) * pages * _PAGE < 1 << 31
    )


@lru_cache(maxsize=1024)
def plan(tokens: int, pages: int) -> Plan:
    """By shapes alone. Blocks share the pages that tokens see, and those left over end at once."""
    steps, tokens = -(-tokens // TOKENS), min(tokens, TOKENS)
    blocks = min(_MULTIPROCESSORS, tokens * pages)
    if steps > 1:  # all at once, for each has to find out first what there is
        blocks = min(blocks, max(LEAST_BLOCKS, _MULTIPROCESSORS // steps))
    together = min(TOGETHER, 1 << (tokens - 1).bit_length())
    each = -(-tokens * pages // blocks)
    room = (_SHARED_BYTES - _FIXED) // (_TILE + _SCALES) - 2 * together
    rounded = -(-each // _SENDERS) * _SENDERS
    # Measured: more on their way would only be in each other's, the more so where each is multiplied for longer.
    most = 12 if together == 1 else 8
    return Plan(blocks, together, stages=min(most, rounded, room // _SENDERS * _SENDERS))


def score(
    codes: Tensor, weights: Tensor, positions: Tensor, segment: Tensor, page_table: Tensor, pool: RowPool, k: int,
    scores: Tensor, maxima: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """codes [T, 64, 128] uint8 and weights [T, 64] float32, contiguous, of tokens at positions [T] int64 of the
    requests segment [T] int32 -> scores [T, P * 64] and maxima [T, P], of keys page_table [., P] int32 leads to.

    What no token sees is left unwritten, and so is all of a token that sees k rows or fewer.
    """
    from engine.kernels.device.cuda import kernel, run

    int32 = ctypes.c_int32
    run(
        kernel("index_scores.cu", f"penumbra_index_scores_{plan.warpgroups}", _SHARED_BYTES),
        plan.blocks * -(-codes.shape[0] // TOKENS), plan.threads, plan.shared_bytes,
        codes, weights, positions, segment, page_table, int32(page_table.shape[1]), pool.data,
        ctypes.c_int64(pool.data.stride(0)), scores, maxima, int32(codes.shape[0]), int32(k), int32(plan.together),
        int32(plan.stages), waits=True,
    )  # fmt: skip
