"""The binding of engine/csrc/mix_few.cu: the hyper-connections in front of a sublayer, for a few tokens."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.device import cuda_products

TOKENS = 16
"""So many go one after another through the weights a block holds; more are better off side by side."""
_COLUMNS, _WIDE, _THREADS, _SLOTS = 32, 512, 128, 34
"""As in the source."""


def takes(tokens: int, size: int) -> bool:
    return 0 < tokens <= TOKENS and size % (4 * _COLUMNS) == 0 and cuda_products()


def mix_in(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    iters: int, x: Tensor, post: Tensor, comb: Tensor,
) -> None:  # fmt: skip
    """As `engine.kernels.device.hyper_connections.mix_in`, into x [T, D], post [T, 4] and comb [T, 4, 4]."""
    from engine.kernels.device.cuda import kernel, run

    tokens, _, size = streams.shape
    parts = torch.empty(tokens, _SLOTS, size // _COLUMNS, dtype=torch.float32, device=streams.device)
    count, of = ctypes.c_int32, ctypes.c_float
    run(
        kernel("mix_few.cu", "penumbra_mix_partial"), size // _COLUMNS, _THREADS, 0,
        streams, fn, parts, count(tokens), count(size), waits=True,
    )  # fmt: skip
    run(
        kernel("mix_few.cu", "penumbra_mix_finish"), tokens * (-(-size // _WIDE) + 1), _THREADS, 0,
        parts, streams, base, scale, 0 if norm is None else norm, x, post, comb, count(size),
        of(rms_eps), of(hc_eps), count(iters), waits=True,
    )  # fmt: skip
