"""The checksum of a page: what proves that the bytes read are the bytes offered.

Definition. The bytes of one item, taken from every region of its class in order, are read as little-endian
unsigned 64-bit words w[0], w[1], ... counted on across regions. The checksum is

    sum over i of  w[i] * ((2 i + 1) * 0x9E3779B97F4A7C15)   modulo 2^64.

Every coefficient is odd, so a change confined to one word always shows. Coefficients differ, so words that
change places show too, unless all they differ in is lost with the carries (two words that differ in the top
bit alone, say). It detects torn, stale and foreign pages; it does not stop a forger.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.native import INT, POINTER

_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_CHECKSUMS = (POINTER, POINTER, POINTER, INT, POINTER, INT, POINTER, INT)


def item_checksums(regions: Sequence[Tensor], items: Sequence[int]) -> list[int]:
    """The checksum of each item, unsigned 64-bit.

    regions  [num_items, item_bytes] uint8 each, rows contiguous; item_bytes a multiple of 8, and may differ
    items    item numbers, the same in every region
    """
    for region in regions:
        if (
            region.dtype != torch.uint8
            or region.dim() != 2
            or region.stride(1) != 1
            or region.shape[1] % 8
            or region.device != regions[0].device
        ):
            raise ValueError(
                f"a region is [num_items, item_bytes] uint8, all on one device, with item_bytes a multiple of 8; "
                f"got {list(region.shape)} {region.dtype} on {region.device}, strides {region.stride()}"
            )
        if items and (min(items) < 0 or max(items) >= region.shape[0]):
            raise ValueError(f"items {min(items)} to {max(items)} of a region of {region.shape[0]} items")
    if not items or not regions:
        return [0] * len(items)
    if regions[0].is_cuda:
        from engine.kernels.device import checksum as device

        return [total * _MULTIPLIER & _MASK for total in device.weighted_sums(regions, items)]
    twin = native.function("penumbra_item_checksums", *_CHECKSUMS)
    if twin is not None:
        many, wanted = ctypes.c_int64 * len(regions), ctypes.c_int64 * len(items)
        out = (ctypes.c_uint64 * len(items))()
        twin(
            many(*(r.data_ptr() for r in regions)), many(*(r.stride(0) for r in regions)),
            many(*(r.shape[1] for r in regions)), len(regions), wanted(*items), len(items), out, native.threads(),
        )  # fmt: skip
        return list(out)
    return [_reference(regions, item) for item in items]


def _reference(regions: Sequence[Tensor], item: int) -> int:
    # Signed 64-bit products and sums wrap exactly as unsigned ones do; only the last step names the sign.
    total, first = 0, 0
    for region in regions:
        words = region[item].view(torch.int64)
        odd = 2 * torch.arange(first, first + len(words), dtype=torch.int64) + 1
        total += int((words * odd).sum())
        first += len(words)
    return total * _MULTIPLIER & _MASK
