"""Flash Compressor: pool, norm, rotate, quantise and store a compressed row in one pass, and keep the rings.

A program owns whole rows, so nothing of a row ever lies in memory in fp32. Every input is read once: the first half of
a token's C4 channels by the block behind it, the second by its own. Rings are written by the same launch where a step
is too short for a write to meet a read of it, else by a second one.

The rows of many tokens are made by CUDA C++ (`compress_long`), which writes as much of C4 rings as none of its rows may
read. It leaves the last tokens of each segment, and of the page that one begins in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO, C4_RING, C128_RATIO, C128_RING
from engine.kernels.device import compress_long, cuda_products
from engine.kernels.device.codec import hadamard_row, rotated
from engine.kernels.device.early import await_previous, early
from engine.kernels.device.rows import check_dim, codec, store_latent, store_row
from engine.kernels.rows import RowPool

if TYPE_CHECKING:
    from engine.kernels.compress import Latents, Pooling

_PAGE = tl.constexpr(256)
_C4_RING, _C128_RING = tl.constexpr(C4_RING), tl.constexpr(C128_RING)
_C4, _C128 = tl.constexpr(C4_RATIO), tl.constexpr(C128_RATIO)
SHORT_STEP = 8
"""Steps of up to this many tokens write rings in the same launch: a C4 row reaches back 7 tokens, and a ring has 16, so
with more of one sequence it might find what was written for a later one."""
_STRIP = 8
"""Tokens of a C128 row that are on their way at once."""


@triton.jit
def _keep_c4(u, g, u_row, g_row, ape, ring, t, position, seg, swa_table, pages, D: tl.constexpr):
    """Token t's [u | g + ape] into the ring of its SWA page."""
    page = tl.load(swa_table + seg * pages + position // _PAGE).to(tl.int64)
    into = ring + (page * _C4_RING + position % _C4_RING) * (4 * D)
    at = tl.arange(0, 2 * D)
    tl.store(into + at, tl.load(u + t * u_row + at))
    tl.store(into + 2 * D + at, tl.load(g + t * g_row + at) + tl.load(ape + position % _C4 * (2 * D) + at))


@triton.jit
def _remember_c4(u, g, u_row, g_row, ape, ring, t, position, seg, offsets, starts, swa_table, pages, D: tl.constexpr):
    """Keep token t if it is among the last 16 of the step or page."""
    end = tl.load(starts + seg) + tl.load(offsets + seg + 1) - tl.load(offsets + seg)
    if (position >= end - _C4_RING) | (position % _PAGE >= _PAGE - _C4_RING):
        _keep_c4(u, g, u_row, g_row, ape, ring, t, position, seg, swa_table, pages, D)


@triton.jit
def _c4_token(
    t, u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, swa_table, pages, freqs,
    eps, pool, item_stride, per_item, scale,
    D: tl.constexpr, STEPS: tl.constexpr, PAIRS: tl.constexpr, ROTATE_KEYS: tl.constexpr, CODEC: tl.constexpr,
    REMEMBER: tl.constexpr,
):  # fmt: skip
    position = tl.load(positions + t)
    seg = tl.load(segment + t)
    if position % _C4 == _C4 - 1:
        start, first = tl.load(starts + seg), tl.load(offsets + seg)
        k = tl.arange(0, 2 * _C4)
        s = position - (2 * _C4 - 1) + k
        here = s >= start
        behind = (s >= 0) & (s < start)
        channel = (k >= _C4).to(tl.int32)[:, None] * D + tl.arange(0, D)[None, :]
        row = (first + s - start)[:, None]
        values = tl.load(u + row * u_row + channel, mask=here[:, None], other=0.0)
        gates = tl.load(g + row * g_row + channel, mask=here[:, None], other=0.0)
        gates += tl.load(ape + (k % _C4)[:, None] * (2 * D) + channel)
        page = tl.load(swa_table + seg * pages + s // _PAGE, mask=behind, other=0).to(tl.int64)
        kept = ring + ((page * _C4_RING + s % _C4_RING) * (4 * D))[:, None] + channel
        values += tl.load(kept, mask=behind[:, None], other=0.0)
        gates = tl.where(behind[:, None], tl.load(kept + 2 * D, mask=behind[:, None], other=0.0), gates)
        # Nothing comes before block 0: its first half weighs nothing.
        gates = tl.where((s >= 0)[:, None], gates, float("-inf"))
        weights = tl.exp(gates - tl.max(gates, axis=0)[None, :])
        pooled = tl.sum(weights * values, axis=0) / tl.sum(weights, axis=0)
        pooled = pooled * tl.rsqrt(tl.sum(pooled * pooled, axis=0) / D + eps)
        pooled = tl.load(norm + tl.arange(0, D)) * pooled
        pooled = rotated(pooled, position - (_C4 - 1), freqs, D, PAIRS, 1.0)
        if ROTATE_KEYS:
            pooled = hadamard_row(pooled, D, STEPS) * scale
        block = position // _C4
        item = tl.load(page_table + seg * pages + block // (_PAGE // _C4)).to(tl.int64)
        store_row(pool, item_stride, item * per_item + block % (_PAGE // _C4), pooled, per_item, D, CODEC)
    if REMEMBER:
        _remember_c4(u, g, u_row, g_row, ape, ring, t, position, seg, offsets, starts, swa_table, pages, D)


@triton.jit(do_not_specialize=["pages", "tokens"])
def _c4(
    u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, swa_table, pages, freqs, eps,
    pool, item_stride, per_item, tokens, scale,
    D: tl.constexpr, STEPS: tl.constexpr, PAIRS: tl.constexpr, ROTATE_KEYS: tl.constexpr, CODEC: tl.constexpr,
    ROWS: tl.constexpr, REMEMBER: tl.constexpr,
):  # fmt: skip
    await_previous()
    for r in tl.range(ROWS):
        t = tl.program_id(0).to(tl.int64) * ROWS + r
        if t < tokens:
            _c4_token(
                t, u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, swa_table,
                pages, freqs, eps, pool, item_stride, per_item, scale, D, STEPS, PAIRS, ROTATE_KEYS, CODEC, REMEMBER,
            )  # fmt: skip


@triton.jit(do_not_specialize=["pages"])
def _ring_c4(u, g, u_row, g_row, ape, ring, positions, segment, offsets, starts, swa_table, pages, D: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    position, seg = tl.load(positions + t), tl.load(segment + t)
    _remember_c4(u, g, u_row, g_row, ape, ring, t, position, seg, offsets, starts, swa_table, pages, D)


@triton.jit(do_not_specialize=["pages"])
def _ends_c4(u, g, u_row, g_row, ape, ring, offsets, starts, swa_table, pages, D: tl.constexpr):
    """What `compress_long` leaves of a segment: its last 16 tokens, and before them those of the page it begins in."""
    await_previous()
    seg, i = tl.program_id(0), tl.program_id(1)
    start, first = tl.load(starts + seg), tl.load(offsets + seg).to(tl.int64)
    last = tl.load(offsets + seg + 1).to(tl.int64)
    if i >= _C4_RING:
        last = tl.minimum(last - _C4_RING, first + (start // _PAGE + 1) * _PAGE - start)
    t = last - 1 - i % _C4_RING
    position = start + t - first
    if (t >= first) & ((i < _C4_RING) | (position % _PAGE >= _PAGE - _C4_RING)):
        _keep_c4(u, g, u_row, g_row, ape, ring, t, position, seg, swa_table, pages, D)


@triton.jit
def _keep_c128(u, g, u_row, g_row, ape, ring, t, position, seg, slots, D: tl.constexpr):
    """Token t's [u | g + ape] into the ring of its request."""
    slot = tl.load(slots + seg).to(tl.int64)
    into = ring + (slot * _C128_RING + position % _C128_RING) * (2 * D)
    at = tl.arange(0, D)
    tl.store(into + at, tl.load(u + t * u_row + at))
    tl.store(into + D + at, tl.load(g + t * g_row + at) + tl.load(ape + position % _C128 * D + at))


@triton.jit
def _remember_c128(u, g, u_row, g_row, ape, ring, t, position, seg, offsets, starts, slots, D: tl.constexpr):
    end = tl.load(starts + seg) + tl.load(offsets + seg + 1) - tl.load(offsets + seg)
    if position >= end - _C128_RING:
        _keep_c128(u, g, u_row, g_row, ape, ring, t, position, seg, slots, D)


@triton.jit
def _c128_token(
    t, u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, slots, pages, freqs, eps,
    pool, item_stride, per_item,
    D: tl.constexpr, PAIRS: tl.constexpr, CODEC: tl.constexpr, STRIP: tl.constexpr, REMEMBER: tl.constexpr,
):  # fmt: skip
    position = tl.load(positions + t)
    seg = tl.load(segment + t)
    if position % _C128 == _C128 - 1:
        start, first = tl.load(starts + seg), tl.load(offsets + seg)
        slot = tl.load(slots + seg).to(tl.int64)
        channel = tl.arange(0, D)[None, :]
        top = tl.full((D,), float("-inf"), tl.float32)
        total = tl.zeros((D,), tl.float32)
        weighed = tl.zeros((D,), tl.float32)
        for strip in tl.range(0, _C128, STRIP):
            k = strip + tl.arange(0, STRIP)
            s = position - (_C128 - 1) + k
            here = (s >= start)[:, None]
            row = (first + s - start)[:, None]
            kept = ring + ((slot * _C128_RING + s % _C128_RING) * (2 * D))[:, None] + channel
            values = tl.load(u + row * u_row + channel, mask=here, other=0.0)
            gates = tl.load(g + row * g_row + channel, mask=here, other=0.0)
            gates += tl.load(ape + k[:, None] * D + channel)
            behind = (s < start)[:, None]
            values += tl.load(kept, mask=behind, other=0.0)
            gates = tl.where(behind, tl.load(kept + D, mask=behind, other=0.0), gates)
            higher = tl.maximum(top, tl.max(gates, axis=0))
            weights = tl.exp(gates - higher[None, :])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, axis=0)
            weighed = weighed * shrink + tl.sum(weights * values, axis=0)
            top = higher
        pooled = weighed / total
        pooled = pooled * tl.rsqrt(tl.sum(pooled * pooled, axis=0) / D + eps)
        pooled = tl.load(norm + tl.arange(0, D)) * pooled
        pooled = rotated(pooled, position - (_C128 - 1), freqs, D, PAIRS, 1.0)
        block = position // _C128
        item = tl.load(page_table + seg * pages + block // (_PAGE // _C128)).to(tl.int64)
        store_row(pool, item_stride, item * per_item + block % (_PAGE // _C128), pooled, per_item, D, CODEC)
    if REMEMBER:
        _remember_c128(u, g, u_row, g_row, ape, ring, t, position, seg, offsets, starts, slots, D)


@triton.jit(do_not_specialize=["pages", "tokens"])
def _c128(
    u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, slots, pages, freqs, eps,
    pool, item_stride, per_item, tokens,
    D: tl.constexpr, PAIRS: tl.constexpr, CODEC: tl.constexpr, ROWS: tl.constexpr, STRIP: tl.constexpr,
    REMEMBER: tl.constexpr,
):  # fmt: skip
    await_previous()
    for r in tl.range(ROWS):
        t = tl.program_id(0).to(tl.int64) * ROWS + r
        if t < tokens:
            _c128_token(
                t, u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, slots, pages,
                freqs, eps, pool, item_stride, per_item, D, PAIRS, CODEC, STRIP, REMEMBER,
            )  # fmt: skip


@triton.jit
def _ring_c128(u, g, u_row, g_row, ape, ring, positions, segment, offsets, starts, slots, D: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    position, seg = tl.load(positions + t), tl.load(segment + t)
    _remember_c128(u, g, u_row, g_row, ape, ring, t, position, seg, offsets, starts, slots, D)


@triton.jit
def _ends_c128(u, g, u_row, g_row, ape, ring, offsets, starts, slots, D: tl.constexpr):
    """A segment's last 256 tokens, into its request's ring."""
    await_previous()
    seg = tl.program_id(0)
    first, last = tl.load(offsets + seg).to(tl.int64), tl.load(offsets + seg + 1).to(tl.int64)
    t = last - 1 - tl.program_id(1)
    if t >= first:
        _keep_c128(u, g, u_row, g_row, ape, ring, t, tl.load(starts + seg) + t - first, seg, slots, D)


@triton.jit(do_not_specialize=["pages"])
def _write_c4(
    kv, kv_row, kv_norm, rows, window, window_stride, window_rows,
    u, g, u_row, g_row, ape, norm, ring, pool, item_stride, per_item,
    index_u, index_g, index_u_row, index_g_row, index_ape, index_norm, index_ring, keys, key_stride, key_rows, scale,
    positions, segment, offsets, starts, page_table, swa_table, pages, freqs, eps,
    D: tl.constexpr, KEY_D: tl.constexpr, KEY_STEPS: tl.constexpr, PAIRS: tl.constexpr, ROTATE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CODEC: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A token's row of the window, of the C4 rows, and of the index keys: each in a program of its own."""
    await_previous()
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _c4_token(
            t, u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, swa_table, pages,
            freqs, eps, pool, item_stride, per_item, 1.0, D, 0, PAIRS, False, CODEC, True,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        _c4_token(
            t, index_u, index_g, index_u_row, index_g_row, index_ape, index_norm, index_ring, positions, segment,
            offsets, starts, page_table, swa_table, pages, freqs, eps, keys, key_stride, key_rows, scale, KEY_D,
            KEY_STEPS, PAIRS, ROTATE_KEYS, KEYS, True,
        )  # fmt: skip
    else:
        store_latent(
            window, window_stride, window_rows, rows, kv, kv_row, kv_norm, positions, freqs, eps, t, D, PAIRS, WINDOW
        )


@triton.jit(do_not_specialize=["pages"])
def _write_c128(
    kv, kv_row, kv_norm, rows, window, window_stride, window_rows,
    u, g, u_row, g_row, ape, norm, ring, pool, item_stride, per_item,
    positions, segment, offsets, starts, page_table, slots, pages, freqs, eps,
    D: tl.constexpr, PAIRS: tl.constexpr, WINDOW: tl.constexpr, CODEC: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    await_previous()
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _c128_token(
            t, u, g, u_row, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, slots, pages,
            freqs, eps, pool, item_stride, per_item, D, PAIRS, CODEC, STRIP, True,
        )  # fmt: skip
    else:
        store_latent(
            window, window_stride, window_rows, rows, kv, kv_row, kv_norm, positions, freqs, eps, t, D, PAIRS, WINDOW
        )


def compress_c4(
    u: Tensor, g: Tensor, ape: Tensor, norm: Tensor, ring: Tensor, meta: StepMeta, freqs: Tensor, eps: float,
    out: RowPool, rotate_keys: bool,
) -> None:  # fmt: skip
    """As `engine.kernels.compress.compress_c4`, shapes checked there."""
    check_dim(out)
    d, tokens = norm.shape[0], u.shape[0]
    u, g = _rows(u), _rows(g)
    segments, short = meta.starts.shape[0], tokens <= SHORT_STEP
    long = compress_long.takes(u, g, ape, norm, ring, freqs, out, rotate_keys)
    if long:
        compress_long.compress(u, g, ape, norm, ring, meta, freqs, eps, out, rotate_keys)
    else:
        rows = 1 if short else C4_RATIO
        _c4[(triton.cdiv(tokens, rows),)](
            u, g, u.stride(0), g.stride(0), ape, norm, ring, meta.positions, meta.segment, meta.offsets, meta.starts,
            meta.page_table, meta.swa_table, meta.page_table.shape[1], freqs, eps,
            out.data, out.data.stride(0), out.rows_per_item, tokens, d**-0.5,
            D=d, STEPS=d.bit_length() - 1, PAIRS=freqs.shape[0], ROTATE_KEYS=rotate_keys, CODEC=codec(out),
            ROWS=rows, REMEMBER=short, num_warps=4 if d > 128 else 1, **early(),
        )  # fmt: skip
    if long and segments * 2 * C4_RING < tokens:
        _ends_c4[(segments, 2 * C4_RING)](
            u, g, u.stride(0), g.stride(0), ape, ring, meta.offsets, meta.starts, meta.swa_table,
            meta.page_table.shape[1], D=d, num_warps=2, **early(),
        )  # fmt: skip
    elif not short:
        _ring_c4[(tokens,)](
            u, g, u.stride(0), g.stride(0), ape, ring, meta.positions, meta.segment, meta.offsets, meta.starts,
            meta.swa_table, meta.page_table.shape[1], D=d, num_warps=2,
        )  # fmt: skip


def compress_c128(
    u: Tensor, g: Tensor, ape: Tensor, norm: Tensor, ring: Tensor, meta: StepMeta, freqs: Tensor, eps: float,
    out: RowPool,
) -> None:  # fmt: skip
    """As `engine.kernels.compress.compress_c128`, shapes checked there."""
    check_dim(out)
    d, tokens = norm.shape[0], u.shape[0]
    u, g = _rows(u), _rows(g)
    segments, short = meta.starts.shape[0], tokens <= SHORT_STEP
    if compress_long.takes(u, g, ape, norm, ring, freqs, out):
        compress_long.compress(u, g, ape, norm, ring, meta, freqs, eps, out)
    else:
        # One row closes in any 128 tokens of a sequence, so a program looks at that many.
        rows = 1 if short else 32
        _c128[(triton.cdiv(tokens, rows),)](
            u, g, u.stride(0), g.stride(0), ape, norm, ring, meta.positions, meta.segment, meta.offsets, meta.starts,
            meta.page_table, meta.slots, meta.page_table.shape[1], freqs, eps,
            out.data, out.data.stride(0), out.rows_per_item, tokens, D=d, PAIRS=freqs.shape[0], CODEC=codec(out),
            ROWS=rows, STRIP=_STRIP, REMEMBER=short, num_warps=4, **early(),
        )  # fmt: skip
    if segments * C128_RING < tokens:
        _ends_c128[(segments, C128_RING)](
            u, g, u.stride(0), g.stride(0), ape, ring, meta.offsets, meta.starts, meta.slots, D=d, num_warps=2,
            **early(),
        )  # fmt: skip
    elif not short:
        _ring_c128[(tokens,)](
            u, g, u.stride(0), g.stride(0), ape, ring, meta.positions, meta.segment, meta.offsets, meta.starts,
            meta.slots, D=d, num_warps=2,
        )  # fmt: skip


def takes_all(tokens: int) -> bool:
    """Whether `write_c4` and `write_c128` take so many tokens."""
    return 0 < tokens <= SHORT_STEP and cuda_products()


def write_c4(
    window: Latents, main: Pooling, index: Pooling, meta: StepMeta, freqs: Tensor, eps: float, rotate_keys: bool
) -> None:
    """As `engine.kernels.compress.write_c4`, for no more than SHORT_STEP tokens; shapes checked there."""
    pages = meta.page_table.shape[1]
    key = index.norm.shape[0]
    _write_c4[(window.kv.shape[0], 3)](
        *_latents(window), *_pooling(main), *_pooling(index), key**-0.5, meta.positions, meta.segment, meta.offsets,
        meta.starts, meta.page_table, meta.swa_table, pages, freqs, eps,
        D=main.norm.shape[0], KEY_D=key, KEY_STEPS=key.bit_length() - 1, PAIRS=freqs.shape[0], ROTATE_KEYS=rotate_keys,
        WINDOW=codec(window.pool), CODEC=codec(main.out), KEYS=codec(index.out), num_warps=4, **early(),
    )  # fmt: skip


def write_c128(window: Latents, main: Pooling, meta: StepMeta, freqs: Tensor, eps: float) -> None:
    """As `engine.kernels.compress.write_c128`, for no more than SHORT_STEP tokens; shapes checked there."""
    _write_c128[(window.kv.shape[0], 2)](
        *_latents(window), *_pooling(main), meta.positions, meta.segment, meta.offsets, meta.starts, meta.page_table,
        meta.slots, meta.page_table.shape[1], freqs, eps, D=main.norm.shape[0], PAIRS=freqs.shape[0],
        WINDOW=codec(window.pool), CODEC=codec(main.out), STRIP=_STRIP, num_warps=4, **early(),
    )  # fmt: skip


def _latents(of: Latents) -> tuple[object, ...]:
    check_dim(of.pool)
    kv, pool = _rows(of.kv), of.pool
    return kv, kv.stride(0), of.norm, of.rows.contiguous(), pool.data, pool.data.stride(0), pool.rows_per_item


def _pooling(of: Pooling) -> tuple[object, ...]:
    check_dim(of.out)
    u, g, out = _rows(of.u), _rows(of.g), of.out
    return u, g, u.stride(0), g.stride(0), of.ape, of.norm, of.ring, out.data, out.data.stride(0), out.rows_per_item


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
