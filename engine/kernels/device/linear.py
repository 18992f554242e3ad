"""Matrix products, weights first: a tile of outputs times a tile of tokens, so that one token fills the tensor cores.

With `--kernels cuda`, kernels in CUDA C++ take what they can of up to 512 tokens. Those here take the rest: weights are
read once for up to 128 tokens and stay in the checkpoint's own format, fp32, bf16, or e4m3 with a scale for every
128 x 128 block. Where a matrix has too few outputs to fill the GPU, its inputs are split over several programs,
whose parts are added in order by the one that reads them: a number that depends on the matrix alone.

Steps of many tokens are bound by arithmetic instead. Their products are cuBLAS's, over matrices widened to bf16 for the
occasion: exactly, where scales are powers of two, as DeepSeek's are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device import INTERPRETED, few_tokens, libraries, linears_some
from engine.kernels.device.backends import backend
from engine.kernels.device.codec import e4m3_value, exact, operand
from engine.kernels.device.norm_rope import norm_rotate

FP8_BLOCK = 128
_DECODE_TOKENS = 16
"""Up to this many tokens a step is bound by reading weights."""
MANY_TOKENS = 256
"""From this many on, widening an e4m3 matrix is soon paid for; a bf16 one is cuBLAS's as it is."""


@triton.jit(do_not_specialize=["tokens", "part_stride"])
def _product(
    x, weight, scales, parts, tokens, x_row, per_group, tiles, inputs, scale_columns, part_stride,
    OUT: tl.constexpr, TOK: tl.constexpr, STEP: tl.constexpr, PER_SPLIT: tl.constexpr,
    HALF: tl.constexpr, FP8: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(2)
    group = tile // tiles
    out = group * per_group + tile % tiles * OUT + tl.arange(0, OUT)
    mine = tile % tiles * OUT + tl.arange(0, OUT) < per_group
    token = tl.program_id(1) * TOK + tl.arange(0, TOK)
    here = token < tokens
    x += group.to(tl.int64) * inputs
    total = tl.zeros((OUT, TOK), tl.float32)
    first = split * PER_SPLIT
    for start in tl.range(first, tl.minimum(first + PER_SPLIT, inputs), STEP):
        k = start + tl.arange(0, STEP)
        w_at = weight + out.to(tl.int64)[:, None] * inputs + k[None, :]
        x_at = x + token.to(tl.int64)[None, :] * x_row + k[:, None]
        if RAGGED:
            w = tl.load(w_at, mask=mine[:, None] & (k < inputs)[None, :], other=0)
            xs = tl.load(x_at, mask=here[None, :] & (k < inputs)[:, None], other=0.0)
        else:
            w = tl.load(w_at)
            xs = tl.load(x_at, mask=here[None, :], other=0.0)
        if FP8:
            part = tl.dot(exact(e4m3_value(w), HALF), operand(xs, HALF))
            # A tile of outputs lies within one block of 128, and so does a step of inputs.
            block = (group * per_group + tile % tiles * OUT) // 128 * scale_columns + start // 128
            total += part * tl.load(scales + block)
        elif HALF:
            total = tl.dot(exact(w.to(tl.float32), HALF), operand(xs, HALF), total)
        else:
            total = tl.dot(w, xs, total, input_precision="tf32x3")
    y = (
        parts
        + split.to(tl.int64) * part_stride
        + token.to(tl.int64)[None, :] * (per_group * (tl.num_programs(0) // tiles))
    )
    tl.store(y + out[:, None], total, mask=mine[:, None] & here[None, :])


@triton.jit(do_not_specialize=["count", "part_stride"])
def _add_parts(parts, y, count, part_stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(parts + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * part_stride + at, mask=inside, other=0.0)
    tl.store(y + at, total, mask=inside)


@triton.jit
def _widen(codes, scales, wide, outputs, inputs, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """e4m3 codes times their block's scale -> bf16."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * inputs + column[None, :]
    inside = (row < outputs)[:, None] & (column < inputs)[None, :]
    scale = tl.load(scales + tl.program_id(0) * ROWS // BLOCK * columns + tl.program_id(1))
    values = e4m3_value(tl.load(codes + at, mask=inside, other=0)) * scale
    tl.store(wide + at, operand(values, True).to(tl.bfloat16), mask=inside)


def widened(weight: Tensor, scales: Tensor | None) -> Tensor:
    """[G * N, K] in bf16."""
    if scales is None:
        return weight
    outputs, inputs = weight.shape
    wide = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=weight.device)
    rows = 32  # of a program, all under one scale
    _widen[(triton.cdiv(outputs, rows), triton.cdiv(inputs, FP8_BLOCK))](
        weight, scales, wide, outputs, inputs, scales.shape[1], ROWS=rows, BLOCK=FP8_BLOCK, num_warps=4
    )
    return wide


def _product_of_many(x: Tensor, weight: Tensor, scales: Tensor | None, groups: int) -> Tensor:
    """As `product`; sums in fp32."""
    tokens, per_group = x.shape[0], weight.shape[0] // groups
    a = x.to(torch.bfloat16).reshape(tokens, groups, -1).transpose(0, 1)
    b = widened(weight, scales).view(groups, per_group, -1).transpose(1, 2)
    if INTERPRETED:  # on a CPU, where torch multiplies bf16 to bf16 alone
        y = torch.bmm(a.float(), b.float())
    elif groups == 1:
        return torch.mm(a[0], b[0], out_dtype=torch.float32)
    else:
        y = torch.bmm(a, b, out_dtype=torch.float32)
    return y.transpose(0, 1).reshape(tokens, groups * per_group)


@lru_cache(maxsize=1024)
def plan(outputs: int, inputs: int, groups: int, fp8: bool, few: bool) -> tuple[int, int, int, int]:
    """(outputs of a tile, inputs of a step, inputs of a split, warps) for a matrix; `few` tokens or many."""
    per_group = outputs // groups
    if not few:
        return 64, 64 if not fp8 else 128, inputs, 4
    tile = 64 if outputs >= 8192 else 32 if outputs >= 256 else 16
    while tile > 16 and per_group % tile and per_group < tile:
        tile //= 2
    step = 128
    programs = groups * -(-per_group // tile)
    splits = 1
    # Some 132 programs fill the GPU; a split reads at least 1024 inputs, or it would be all prologue.
    while programs * splits < 132 and inputs // (splits * 2) >= 1024:
        splits *= 2
    per_split = -(-inputs // splits)
    return tile, step, -(-per_split // step) * step, 4


def product(x: Tensor, weight: Tensor, scales: Tensor | None, groups: int) -> Tensor:
    """x [T, G*K] times weight [G*N, K] of fp32, bf16, or e4m3 with scales [ceil(G*N / 128), ceil(K / 128)] -> [T, G*N].

    The result is fp32.
    """
    outputs, inputs = weight.shape
    tokens, fp8 = x.shape[0], scales is not None
    per_group = outputs // groups
    if fp8 and groups > 1 and per_group % FP8_BLOCK:
        raise ValueError(
            f"{groups} groups of {per_group} outputs in e4m3: a scale covers {FP8_BLOCK} outputs and would cover two "
            "groups. Load such a matrix in bfloat16."
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    if scales is not None and backend("linears") is not None and libraries.takes_product(weight, groups):
        return libraries.product(x, weight, scales)
    if few_tokens.takes(tokens, weight, groups):
        return few_tokens.products(x, [(weight, scales)], groups)[0]
    if scales is not None and linears_some.takes(tokens, [weight], groups):
        return linears_some.products(x, [(weight, scales)], groups)[0]
    few = tokens <= _DECODE_TOKENS
    if (tokens >= MANY_TOKENS and weight.dtype != torch.float32) or (weight.dtype == torch.bfloat16 and not few):
        return _product_of_many(x, weight, scales, groups)
    tile, step, per_split, warps = plan(outputs, inputs, groups, fp8, few)
    tok = min(max(16, triton.next_power_of_2(tokens)), 128)
    splits = -(-inputs // per_split)
    tiles = -(-per_group // tile)
    y = torch.empty(tokens, outputs, dtype=torch.float32, device=x.device)
    if not tokens:
        return y
    parts = y if splits == 1 else torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    _product[(groups * tiles, triton.cdiv(tokens, tok), splits)](
        x, weight, scales, parts, tokens, x.stride(0), per_group, tiles, inputs,
        0 if scales is None else scales.shape[1], tokens * outputs, OUT=tile, TOK=tok, STEP=step, PER_SPLIT=per_split,
        HALF=weight.dtype != torch.float32, FP8=fp8, RAGGED=bool(per_group % tile or inputs % step),
        num_warps=warps if few else 8, num_stages=4 if few else 3,
    )  # fmt: skip
    if splits > 1:
        count, block = tokens * outputs, 1024
        _add_parts[(triton.cdiv(count, block),)](parts, y, count, count, SPLITS=splits, BLOCK=block)
    return y


def products(
    x: Tensor, matrices: Sequence[tuple[Tensor, Tensor | None]], norm: Tensor | None = None, eps: float = 0.0
) -> list[Tensor]:
    """x [T, K], normed by `norm` [K] if given, times each (weight, scales): in one launch, where it is few tokens and
    matrices that allow it, or more and e4m3 ones.
    """
    own, tokens = backend("linears") is None, len(x)
    few = own and len(matrices) <= few_tokens.MATRICES
    if own and x.stride(1) != 1:
        x = x.contiguous()
    if norm is not None:
        if few and all(few_tokens.takes_normed(tokens, weight) for weight, _ in matrices):
            return few_tokens.products(x, matrices, norm=norm, eps=eps)
        quantised = [(weight, scales) for weight, scales in matrices if scales is not None]
        if len(quantised) == len(matrices) and own and linears_some.takes(tokens, [weight for weight, _ in quantised]):
            return linears_some.products(x, quantised, norm=norm, eps=eps)
        x = norm_rotate(x, norm, eps, None, None, False)
    if few and all(few_tokens.takes(tokens, weight) for weight, _ in matrices):
        return few_tokens.products(x, matrices)
    return _each(x, matrices, own)


def _each(x: Tensor, matrices: Sequence[tuple[Tensor, Tensor | None]], own: bool) -> list[Tensor]:
    """`product` of each; bf16 ones that lie one behind the other as one, and those e4m3 ones that `linears_some` takes
    share what their tokens become.
    """
    quantised = [(weight, scales) for weight, scales in matrices if scales is not None]
    together = own and len(quantised) > 1 and linears_some.takes(len(x), [weight for weight, _ in quantised])
    made = iter(linears_some.products(x, quantised) if together else [product(x, *each, 1) for each in quantised])
    plain = iter(_plain(x, [weight for weight, scales in matrices if scales is None]))
    return [next(plain if scales is None else made) for _, scales in matrices]


def _plain(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """`product` of each of these, which have no scales."""
    if len(weights) < 2 or not _one_behind_the_other(weights):
        return [product(x, weight, None, 1) for weight in weights]
    rows = [len(weight) for weight in weights]
    whole = weights[0].as_strided((sum(rows), weights[0].shape[1]), weights[0].stride())
    return list(product(x, whole, None, 1).split(rows, dim=1))


def _one_behind_the_other(weights: list[Tensor]) -> bool:
    """Whether these, [., K] in bf16, are rows of one tensor in order, as `engine.kernels.linear.stacked` lays them."""
    if any(weight.dtype != torch.bfloat16 for weight in weights):
        return False
    if len({weight.untyped_storage().data_ptr() for weight in weights}) > 1:
        return False
    starts = itertools.accumulate((weight.numel() for weight in weights), initial=weights[0].storage_offset())
    return all(weight.storage_offset() == start for weight, start in zip(weights, starts, strict=False))
