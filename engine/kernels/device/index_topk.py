"""The lightning indexer on the device: scores of all keys for every token of a request in one pass, then the top-k.

Keys are read once for up to four neighbouring tokens. Beside its 64 scores, each page leaves their maximum, by which
the top-k passes over most of the row. With `half`, queries are quantised to e4m3 and products are e4m3 times e4m3.

T tokens, H index heads, D index head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO
from engine.kernels.device import INTERPRETED, index_scores, libraries
from engine.kernels.device.backends import backend
from engine.kernels.device.codec import (
    e4m3_value,
    hadamard_row,
    operand,
    power_of_two,
    quantised,
    rotated,
    scale_exponent,
)
from engine.kernels.device.early import await_previous, early
from engine.kernels.device.topk_rows import choose
from engine.kernels.rows import INDEX_DIM, RowPool

SCORE_BYTES = 256 << 20
"""Bytes of scores that lie in memory at once; more tokens go one pass after another."""
_PAGE = tl.constexpr(64)
_DIM = tl.constexpr(INDEX_DIM)
_C4 = tl.constexpr(C4_RATIO)
_FP8, _BF16, _FP32 = (tl.constexpr(kind) for kind in (0, 1, 2))
TOKENS = 4
"""Neighbouring tokens that share a read of the keys, at most."""
_FEW_PROGRAMS = 512
"""Of a page each: four for each multiprocessor."""


@triton.jit
def _quantise(
    q, w, codes, weights, positions, freqs, turn_scale, w_scale, heads,
    D: tl.constexpr, STEPS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """q [T, H, D] -> e4m3 codes; w [T, H] takes over the scale. With PAIRS, q is rotated and Hadamard-turned before."""
    await_previous()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, D)
    values = tl.load(q + row * D + at)
    if PAIRS > 0:
        values = rotated(values, tl.load(positions + row // heads), freqs, D, PAIRS, 1.0)
        values = hadamard_row(values, D, STEPS) * turn_scale
    exponent = tl.minimum(scale_exponent(tl.max(tl.abs(values), axis=0)), 127)
    tl.store(codes + row * D + at, quantised(values, exponent))
    tl.store(weights + row, tl.load(w + row) * w_scale * power_of_two(exponent))


@triton.jit(do_not_specialize=["pages", "first", "last"])
def _scores(
    q, w, positions, segment, page_table, pages, pool, item_stride, scores, maxima, first, last, heads, k,
    D: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, STRIP: tl.constexpr, KIND: tl.constexpr,
    V4: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """scores [tokens, pages * 64] and maxima [tokens, pages] of tokens [first, last), STRIP pages a program."""
    await_previous()
    token = first + tl.program_id(0) * TOKENS
    strip = tl.program_id(1) * STRIP
    j = tl.arange(0, TOKENS)
    there = token + j < last
    segs = tl.load(segment + token + j, mask=there, other=-1)
    visible = tl.load(positions + token + j, mask=there, other=-1) + 1
    visible = tl.where(visible // _C4 > k, visible // _C4, 0)  # what is chosen whole needs no scores
    if strip * _PAGE < tl.max(visible, axis=0):
        head = tl.arange(0, HEADS)
        row = tl.reshape(token + j[:, None] + tl.zeros((1, HEADS), tl.int32), (TOKENS * HEADS,)).to(tl.int64)
        which = tl.reshape(head[None, :] + tl.zeros((TOKENS, 1), tl.int32), (TOKENS * HEADS,))
        known = (row < last) & (which < heads)
        channel = tl.arange(0, D)
        qs = tl.load(q + (row * heads + which)[:, None] * D + channel[None, :], mask=known[:, None], other=0)
        ws = tl.load(w + row * heads + which, mask=known, other=0.0)
        if KIND == _FP8:
            if EMULATE:
                qs = e4m3_value(qs)
            else:
                qs = qs.to(tl.float8e4nv, bitcast=True)
        elif KIND == _BF16:
            qs = operand(qs, True)
        for i in tl.range(TOKENS):
            # One turn for each request among the tokens, the first of its tokens here.
            seg = tl.max(tl.where(j == i, segs, -1), axis=0)
            before = tl.max(tl.where(j == i - 1, segs, -1), axis=0)
            if (seg >= 0) & ((i == 0) | (seg != before)):
                ours = segs == seg
                reach = tl.max(tl.where(ours, visible, 0), axis=0)
                end = tl.minimum(strip + STRIP, (reach + _PAGE - 1) // _PAGE)
                for page in tl.range(strip, end):
                    item = pool + tl.load(page_table + seg * pages + page).to(tl.int64) * item_stride
                    key = tl.arange(0, _PAGE)
                    if V4:
                        codes = tl.load(item + key[:, None] * _DIM + channel[None, :])
                        scale = tl.load((item + _PAGE * _DIM).to(tl.pointer_type(tl.float32)) + key)
                        if KIND == _FP8:
                            if EMULATE:
                                products = tl.dot(e4m3_value(codes), tl.trans(qs))
                            else:
                                products = tl.dot(codes.to(tl.float8e4nv, bitcast=True), tl.trans(qs))
                        else:
                            products = tl.dot(e4m3_value(codes), tl.trans(qs), input_precision="tf32x3")
                    else:
                        values = tl.load(item.to(tl.pointer_type(tl.float32)) + key[:, None] * D + channel[None, :])
                        scale = tl.full((_PAGE,), 1.0, tl.float32)
                        if KIND == _BF16:
                            products = tl.dot(operand(values, True), tl.trans(qs))
                        else:
                            products = tl.dot(values, tl.trans(qs), input_precision="tf32x3")
                    # Not a maximum with 0, which would lose a NaN.
                    weighed = tl.where(products < 0, 0.0, products) * ws[None, :]
                    sums = tl.sum(tl.reshape(weighed, (_PAGE, TOKENS, HEADS)), axis=2) * scale[:, None]
                    sums = tl.where(sums == sums, sums, float("inf"))
                    place = page * _PAGE + key
                    sums = tl.where(place[:, None] < visible[None, :], sums, float("-inf"))
                    out = (token - first + j).to(tl.int64)
                    mine = ours & (page * _PAGE < visible)
                    tl.store(scores + (out * pages * _PAGE)[None, :] + place[:, None], sums, mask=mine[None, :])
                    tl.store(maxima + out * pages + page, tl.max(sums, axis=0), mask=mine)


def shape(pages: int, tokens: int) -> tuple[int, int]:
    """(tokens of a program, its pages) for a table of so many pages: in a short step, programs are what is short."""
    together = min(TOKENS, triton.next_power_of_2(tokens))
    short = triton.cdiv(tokens, together) * pages <= _FEW_PROGRAMS
    return (min(2, together), 1) if short else (together, 4 * together)


def scores_and_maxima(
    q: Tensor, w: Tensor, pool: RowPool, meta: StepMeta, k: int, half: bool, first: int = 0, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """q [T, H, D] and w [T, H] as `_scores` reads them -> scores [last - first, pages * 64], maxima [., pages].

    What no token sees is left unwritten, and so is all of a token that sees k rows or fewer.
    """
    tokens, heads, dim = q.shape
    last = tokens if last is None else last
    pages = meta.page_table.shape[1]
    v4 = pool.layout == "v4"
    own = index_scores.takes(last - first, heads, pages, pool) or not libraries.takes_index_scores(heads, dim, pool)
    if half and v4 and backend("index-scores", rather_own=own) is not None:
        return libraries.index_scores(q, w, pool, meta, first, last)
    kind = (0 if v4 else 1) if half else 2
    scores = torch.empty(last - first, pages * 64, dtype=torch.float32, device=q.device)
    maxima = torch.empty(last - first, pages, dtype=torch.float32, device=q.device)
    if half and index_scores.takes(last - first, heads, pages, pool):
        of = slice(first, last)
        index_scores.score(
            q[of], w[of], meta.positions[of], meta.segment[of], meta.page_table, pool, k, scores, maxima,
            index_scores.plan(last - first, pages),
        )  # fmt: skip
        return scores, maxima
    padded = max(16, triton.next_power_of_2(heads))
    together, strip = shape(pages, last - first)
    if not half:
        together = 1
    elif padded < 64:
        together = min(together * (64 // padded), triton.next_power_of_2(last - first))
    _scores[(triton.cdiv(last - first, together), triton.cdiv(pages, strip))](
        q, w, meta.positions, meta.segment, meta.page_table, pages, pool.data, pool.data.stride(0), scores, maxima,
        first, last, heads, k, D=dim, HEADS=padded, TOKENS=together, STRIP=strip, KIND=kind, V4=v4,
        EMULATE=INTERPRETED, num_warps=4, num_stages=2, **early(),
    )  # fmt: skip
    return scores, maxima


def quantise(
    q: Tensor, w: Tensor, w_scale: float = 1.0, positions: Tensor | None = None, freqs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [T, H, D], w [T, H] fp32 -> e4m3 codes [T, H, D] uint8 and weights that carry their scales [T, H].

    With `freqs`, q is rotated by them and Hadamard-turned before.
    """
    codes, weights = torch.empty(q.shape, dtype=torch.uint8, device=q.device), torch.empty_like(w)
    if q.numel():
        dim = q.shape[2]
        _quantise[(q.shape[0] * q.shape[1],)](
            q, w, codes, weights, positions, freqs, dim**-0.5, w_scale, q.shape[1],
            D=dim, STEPS=dim.bit_length() - 1, PAIRS=0 if freqs is None else freqs.shape[0], num_warps=1, **early(),
        )  # fmt: skip
    return codes, weights


def select_blocks(q: Tensor, w: Tensor, w_scale: float, freqs: Tensor, pool: RowPool, meta: StepMeta, k: int) -> Tensor:
    """As `engine.kernels.index_topk.select_blocks`, for e4m3 queries and keys."""
    _check(pool)
    codes, weights = quantise(q.contiguous(), w.contiguous(), w_scale, meta.positions, freqs)
    return _topk(codes, weights, pool, meta, k, half=True)


def index_topk(q: Tensor, w: Tensor, pool: RowPool, meta: StepMeta, k: int, half: bool) -> Tensor:
    """As `engine.kernels.index_topk.index_topk`; with `half` products take e4m3 (v4) or bf16 (exact) operands."""
    _check(pool)
    q, w = q.contiguous(), w.contiguous()
    if half and pool.layout == "v4":
        q, w = quantise(q, w)
    return _topk(q, w, pool, meta, k, half)


def _check(pool: RowPool) -> None:
    if pool.rows_per_item != 64 or pool.dim & (pool.dim - 1) or pool.dim > 256:
        raise ValueError(
            f"index keys of {pool.dim} values, {pool.rows_per_item} a page: the GPU kernel reads 64 keys a page of a "
            "power of two up to 256 values. Use --device cpu for such a model."
        )


def _topk(q: Tensor, w: Tensor, pool: RowPool, meta: StepMeta, k: int, half: bool) -> Tensor:
    """q [T, H, D] and w [T, H] as `_scores` reads them."""
    tokens = q.shape[0]
    row_bytes = 4 * meta.page_table.shape[1] * 64
    at_once = max(TOKENS, SCORE_BYTES // max(row_bytes, 1) // TOKENS * TOKENS)
    chosen = []
    for first in range(0, tokens, at_once):
        last = min(first + at_once, tokens)
        scores, maxima = scores_and_maxima(q, w, pool, meta, k, half, first, last)
        chosen.append(choose(scores, maxima, meta.positions[first:last], C4_RATIO, k))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)
