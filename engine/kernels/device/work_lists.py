"""The binding of engine/csrc/work_list.cu: work lists of many pairs in one kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.device import cuda_products

_THREADS, _WARPS = 512, 16


def takes(experts: int) -> bool:
    """Whether `work_list` is to be used, for so many experts."""
    return cuda_products() and shared_bytes(experts) <= 48 << 10


def shared_bytes(experts: int) -> int:
    return 4 * (experts + _WARPS)


def work_list(picks: Tensor, experts: int, block: int, room: int, blocks: int) -> tuple[Tensor, Tensor]:
    """As `engine.kernels.device.experts.work_list`, for so many blocks."""
    from engine.kernels.device.cuda import kernel, run

    members, owners = (torch.empty(n, dtype=torch.int32, device=picks.device) for n in (blocks * block, blocks))
    run(
        kernel("work_list.cu", "penumbra_work_list"), experts, _THREADS, shared_bytes(experts), picks.contiguous(),
        members, owners, *map(ctypes.c_int32, (picks.numel(), experts, blocks, block, room)), waits=True,
    )  # fmt: skip
    return members, owners
