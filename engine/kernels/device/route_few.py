"""The binding of engine/csrc/route_few.cu: where a few tokens go, and the list of work for `few_tokens.py`.

The gate's products come in parts, one for each span of columns, which the second kernel adds as it reads them: so the
tokens are read by few blocks, though many share the reading of the gate.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.device import cuda_products

TOKENS = 64
_PAIRS, _MOST_PICKS, _MOST_EXPERTS = 512, 16, 1024
_THREADS, _SPAN, _EXPERTS, _TOGETHER = 256, 1024, 8, 8
"""As in the source; tokens of a block."""


def takes(tokens: int, gate: Tensor, k: int) -> bool:
    """Whether `route` takes so many tokens and picks of this gate [E, D]."""
    experts, size = gate.shape
    return (
        0 < tokens <= TOKENS
        and cuda_products()
        and gate.dtype == torch.float32
        and size % 128 == 0
        and 0 < k <= min(experts, _MOST_PICKS)
        and experts <= _MOST_EXPERTS
        and tokens * k <= _PAIRS
    )


def route(
    x: Tensor, gate: Tensor, bias: Tensor | None, table: Tensor | None, token_ids: Tensor | None, k: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """picks [T, k] int32, weights [T, k] fp32, members [B * 8] and owners [B] int32, B as `blocks` says.

    x [T, D] fp32, gate [E, D] fp32; either bias [E] fp32, or table [V, k] and token_ids [T] int64. The picks are those
    of `engine.kernels.experts.route_scored` and `route_hashed`, the list of work is that of
    `engine.kernels.device.experts.work_list` for blocks of 8 with room for T pairs where T is less.
    """
    from engine.kernels.device.cuda import kernel, run

    (tokens, size), experts = x.shape, gate.shape[0]
    spans = -(-size // _SPAN)
    x = x.contiguous()
    parts = torch.empty(spans, tokens, experts, dtype=torch.float32, device=x.device)
    picks = torch.empty(tokens, k, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=x.device)
    count = blocks(tokens, experts, k)
    members = torch.empty(count * _TOGETHER, dtype=torch.int32, device=x.device)
    owners = torch.empty(count, dtype=torch.int32, device=x.device)
    run(
        kernel("route_few.cu", f"penumbra_gate_{most(tokens)}"),
        -(-experts // _EXPERTS) * spans * -(-tokens // _TOGETHER), _THREADS, 0,
        x, gate, parts, *map(ctypes.c_int32, (tokens, experts, size)), waits=True,
    )  # fmt: skip
    steering = [0 if t is None else t.contiguous() for t in (bias, table, token_ids)]
    run(
        kernel("route_few.cu", f"penumbra_route_{values(experts)}"), 1, _THREADS, 0,
        parts, ctypes.c_int32(spans), *steering, picks, weights, members, owners,
        *map(ctypes.c_int32, (tokens, experts, k, count)), ctypes.c_float(scaling), waits=True,
    )  # fmt: skip
    return picks, weights, members, owners


def most(tokens: int) -> int:
    """Of the gate's kernels the one for so many tokens: a block takes up to 1, 2, 4 or 8 of them."""
    return min(_TOGETHER, 1 << (tokens - 1).bit_length())


def blocks(tokens: int, experts: int, k: int) -> int:
    """Blocks of work at most: one for each pair, or the full ones and one more for each expert."""
    pairs, room = tokens * k, min(tokens, _TOGETHER)
    return min(pairs, experts + pairs // room)


def values(experts: int) -> int:
    """Of the routing kernels the one for so many experts, by how many of them a lane scores: 8, 16 or 32."""
    return max(8, 1 << (-(-experts // 32) - 1).bit_length())
