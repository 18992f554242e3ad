"""Matrix products whose rows do not know their neighbours.

T tokens, N outputs, K inputs, G groups.

The law of this file: row t of a result has the same bits whatever T is, whatever the other rows hold, and
however many threads work on it. Prefill in any chunking, batched decode and decode alone then agree exactly,
which is what lets one worker continue what another began.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 4
"""torch picks its fp32 product by the number of rows; every multiple of 4 rows gets the same one."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [N, K] laid out for `linear`. Make one with `prepare`, once, when the checkpoint is loaded."""

    outputs: int
    inputs: int
    data: Tensor

    @classmethod
    def prepare(cls, weight: Tensor) -> Matrix:
        """weight [N, K] bf16 or fp32, used as x @ weight.T; the result shares no memory with it."""
        if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"A matrix is [outputs, inputs] in bfloat16 or float32; got {list(weight.shape)} "
                f"{weight.dtype}. Dequantise FP8 and FP4 tensors first: both are exact in bfloat16."
            )
        outputs, inputs = weight.shape
        return cls(outputs, inputs, weight.detach().to(torch.float32, copy=True).contiguous())


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x [T, K] fp32 -> [T, N] fp32, products summed in fp32."""
    if x.shape[-1] != matrix.inputs:
        raise ValueError(f"rows of {x.shape[-1]} values do not fit a matrix of {matrix.inputs} inputs")
    return safe_rows(x, matrix.data)


def grouped_linear(x: Tensor, matrix: Matrix, groups: int) -> Tensor:
    """A block-diagonal product: group g sees its own K inputs and owns N of the outputs.

    x [T, G, K] fp32, matrix [G*N, K] -> [T, G*N] fp32
    """
    if x.dim() != 3 or x.shape[1] != groups or x.shape[2] != matrix.inputs or matrix.outputs % groups:
        raise ValueError(
            f"x {list(x.shape)} does not fit {groups} groups of a [{matrix.outputs}, {matrix.inputs}] matrix"
        )
    per_group = matrix.data.view(groups, matrix.outputs // groups, matrix.inputs)
    return torch.cat([safe_rows(x[:, g].contiguous(), per_group[g]) for g in range(groups)], dim=1)


def safe_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The reference product: x [T, K] fp32, weight [N, K] fp32 -> [T, N], under the law above."""
    tokens = x.shape[0]
    spare = -tokens % _TILE
    return F.linear(F.pad(x, (0, 0, 0, spare)) if spare else x, weight)[:tokens]
