"""The binding of engine/csrc/mix_few.cu: the hyper-connections between sublayers, for a few tokens."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.device import cuda_products

TOKENS = 64
"""At most, each four of them by blocks of their own; more are better off with their products on tensor cores."""
BETWEEN_TOKENS = 16
"""That `mix_between` takes. On an H200 it was 27 us for 64, where `mix_out` and `mix_in` took 19; 4.1 and 7.1 for 4."""
SIZE = 8192
"""At most: a thread that finishes has all its parts on their way at once."""
_COLUMNS, _TOGETHER, _THREADS, _WIDE, _FINISHING, _SLOTS = 32, 4, 512, 256, 192, 34
"""As in the source."""


def takes(tokens: int, size: int) -> bool:
    return 0 < tokens <= TOKENS and size <= SIZE and size % (4 * _COLUMNS) == 0 and cuda_products()


def mix_in(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    x: Tensor, post: Tensor, logits: Tensor,
) -> None:  # fmt: skip
    """As `engine.kernels.device.hyper_connections.mix_in`, into x [T, D], post [T, 4] and comb's logits [T, 4, 4]."""
    parts = _partial("penumbra_mix_partial", streams, fn)
    _finish(parts, streams, base, scale, norm, rms_eps, hc_eps, x, post, logits)


def mix_between(
    made: Tensor, beside: Tensor | None, before: Tensor, before_post: Tensor, before_comb: Tensor, before_rounds: int,
    before_eps: float, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    streams: Tensor, x: Tensor, post: Tensor, logits: Tensor,
) -> None:  # fmt: skip
    """`mix_in` of the streams that a sublayer leaves, which go into streams [T, 4, D]: contiguous, like all of it.

    made [T, k, D] and beside [T, D] are what it made, in parts; before, before_post and before_comb what it began with.
    These three are read before the kernel that is queued last has ended. So it must not be the one they come from, but
    one that waits before it lets others begin, as every product does. before_comb is made doubly stochastic in so many
    rounds, or is so already if there are none.
    """
    from engine.kernels.device.cuda import kernel, run

    tokens, count, size = made.shape
    parts = _parts(streams)
    run(
        kernel("mix_few.cu", "penumbra_mix_between"), _blocks(streams), _THREADS, 0,
        made, ctypes.c_int32(count), 0 if beside is None else beside, before, before_post, before_comb,
        ctypes.c_int32(before_rounds), ctypes.c_float(before_eps), streams, fn, parts, ctypes.c_int32(tokens),
        ctypes.c_int32(size), waits=True,
    )  # fmt: skip
    _finish(parts, streams, base, scale, norm, rms_eps, hc_eps, x, post, logits)


def mix_out(
    made: Tensor, beside: Tensor | None, before: Tensor, post: Tensor, comb: Tensor, rounds: int, eps: float,
    streams: Tensor,
) -> None:  # fmt: skip
    """The streams that a sublayer leaves, as `mix_between` makes them, from any kernel's before, post and comb."""
    from engine.kernels.device.cuda import kernel, run

    tokens, count, size = made.shape
    run(
        kernel("mix_few.cu", "penumbra_mix_out"), _blocks(streams), _THREADS, 0,
        made, ctypes.c_int32(count), 0 if beside is None else beside, before, post, comb, ctypes.c_int32(rounds),
        ctypes.c_float(eps), streams, ctypes.c_int32(tokens), ctypes.c_int32(size), waits=True,
    )  # fmt: skip


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    x: Tensor,
) -> None:  # fmt: skip
    """As `engine.kernels.device.hyper_connections.collapse`, into x [T, D]."""
    parts = _partial("penumbra_collapse_partial", streams, fn)
    _finish(parts, streams, base, scale, norm, rms_eps, hc_eps, x, None, None)


def _blocks(streams: Tensor) -> int:
    """Of a kernel that makes parts, or streams."""
    tokens, _, size = streams.shape
    return -(-tokens // _TOGETHER) * (size // _COLUMNS)


def _parts(streams: Tensor) -> Tensor:
    tokens, _, size = streams.shape
    return torch.empty(tokens, _SLOTS, size // _COLUMNS, dtype=torch.float32, device=streams.device)


def _partial(name: str, streams: Tensor, fn: Tensor) -> Tensor:
    from engine.kernels.device.cuda import kernel, run

    tokens, _, size = streams.shape
    parts = _parts(streams)
    run(
        kernel("mix_few.cu", name), _blocks(streams), _THREADS, 0,
        streams, fn, parts, ctypes.c_int32(tokens), ctypes.c_int32(size), waits=True,
    )  # fmt: skip
    return parts


def _finish(
    parts: Tensor, streams: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    x: Tensor, post: Tensor | None, logits: Tensor | None,
) -> None:  # fmt: skip
    from engine.kernels.device.cuda import kernel, run

    tokens, _, size = streams.shape
    of_token = -(-size // _WIDE) + (post is not None)
    run(
        kernel("mix_few.cu", "penumbra_mix_finish"), tokens * of_token, _FINISHING, 0,
        parts, streams, base, scale, *(0 if t is None else t for t in (norm, x, post, logits)), ctypes.c_int32(size),
        ctypes.c_float(rms_eps), ctypes.c_float(hc_eps), waits=True,
    )  # fmt: skip
