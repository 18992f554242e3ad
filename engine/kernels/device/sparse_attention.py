"""Attention over the window and compressed rows, keys split over programs.

A program takes one token, some of its heads and a run of key tiles; partial results are merged by a second kernel,
in order. Rows are decoded in registers on their way into the products, so pools are read as they are, once.
With CUDA C++ this is for what that does not take: pools and numbers of heads of small models.

T tokens, H heads, D values a row, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO, C128_RATIO, WINDOW
from engine.kernels.device import attend_few, attend_long, libraries
from engine.kernels.device.backends import backend
from engine.kernels.device.codec import e4m3_value, exact, operand, rotated
from engine.kernels.device.norm_rope import norm_rotate
from engine.kernels.device.rows import check_dim
from engine.kernels.rows import GROUP, LATENT_BYTES, LATENT_SCALE_BYTES, NOPE_DIM, RowPool

_WINDOW = tl.constexpr(WINDOW)
_PAGE = tl.constexpr(256)
_C128 = tl.constexpr(C128_RATIO)
_NOPE, _GROUP = tl.constexpr(NOPE_DIM), tl.constexpr(GROUP)
_DATA, _SCALES = tl.constexpr(LATENT_BYTES), tl.constexpr(LATENT_SCALE_BYTES)
_NO_RATIO, _RATIO_4, _RATIO_128 = (tl.constexpr(ratio) for ratio in (0, 4, 128))
PROGRAMS = 264
"""Programs to aim at in a short step: two for each of Hopper's 132 multiprocessors."""
MAX_SPLITS = triton.next_power_of_2(PROGRAMS)
LONG_STEP = 64
"""From this many tokens on there are programs enough without splitting keys, and partial results would be large."""


@triton.jit
def _keys(pool, item_stride, n, row, valid, D: tl.constexpr, TILE: tl.constexpr, V4: tl.constexpr):
    """Rows [TILE] int64, decoded: [TILE, D] fp32; zeros where not valid."""
    item = (row // n * item_stride)[:, None]
    place = (row % n)[:, None]
    channel = tl.arange(0, D)[None, :]
    if V4:
        data = pool + item + place * _DATA
        codes = tl.load(data + channel, mask=valid[:, None] & (channel < _NOPE), other=0)
        rope = tl.load(
            (data + _NOPE).to(tl.pointer_type(tl.uint16)) + (channel - _NOPE),
            mask=valid[:, None] & (channel >= _NOPE),
            other=0,
        )
        group = tl.arange(0, D // _GROUP)[None, :]
        exponents = tl.load(pool + item + n * _DATA + place * _SCALES + group, mask=valid[:, None], other=127)
        # A scale of 255 is NaN, as its codes are; its power of two would be infinity.
        scale = (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        wide = tl.reshape(tl.broadcast_to(scale[:, :, None], (TILE, D // _GROUP, _GROUP)), (TILE, D))
        turned = (rope.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        keys = tl.where(channel < _NOPE, e4m3_value(codes) * wide, turned)
    else:
        exact_data = (pool + item).to(tl.pointer_type(tl.float32)) + place * D
        keys = tl.load(exact_data + channel, mask=valid[:, None], other=0.0)
    return keys


@triton.jit
def _attend(q, keys, valid, top, total, acc, scale, HALF: tl.constexpr, V4: tl.constexpr):
    """One tile of keys [TILE, D] more: the running maximum [H], denominator [H] and weighted sum [H, D]."""
    # A v4 row is bf16 already; one of fp32 is rounded like the query.
    rows = exact(keys, HALF) if V4 else operand(keys, HALF)
    if HALF:
        logits = tl.dot(q, tl.trans(rows)) * scale
    else:
        logits = tl.dot(q, tl.trans(rows), input_precision="tf32x3") * scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, axis=1))
    # Before the first valid key nothing is known: exp(-inf - -inf) is kept from being NaN.
    floor = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(logits - floor[:, None])
    shrink = tl.exp(top - floor)
    total = total * shrink + tl.sum(weights, axis=1)
    if HALF:
        acc = tl.dot(operand(weights, HALF), rows, acc * shrink[:, None])
    else:
        acc = tl.dot(weights, rows, acc * shrink[:, None], input_precision="tf32x3")
    return higher, total, acc


@triton.jit(do_not_specialize=["pages"])
def _partial(
    q, sink, positions, segment, page_table, swa_table, oldest, pages,
    window, window_stride, window_rows, pool, item_stride, per_item, selected, picks,
    out, tops, totals, heads, scale,
    D: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, RATIO: tl.constexpr, V4: tl.constexpr,
    HALF: tl.constexpr, OLDEST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: all keys in this program, out [T, H, D] is the result. Else out [T, S, H, D] waits to be merged."""
    token, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    mine = head < heads
    channel = tl.arange(0, D)
    position, seg = tl.load(positions + token), tl.load(segment + token)
    qs = tl.load(q + (token * heads + head)[:, None] * D + channel[None, :], mask=mine[:, None], other=0.0)
    qs = operand(qs, HALF)
    finished = 0
    if RATIO == _RATIO_4:
        finished = tl.minimum((position + 1) // 4, picks).to(tl.int32)
    elif RATIO == _RATIO_128:
        finished = ((position + 1) // _C128).to(tl.int32)
    front: tl.constexpr = _WINDOW // TILE
    tiles = front + (finished + TILE - 1) // TILE
    share = (tiles + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, D), tl.float32)
    floor = position - (_WINDOW - 1)
    if OLDEST:
        floor = tl.maximum(floor, tl.load(oldest + seg))
    floor = tl.maximum(floor, 0)
    for tile in tl.range(begin, tl.minimum(end, front)):
        s = position - (_WINDOW - 1) + tile * TILE + tl.arange(0, TILE)
        valid = s >= floor
        page = tl.load(swa_table + seg * pages + s // _PAGE, mask=valid, other=0).to(tl.int64)
        keys = _keys(window, window_stride, window_rows, page * window_rows + s % _PAGE, valid, D, TILE, V4)
        top, total, acc = _attend(qs, keys, valid, top, total, acc, scale, HALF, V4)
    if RATIO != _NO_RATIO:
        for tile in tl.range(tl.maximum(begin, front), end):
            i = (tile - front) * TILE + tl.arange(0, TILE)
            valid = i < finished
            block = i.to(tl.int64)
            if RATIO == _RATIO_4:
                block = tl.load(selected + token * picks + i, mask=valid, other=-1).to(tl.int64)
                valid = block >= 0
                block = tl.maximum(block, 0)
            page = tl.load(page_table + seg * pages + block // per_item, mask=valid, other=0).to(tl.int64)
            keys = _keys(pool, item_stride, per_item, page * per_item + block % per_item, valid, D, TILE, V4)
            top, total, acc = _attend(qs, keys, valid, top, total, acc, scale, HALF, V4)
    if WHOLE:
        drain = tl.load(sink + head, mask=mine, other=float("-inf"))
        higher = tl.maximum(top, drain)
        floor_ = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - floor_)
        total = total * shrink + tl.exp(drain - floor_)
        result = acc * (shrink / total)[:, None]
        tl.store(out + (token * heads + head)[:, None] * D + channel[None, :], result, mask=mine[:, None])
    else:
        at = (token * splits + split) * heads + head
        tl.store(tops + at, top, mask=mine)
        tl.store(totals + at, total, mask=mine)
        if begin < end:
            tl.store(out + at[:, None] * D + channel[None, :], acc, mask=mine[:, None])


@triton.jit(do_not_specialize=["splits"])
def _merge(
    parts, tops, totals, sink, out, positions, freqs, heads, splits,
    D: tl.constexpr, SPLITS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    there = split < splits
    at = (token * splits + split) * heads + head
    top = tl.load(tops + at, mask=there, other=float("-inf"))
    total = tl.load(totals + at, mask=there, other=0.0)
    drain = tl.load(sink + head)
    highest = tl.maximum(tl.max(top, axis=0), drain)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp(top - highest)
    denominator = tl.sum(total * shrink, axis=0) + tl.exp(drain - highest)
    channel = tl.arange(0, D)
    result = tl.zeros((D,), tl.float32)
    for i in tl.range(splits):
        place = (token * splits + i) * heads + head
        # A split without keys left its part unwritten.
        own = tl.load(totals + place)
        if own != 0.0:
            result += tl.exp(tl.load(tops + place) - highest) * tl.load(parts + place * D + channel)
    result = result / denominator
    if PAIRS > 0:
        result = rotated(result, tl.load(positions + token), freqs, D, PAIRS, -1.0)
    tl.store(out + (token * heads + head) * D + channel, result)


def shape(tokens: int, heads: int, half: bool, v4: bool) -> tuple[int, int, int]:
    """(heads of a program, keys of a tile, warps): sums of all its heads and a tile of decoded keys share a
    multiprocessor's registers.
    """
    tile = (64 if v4 else 32) if half else 16
    return min(64 if half else 16, max(16, triton.next_power_of_2(heads))), tile, 8


def num_splits(tokens: int, blocks: int, key_tiles: int) -> int:
    """Into how many programs the keys of a token are cut, for each of so many blocks of heads."""
    if tokens >= LONG_STEP:
        return 1
    return max(1, min(key_tiles, PROGRAMS // (tokens * blocks)))


def sparse_attention(
    q: Tensor, sink: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, ratio: int,
    selected: Tensor | None, scale: float, half: bool, freqs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `engine.kernels.sparse_attention.sparse_attention`; with `half` products take bf16 operands."""
    check_dim(window)
    tokens, heads, dim = q.shape
    out = torch.empty_like(q)
    if not tokens:
        return out
    rows = window if compressed is None else compressed
    picks = 0 if selected is None else selected.shape[1]
    v4 = window.layout == "v4"
    pages = meta.page_table.shape[1]
    keys = WINDOW + {0: 0, C4_RATIO: picks, C128_RATIO: pages * (256 // C128_RATIO)}[ratio]
    long = attend_long.better(tokens, heads, keys)
    in_cuda = attend_few.takes(heads, dim, half, window, compressed) and (long or tokens <= attend_few.TOKENS)
    prompt = tokens > attend_few.TOKENS
    own = in_cuda and not (prompt and heads > attend_long.HEADS and keys >= attend_long.MANY_KEYS)
    own = own or not libraries.takes_attention(heads, dim, window)
    if half and backend("attention", rather_own=own) is not None:
        out = libraries.attention(q, sink, meta, window, compressed, ratio, selected, scale)
        return out if freqs is None else norm_rotate(out, None, None, meta.positions, freqs, inverse=True)
    if in_cuda:
        kernels = attend_long if long else attend_few
        kernels.attend(q.contiguous(), sink, meta, window, compressed, selected, keys, scale, freqs, out)
        return out
    block, tile, warps = shape(tokens, heads, half, v4)
    splits = num_splits(tokens, -(-heads // block), -(-keys // tile))
    whole = splits == 1
    parts = out if whole else torch.empty(tokens, splits, heads, dim, dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty(tokens, splits, heads, dtype=torch.float32, device=q.device) for _ in range(2))
    _partial[(tokens, splits, triton.cdiv(heads, block))](
        q.contiguous(), sink, meta.positions, meta.segment, meta.page_table, meta.swa_table, meta.oldest, pages,
        window.data, window.data.stride(0), window.rows_per_item, rows.data, rows.data.stride(0), rows.rows_per_item,
        selected, picks, parts, tops, totals, heads, scale,
        D=dim, HEADS=block, TILE=tile, RATIO=ratio, V4=v4, HALF=half, OLDEST=meta.oldest is not None, WHOLE=whole,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    if not whole:
        _merge[(tokens, heads)](
            parts, tops, totals, sink, out, meta.positions, freqs, heads, splits,
            D=dim, SPLITS=MAX_SPLITS, PAIRS=0 if freqs is None else freqs.shape[0], num_warps=4,
        )  # fmt: skip
        return out
    return out if freqs is None else norm_rotate(out, None, None, meta.positions, freqs, inverse=True)
