"""Compressors: neighbouring tokens pooled into one KV row.

T tokens of B segments, d row size, R rows finished in a step. C4 pools eight tokens into a row every four
tokens, C128 pools 128 into a row every 128. What a later row still needs of a token is kept in a ring: C4's
lives in the token's SWA page, so a shared prefix carries it along; C128's belongs to the request slot.

Chunking never shows: rows(a + b) equals rows(a) then rows(b), bit for bit. All arithmetic is fp32.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO, C4_RING, C128_RATIO, C128_RING
from engine.kernels import native
from engine.kernels.linear import fp32_rows
from engine.kernels.native import FLOAT, INT, POINTER
from engine.kernels.norm_rope import hadamard, rms_norm, rotate
from engine.kernels.rows import RowPool, write_latents, write_rows

_PAGE = 256
_C4_PER_PAGE = _PAGE // C4_RATIO
_C128_PER_PAGE = _PAGE // C128_RATIO
_LANES = 16
"""Rows and rotated parts the C++ twins take are a multiple of this long; others keep to the reference."""
_C4 = (
    POINTER, INT, POINTER, INT, POINTER, POINTER, POINTER, INT, INT, INT, POINTER, POINTER, POINTER, POINTER,
    POINTER, INT, FLOAT, INT, POINTER, POINTER, POINTER, INT,
)  # fmt: skip
_C128 = (
    POINTER, INT, POINTER, INT, POINTER, POINTER, POINTER, INT, INT, INT, POINTER, POINTER, POINTER, POINTER,
    POINTER, INT, FLOAT, POINTER, POINTER, POINTER, INT,
)  # fmt: skip


class Latents(NamedTuple):
    """Rows of a layer's window: what `write_latents` takes, beside positions and frequencies."""

    pool: RowPool
    rows: Tensor  # [T] int64
    kv: Tensor  # [T, d]
    norm: Tensor  # [d]


class Pooling(NamedTuple):
    """Rows that a compressor makes, as `compress_c4` and `compress_c128` take them."""

    u: Tensor
    g: Tensor
    ape: Tensor
    norm: Tensor
    ring: Tensor
    out: RowPool


def write_c4(
    window: Latents, main: Pooling, index: Pooling, meta: StepMeta, freqs: Tensor, eps: float, rotate_keys: bool
) -> None:
    """All that a C4 layer keeps of a step: its window's rows, its compressed ones and the indexer's keys.

    For a few tokens on a GPU in one go; rotate_keys is of the index alone.
    """
    if window.kv.is_cuda:
        from engine.kernels.device import compress as device

        if device.takes_all(len(window.kv)):
            for of in (main, index):
                d = of.norm.shape[0]
                _check(of.u, of.g, of.ape, (C4_RATIO, 2 * d), of.ring, (C4_RING, 4 * d), meta)
            device.write_c4(window, main, index, meta, freqs, eps, rotate_keys)
            return
    write_latents(*window, meta.positions, freqs, eps)
    for of, turned in ((main, False), (index, rotate_keys)):
        compress_c4(of.u, of.g, of.ape, of.norm, of.ring, meta, freqs, eps, of.out, turned)


def write_c128(window: Latents, main: Pooling, meta: StepMeta, freqs: Tensor, eps: float) -> None:
    """All that a C128 layer keeps of a step: its window's rows and its compressed ones. As `write_c4`."""
    if window.kv.is_cuda:
        from engine.kernels.device import compress as device

        if device.takes_all(len(window.kv)):
            d = main.norm.shape[0]
            _check(main.u, main.g, main.ape, (C128_RATIO, d), main.ring, (C128_RING, 2 * d), meta)
            device.write_c128(window, main, meta, freqs, eps)
            return
    write_latents(*window, meta.positions, freqs, eps)
    compress_c128(main.u, main.g, main.ape, main.norm, main.ring, meta, freqs, eps, main.out)


def compress_c4(
    u: Tensor,
    g: Tensor,
    ape: Tensor,
    norm: Tensor,
    ring: Tensor,
    meta: StepMeta,
    freqs: Tensor,
    eps: float,
    out: RowPool,
    rotate_keys: bool,
) -> None:
    """Write the row of every block of four tokens that ends in this step, then remember its last tokens.

    u, g         [T, 2d] fp32     values, gates; the first d channels serve the NEXT block, the last d their own
    ape          [4, 2d] fp32     added to the gate by place in the block
    norm         [d] fp32
    ring         [num_swa_items, 16, 4d] fp32, updated in place: a token's row is
                 [u[:d] | u[d:] | gate[:d] | gate[d:]] at (its SWA page, position % 16)
    freqs        [rope_dim / 2] fp32; a row is rotated at the position of its block's first token
    out          row b of a sequence is row b % 64 of its page b // 64
    rotate_keys  Hadamard-rotate the rows, for an indexer whose keys are stored in FP8

    A page's ring keeps the page's own last 16 tokens, so any page boundary can be resumed from. The step's
    last 16 tokens are kept too: twice a row's reach, so that drafts may be taken back.
    """
    d = norm.shape[0]
    _check(u, g, ape, (C4_RATIO, 2 * d), ring, (C4_RING, 4 * d), meta)
    if u.is_cuda:
        from engine.kernels.device import compress as device

        device.compress_c4(u, g, ape, norm, ring, meta, freqs, eps, out, rotate_keys)
        return
    if _fits(d, freqs) and (twin := native.function("penumbra_compress_c4", *_C4)) is not None:
        u, g = fp32_rows(u), fp32_rows(g)
        segments, pages = meta.page_table.shape
        values = u.new_empty(u.shape[0] // C4_RATIO + segments, d)
        ids, count = meta.positions.new_empty(values.shape[0]), ctypes.c_int64()
        twin(
            u.data_ptr(), u.stride(0), g.data_ptr(), g.stride(0), ape.data_ptr(), norm.data_ptr(),
            ring.data_ptr(), d, segments, pages, meta.offsets.data_ptr(), meta.starts.data_ptr(),
            meta.page_table.data_ptr(), meta.swa_table.data_ptr(), freqs.data_ptr(), freqs.shape[0], eps,
            rotate_keys, values.data_ptr(), ids.data_ptr(), ctypes.byref(count), native.threads(),
        )  # fmt: skip
        if count.value:
            write_rows(out, ids[: count.value], values[: count.value])
        return
    tokens = torch.cat([u, g + ape[meta.positions % C4_RATIO]], dim=1)
    pooled, positions, rows, writes = [], [], [], []
    for b, (start, first, last) in enumerate(_segments(meta)):
        end = start + last - first
        oldest = max(0, start // C4_RATIO * C4_RATIO - C4_RATIO)
        behind = torch.arange(oldest, start)
        table = meta.swa_table[b].long()
        held = torch.cat([ring[table[behind // _PAGE], behind % C4_RING], tokens[first:last]])
        blocks = torch.arange(start // C4_RATIO, end // C4_RATIO)
        if len(blocks):
            own = blocks[:, None] * C4_RATIO + torch.arange(C4_RATIO) - oldest
            window = torch.cat([own - C4_RATIO, own], dim=1)  # [R, 8] places in `held`
            values, gates = held[window.clamp(min=0)].chunk(2, dim=-1)
            half = torch.tensor([0] * C4_RATIO + [1] * C4_RATIO)[None, :, None]
            values = torch.where(half == 0, values[..., :d], values[..., d:])
            gates = torch.where(half == 0, gates[..., :d], gates[..., d:])
            # Nothing comes before block 0: its first half weighs nothing.
            gates = gates.masked_fill((window < 0)[..., None], -torch.inf)
            pooled.append(_pool(values, gates))
            positions.append(blocks * C4_RATIO)
            rows.append(_page_rows(meta.page_table[b], blocks, _C4_PER_PAGE))
        at = torch.arange(start, end)
        at = at[(at >= end - C4_RING) | (at % _PAGE >= _PAGE - C4_RING)]
        writes.append((table[at // _PAGE], at % C4_RING, tokens[first + at - start]))
    _emit(pooled, positions, rows, norm, freqs, eps, out, rotate_keys)
    _remember(ring, writes)


def compress_c128(
    u: Tensor,
    g: Tensor,
    ape: Tensor,
    norm: Tensor,
    ring: Tensor,
    meta: StepMeta,
    freqs: Tensor,
    eps: float,
    out: RowPool,
) -> None:
    """Write the row of every block of 128 tokens that ends in this step, then remember its last 256 tokens.

    u, g   [T, d] fp32      values and gates
    ape    [128, d] fp32    added to the gate by place in the block
    norm   [d] fp32
    ring   [num_slots, 256, 2d] fp32, updated in place: a token's row is [u | gate] at (slot, position % 256)
    freqs  [rope_dim / 2] fp32; a row is rotated at the position of its block's first token
    out    row b of a sequence is row b % 2 of its page b // 2
    """
    d = norm.shape[0]
    _check(u, g, ape, (C128_RATIO, d), ring, (C128_RING, 2 * d), meta)
    if u.is_cuda:
        from engine.kernels.device import compress as device

        device.compress_c128(u, g, ape, norm, ring, meta, freqs, eps, out)
        return
    if _fits(d, freqs) and (twin := native.function("penumbra_compress_c128", *_C128)) is not None:
        u, g = fp32_rows(u), fp32_rows(g)
        segments, pages = meta.page_table.shape
        values = u.new_empty(u.shape[0] // C128_RATIO + segments, d)
        ids, count = meta.positions.new_empty(values.shape[0]), ctypes.c_int64()
        twin(
            u.data_ptr(), u.stride(0), g.data_ptr(), g.stride(0), ape.data_ptr(), norm.data_ptr(),
            ring.data_ptr(), d, segments, pages, meta.offsets.data_ptr(), meta.starts.data_ptr(),
            meta.page_table.data_ptr(), meta.slots.data_ptr(), freqs.data_ptr(), freqs.shape[0], eps,
            values.data_ptr(), ids.data_ptr(), ctypes.byref(count), native.threads(),
        )  # fmt: skip
        if count.value:
            write_rows(out, ids[: count.value], values[: count.value])
        return
    tokens = torch.cat([u, g + ape[meta.positions % C128_RATIO]], dim=1)
    pooled, positions, rows, writes = [], [], [], []
    for b, (start, first, last) in enumerate(_segments(meta)):
        end = start + last - first
        slot = int(meta.slots[b])
        oldest = start // C128_RATIO * C128_RATIO
        blocks = torch.arange(start // C128_RATIO, end // C128_RATIO)
        if len(blocks):
            held = torch.cat([ring[slot, torch.arange(oldest, start) % C128_RING], tokens[first:last]])
            window = blocks[:, None] * C128_RATIO + torch.arange(C128_RATIO) - oldest
            values, gates = held[window].chunk(2, dim=-1)
            pooled.append(_pool(values, gates))
            positions.append(blocks * C128_RATIO)
            rows.append(_page_rows(meta.page_table[b], blocks, _C128_PER_PAGE))
        at = torch.arange(max(start, end - C128_RING), end)
        writes.append((torch.full_like(at, slot), at % C128_RING, tokens[first + at - start]))
    _emit(pooled, positions, rows, norm, freqs, eps, out, rotate_keys=False)
    _remember(ring, writes)


def _check(
    u: Tensor, g: Tensor, ape: Tensor, ape_shape: tuple[int, int], ring: Tensor, item: tuple[int, int], meta: StepMeta
) -> None:
    wanted = (meta.positions.shape[0], ape_shape[1])
    if u.shape != wanted or g.shape != wanted or ape.shape != ape_shape or ring.shape[1:] != item:
        raise ValueError(
            f"u {list(u.shape)}, g {list(g.shape)}, ape {list(ape.shape)} and ring {list(ring.shape)} do not belong "
            f"together: expected {list(wanted)} twice, {list(ape_shape)} and [items, {item[0]}, {item[1]}]"
        )
    if not ring.is_contiguous() or ring.dtype != torch.float32 or not ape.is_contiguous():
        raise ValueError("a ring is contiguous fp32, updated in place, and ape is contiguous; copies would be lost")


def _fits(d: int, freqs: Tensor) -> bool:
    return d % _LANES == 0 and 2 * freqs.shape[0] % _LANES == 0


def _segments(meta: StepMeta) -> list[tuple[int, int, int]]:
    """(first position, first token row, end of token rows) of each segment."""
    offsets = meta.offsets.tolist()
    return list(zip(meta.starts.tolist(), offsets[:-1], offsets[1:], strict=True))


def _pool(values: Tensor, gates: Tensor) -> Tensor:
    """Softmax over the tokens, channel by channel: values, gates [R, tokens, d] -> [R, d]."""
    weights = torch.exp(gates - gates.amax(dim=1, keepdim=True))
    return (weights * values).sum(dim=1) / weights.sum(dim=1)


def _page_rows(pages: Tensor, blocks: Tensor, per_page: int) -> Tensor:
    return pages[blocks // per_page].long() * per_page + blocks % per_page


def _emit(
    pooled: list[Tensor],
    positions: list[Tensor],
    rows: list[Tensor],
    norm: Tensor,
    freqs: Tensor,
    eps: float,
    out: RowPool,
    rotate_keys: bool,
) -> None:
    if pooled:
        values = rotate(rms_norm(torch.cat(pooled), norm, eps), torch.cat(positions), freqs)
        write_rows(out, torch.cat(rows), hadamard(values) if rotate_keys else values)


def _remember(ring: Tensor, writes: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for items, places, values in writes:
        ring[items, places] = values
