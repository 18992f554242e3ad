"""Attention of one latent KV head over a window of raw rows and a few compressed rows.

T tokens, H query heads, D values in a row, K selected rows at most.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO, C128_RATIO, WINDOW
from engine.kernels import native
from engine.kernels.norm_rope import rotate
from engine.kernels.rows import RowPool, read_rows

_SIGNATURE = (
    *[native.POINTER] * 8,  # q, sink, out, positions, offsets, page_table, swa_table, oldest
    *[native.INT] * 4,  # segments, pages, heads, dim
    *[native.POINTER] * 2,  # window, compressed
    native.INT,  # ratio
    native.POINTER,  # selected
    native.INT,  # selected rows a token
    native.FLOAT,  # scale
    native.INT,  # threads
)


def sparse_attention(
    q: Tensor,
    sink: Tensor,
    meta: StepMeta,
    window: RowPool,
    compressed: RowPool | None,
    ratio: int,
    selected: Tensor | None,
    scale: float,
    half: bool = False,
    freqs: Tensor | None = None,
) -> Tensor:
    """Every token attends to its window, to the compressed rows it may see, and to nothing else.

    q           [T, H, D] float32   queries, as `norm_rope.query` makes them
    sink        [H] float32         a logit that takes probability and gives no value; -inf for a padding head
    window      256 rows a page: the token at position s is row swa_table[., s // 256] * 256 + s % 256
    compressed  None (ratio 0); C4 rows, 64 a page (ratio 4); C128 rows, 2 a page (ratio 128)
    selected    [T, K] int32        ratio 4 only: block numbers, then -1 from the first unused column on
    scale       multiplies q . key, not the sink
    half        on a GPU, products take bf16 operands
    freqs       what keys were rotated by, so that results are turned back by their token's position: a key's rotation
                comes with its value, and then only the distance of the two is left
    ->          [T, H, D] float32   without `freqs` still rotated like the keys

    The keys of a token at position p are the window rows of [max(0, p - 127), p], from `meta.oldest` on, and the
    blocks `selected` (ratio 4) or every finished block b < (p + 1) // 128 (ratio 128). A key is its own value. One
    softmax. All of it in float32. The native engine gives a (token, head) the same bits whatever else is in the step,
    however a prompt was cut into chunks, and on any number of threads.
    """
    _check_ratio(ratio, compressed, selected)
    num_tokens, num_heads, dim = q.shape
    if q.is_cuda:
        from engine.kernels.device import sparse_attention as device

        return device.sparse_attention(q, sink, meta, window, compressed, ratio, selected, scale, half, freqs)
    native.check(q, "q", torch.float32, (len(meta.positions), num_heads, window.dim))
    native.check(sink, "sink", torch.float32, (num_heads,))
    if selected is not None:
        native.check(selected, "selected", torch.int32, (num_tokens, None))
    out = torch.empty_like(q)
    if twin := native.function("penumbra_sparse_attention", *_SIGNATURE):
        twin(
            q.data_ptr(),
            sink.data_ptr(),
            out.data_ptr(),
            meta.positions.data_ptr(),
            meta.offsets.data_ptr(),
            meta.page_table.data_ptr(),
            meta.swa_table.data_ptr(),
            None if meta.oldest is None else meta.oldest.data_ptr(),
            *meta.page_table.shape,
            num_heads,
            dim,
            window.address,
            None if compressed is None else compressed.address,
            ratio,
            None if selected is None else selected.data_ptr(),
            0 if selected is None else selected.shape[1],
            scale,
            native.threads(),
        )
        return out if freqs is None else rotate(out, meta.positions, freqs, inverse=True)
    positions = meta.positions.tolist()
    for segment, (start, end) in enumerate(itertools.pairwise(meta.offsets.tolist())):
        pages = meta.page_table[segment].long()
        swa_pages = meta.swa_table[segment].long()
        floor = 0 if meta.oldest is None else int(meta.oldest[segment])
        first = max(floor, positions[start] - WINDOW + 1)
        raw = read_rows(window, _rows(window, swa_pages, torch.arange(first, positions[end - 1] + 1)))
        if compressed is not None and ratio == C128_RATIO:
            finished = torch.arange((positions[end - 1] + 1) // C128_RATIO)
            pooled = read_rows(compressed, _rows(compressed, pages, finished))
        for token in range(start, end):
            p = positions[token]
            keys = raw[max(floor, p - WINDOW + 1) - first : p + 1 - first]
            if ratio == C128_RATIO:
                keys = torch.cat([keys, pooled[: (p + 1) // C128_RATIO]])
            elif compressed is not None and selected is not None:
                blocks = selected[token][selected[token] >= 0].long()
                keys = torch.cat([keys, read_rows(compressed, _rows(compressed, pages, blocks))])
            logits = torch.cat([q[token] @ keys.T * scale, sink[:, None]], dim=1)
            out[token] = logits.softmax(dim=1)[:, :-1] @ keys
    return out if freqs is None else rotate(out, meta.positions, freqs, inverse=True)


def _rows(pool: RowPool, pages: Tensor, blocks: Tensor) -> Tensor:
    n = pool.rows_per_item
    return pages[blocks // n] * n + blocks % n


def _check_ratio(ratio: int, compressed: RowPool | None, selected: Tensor | None) -> None:
    wants = {0: (False, False), C4_RATIO: (True, True), C128_RATIO: (True, False)}.get(ratio)
    if wants != (compressed is not None, selected is not None):
        raise ValueError(
            f"ratio {ratio} with compressed rows {'given' if compressed is not None else 'missing'} and a selection "
            f"{'given' if selected is not None else 'missing'}. Ratio 0 reads neither, ratio {C4_RATIO} both, "
            f"ratio {C128_RATIO} every finished row and so no selection."
        )
