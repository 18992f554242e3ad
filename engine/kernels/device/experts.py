"""Mixture of experts on the device: routing, a work list by expert, and three products over it.

The work list gathers the (token, pick) pairs of an expert into blocks, so that an expert's weights are read once for
all tokens of a block. Blocks that are not needed end at once; how many there may be is known from the shapes.
T tokens, k picks of E experts, P = T * k pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device import experts_few, experts_some, few_tokens, work_lists
from engine.kernels.device.codec import exact, operand
from engine.kernels.device.early import await_previous, early
from engine.kernels.device.libraries import HummingExperts

FP32, BF16, FP4 = (tl.constexpr(kind) for kind in (0, 1, 2))
MAX_SCALE_CODE = 128
"""Largest UE8M0 code of an FP4 group that the kernels take: they fold 2^126 into the scale, which bf16 must hold."""


@triton.jit
def _swiglu(gate, up, limit):
    gate = tl.minimum(gate, limit)
    return gate / (1 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit)


@triton.jit(do_not_specialize=["count"])
def _swiglu_rows(gate, up, y, count, limit, BLOCK: tl.constexpr):
    await_previous()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g, u = tl.load(gate + at, mask=inside, other=0.0), tl.load(up + at, mask=inside, other=0.0)
    tl.store(y + at, _swiglu(g, u, limit), mask=inside)


@triton.jit
def _route(
    z, bias, table, token_ids, picks, weights, experts, scaling,
    EXPERTS: tl.constexpr, K: tl.constexpr, HASHED: tl.constexpr,
):  # fmt: skip
    """z [T, E] gate products -> picks and weights of one token."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    inside = e < experts
    x = tl.load(z + token * experts + e, mask=inside, other=0.0)
    # log1p(small): what 1 + small lost in rounding is put right by the quotient.
    small = tl.exp(-tl.abs(x))
    more = 1 + small
    log1p = tl.where(more == 1, small, tl.log(more) * (small / tl.where(more == 1, 1.0, more - 1)))
    scores = tl.sqrt(tl.maximum(x, 0.0) + log1p)
    if HASHED:
        row = tl.load(token_ids + token) * K
        total = 0.0
        for j in tl.static_range(K):
            pick = tl.load(table + row + j)
            total += tl.sum(tl.where(e == pick, scores, 0.0), axis=0)
        for j in tl.static_range(K):
            pick = tl.load(table + row + j)
            weight = tl.sum(tl.where(e == pick, scores, 0.0), axis=0)
            tl.store(picks + token * K + j, pick.to(tl.int32))
            tl.store(weights + token * K + j, weight / (total + 1e-20) * scaling)
    else:
        steered = tl.where(inside, scores + tl.load(bias + e, mask=inside, other=0.0), float("-inf"))
        # A token whose scores are not numbers still picks K experts; its result is not a number either.
        steered = tl.where(inside & (steered != steered), float("inf"), steered)
        total = 0.0
        left = steered
        for _ in tl.static_range(K):
            best = tl.max(left, axis=0)
            pick = tl.min(tl.where((left == best) & inside, e, EXPERTS), axis=0)
            total += tl.sum(tl.where(e == pick, scores, 0.0), axis=0)
            left = tl.where(e == pick, float("-inf"), left)
        left = steered
        for j in tl.static_range(K):
            best = tl.max(left, axis=0)
            pick = tl.min(tl.where((left == best) & inside, e, EXPERTS), axis=0)
            weight = tl.sum(tl.where(e == pick, scores, 0.0), axis=0)
            left = tl.where(e == pick, float("-inf"), left)
            tl.store(picks + token * K + j, pick)
            tl.store(weights + token * K + j, weight / (total + 1e-20) * scaling)


@triton.jit(do_not_specialize=["pairs", "blocks", "room"])
def _work_list(picks, members, owners, pairs, blocks, room, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """For few pairs, all in one program: pair i goes behind those of lower experts and behind earlier ones of its own.

    members [blocks * BLOCK] int32  pair of each place, or `pairs` where none, as behind the first `room` of a block
    owners  [blocks] int32          expert of each block, or -1
    """
    place = tl.arange(0, 2 * PAIRS)
    for start in tl.range(0, blocks * BLOCK, 2 * PAIRS):
        tl.store(members + start + place, pairs, mask=start + place < blocks * BLOCK)
    tl.store(owners + place, -1, mask=place < blocks)
    tl.debug_barrier()  # what follows overwrites some of that
    i = tl.arange(0, PAIRS)
    expert = tl.load(picks + i, mask=i < pairs, other=1 << 20)
    same = expert[None, :] == expert[:, None]
    earlier = i[None, :] < i[:, None]
    rank = tl.sum((same & earlier).to(tl.int32), axis=1)
    first = rank == 0
    # Blocks before an expert's own: those of every lower expert, counted where its first pair stands.
    size = tl.sum(same.to(tl.int32), axis=1)
    needed = tl.where(first & (i < pairs), (size + room - 1) // room, 0)
    lower = expert[None, :] < expert[:, None]
    before = tl.sum(tl.where(lower, needed[None, :], 0), axis=1)
    block = before + rank // room
    tl.store(members + block * BLOCK + rank % room, i, mask=i < pairs)
    tl.store(owners + block, expert, mask=(i < pairs) & (rank % room == 0))


@triton.jit
def _fp4_half(codes, scale):
    """[N, C] int32 e2m1 codes (4 bits) times scale [N, C] that carries 2^126 more -> fp32 values, exact in bf16."""
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * scale


@triton.jit
def _half_product(
    total, x, x_rows, here, weight, scales, out, mine, start, inputs,
    STEP: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """total [OUT, TOK] plus weight[out, start : start + STEP] times x of these rows."""
    if KIND == FP4:
        half = start // 2 + tl.arange(0, STEP // 2)
        packed = tl.load(weight + out[:, None] * (inputs // 2) + half[None, :], mask=mine[:, None], other=0).to(
            tl.int32
        )
        group = start // 32 + tl.arange(0, STEP // 32)
        code = tl.load(scales + out[:, None] * (inputs // 32) + group[None, :], mask=mine[:, None], other=0).to(
            tl.int32
        )
        # 2^(code - 127) * 2^126, for codes up to MAX_SCALE_CODE.
        scale = ((code + 126) << 23).to(tl.float32, bitcast=True)
        wide = tl.reshape(tl.broadcast_to(scale[:, :, None], (OUT, STEP // 32, 16)), (OUT, STEP // 2))
        even = tl.load(x + x_rows[None, :] + 2 * half[:, None], mask=here[None, :], other=0.0)
        odd = tl.load(x + x_rows[None, :] + 2 * half[:, None] + 1, mask=here[None, :], other=0.0)
        total = tl.dot(exact(_fp4_half(packed & 15, wide), True), operand(even, True), total)
        total = tl.dot(exact(_fp4_half(packed >> 4, wide), True), operand(odd, True), total)
    else:
        k = start + tl.arange(0, STEP)
        inside = k < inputs
        w = tl.load(weight + out[:, None] * inputs + k[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        xs = tl.load(x + x_rows[None, :] + k[:, None], mask=here[None, :] & inside[:, None], other=0.0)
        if KIND == BF16:
            total = tl.dot(exact(w.to(tl.float32), True), operand(xs, True), total)
        else:
            total = tl.dot(w, xs, total, input_precision="tf32x3")
    return total


@triton.jit(do_not_specialize=["pairs"])
def _gate_up(
    x, gate, gate_scales, up, up_scales, members, owners, y, pairs, picks_per_token, hidden, inner, limit,
    KIND: tl.constexpr, OUT: tl.constexpr, TOK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y [P, I]: swiglu(gate x, up x) of every pair."""
    block = tl.program_id(1)
    expert = tl.load(owners + block).to(tl.int64)
    if expert >= 0:
        pair = tl.load(members + block * TOK + tl.arange(0, TOK))
        here = pair < pairs
        x_rows = (pair // picks_per_token).to(tl.int64) * hidden
        row = tl.program_id(0) * OUT + tl.arange(0, OUT)
        mine = row < inner
        a, b = tl.zeros((OUT, TOK), tl.float32), tl.zeros((OUT, TOK), tl.float32)
        out = row.to(tl.int64) + expert * inner
        for start in tl.range(0, hidden, STEP):
            a = _half_product(a, x, x_rows, here, gate, gate_scales, out, mine, start, hidden, STEP, OUT, KIND)
            b = _half_product(b, x, x_rows, here, up, up_scales, out, mine, start, hidden, STEP, OUT, KIND)
        at = pair.to(tl.int64)[None, :] * inner + row[:, None]
        tl.store(y + at, _swiglu(a, b, limit), mask=here[None, :] & mine[:, None])


@triton.jit(do_not_specialize=["pairs"])
def _down(
    x, down, scales, weights, members, owners, y, pairs, hidden, inner,
    KIND: tl.constexpr, OUT: tl.constexpr, TOK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y [P, D]: weight * down(x) of every pair."""
    block = tl.program_id(1)
    expert = tl.load(owners + block).to(tl.int64)
    if expert >= 0:
        pair = tl.load(members + block * TOK + tl.arange(0, TOK))
        here = pair < pairs
        x_rows = pair.to(tl.int64) * inner
        row = tl.program_id(0) * OUT + tl.arange(0, OUT)
        mine = row < hidden
        total = tl.zeros((OUT, TOK), tl.float32)
        out = row.to(tl.int64) + expert * hidden
        for start in tl.range(0, inner, STEP):
            total = _half_product(total, x, x_rows, here, down, scales, out, mine, start, inner, STEP, OUT, KIND)
        total = total * tl.load(weights + pair, mask=here, other=0.0)[None, :]
        at = pair.to(tl.int64)[None, :] * hidden + row[:, None]
        tl.store(y + at, total, mask=here[None, :] & mine[:, None])


@triton.jit
def _sum_picks(parts, beside, y, hidden, K: tl.constexpr, BLOCK: tl.constexpr, BESIDE: tl.constexpr):
    await_previous()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    total = tl.load(parts + token * K * hidden + at, mask=inside, other=0.0)
    for j in tl.static_range(1, K):
        total += tl.load(parts + (token * K + j) * hidden + at, mask=inside, other=0.0)
    if BESIDE:
        total += tl.load(beside + token * hidden + at, mask=inside, other=0.0)
    tl.store(y + token * hidden + at, total, mask=inside)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """As `engine.kernels.experts.swiglu`."""
    y = torch.empty_like(gate)
    if y.numel():
        _swiglu_rows[(triton.cdiv(y.numel(), 1024),)](gate, up, y, y.numel(), limit, BLOCK=1024, **early())
    return y


def route(
    z: Tensor, bias: Tensor | None, table: Tensor | None, token_ids: Tensor | None, k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """z [T, E] fp32 gate products -> picks [T, k] int32, weights [T, k] fp32; by scores + bias, or by table [V, k]."""
    tokens, experts = z.shape
    picks = torch.empty(tokens, k, dtype=torch.int32, device=z.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=z.device)
    if tokens:
        _route[(tokens,)](
            z, bias, table, token_ids, picks, weights, experts, scaling,
            EXPERTS=triton.next_power_of_2(experts), K=k, HASHED=table is not None, num_warps=4 if experts > 128 else 1,
        )  # fmt: skip
    return picks, weights


FEW_PAIRS = 128
"""Pairs that one program sorts; more go through `work_lists`, where that takes them, or torch."""


def work_list(picks: Tensor, experts: int, block: int, room: int | None = None) -> tuple[Tensor, Tensor]:
    """picks [T, k] int32 -> members [B * block] int32, owners [B] int32, as `_work_list` says.

    room: how many pairs a block may hold, where that is fewer than it has places for.
    """
    pairs, room = picks.numel(), block if room is None else room
    blocks = pairs if pairs <= FEW_PAIRS else min(pairs, experts) + pairs // room
    if pairs > FEW_PAIRS and work_lists.takes(experts):
        return work_lists.work_list(picks, experts, block, room, blocks)
    members, owners = (torch.empty(n, dtype=torch.int32, device=picks.device) for n in (blocks * block, blocks))
    if pairs <= FEW_PAIRS:
        _work_list[(1,)](picks, members, owners, pairs, blocks, room, PAIRS=FEW_PAIRS, BLOCK=block, num_warps=4)
        return members, owners
    members.fill_(pairs)
    owners.fill_(-1)
    flat = picks.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    sizes = torch.zeros(experts, dtype=torch.int64, device=picks.device).scatter_add_(0, flat, torch.ones_like(flat))
    needed = (sizes + room - 1) // room
    before = needed.cumsum(0) - needed
    sorted_experts = flat[order]
    rank = torch.arange(pairs, device=picks.device) - (sizes.cumsum(0) - sizes)[sorted_experts]
    place = before[sorted_experts] + rank // room
    members[place * block + rank % room] = order.int()
    owners[place] = sorted_experts.int()
    return members, owners


def routed_experts(
    x: Tensor, picks: Tensor, weights: Tensor, stacks: tuple[Tensor, ...],
    scales: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None], most: tuple[int, int], limit: float,
    beside: Tensor | None = None, work: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As `engine.kernels.experts.routed_experts`, the rest as `routed_parts`."""
    parts = routed_parts(x, picks, weights, stacks, scales, most, limit, work)
    return sum_picks(parts.view(*picks.shape, -1), beside)


def sum_picks(parts: Tensor, beside: Tensor | None) -> Tensor:
    """parts [T, k, D], beside [T, D] or None -> [T, D], added in that order."""
    tokens, k, hidden = parts.shape
    y = torch.empty(tokens, hidden, dtype=torch.float32, device=parts.device)
    if tokens:
        _sum_picks[(tokens, triton.cdiv(hidden, 1024))](
            parts, beside, y, hidden, K=k, BLOCK=1024, BESIDE=beside is not None, **early()
        )
    return y


def routed_parts(
    x: Tensor, picks: Tensor, weights: Tensor, stacks: tuple[Tensor, ...],
    scales: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None], most: tuple[int, int], limit: float,
    work: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[P, D]: what each pair's expert made of its token, weighted; stacks are gate, up [E, I, D] and down [E, D, I].

    fp32 or bf16 without scales; with UE8M0 scales [E, ., . / 32] uint8, FP4 codes of two to a byte. most: the largest
    scale code of gate and up, and of down. Of two stacks, these are the panels of gate and up, and of down.
    """
    tokens, k = picks.shape
    hidden = x.shape[1]
    panels = len(stacks) == 2
    gate, up, down = (stacks[0], stacks[0], stacks[1]) if panels else stacks
    count, inner = gate.shape[0], gate.shape[1] * (32 if panels else 1)
    kind = 2 if scales[0] is not None else 1 if gate.dtype == torch.bfloat16 else 0
    if kind == 2 and (hidden % 64 or inner % 64):
        raise ValueError(f"FP4 experts of {hidden} x {inner}: the GPU kernel takes multiples of 64 inputs.")
    pairs = tokens * k
    if not tokens:
        return torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    x = x.contiguous()
    parts = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    h = torch.empty(pairs, inner, dtype=torch.float32, device=x.device)
    if panels and experts_few.takes(tokens, pairs, count):
        members, owners = work or work_list(picks, count, few_tokens.TOKENS, min(tokens, few_tokens.TOKENS))
        experts_few.products(x, (gate, down), weights, members, owners, limit, h, parts)
    elif panels:
        members, owners = work_list(picks, count, experts_some.room(pairs, count))
        experts_some.products(x, (gate, down), weights, members, owners, limit, h, parts)
    else:
        few = pairs <= 16 * count
        tok = 16 if few else 64
        members, owners = work_list(picks, count, tok)
        out = 32 if few else 64
        blocks = owners.shape[0]
        _gate_up[(triton.cdiv(inner, out), blocks)](
            x, gate, scales[0], up, scales[1], members, owners, h, pairs, k, hidden, inner, limit,
            KIND=kind, OUT=out, TOK=tok, STEP=_step(hidden, kind), num_warps=4, num_stages=3,
        )  # fmt: skip
        _down[(triton.cdiv(hidden, out), blocks)](
            h, down, scales[2], weights, members, owners, parts, pairs, hidden, inner,
            KIND=kind, OUT=out, TOK=tok, STEP=_step(inner, kind), num_warps=4, num_stages=3,
        )  # fmt: skip
    return parts


def library_parts(x: Tensor, picks: Tensor, weights: Tensor, library: HummingExperts, limit: float) -> Tensor:
    """As `routed_parts`, by a library's products."""
    pairs = picks.numel()
    if not pairs:
        return torch.empty(0, x.shape[1], dtype=torch.float32, device=x.device)
    first, second = library.blocks(pairs)
    members, owners = work_list(picks, library.count, first)
    gate, up = library.gate_up(x, members, owners, picks.shape[1], pairs)
    h = swiglu(gate, up, limit)
    if second != first:
        members, owners = work_list(picks, library.count, second)
    return library.down(h, members, owners, pairs) * weights.reshape(-1, 1)


def _step(inputs: int, kind: int) -> int:
    """Inputs of a step; three steps of both matrices and of the tokens share a multiprocessor's memory."""
    return 32 if kind == 0 else 128 if inputs % 128 == 0 else 64
