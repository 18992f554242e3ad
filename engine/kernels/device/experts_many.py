"""The FP4 experts of many tokens, whose weights lie in the panels of `experts_few`.

Steps of many tokens are bound by arithmetic: some experts at a time are widened to bf16, exactly, and torch multiplies
each by the tokens that go to it, one grouped product for all of them. Where an expert's tokens begin is read back by
the host, once for a step: no step of so many tokens is part of a CUDA graph.

P pairs of a token and a pick of it, sorted by expert; E experts, D hidden, I an expert's inner size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device import experts_few
from engine.kernels.device.codec import operand

WIDE_BYTES = 2 << 30
"""Of widened weights that lie in memory at once."""
_STEP, _WORDS = (tl.constexpr(n) for n in (experts_few.STEP, experts_few.STEP_BYTES // 4))


@triton.jit
def _widen(panels, wide, steps, first, ROWS: tl.constexpr):
    """One step of a panel, 64 rows by 256 inputs -> wide [experts, panels * 64, K] bf16, rows as they lie in panels."""
    panel, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    four = tl.arange(0, _STEP // 4)  # inputs, which are four bytes of what one word unpacks to
    panels += ((first + panel) * steps + step) * 4 * _WORDS
    warp = row // 16 * _WORDS
    half, within = row % 16 // 8, row % 8
    group, second, quad = four // 8, four % 8 // 4, four % 4
    of_row, of_four = warp + within * 16 + half, group // 2 * 128 + quad * 4 + group % 2 * 2
    w = tl.load(panels + of_row[:, None] + of_four[None, :]).to(tl.uint32, bitcast=True)
    codes = tl.where(second[None, :] > 0, (w << 2) ^ (w >> 2), w) & 0x9C9C9C9C
    scales = tl.load(panels + (warp + 512 + half * 8 + within)[:, None] + (group // 4 * 16)[None, :])
    # 2^(code - 127) * 2^126: the bits of a weight, as fp32, are its value over 2^126.
    scale = (((scales >> (group % 4 * 8)[None, :]) & 255) + 126) << 23
    byte = tl.arange(0, 4).to(tl.uint32)
    code = codes[:, :, None] >> (8 * byte)[None, None, :]
    bits = (code & 0x80) << 24 | (code & 0x1C) << 20
    value = bits.to(tl.float32, bitcast=True) * scale.to(tl.float32, bitcast=True)[:, :, None]
    k = step * _STEP + 4 * four[:, None] + tl.arange(0, 4)[None, :]
    at = (panel * 64 + row)[:, None, None] * (steps * _STEP) + k[None, :, :]
    tl.store(wide + at, operand(value, True).to(tl.bfloat16))


def widened(panels: Tensor, first: int, last: int) -> Tensor:
    """Panels [E, N / 64, K / 256, 4, 2176] uint8 of experts [first, last) -> [last - first, N, K] bf16.

    Row 16 w + 8 h + r of a panel is row r of warp w's upper (h = 0) or lower ones: of `gate_up_panels` gate's or up's.
    Scales are 2^1 at most, as `experts.MAX_SCALE_CODE` says.
    """
    _, count, steps, *_ = panels.shape
    wide = torch.empty(last - first, count * 64, steps * experts_few.STEP, dtype=torch.bfloat16, device=panels.device)
    rows = 16
    grid = ((last - first) * count, steps, 64 // rows)
    _widen[grid](panels.view(torch.int32), wide, steps, first * count, ROWS=rows, num_warps=4)
    return wide


@triton.jit
def _swiglu_of_panels(both, h, inner, limit, BLOCK: tl.constexpr):
    """both [P, 2 I] bf16, gate and up in eights as panels have them -> h [P, I] bf16."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = both + pair * 2 * inner + i // 8 * 16 + i % 8
    gate = tl.minimum(tl.load(at, mask=i < inner, other=0.0).to(tl.float32), limit)
    up = tl.load(at + 8, mask=i < inner, other=0.0).to(tl.float32)
    made = gate / (1 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit)
    tl.store(h + pair * inner + i, operand(made, True).to(tl.bfloat16), mask=i < inner)


@triton.jit
def _weighed(made, order, weights, parts, hidden, BLOCK: tl.constexpr):
    """made [P, D] bf16 of sorted pairs -> parts [P, D] fp32, each in its own place and times its weight."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(made + row * hidden + at, mask=at < hidden, other=0.0).to(tl.float32)
    tl.store(parts + pair * hidden + at, values * tl.load(weights + pair), mask=at < hidden)


def routed_parts(
    x: Tensor, picks: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float, parts: Tensor
) -> None:
    """Into parts [P, D]: as `experts.routed_parts`, of panels; products take bf16 operands and give bf16."""
    (count, panels, *_), (tokens, k) = gate_up.shape, picks.shape
    inner, hidden, pairs = panels * 32, x.shape[1], tokens * k
    flat = picks.reshape(-1)
    order = torch.argsort(flat, stable=True)
    rows = x.to(torch.bfloat16)[order // k]
    ends = torch.bincount(flat, minlength=count).cumsum(0)
    bounds = [0, *ends.tolist()]
    h = torch.empty(pairs, inner, dtype=torch.bfloat16, device=x.device)
    made = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=x.device)
    together = max(1, WIDE_BYTES // (4 * inner * hidden))
    for first in range(0, count, together):
        last = min(first + together, count)
        begin, end = bounds[first], bounds[last]
        if begin == end:
            continue
        offsets = (ends[first:last] - begin).int()
        both = F.grouped_mm(rows[begin:end], widened(gate_up, first, last).transpose(1, 2), offs=offsets)
        _swiglu_of_panels[(end - begin, triton.cdiv(inner, 1024))](both, h[begin:end], inner, limit, BLOCK=1024)
        made[begin:end] = F.grouped_mm(h[begin:end], widened(down, first, last).transpose(1, 2), offs=offsets)
    _weighed[(pairs, triton.cdiv(hidden, 1024))](made, order, weights, parts, hidden, BLOCK=1024)
