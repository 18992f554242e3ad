"""The binding of engine/csrc/sample_rows.cu: tokens drawn where the logits lie, which so need not go to the host."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.device import cuda_products
from engine.kernels.topk_rows import TILE

CANDIDATES = 512
"""Of a row's tokens, that filters look at."""
PART_BYTES = 32
DRAWN, NOT_FINITE, UNSURE = range(3)
"""What became of a row: as in the source."""
_SPANS, _THREADS = 32, 256
_MOST_TOKENS = 262_144
"""Of a vocabulary, from which candidates are found."""


def takes(vocabulary: int) -> bool:
    """Whether `draw` takes rows of so many logits."""
    return cuda_products() and vocabulary % TILE == 0 and CANDIDATES < vocabulary <= _MOST_TOKENS


def draw(logits: Tensor, how: Tensor, filtered: bool) -> Tensor:
    """logits [S, V] fp32, how [S, 5] int64, on a GPU, as `Row` of the source -> [S, 2] int32: a token and DRAWN, or one
    that means nothing where logits are not finite, or where more than CANDIDATES tokens pass a row's filters.

    filtered: any of the rows has top_k, top_p or min_p.
    """
    from engine.kernels.device import topk_rows
    from engine.kernels.device.cuda import kernel, run

    count, vocabulary = logits.shape
    logits, how = logits.contiguous(), how.contiguous()
    parts = torch.empty(count * _SPANS, PART_BYTES, dtype=torch.uint8, device=logits.device)
    drawn = torch.empty(count, 2, dtype=torch.int32, device=logits.device)
    stride = ctypes.c_int64(logits.stride(0))
    run(
        kernel("sample_rows.cu", "penumbra_sample_parts"), count * _SPANS, _THREADS, 0,
        logits, stride, how, parts, ctypes.c_int32(vocabulary), waits=True,
    )  # fmt: skip
    candidates: Tensor | int = 0
    if filtered:
        lengths = torch.full((count,), vocabulary, dtype=torch.int64, device=logits.device)
        maxima = topk_rows.maxima_of(logits, lengths) if vocabulary > topk_rows.WHOLE else None
        candidates = topk_rows.choose(logits, maxima, lengths - 1, 1, CANDIDATES)
    run(
        kernel("sample_rows.cu", "penumbra_sample_rows"), count, CANDIDATES, 0,
        logits, stride, how, parts, candidates, drawn, waits=True,
    )  # fmt: skip
    return drawn
