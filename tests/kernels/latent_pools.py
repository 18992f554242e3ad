"""Pools of latent rows that the attention kernels are tried on."""

from __future__ import annotations

import torch

from engine.kernels.rows import RowPool

WINDOW = 256
ROWS = {0: 64, 4: 64, 128: 2}
"""Of an item: of a window, and of the rows compressed by each ratio."""


def empty_pool(rows: int, items: int) -> RowPool:
    """Full of 0xff, codes and scales of NaN."""
    size = RowPool.item_bytes_for(rows, "latent", "v4", 512, 64)
    # A gap behind each item: their stride is not their size.
    memory = torch.full((items, size + 64), 0xFF, dtype=torch.uint8)
    return RowPool(memory[:, :size], rows, "latent", "v4", 512, 64)
