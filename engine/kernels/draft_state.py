"""What the draft layer keeps of a step beside its rows: engine/model/mtp.py says what it is and why.

T tokens of B segments, D hidden. No value is looked at here, so that a GPU need not be waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.kernels.addresses import window_rows
from wire.types import PAGE_TOKENS

HEADER = 4
"""Numbers before the streams in a state; float32 holds positions exactly."""


def resume(streams: Tensor, states: Tensor, meta: StepMeta) -> tuple[Tensor, Tensor]:
    """The streams [T, 4, D] of the token before each, and the first position [B] int64 with a row in each segment.

    streams [T, 4, D] of the step's tokens, states [items, HEADER + 4D]
    """
    if streams.is_cuda:
        from engine.kernels.device import draft_state as device

        return device.resume(streams, states, meta)
    # Row T is for segments without tokens, which begin there.
    before = torch.cat([streams[-1:], streams])
    first = meta.offsets[:-1].long()
    page = (meta.starts - 1).clamp(min=0) // PAGE_TOKENS
    held = states[meta.swa_table.gather(1, page[:, None])[:, 0].long()]
    known = (meta.starts > 0) & (held[:, 0] == meta.starts)
    before[first] = torch.where(known[:, None], held[:, HEADER:], 0.0).view(-1, *streams.shape[1:])
    return before[:-1], torch.where(known, held[:, 1].long(), meta.starts + 1)


def keep(streams: Tensor, states: Tensor, meta: StepMeta, kept: Tensor, oldest: Tensor) -> tuple[Tensor, Tensor]:
    """Write the states of the first kept [B] tokens of each segment, whose rows begin at oldest [B].

    -> rows [T] int64 of the window where keys of the tokens go, the sink's if they do not stay
       streams [B, 4, D] behind each segment's last kept token
    """
    if streams.is_cuda:
        from engine.kernels.device import draft_state as device

        return device.keep(streams, states, meta, kept, oldest)
    segment, place = meta.segment.long(), torch.arange(len(streams))
    last = meta.offsets[:-1].long() + kept - 1
    stays = place <= last[segment]
    rows = window_rows(meta.positions, meta.segment, meta.swa_table)
    written = stays & (meta.positions >= oldest[segment])
    told = stays & (rows >= PAGE_TOKENS)
    told &= (meta.positions % PAGE_TOKENS == PAGE_TOKENS - 1) | (place == last[segment])
    header = torch.zeros(len(streams), HEADER)
    header[:, 0] = (meta.positions + 1) * told
    header[:, 1] = oldest[segment]
    states[rows * told // PAGE_TOKENS] = torch.cat([header, streams.flatten(1)], dim=1)
    return rows * written, streams[last]
