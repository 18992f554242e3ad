"""Page checksums where the pages lie: a program sums a strip of an item's words, with wrapping 64-bit arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_STRIP = 4096
"""Words a program sums."""


@triton.jit
def _sums(region, item_stride, items, sums, words, first, STRIP: tl.constexpr, BLOCK: tl.constexpr):
    """sums [items, strips] int64: of word * (2 i + 1) over a strip of each item, i counting on from `first`."""
    strip = tl.program_id(1)
    item = tl.load(items + tl.program_id(0)).to(tl.int64)
    base = (region + item * item_stride).to(tl.pointer_type(tl.int64))
    total = tl.zeros((BLOCK,), tl.int64)
    for start in tl.range(strip * STRIP, tl.minimum(strip * STRIP + STRIP, words), BLOCK):
        i = start + tl.arange(0, BLOCK)
        word = tl.load(base + i, mask=i < words, other=0)
        total += word * (2 * (first + i.to(tl.int64)) + 1)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + strip, tl.sum(total, axis=0))


def weighted_sums(regions: Sequence[Tensor], items: Sequence[int]) -> list[int]:
    """Per item, the sum of word i * (2 i + 1) modulo 2^64, as a signed number. Waits for the device."""
    device = regions[0].device
    ids = torch.tensor(list(items), dtype=torch.int32, device=device)
    parts, first = [], 0
    for region in regions:
        words = region.shape[1] // 8
        strips = triton.cdiv(words, _STRIP)
        sums = torch.empty(len(items), strips, dtype=torch.int64, device=device)
        _sums[(len(items), strips)](region, region.stride(0), ids, sums, words, first, STRIP=_STRIP, BLOCK=1024)
        parts.append(sums.sum(dim=1))
        first += words
    return torch.stack(parts).sum(dim=0).tolist()
