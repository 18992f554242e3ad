"""The bytes of a row: how one region of a pool stores latents and indexer keys, and the codec of both layouts.

Layout `exact` keeps each row as `dim` float32 values, rows back to back, and loses nothing.

Layout `v4` is what production kernels read. A page item of n rows holds all data first, then all scales:

    latent  i * 576               448 e4m3 values, then 64 bfloat16 values (the rope channels) of row i
            n * 576 + i * 8       7 scale bytes, one per 64 e4m3 values, and a pad byte
            item                  rounded up to a multiple of 576 bytes
    index   i * 128               128 e4m3 values of row i
            n * 128 + i * 4       one float32 scale

A scale is the smallest power of two that brings max(amax, 1e-4) to at most 448; a latent's scale byte is its
biased exponent. Values are divided by it, clamped to +-448 and rounded to the nearest e4m3, ties to even; rope
channels are rounded to bfloat16 the same way. Values that share a scale with a NaN or an infinity are stored
as NaN under a NaN scale, so that what was broken stays visibly broken.

R rows, D values in a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.norm_rope import latent

Kind = Literal["latent", "index"]
Layout = Literal["v4", "exact"]

LATENT_DIM = 512
ROPE_DIM = 64
INDEX_DIM = 128
NOPE_DIM = LATENT_DIM - ROPE_DIM
GROUP = 64
"""e4m3 values of a latent that share one scale."""
LATENT_BYTES = NOPE_DIM + 2 * ROPE_DIM
LATENT_SCALE_BYTES = NOPE_DIM // GROUP + 1
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
_E4M3_NAN = 0x7F
_NAN_EXPONENT = 255 - 127


class _NativePool(ctypes.Structure):
    """A row pool as `struct Pool` of engine/csrc/rows.h reads it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("item_stride", ctypes.c_int64),
        ("rows_per_item", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("codec", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class RowPool:
    """One region of a pool, seen as rows. Flat row id = item * rows_per_item + offset in the item."""

    data: Tensor  # [num_items, item_bytes] uint8; items are evenly spaced, each in one piece
    rows_per_item: int  # SWA 256, C4 and C4 index 64, C128 2
    kind: Kind
    layout: Layout
    dim: int  # values in a row: head_dim, or index_head_dim
    rope_dim: int  # trailing channels of a latent kept in bfloat16; an index row has none to tell apart
    described: _NativePool = field(init=False, repr=False, compare=False)  # for C++; shares the memory of `data`

    def __post_init__(self) -> None:
        item_bytes = self.item_bytes_for(self.rows_per_item, self.kind, self.layout, self.dim, self.rope_dim)
        data = self.data
        if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != item_bytes:
            raise ValueError(
                f"a {self.layout} {self.kind} pool of {self.rows_per_item} rows of {self.dim} values keeps items of "
                f"{item_bytes} bytes; its memory is {data.dtype} {list(data.shape)}. "
                "Allocate it with RowPool.item_bytes_for()."
            )
        if data.stride(1) != 1 or data.stride(0) < item_bytes:
            raise ValueError("a row pool's items overlap or lie in pieces; row addresses count on whole items")
        codec = 0 if self.layout == "exact" else 1 if self.kind == "latent" else 2
        view = _NativePool(data.data_ptr(), data.stride(0), self.rows_per_item, self.dim, codec)
        object.__setattr__(self, "described", view)

    @property
    def address(self) -> int:
        """Where C++ kernels find the pool's description."""
        return ctypes.addressof(self.described)

    @property
    def num_rows(self) -> int:
        return self.data.shape[0] * self.rows_per_item

    @staticmethod
    def item_bytes_for(rows: int, kind: Kind, layout: Layout, dim: int, rope_dim: int) -> int:
        """Bytes of an item of `rows` rows, padding included. Raises ValueError for a shape v4 does not have."""
        if layout == "exact":
            return rows * dim * 4
        if kind == "latent":
            if (dim, rope_dim) != (LATENT_DIM, ROPE_DIM):
                raise ValueError(
                    f"the v4 layout stores latents of {LATENT_DIM} values with {ROPE_DIM} rope channels, not {dim} "
                    f"with {rope_dim}; its byte offsets are fixed. Use kv_layout='exact' for such a model."
                )
            return -(-rows * (LATENT_BYTES + LATENT_SCALE_BYTES) // LATENT_BYTES) * LATENT_BYTES
        if dim != INDEX_DIM:
            raise ValueError(
                f"the v4 layout stores indexer keys of {INDEX_DIM} values, not {dim}; its byte offsets are fixed. "
                "Use kv_layout='exact' for such a model."
            )
        return rows * (INDEX_DIM + 4)


def write_rows(pool: RowPool, rows: Tensor, values: Tensor) -> None:
    """Encode rows into the pool.

    rows    [R] int64        flat row ids; only rows of item 0, the sink, may repeat
    values  [R, dim] float32
    """
    _check(pool, rows)
    if values.dtype != torch.float32 or tuple(values.shape) != (len(rows), pool.dim):
        raise ValueError(
            f"values are {values.dtype} {list(values.shape)}; the pool takes float32 [{len(rows)}, {pool.dim}]"
        )
    if not len(rows):
        return
    if pool.data.is_cuda:
        from engine.kernels.device import rows as device

        device.write_rows(pool, rows, values)
    elif twin := _native("penumbra_write_rows"):
        rows, values = rows.contiguous(), values.contiguous()
        twin(pool.address, rows.data_ptr(), values.data_ptr(), len(rows), native.threads())
    elif pool.layout == "exact":
        _scatter(pool, _at(pool, rows, pool.dim * 4, 0), values.contiguous().view(torch.uint8))
    elif pool.kind == "latent":
        groups, exponents = _quantise(values[:, :NOPE_DIM].reshape(len(rows), NOPE_DIM // GROUP, GROUP))
        rope = values[:, NOPE_DIM:].to(torch.bfloat16).view(torch.uint8)
        data = torch.cat([groups.reshape(len(rows), NOPE_DIM), rope], dim=1)
        scales = torch.cat([(exponents + 127).to(torch.uint8), rows.new_zeros(len(rows), 1).byte()], dim=1)
        _scatter(pool, _at(pool, rows, LATENT_BYTES, 0), data)
        _scatter(pool, _at(pool, rows, LATENT_SCALE_BYTES, pool.rows_per_item * LATENT_BYTES), scales)
    else:
        data, exponents = _quantise(values.reshape(len(rows), 1, INDEX_DIM))
        scales = torch.where(exponents == _NAN_EXPONENT, torch.nan, torch.ldexp(torch.ones(len(rows), 1), exponents))
        _scatter(pool, _at(pool, rows, INDEX_DIM, 0), data.reshape(len(rows), INDEX_DIM))
        _scatter(pool, _at(pool, rows, 4, pool.rows_per_item * INDEX_DIM), scales.view(torch.uint8))


def write_latents(
    pool: RowPool, rows: Tensor, kv: Tensor, weight: Tensor, positions: Tensor, freqs: Tensor, eps: float
) -> None:
    """Encode what `latent` makes of raw projections kv [R, dim]; rows as in `write_rows`."""
    if not kv.is_cuda or not len(rows):
        write_rows(pool, rows, latent(kv, weight, positions, freqs, eps))
        return
    _check(pool, rows)
    from engine.kernels.device import rows as device

    device.write_latents(pool, rows, kv, weight, positions, freqs, eps)


def read_rows(pool: RowPool, rows: Tensor) -> Tensor:
    """Decode rows: [R] int64 flat row ids -> [R, dim] float32, exactly what the bytes say.

    No step on a GPU asks for it: its kernels decode rows as they attend to them. So the reference serves there.
    """
    _check(pool, rows)
    if not pool.data.is_cuda and (twin := _native("penumbra_read_rows")):
        rows, values = rows.contiguous(), torch.empty(len(rows), pool.dim)
        twin(pool.address, rows.data_ptr(), values.data_ptr(), len(rows), native.threads())
        return values
    if pool.layout == "exact":
        return _gather(pool, _at(pool, rows, pool.dim * 4, 0), pool.dim * 4).view(torch.float32)
    if pool.kind == "latent":
        data = _gather(pool, _at(pool, rows, LATENT_BYTES, 0), LATENT_BYTES)
        start = pool.rows_per_item * LATENT_BYTES
        exponents = _gather(pool, _at(pool, rows, LATENT_SCALE_BYTES, start), LATENT_SCALE_BYTES - 1).int() - 127
        nope = data[:, :NOPE_DIM].contiguous().view(torch.float8_e4m3fn).float()
        nope = torch.ldexp(nope.view(len(rows), NOPE_DIM // GROUP, GROUP), exponents[:, :, None])
        rope = data[:, NOPE_DIM:].contiguous().view(torch.bfloat16).float()
        return torch.cat([nope.view(len(rows), NOPE_DIM), rope], dim=1)
    data = _gather(pool, _at(pool, rows, INDEX_DIM, 0), INDEX_DIM)
    scales = _gather(pool, _at(pool, rows, 4, pool.rows_per_item * INDEX_DIM), 4).view(torch.float32)
    return data.view(torch.float8_e4m3fn).float() * scales


def _quantise(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[R, G, n] float32 -> e4m3 bytes [R, G, n] and the exponents of their powers of two [R, G] int32."""
    amax = groups.abs().amax(dim=-1)
    broken = ~torch.isfinite(amax)
    mantissa, exponents = torch.frexp(amax.clamp_min(AMAX_FLOOR) / E4M3_MAX)  # mantissa in [0.5, 1)
    # frexp gives the power of two just above the quotient; an exact power of two is its own ceiling.
    exponents = torch.where(broken, _NAN_EXPONENT, exponents - (mantissa == 0.5).int())
    scaled = torch.ldexp(groups, -exponents[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(broken[..., None], _E4M3_NAN, codes).to(torch.uint8), exponents


def _at(pool: RowPool, rows: Tensor, stride_bytes: int, start_bytes: int) -> Tensor:
    """Byte address of each row's part that lies `start_bytes` into its item, `stride_bytes` a row."""
    n = pool.rows_per_item
    return rows // n * pool.data.stride(0) + rows % n * stride_bytes + start_bytes


def _flat(pool: RowPool) -> Tensor:
    """The pool's memory from its first item's first byte to its last item's last."""
    items, item_bytes = pool.data.shape
    return pool.data.as_strided(((items - 1) * pool.data.stride(0) + item_bytes,), (1,))


def _gather(pool: RowPool, at: Tensor, num_bytes: int) -> Tensor:
    return _flat(pool)[at[:, None] + torch.arange(num_bytes, device=at.device)]


def _scatter(pool: RowPool, at: Tensor, data: Tensor) -> None:
    _flat(pool)[at[:, None] + torch.arange(data.shape[1])] = data


def _native(name: str) -> Callable[..., None] | None:
    return native.function(name, native.POINTER, native.POINTER, native.POINTER, native.INT, native.INT)


def _check(pool: RowPool, rows: Tensor) -> None:
    if pool.data.device != rows.device:
        raise ValueError(f"the pool is on {pool.data.device} and the row ids on {rows.device}; they must be together")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"row ids are {rows.dtype} {list(rows.shape)}; they must be int64 [R]")
