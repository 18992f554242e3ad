"""The k best of each row of scores.

T rows, R scores in a row at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64
"""Scores that share a maximum, where maxima are handed along."""


def topk_rows(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Places of the k highest scores of each row.

    scores   [T, R] float32   row t has lengths[t] scores; what lies behind them is not looked at
    lengths  [T] int64
    ->       [T, k] int32     ascending, then -1

    Exact: of equal scores the lower places are taken, and zeros are equal. NaN ranks with infinity.
    """
    if scores.dim() != 2 or scores.dtype != torch.float32 or lengths.shape != scores.shape[:1] or k < 1:
        raise ValueError(
            f"scores {scores.dtype} {list(scores.shape)} with lengths {list(lengths.shape)} and k = {k}: expected "
            "float32 [T, R], [T] and at least 1"
        )
    if scores.is_cuda:
        from engine.kernels.device import topk_rows as device

        return device.topk_rows(scores, lengths, k)
    chosen = torch.full((len(scores), k), -1, dtype=torch.int32)
    for row, length, out in zip(scores, lengths.tolist(), chosen, strict=True):
        values = torch.where(row[:length].isnan(), torch.inf, row[:length])
        best = values.sort(descending=True, stable=True).indices[:k]
        out[: len(best)] = best.sort().values
    return chosen
