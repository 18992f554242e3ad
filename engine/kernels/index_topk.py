"""The lightning indexer's choice: which C4 rows each token reads.

T tokens, H index heads, D index head size, K rows chosen at most.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO
from engine.kernels import native
from engine.kernels.norm_rope import hadamard, rotate
from engine.kernels.rows import RowPool, read_rows

_UNIT_ROWS = 32
_SIGNATURE = (
    *[native.POINTER] * 5,  # q, w, positions, offsets, page_table
    *[native.INT] * 4,  # segments, pages, heads, dim
    native.POINTER,  # pool
    native.INT,  # k
    native.POINTER,  # chosen
    native.INT,  # threads
)


def select_blocks(
    q: Tensor, w: Tensor, w_scale: float, freqs: Tensor, pool: RowPool, meta: StepMeta, k: int, half: bool
) -> Tensor:
    """`index_topk` of raw projections: q [T, H, D] before its rotation by `freqs`, w [T, H] before its scale.

    Keys of the v4 layout are Hadamard-turned, so that e4m3 spends its range evenly; queries turn with them.
    """
    if q.is_cuda and half and pool.layout == "v4":
        from engine.kernels.device import index_topk as device

        return device.select_blocks(q, w, w_scale, freqs, pool, meta, k)
    q = rotate(q, meta.positions, freqs)
    return index_topk(hadamard(q) if pool.layout == "v4" else q, w * w_scale, pool, meta, k, half)


def index_topk(q: Tensor, w: Tensor, pool: RowPool, meta: StepMeta, k: int, half: bool = False) -> Tensor:
    """The k best C4 rows of each token, as block numbers of its own sequence.

    q     [T, H, D] float32  rotated, and Hadamard-turned when the keys in the pool are
    w     [T, H] float32     signed head weights
    pool  index keys, 64 rows a page; block b of segment s is row page_table[s, b // 64] * 64 + b % 64
    half  on a GPU, products take e4m3 queries (layout v4) or bf16 operands (exact)
    ->    [T, k] int32       ascending, then -1

    A token at position p sees the finished blocks b < (p + 1) // 4. Its score for block b is
    sum over heads of w * relu(q . key), in float32. Exact: ties go to the lower block. NaN ranks with
    infinity: a broken key is chosen, so that it shows.
    The native engine's choice for a token does not depend on the other tokens of the step, nor on the threads.
    """
    num_tokens, num_heads, dim = q.shape
    if q.is_cuda:
        from engine.kernels.device import index_topk as device

        return device.index_topk(q, w, pool, meta, k, half)
    native.check(q, "q", torch.float32, (len(meta.positions), num_heads, pool.dim))
    native.check(w, "w", torch.float32, (num_tokens, num_heads))
    if k < 1 or pool.rows_per_item % _UNIT_ROWS:
        raise ValueError(
            f"k = {k} from pages of {pool.rows_per_item} rows: at least one row must be chosen, and keys are read "
            f"{_UNIT_ROWS} at a time. A page holds 64 index rows."
        )
    chosen = torch.full((num_tokens, k), -1, dtype=torch.int32)
    if twin := native.function("penumbra_index_topk", *_SIGNATURE):
        twin(
            q.data_ptr(),
            w.data_ptr(),
            meta.positions.data_ptr(),
            meta.offsets.data_ptr(),
            meta.page_table.data_ptr(),
            *meta.page_table.shape,
            num_heads,
            dim,
            pool.address,
            k,
            chosen.data_ptr(),
            native.threads(),
        )
        return chosen
    visible = ((meta.positions + 1) // C4_RATIO).tolist()
    offsets = meta.offsets.tolist()
    n = pool.rows_per_item
    for segment, (start, end) in enumerate(itertools.pairwise(offsets)):
        blocks = torch.arange(visible[end - 1])  # positions ascend, so the last token sees the most
        if len(blocks) > k:
            keys = read_rows(pool, meta.page_table[segment].long()[blocks // n] * n + blocks % n)
        for token in range(start, end):
            seen = visible[token]
            if seen <= k:
                chosen[token, :seen] = blocks[:seen]
                continue
            scores = (keys[:seen] @ q[token].T).relu() @ w[token]
            scores = torch.where(scores.isnan(), torch.inf, scores)
            best = scores.sort(descending=True, stable=True).indices[:k]
            chosen[token] = best.sort().values
    return chosen
