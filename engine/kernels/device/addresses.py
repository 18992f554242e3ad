"""A step's addresses on the device: small numbers, but each torch operation on them is a launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device.early import await_previous, early
from wire.types import PAGE_TOKENS

_PAGE = tl.constexpr(PAGE_TOKENS)
_TOKENS = 32
"""Of a program."""
_SEGMENTS = 128
"""Room for so many at least, so that batches of any size run what was compiled for the first."""


@triton.jit(do_not_specialize=["tokens", "segments"], do_not_specialize_on_alignment=["starts", "counts"])
def _token_addresses(
    starts, counts, positions, segment, offsets, firsts, tokens, segments, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr
):
    b = tl.arange(0, SEGMENTS)
    there = b < segments
    count = tl.load(counts + b, mask=there, other=0).to(tl.int64)
    start = tl.load(starts + b, mask=there, other=0).to(tl.int64)
    ends = tl.cumsum(count, axis=0)
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    own = tl.sum(((ends[None, :] <= row[:, None]) & there[None, :]).to(tl.int32), axis=1)
    behind = tl.where(own[:, None] == b[None, :], (start - (ends - count))[None, :], 0)
    tl.store(positions + row, row + tl.sum(behind, axis=1), mask=row < tokens)
    tl.store(segment + row, own, mask=row < tokens)
    if tl.program_id(0) == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + b, ends.to(tl.int32), mask=there)
        tl.store(firsts + b, start, mask=there)


@triton.jit(do_not_specialize=["tokens", "pages"], do_not_specialize_on_alignment=["swa_table"])
def _window_rows(positions, segment, swa_table, rows, tokens, pages, TOKENS: tl.constexpr):
    await_previous()
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = t < tokens
    position = tl.load(positions + t, mask=here, other=0)
    own = tl.load(segment + t, mask=here, other=0)
    page = tl.load(swa_table + own * pages + position // _PAGE, mask=here, other=0).to(tl.int64)
    tl.store(rows + t, page * _PAGE + position % _PAGE, mask=here)


def token_addresses(starts: Tensor, counts: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `engine.kernels.addresses.token_addresses`."""
    segments, device = starts.shape[0], starts.device
    positions, firsts = (torch.empty(n, dtype=torch.int64, device=device) for n in (num_tokens, segments))
    segment, offsets = (torch.empty(n, dtype=torch.int32, device=device) for n in (num_tokens, segments + 1))
    _token_addresses[(max(1, triton.cdiv(num_tokens, _TOKENS)),)](
        starts.contiguous(), counts.contiguous(), positions, segment, offsets, firsts, num_tokens, segments,
        SEGMENTS=max(_SEGMENTS, triton.next_power_of_2(segments)), TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip
    return positions, segment, offsets, firsts


def window_rows(positions: Tensor, segment: Tensor, swa_table: Tensor) -> Tensor:
    """As `engine.kernels.addresses.window_rows`."""
    rows = torch.empty_like(positions)
    if len(rows):
        _window_rows[(triton.cdiv(len(rows), _TOKENS),)](
            positions, segment, swa_table.contiguous(), rows, len(rows), swa_table.shape[1], TOKENS=_TOKENS,
            num_warps=1, **early(),
        )  # fmt: skip
    return rows
