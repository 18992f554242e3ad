"""Where a step's tokens lie: their positions, their segments, their rows of the window.

T tokens of B segments, P pages at most. No value is looked at, so all of it can be computed where the numbers lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wire.types import PAGE_TOKENS


def token_addresses(starts: Tensor, counts: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """counts [B] tokens of each sequence from starts [B] on, num_tokens in all.

    -> positions [T] int64, segment [T] int32, offsets [B + 1] int32 (as of StepMeta), and starts [B] as int64
    """
    if starts.is_cuda:
        from engine.kernels.device import addresses as device

        return device.token_addresses(starts, counts, num_tokens)
    starts, counts = starts.long(), counts.long()
    ends = counts.cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    segment = torch.repeat_interleave(counts, output_size=num_tokens)
    positions = torch.arange(num_tokens) + (starts - offsets[:-1])[segment]
    return positions, segment.int(), offsets.int(), starts


def window_rows(positions: Tensor, segment: Tensor, swa_table: Tensor) -> Tensor:
    """[T] int64: each token's own row in a window pool; a row of the sink where its page is not mapped.

    positions [T] int64, segment [T] int32, swa_table [B, P] int32
    """
    if positions.is_cuda:
        from engine.kernels.device import addresses as device

        return device.window_rows(positions, segment, swa_table)
    page = swa_table[segment.long(), positions // PAGE_TOKENS].long()
    return page * PAGE_TOKENS + positions % PAGE_TOKENS
