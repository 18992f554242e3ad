"""The binding of engine/csrc/mix_few.cu: the hyper-connections between sublayers, for a few tokens."""

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
    parts = _partial("penumbra_mix_partial", streams, fn)
    _finish(parts, streams, base, scale, norm, rms_eps, hc_eps, iters, x, post, comb)


def mix_between(
    made: Tensor, beside: Tensor | None, before: Tensor, before_post: Tensor, before_comb: Tensor, fn: Tensor,
    base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float, iters: int, streams: Tensor,
    x: Tensor, post: Tensor, comb: Tensor,
) -> None:  # fmt: skip
    """`mix_in` of the streams that a sublayer leaves, which go into streams [T, 4, D]: contiguous, like all of it.

    made [T, k, D] and beside [T, D] are what it made, in parts; before, before_post and before_comb what it began with.
    These three must not come from the kernel that is queued last: they are read before it ends.
    """
    from engine.kernels.device.cuda import kernel, run

    tokens, count, size = made.shape
    parts = _parts(streams)
    run(
        kernel("mix_few.cu", "penumbra_mix_between"), size // _COLUMNS, _THREADS, 0,
        made, ctypes.c_int32(count), 0 if beside is None else beside, before, before_post, before_comb, streams, fn,
        parts, ctypes.c_int32(tokens), ctypes.c_int32(size), waits=True,
    )  # fmt: skip
    _finish(parts, streams, base, scale, norm, rms_eps, hc_eps, iters, x, post, comb)


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    x: Tensor,
) -> None:  # fmt: skip
    """As `engine.kernels.device.hyper_connections.collapse`, into x [T, D]."""
    parts = _partial("penumbra_collapse_partial", streams, fn)
    _finish(parts, streams, base, scale, norm, rms_eps, hc_eps, 0, x, None, None)


def _parts(streams: Tensor) -> Tensor:
    tokens, _, size = streams.shape
    return torch.empty(tokens, _SLOTS, size // _COLUMNS, dtype=torch.float32, device=streams.device)


def _partial(name: str, streams: Tensor, fn: Tensor) -> Tensor:
    from engine.kernels.device.cuda import kernel, run

    tokens, _, size = streams.shape
    parts = _parts(streams)
    run(
        kernel("mix_few.cu", name), size // _COLUMNS, _THREADS, 0,
        streams, fn, parts, ctypes.c_int32(tokens), ctypes.c_int32(size), waits=True,
    )  # fmt: skip
    return parts


def _finish(
    parts: Tensor, streams: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    iters: int, x: Tensor, post: Tensor | None, comb: Tensor | None,
) -> None:  # fmt: skip
    from engine.kernels.device.cuda import kernel, run

    tokens, _, size = streams.shape
    of_token = -(-size // _WIDE) + (comb is not None)
    run(
        kernel("mix_few.cu", "penumbra_mix_finish"), tokens * of_token, _THREADS, 0,
        parts, streams, base, scale, *(0 if t is None else t for t in (norm, x, post, comb)), ctypes.c_int32(size),
        ctypes.c_float(rms_eps), ctypes.c_float(hc_eps), ctypes.c_int32(iters), waits=True,
    )  # fmt: skip
