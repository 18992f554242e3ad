"""Row codecs on the device: a program encodes one row straight into its page."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device.codec import bf16_bits, power_of_two, quantised, rotated, scale_exponent
from engine.kernels.device.early import await_previous, early
from engine.kernels.rows import GROUP, INDEX_DIM, LATENT_BYTES, LATENT_DIM, LATENT_SCALE_BYTES, NOPE_DIM, RowPool

EXACT, LATENT, INDEX = (tl.constexpr(code) for code in (0, 1, 2))
_GROUP, _NOPE, _NOPE_GROUPS = tl.constexpr(GROUP), tl.constexpr(NOPE_DIM), tl.constexpr(NOPE_DIM // GROUP)
_DATA, _SCALES, _INDEX = tl.constexpr(LATENT_BYTES), tl.constexpr(LATENT_SCALE_BYTES), tl.constexpr(INDEX_DIM)


def codec(pool: RowPool) -> int:
    """Which of EXACT, LATENT and INDEX the pool's rows are."""
    return 0 if pool.layout == "exact" else 1 if pool.kind == "latent" else 2


@triton.jit
def store_row(pool, item_stride, row_id, values, n, SIZE: tl.constexpr, CODEC: tl.constexpr):
    """Encode values [SIZE] fp32 as flat row `row_id`, an int64, of a pool with n rows an item; pool points at bytes."""
    item = pool + row_id // n * item_stride
    place = row_id % n
    at = tl.arange(0, SIZE)
    if CODEC == EXACT:
        tl.store((item + place * (SIZE * 4)).to(tl.pointer_type(tl.float32)) + at, values)
    elif CODEC == LATENT:
        groups = tl.reshape(values, (SIZE // _GROUP, _GROUP))
        group = tl.arange(0, SIZE // _GROUP)
        exponents = scale_exponent(tl.max(_poisoned(tl.abs(groups)), axis=1))
        codes = quantised(groups, exponents[:, None])
        where = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        nope = where < _NOPE
        tl.store(item + place * _DATA + where, codes, mask=nope)
        rope = (item + place * _DATA + _NOPE).to(tl.pointer_type(tl.uint16))
        tl.store(rope + (where - _NOPE), bf16_bits(groups), mask=where >= _NOPE)
        scales = tl.where(group < _NOPE_GROUPS, exponents + 127, 0).to(tl.uint8)
        tl.store(item + n * _DATA + place * _SCALES + group, scales)
    else:
        exponent = scale_exponent(tl.max(_poisoned(tl.abs(values)), axis=0))
        tl.store(item + place * _INDEX + at, quantised(values, exponent))
        scale = tl.where(exponent == 128, float("nan"), power_of_two(tl.minimum(exponent, 127)))
        tl.store((item + n * _INDEX + place * 4).to(tl.pointer_type(tl.float32)), scale)


@triton.jit
def _poisoned(magnitude):
    """NaN as infinity, which a maximum does not lose."""
    return tl.where(magnitude == magnitude, magnitude, float("inf"))


@triton.jit
def _write(pool, item_stride, n, row_ids, values, SIZE: tl.constexpr, CODEC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    store_row(
        pool, item_stride, tl.load(row_ids + row), tl.load(values + row * SIZE + tl.arange(0, SIZE)), n, SIZE, CODEC
    )


@triton.jit
def store_latent(
    pool, item_stride, n, row_ids, kv, kv_row, weight, positions, freqs, eps, row,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    """Encode row `row`, an int64, of raw projections kv: normed and turned."""
    at = tl.arange(0, SIZE)
    values = tl.load(kv + row * kv_row + at)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    values = rotated(tl.load(weight + at) * values, tl.load(positions + row), freqs, SIZE, PAIRS, 1.0)
    store_row(pool, item_stride, tl.load(row_ids + row), values, n, SIZE, CODEC)


@triton.jit
def _write_latents(
    pool, item_stride, n, row_ids, kv, kv_row, weight, positions, freqs, eps,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    await_previous()
    row = tl.program_id(0).to(tl.int64)
    store_latent(pool, item_stride, n, row_ids, kv, kv_row, weight, positions, freqs, eps, row, SIZE, PAIRS, CODEC)


def check_dim(pool: RowPool) -> None:
    """Raise ValueError for rows the kernels do not take."""
    if pool.dim & (pool.dim - 1) or pool.dim > 2 * LATENT_DIM:
        raise ValueError(
            f"the GPU kernels hold rows whose length is a power of two up to {2 * LATENT_DIM}; this pool's have "
            f"{pool.dim} values. Use --device cpu for such a model."
        )


def write_rows(pool: RowPool, rows: Tensor, values: Tensor) -> None:
    """As `engine.kernels.rows.write_rows`, shapes checked there."""
    check_dim(pool)
    _write[(len(rows),)](
        pool.data, pool.data.stride(0), pool.rows_per_item, rows.contiguous(), values.contiguous(),
        SIZE=pool.dim, CODEC=codec(pool), num_warps=4 if pool.dim > 128 else 1,
    )  # fmt: skip


def write_latents(
    pool: RowPool, rows: Tensor, kv: Tensor, weight: Tensor, positions: Tensor, freqs: Tensor, eps: float
) -> None:
    """As `engine.kernels.rows.write_latents`."""
    check_dim(pool)
    kv = kv if kv.stride(1) == 1 else kv.contiguous()
    _write_latents[(len(rows),)](
        pool.data, pool.data.stride(0), pool.rows_per_item, rows.contiguous(), kv, kv.stride(0), weight, positions,
        freqs, eps, SIZE=pool.dim, PAIRS=freqs.shape[0], CODEC=codec(pool), num_warps=4 if pool.dim > 128 else 1,
        **early(),
    )  # fmt: skip
