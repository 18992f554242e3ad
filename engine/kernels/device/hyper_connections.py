"""Hyper-connections on the device: partial products of the streams with fn, then one program that finishes a token.

T tokens, D hidden size, S splits of the 4 D inputs. A partial row has 32 numbers: 24 (or 4) products and, at 24, the
sum of squares; a fixed order of adding makes them the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device import mix_few
from engine.kernels.device.early import await_previous, early
from engine.kernels.hyper_connections import Unbalanced

_STEP = 128
_ROWS = tl.constexpr(32)
_SQUARES = tl.constexpr(24)


@triton.jit(do_not_specialize=["tokens"])
def _partial(x, fn, parts, tokens, width, rows, PER_SPLIT: tl.constexpr, TOK: tl.constexpr, STEP: tl.constexpr):
    """x [T, W], fn [rows, W] -> parts [S, T, 32]."""
    await_previous()
    split = tl.program_id(1)
    token = tl.program_id(0) * TOK + tl.arange(0, TOK)
    here = token < tokens
    row = tl.arange(0, _ROWS)
    total = tl.zeros((TOK, _ROWS), tl.float32)
    squares = tl.zeros((TOK,), tl.float32)
    for start in tl.range(split * PER_SPLIT, tl.minimum(split * PER_SPLIT + PER_SPLIT, width), STEP):
        k = start + tl.arange(0, STEP)
        inside = k < width
        xs = tl.load(
            x + token.to(tl.int64)[:, None] * width + k[None, :], mask=here[:, None] & inside[None, :], other=0.0
        )
        ws = tl.load(fn + row[None, :] * width + k[:, None], mask=(row < rows)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(xs, ws, total, input_precision="tf32x3")
        squares += tl.sum(xs * xs, axis=1)
    at = (split.to(tl.int64) * tokens + token)[:, None] * _ROWS + row[None, :]
    tl.store(parts + at, tl.where(row[None, :] == _SQUARES, squares[:, None], total), mask=here[:, None])


@triton.jit
def _mixes(parts, token, tokens, width, rms_eps, SPLITS: tl.constexpr):
    """[32] products over the root mean square of the streams."""
    row = tl.arange(0, _ROWS)
    split = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(parts + (split[:, None] * tokens + token) * _ROWS + row[None, :]), axis=0)
    squares = tl.sum(tl.where(row == _SQUARES, total, 0.0), axis=0)
    return total * tl.rsqrt(squares / width + rms_eps)


@triton.jit
def _pick(values, i):
    return tl.sum(tl.where(tl.arange(0, _ROWS) == i, values, 0.0), axis=0)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit(do_not_specialize=["tokens"])
def _finish(
    parts, streams, base, scale, norm, x, post, comb, tokens, size, rms_eps, hc_eps, ITERS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token: x [D] (normed with NORM), post [4], comb [4, 4]."""
    token = tl.program_id(0).to(tl.int64)
    mix = _mixes(parts, token, tokens, 4 * size, rms_eps, SPLITS)
    row = tl.arange(0, _ROWS)
    pre_scale, post_scale, comb_scale = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    by_row = tl.where(row < 4, pre_scale, tl.where(row < 8, post_scale, comb_scale))
    logits = mix * by_row + tl.load(base + row, mask=row < 24, other=0.0)
    opened = _sigmoid(logits)
    at = tl.arange(0, BLOCK)
    inside = at < size
    mixed = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(4):
        stream = tl.load(streams + (token * 4 + k) * size + at, mask=inside, other=0.0)
        mixed += (_pick(opened, k) + hc_eps) * stream
    if NORM:
        mixed = mixed * tl.rsqrt(tl.sum(mixed * mixed, axis=0) / size + rms_eps)
        mixed = tl.load(norm + at, mask=inside, other=0.0) * mixed
    tl.store(x + token * size + at, mixed, mask=inside)
    tl.store(post + token * 4 + row - 4, 2 * opened, mask=(row >= 4) & (row < 8))
    # comb[j, k] lies at row 8 + 4 j + k; as a [4, 4] tile.
    j, k = tl.arange(0, 4), tl.arange(0, 4)
    place = 8 + 4 * j[:, None] + k[None, :]
    cells = tl.sum(tl.where(row[None, None, :] == place[:, :, None], logits[None, None, :], 0.0), axis=2)
    cells = tl.exp(cells - tl.max(cells, axis=1)[:, None])
    cells = cells / tl.sum(cells, axis=1)[:, None] + hc_eps
    cells = cells / (tl.sum(cells, axis=0)[None, :] + hc_eps)
    for _ in tl.range(ITERS - 1):
        cells = cells / (tl.sum(cells, axis=1)[:, None] + hc_eps)
        cells = cells / (tl.sum(cells, axis=0)[None, :] + hc_eps)
    tl.store(comb + token * 16 + 4 * j[:, None] + k[None, :], cells)


@triton.jit(do_not_specialize=["tokens"])
def _collapse(
    parts, streams, base, scale, norm, x, tokens, size, rms_eps, hc_eps, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    await_previous()
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, _ROWS)
    mix = _mixes(parts, token, tokens, 4 * size, rms_eps, SPLITS)
    opened = _sigmoid(mix * tl.load(scale) + tl.load(base + row, mask=row < 4, other=0.0)) + hc_eps
    at = tl.arange(0, BLOCK)
    inside = at < size
    mixed = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(4):
        mixed += _pick(opened, k) * tl.load(streams + (token * 4 + k) * size + at, mask=inside, other=0.0)
    if NORM:
        mixed = mixed * tl.rsqrt(tl.sum(mixed * mixed, axis=0) / size + rms_eps)
        mixed = tl.load(norm + at, mask=inside, other=0.0) * mixed
    tl.store(x + token * size + at, mixed, mask=inside)


@triton.jit
def _spread(
    made, beside, streams, post, comb, out, size, COUNT: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr
):
    await_previous()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    result = tl.load(made + token * COUNT * size + at, mask=inside, other=0.0)
    for i in tl.static_range(1, COUNT):
        result += tl.load(made + (token * COUNT + i) * size + at, mask=inside, other=0.0)
    if BESIDE:
        result += tl.load(beside + token * size + at, mask=inside, other=0.0)
    for k in tl.static_range(4):
        total = tl.load(post + token * 4 + k) * result
        for j in tl.static_range(4):
            stream = tl.load(streams + (token * 4 + j) * size + at, mask=inside, other=0.0)
            total += tl.load(comb + token * 16 + 4 * j + k) * stream
        tl.store(out + (token * 4 + k) * size + at, total, mask=inside)


@triton.jit
def _embed(embedding, token_ids, streams, size, BLOCK: tl.constexpr):
    await_previous()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(embedding + tl.load(token_ids + token) * size + at, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(4):
        tl.store(streams + (token * 4 + k) * size + at, values, mask=inside)


def embedded(embedding: Tensor, token_ids: Tensor) -> Tensor:
    """As `engine.kernels.hyper_connections.embedded`."""
    tokens, size = len(token_ids), embedding.shape[1]
    streams = torch.empty(tokens, 4, size, dtype=torch.float32, device=embedding.device)
    if tokens:
        block = min(1024, triton.next_power_of_2(size))
        _embed[(tokens, triton.cdiv(size, block))](embedding, token_ids, streams, size, BLOCK=block, **early())
    return streams


def _partials(streams: Tensor, fn: Tensor) -> tuple[Tensor, int]:
    """streams [T, 4, D] contiguous, fn [rows, 4 D] -> parts [S, T, 32] and S."""
    tokens, width = streams.shape[0], fn.shape[1]
    # The same number of splits for any number of tokens, so that a token's sums do not depend on its company.
    splits = max(1, min(32, triton.next_power_of_2(width // 512)))
    per_split = -(-width // splits // _STEP) * _STEP
    parts = torch.empty(splits, tokens, 32, dtype=torch.float32, device=streams.device)
    _partial[(triton.cdiv(tokens, 16), splits)](
        streams, fn, parts, tokens, width, fn.shape[0], PER_SPLIT=per_split, TOK=16, STEP=_STEP, num_warps=4, **early(),
    )  # fmt: skip
    return parts, splits


def mix_in(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float,
    iters: int,
) -> tuple[Tensor, Tensor, Tensor | Unbalanced]:  # fmt: skip
    """As `engine.kernels.hyper_connections.mix_in`, and x normed by `norm` [D] where it is given."""
    streams = streams.contiguous()
    tokens, _, size = streams.shape
    x = torch.empty(tokens, size, dtype=torch.float32, device=streams.device)
    post, comb = (torch.empty(tokens, 4, *more, dtype=torch.float32, device=streams.device) for more in ((), (4,)))
    if mix_few.takes(tokens, size):
        mix_few.mix_in(streams, fn, base, scale, norm, rms_eps, hc_eps, x, post, comb)
        return x, post, Unbalanced(comb, iters, hc_eps)
    if tokens:
        parts, splits = _partials(streams, fn)
        _finish[(tokens,)](
            parts, streams, base, scale, norm, x, post, comb, tokens, size, rms_eps, hc_eps, ITERS=iters,
            SPLITS=splits, BLOCK=triton.next_power_of_2(size), NORM=norm is not None,
            num_warps=8 if size > 1024 else 4,
        )  # fmt: skip
    return x, post, comb


def takes_parts(tokens: int, size: int) -> bool:
    """Whether what a sublayer made of so many tokens may be parts, which `mix_out` and `mix_between` add up."""
    return mix_few.takes(tokens, size)


def takes_between(tokens: int, size: int) -> bool:
    """Whether `mix_between` takes so many tokens of this size."""
    return mix_few.takes(tokens, size) and tokens <= mix_few.BETWEEN_TOKENS


def mix_between(
    made: Tensor, beside: Tensor | None, streams: Tensor, post: Tensor, comb: Tensor | Unbalanced, fn: Tensor,
    base: Tensor, scale: Tensor, norm: Tensor | None, rms_eps: float, hc_eps: float, iters: int,
) -> tuple[Tensor, Tensor, Tensor, Unbalanced]:  # fmt: skip
    """As `engine.kernels.hyper_connections.mix_on` of what a sublayer left, its parts made [T, k, D] and beside [T, D];
    where `takes_between` says so.
    """
    matrix, rounds, eps = (comb.logits, comb.rounds, comb.eps) if isinstance(comb, Unbalanced) else (comb, 0, hc_eps)
    made, beside = made.contiguous(), None if beside is None else beside.contiguous()
    if not all(t.is_contiguous() for t in (streams, post, matrix)):
        raise ValueError(
            "streams and how they mix are read early, before a copy of them would be made: hand them over contiguous"
        )
    after, new_post, logits = (torch.empty_like(t) for t in (streams, post, matrix))
    x = torch.empty(made.shape[0], made.shape[2], dtype=torch.float32, device=made.device)
    mix_few.mix_between(
        made, beside, streams, post, matrix, rounds, eps, fn, base, scale, norm, rms_eps, hc_eps, after, x, new_post,
        logits,
    )  # fmt: skip
    return x, after, new_post, Unbalanced(logits, iters, hc_eps)


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float, norm: Tensor | None = None
) -> Tensor:
    """As `engine.kernels.hyper_connections.collapse`."""
    streams = streams.contiguous()
    tokens, _, size = streams.shape
    x = torch.empty(tokens, size, dtype=torch.float32, device=streams.device)
    if mix_few.takes(tokens, size):
        mix_few.collapse(streams, fn, base, scale, norm, rms_eps, hc_eps, x)
    elif tokens:
        parts, splits = _partials(streams, fn)
        _collapse[(tokens,)](
            parts, streams, base, scale, norm, x, tokens, size, rms_eps, hc_eps, SPLITS=splits,
            BLOCK=triton.next_power_of_2(size), NORM=norm is not None, num_warps=8 if size > 1024 else 4, **early(),
        )  # fmt: skip
    return x


def mix_out(
    y: Tensor, streams: Tensor, post: Tensor, comb: Tensor | Unbalanced, beside: Tensor | None = None
) -> Tensor:
    """As `engine.kernels.hyper_connections.mix_out`; y [T, k, D] and beside [T, D] are parts of what was made."""
    tokens, _, size = streams.shape
    if isinstance(comb, Unbalanced):
        y, streams, post, logits = (t.contiguous() for t in (y, streams, post, comb.logits))
        out = torch.empty_like(streams)
        made = y[:, None] if y.dim() == 2 else y
        mix_few.mix_out(made, beside, streams, post, logits, comb.rounds, comb.eps, out)
        return out
    out = torch.empty_like(streams)
    if tokens:
        block = min(1024, triton.next_power_of_2(size))
        _spread[(tokens, triton.cdiv(size, block))](
            y.contiguous(), beside, streams, post, comb, out, size, COUNT=1 if y.dim() == 2 else y.shape[1],
            BESIDE=beside is not None, BLOCK=block, **early(),
        )  # fmt: skip
    return out
