"""The draft layer's states on the device: a program moves a part of one token's streams, or of one segment's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import StepMeta
from engine.kernels.device.early import await_previous, early
from engine.kernels.draft_state import HEADER
from wire.types import PAGE_TOKENS

_HEADER, _PAGE = tl.constexpr(HEADER), tl.constexpr(PAGE_TOKENS)
_BLOCK = 1024


@triton.jit
def _held(states, state_row, starts, swa_table, pages, seg):
    """A segment's start, the state that may be of the token in front of it, and whether it is."""
    start = tl.load(starts + seg)
    page = tl.maximum(start - 1, 0) // _PAGE
    held = states + tl.load(swa_table + seg * pages + page).to(tl.int64) * state_row
    return start, held, (start > 0) & (tl.load(held) == start.to(tl.float32))


@triton.jit(do_not_specialize=["tokens", "segments", "pages"], do_not_specialize_on_alignment=["swa_table"])
def _resume(
    streams, states, state_row, segment, offsets, starts, swa_table, before, oldest, tokens, segments, pages, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    await_previous()
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if n < tokens:
        seg = tl.load(segment + n)
        _, held, known = _held(states, state_row, starts, swa_table, pages, seg)
        begins = n == tl.load(offsets + seg)
        old = tl.load(held + _HEADER + at, mask=(at < width) & begins & known, other=0.0)
        new = tl.load(streams + (n - 1) * width + at, mask=(at < width) & (begins == 0), other=0.0)
        tl.store(before + n * width + at, tl.where(begins, old, new), mask=at < width)
    if (n < segments) & (tl.program_id(1) == 0):
        start, held, known = _held(states, state_row, starts, swa_table, pages, n)
        tl.store(oldest + n, tl.where(known, tl.load(held + 1).to(tl.int64), start + 1))


@triton.jit(do_not_specialize=["tokens", "segments", "pages"], do_not_specialize_on_alignment=["swa_table", "kept"])
def _keep(
    streams, states, state_row, positions, segment, offsets, swa_table, kept, oldest, rows, behind, tokens, segments,
    pages, width, BLOCK: tl.constexpr,
):  # fmt: skip
    await_previous()
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if n < tokens:
        seg, position = tl.load(segment + n), tl.load(positions + n)
        first = tl.load(oldest + seg)
        last = tl.load(offsets + seg) + tl.load(kept + seg) - 1
        page = tl.load(swa_table + seg * pages + position // _PAGE).to(tl.int64)
        told = (n <= last) & (page > 0) & ((position % _PAGE == _PAGE - 1) | (n == last))
        # What is not told leaves zeros in the sink's header: a state of no time.
        state = states + tl.where(told, page, 0) * state_row
        values = tl.load(streams + n * width + at, mask=at < width, other=0.0)
        tl.store(state + _HEADER + at, values, mask=(at < width) & told)
        if tl.program_id(1) == 0:
            i = tl.arange(0, _HEADER)
            header = tl.where(told, tl.where(i == 0, position + 1, tl.where(i == 1, first, 0)), 0)
            tl.store(state + i, header.to(tl.float32))
            row = page * _PAGE + position % _PAGE
            tl.store(rows + n, tl.where((n <= last) & (position >= first), row, 0))
    if n < segments:
        last = tl.maximum(tl.load(offsets + n) + tl.load(kept + n) - 1, 0).to(tl.int64)
        values = tl.load(streams + last * width + at, mask=at < width, other=0.0)
        tl.store(behind + n * width + at, values, mask=at < width)


def resume(streams: Tensor, states: Tensor, meta: StepMeta) -> tuple[Tensor, Tensor]:
    """As `engine.kernels.draft_state.resume`."""
    streams = streams.contiguous()
    tokens, segments, width = streams.shape[0], len(meta.starts), streams.shape[1] * streams.shape[2]
    before, oldest = torch.empty_like(streams), torch.empty_like(meta.starts)
    _resume[(max(tokens, segments), triton.cdiv(width, _BLOCK))](
        streams, states, states.stride(0), meta.segment, meta.offsets, meta.starts, meta.swa_table.contiguous(), before,
        oldest, tokens, segments, meta.swa_table.shape[1], width, BLOCK=_BLOCK, **early(),
    )  # fmt: skip
    return before, oldest


def keep(streams: Tensor, states: Tensor, meta: StepMeta, kept: Tensor, oldest: Tensor) -> tuple[Tensor, Tensor]:
    """As `engine.kernels.draft_state.keep`."""
    streams = streams.contiguous()
    tokens, segments, width = streams.shape[0], len(meta.starts), streams.shape[1] * streams.shape[2]
    rows = torch.empty_like(meta.positions)
    behind = torch.empty(segments, *streams.shape[1:], dtype=streams.dtype, device=streams.device)
    _keep[(max(tokens, segments), triton.cdiv(width, _BLOCK))](
        streams, states, states.stride(0), meta.positions, meta.segment, meta.offsets, meta.swa_table.contiguous(),
        kept, oldest, rows, behind, tokens, segments, meta.swa_table.shape[1], width, BLOCK=_BLOCK, **early(),
    )  # fmt: skip
    return rows, behind
