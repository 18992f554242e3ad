"""The binding of engine/csrc/sample_rows.cu: tokens drawn where the logits lie, which so need not go to the host."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.device import cuda_products
from engine.kernels.sample import CANDIDATES
from engine.kernels.topk_rows import TILE

PART_BYTES = 32
_SPANS, _THREADS = 32, 256
_MOST_TOKENS = 262_144
"""Of a vocabulary, from which candidates are found."""


def takes(vocabulary: int) -> bool:
    """Whether `draw` takes rows of so many logits."""
    return cuda_products() and vocabulary % TILE == 0 and CANDIDATES < vocabulary <= _MOST_TOKENS


def draw(logits: Tensor, how: Tensor, filtered: bool, segment: Tensor | None, positions: Tensor | None) -> Tensor:
    """As `engine.kernels.sample.draw`."""
    from engine.kernels.device import topk_rows
    from engine.kernels.device.cuda import kernel, run

    count, vocabulary = logits.shape
    logits, how = logits.contiguous(), how.contiguous()
    parts = torch.empty(count * _SPANS, PART_BYTES, dtype=torch.uint8, device=logits.device)
    drawn = torch.empty(count, 2, dtype=torch.int32, device=logits.device)
    stride = ctypes.c_int64(logits.stride(0))
    by = (how, 0 if segment is None else segment, 0 if positions is None else positions)
    run(
        kernel("sample_rows.cu", "penumbra_sample_parts"), count * _SPANS, _THREADS, 0,
        logits, stride, *by, parts, ctypes.c_int32(vocabulary), waits=True,
    )  # fmt: skip
    candidates: Tensor | int = 0
    if filtered:
        lengths = torch.full((count,), vocabulary, dtype=torch.int64, device=logits.device)
        maxima = topk_rows.maxima_of(logits, lengths) if vocabulary > topk_rows.WHOLE else None
        candidates = topk_rows.choose(logits, maxima, lengths - 1, 1, CANDIDATES)
    run(
        kernel("sample_rows.cu", "penumbra_sample_rows"), count, CANDIDATES, 0,
        logits, stride, *by, parts, candidates, drawn, waits=True,
    )  # fmt: skip
    return drawn
