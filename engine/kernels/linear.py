"""Matrix products whose rows do not know their neighbours.

T tokens, N outputs, K inputs, G groups.

The law of this file: row t of a result has the same bits whatever T is, whatever the other rows hold, and
however many threads work on it. Prefill in any chunking, batched decode and decode alone then agree exactly,
which is what lets one worker continue what another began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import native

_TILE = 4
"""torch picks its fp32 product by the number of rows, on each processor differently: it is always asked for 4 rows."""
_PANEL = 32
"""Outputs the C++ product computes side by side."""
_LINEAR = (
    native.POINTER, native.INT, native.INT, native.POINTER, native.INT, native.INT, native.INT, native.INT,
    native.POINTER, native.INT,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [N, K] as the checkpoint holds it: for a GPU, which multiplies by it as it is."""

    codes: Tensor  # [N, K] uint8, e4m3
    scales: Tensor  # [ceil(N / 128), ceil(K / 128)] fp32

    def to(self, device: str) -> Fp8Weight:
        return Fp8Weight(self.codes.to(device), self.scales.to(device))


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [N, K] laid out for `linear`. Make one with `prepare`, once, when the checkpoint is loaded.

    data is fp32 [N, K] for the reference, what `pack` makes of the weight for the C++ product, or on a GPU the weight
    itself in fp32, bf16, or e4m3 codes with `scales`.
    """

    outputs: int
    inputs: int
    data: Tensor
    packed: bool
    scales: Tensor | None = None

    @property
    def half(self) -> bool:
        """Whether products take operands of 16 bits or less: on a GPU, unless the weight is fp32."""
        return self.data.is_cuda and self.data.dtype != torch.float32

    @classmethod
    def prepare(cls, weight: Tensor | Fp8Weight) -> Matrix:
        """weight [N, K] bf16 or fp32, used as x @ weight.T; the result shares no memory with it, except on a GPU."""
        if isinstance(weight, Fp8Weight):
            if not weight.codes.is_cuda:
                raise ValueError("an e4m3 weight is multiplied by on a GPU alone. Dequantise it first.")
            outputs, inputs = weight.codes.shape
            return cls(outputs, inputs, weight.codes.contiguous(), False, weight.scales.contiguous())
        if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"A matrix is [outputs, inputs] in bfloat16 or float32; got {list(weight.shape)} "
                f"{weight.dtype}. Dequantise FP8 and FP4 tensors first: both are exact in bfloat16."
            )
        outputs, inputs = weight.shape
        if weight.is_cuda:
            return cls(outputs, inputs, weight.detach().contiguous(), False)
        if native.library() is not None:
            return cls(outputs, inputs, pack(weight.detach()), True)
        return cls(outputs, inputs, weight.detach().to(torch.float32, copy=True).contiguous(), False)

    @property
    def dense(self) -> Tensor:
        """[N, K] fp32, whatever the layout; for the reference, not for a hot path."""
        return unpack(self.data, self.outputs) if self.packed else self.data


def stacked(weights: Sequence[Tensor | Fp8Weight]) -> list[Tensor | Fp8Weight]:
    """The same weights [., K]; if all are in bf16 on a GPU, one behind the other in memory, so that a product of many
    tokens may take them as one.
    """
    plain = [w for w in weights if isinstance(w, Tensor) and w.is_cuda and w.dtype == torch.bfloat16]
    if len(plain) < max(2, len(weights)):
        return list(weights)
    return list(torch.cat(plain).split([len(weight) for weight in plain]))


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x [T, K] fp32 -> [T, N] fp32, products summed in fp32."""
    if x.dim() != 2 or x.shape[1] != matrix.inputs:
        raise ValueError(f"x {list(x.shape)} does not fit a [{matrix.outputs}, {matrix.inputs}] matrix")
    return _product(x, matrix, 1)


def linears(x: Tensor, matrices: Sequence[Matrix]) -> list[Tensor]:
    """`linear` of one x and each matrix; on a GPU, where launches are what few tokens wait for, in one."""
    if not x.is_cuda:
        return [linear(x, matrix) for matrix in matrices]
    from engine.kernels.device import linear as device

    if wrong := [m for m in matrices if x.dim() != 2 or x.shape[1] != m.inputs]:
        raise ValueError(f"x {list(x.shape)} does not fit a [{wrong[0].outputs}, {wrong[0].inputs}] matrix")
    return device.products(x, [(matrix.data, matrix.scales) for matrix in matrices])


def grouped_linear(x: Tensor, matrix: Matrix, groups: int) -> Tensor:
    """A block-diagonal product: group g sees its own K inputs and owns N of the outputs.

    x [T, G, K] fp32, matrix [G*N, K] -> [T, G*N] fp32
    """
    if x.dim() != 3 or x.shape[1] != groups or x.shape[2] != matrix.inputs or matrix.outputs % groups:
        raise ValueError(
            f"x {list(x.shape)} does not fit {groups} groups of a [{matrix.outputs}, {matrix.inputs}] matrix"
        )
    return _product(x.flatten(1), matrix, groups)


def _product(x: Tensor, matrix: Matrix, groups: int) -> Tensor:
    """x [T, G*K], matrix [G*N, K] -> [T, G*N]."""
    if x.is_cuda:
        from engine.kernels.device import linear as device

        return device.product(x, matrix.data, matrix.scales, groups)
    twin = native.function("penumbra_linear", *_LINEAR) if matrix.packed else None
    per_group = matrix.outputs // groups
    if twin is None:
        blocks = matrix.dense.view(groups, per_group, matrix.inputs)
        parts = [safe_rows(part, block) for part, block in zip(x.chunk(groups, 1), blocks, strict=True)]
        return parts[0] if groups == 1 else torch.cat(parts, dim=1)
    x = fp32_rows(x)
    y = x.new_empty(x.shape[0], matrix.outputs)
    twin(
        x.data_ptr(), x.stride(0), x.shape[0], matrix.data.data_ptr(), matrix.data.dtype == torch.bfloat16,
        groups, per_group, matrix.inputs, y.data_ptr(), native.threads(),
    )  # fmt: skip
    return y


def fp32_rows(x: Tensor) -> Tensor:
    """x as the C++ kernels read it: fp32 on the CPU, the values of a row side by side (rows may have gaps)."""
    if x.dtype != torch.float32 or not x.is_cpu:
        raise ValueError(
            f"the CPU kernels compute in float32 on the CPU; got {x.dtype} on {x.device}. Convert it first."
        )
    return x if x.stride(-1) == 1 else x.contiguous()


def pack(weight: Tensor) -> Tensor:
    """weight [..., N, K] bf16 or fp32 -> panels [..., ceil(N / 32), K, 32], padded with zeros.

    In bf16 output i of a panel sits beside output 16 + i, so that the two are one 32-bit word.
    """
    *lead, outputs, inputs = weight.shape
    panels = F.pad(weight, (0, 0, 0, -outputs % _PANEL)).view(*lead, -1, _PANEL, inputs).transpose(-1, -2)
    if weight.dtype == torch.bfloat16:
        panels = panels.unflatten(-1, (2, _PANEL // 2)).transpose(-1, -2).flatten(-2)
    return panels.clone(memory_format=torch.contiguous_format)


def unpack(panels: Tensor, outputs: int) -> Tensor:
    """The inverse of `pack`, in fp32."""
    if panels.dtype == torch.bfloat16:
        panels = panels.unflatten(-1, (_PANEL // 2, 2)).transpose(-1, -2).flatten(-2)
    return panels.float().transpose(-1, -2).flatten(-3, -2)[..., :outputs, :].contiguous()


def safe_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The reference product: x [T, K] fp32, weight [N, K] fp32 -> [T, N], under the law above."""
    tokens = x.shape[0]
    spare = -tokens % _TILE
    tiles = (F.pad(x, (0, 0, 0, spare)) if spare else x).reshape(-1, _TILE, x.shape[1])
    return torch.bmm(tiles, weight.T.expand(len(tiles), -1, -1)).flatten(0, 1)[:tokens]
