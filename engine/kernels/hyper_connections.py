"""Manifold-constrained hyper-connections (mHC): four residual streams instead of one.

T tokens, D hidden size. A layer reads one mixture of the streams (`mix_in`) and writes its result back into
all of them (`mix_out`) through a 4x4 matrix that Sinkhorn steps have made doubly stochastic. All fp32; rows
are independent of their neighbours, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.experts import Parts
from engine.kernels.linear import fp32_rows, safe_rows
from engine.kernels.native import FLOAT, INT, POINTER
from engine.kernels.norm_rope import rms_norm

STREAMS = 4
_LANES = 16
"""Rows the C++ twins take are a multiple of this long; others keep to the reference."""
_MIX_IN = (
    POINTER, INT, INT, POINTER, POINTER, POINTER, FLOAT, FLOAT, INT, POINTER, POINTER, POINTER, INT,
)  # fmt: skip
_MIX_OUT = (POINTER, POINTER, POINTER, POINTER, INT, INT, POINTER, INT)
_COLLAPSE = (POINTER, INT, INT, POINTER, POINTER, POINTER, FLOAT, FLOAT, POINTER, INT)


class HyperSite:
    """One site's parameters: fn [24, 4D], base [24], scale [3], all fp32.

    Rows are 4 that weigh the streams on the way in, 4 that weigh the result on the way out, and 16 that
    mix the streams ([from, to], row-major); `scale` has one number for each of the three kinds.
    """

    __slots__ = ("base", "packed", "packed_fn", "scale", "width")

    def __init__(self, fn: Tensor, base: Tensor, scale: Tensor) -> None:
        rows = 2 * STREAMS + STREAMS * STREAMS
        if fn.dim() != 2 or fn.shape[0] != rows or base.shape != (rows,) or scale.shape != (3,):
            raise ValueError(
                f"a hyper-connection site is fn [{rows}, 4D], base [{rows}], scale [3]; "
                f"got {list(fn.shape)}, {list(base.shape)}, {list(scale.shape)}"
            )
        self.width = fn.shape[1]
        self.packed = fn.is_cpu and self.width % (STREAMS * _LANES) == 0 and native.library() is not None
        self.base, self.scale = (t.detach().float().contiguous() for t in (base, scale))
        fn = fn.detach().float()
        # The C++ twin reads [4D / 16, 24, 16]: sixteen inputs of every row side by side.
        self.packed_fn = (fn.unflatten(1, (-1, _LANES)).transpose(0, 1) if self.packed else fn).contiguous()

    @property
    def fn(self) -> Tensor:
        """[24, 4D] fp32."""
        return self.packed_fn.transpose(0, 1).flatten(1) if self.packed else self.packed_fn


@dataclass(frozen=True, slots=True)
class Unbalanced:
    """A mixing matrix that whoever takes it still makes doubly stochastic: logits [T, 4, 4], by so many rounds.

    Of a few tokens on a GPU: that takes longer than all else `mix_in` does, and can be done while the layer runs.
    """

    logits: Tensor
    rounds: int
    eps: float

    def balanced(self) -> Tensor:
        """[T, 4, 4]: comb[j, k] carries stream j into stream k."""
        comb = self.logits.softmax(dim=-1) + self.eps
        comb = comb / (comb.sum(dim=1, keepdim=True) + self.eps)
        for _ in range(self.rounds - 1):
            comb = comb / (comb.sum(dim=2, keepdim=True) + self.eps)
            comb = comb / (comb.sum(dim=1, keepdim=True) + self.eps)
        return comb


def embedded(embedding: Tensor, token_ids: Tensor) -> Tensor:
    """embedding [V, D], token_ids [T] int64 -> [T, 4, D] fp32: all streams begin with a token's row."""
    if embedding.is_cuda:
        from engine.kernels.device import hyper_connections as device

        return device.embedded(embedding, token_ids)
    return embedding[token_ids].float()[:, None, :].repeat(1, STREAMS, 1)


def mix_in(
    streams: Tensor, site: HyperSite, rms_eps: float, hc_eps: float, iters: int, norm: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | Unbalanced]:
    """What the layer reads, and how its result will be spread.

    streams [T, 4, D] -> x [T, D], post [T, 4], comb [T, 4, 4]; comb[j, k] carries stream j into stream k,
    and its columns sum to 1 because the last of the `iters` Sinkhorn rounds ends on columns. Of a few tokens on a GPU
    those rounds are left to whoever takes it.
    norm [D] or None: x goes through an RMSNorm of these weights.
    """
    tokens, size = _shape(streams)
    if site.width != STREAMS * size:
        raise ValueError(f"a site of width {site.width} does not fit streams {list(streams.shape)}")
    if streams.is_cuda:
        from engine.kernels.device import hyper_connections as device

        return device.mix_in(streams, site.fn, site.base, site.scale, norm, rms_eps, hc_eps, iters)
    if site.packed and (twin := native.function("penumbra_mix_in", *_MIX_IN)) is not None:
        streams = fp32_rows(streams).contiguous()
        x, post = streams.new_empty(tokens, size), streams.new_empty(tokens, STREAMS)
        comb = streams.new_empty(tokens, STREAMS, STREAMS)
        twin(
            streams.data_ptr(), tokens, size, site.packed_fn.data_ptr(), site.base.data_ptr(), site.scale.data_ptr(),
            rms_eps, hc_eps, iters, x.data_ptr(), post.data_ptr(), comb.data_ptr(), native.threads(),
        )  # fmt: skip
        return x if norm is None else rms_norm(x, norm, rms_eps), post, comb
    mix = _projection(streams, site.fn, rms_eps)
    pre_scale, post_scale, comb_scale = site.scale
    pre = _sigmoid(mix[:, :4] * pre_scale + site.base[:4]) + hc_eps
    post = 2 * _sigmoid(mix[:, 4:8] * post_scale + site.base[4:8])
    logits = (mix[:, 8:] * comb_scale + site.base[8:]).view(-1, STREAMS, STREAMS)
    x = _weigh(streams, pre)
    comb = Unbalanced(logits, iters, hc_eps).balanced()
    return x if norm is None else rms_norm(x, norm, rms_eps), post, comb


class Behind(NamedTuple):
    """The streams behind a sublayer, still in what `mix_out` makes them from."""

    made: Tensor | Parts
    streams: Tensor
    post: Tensor
    comb: Tensor | Unbalanced


def streams_of(before: Tensor | Behind) -> Tensor:
    """[T, 4, D]."""
    return mix_out(*before) if isinstance(before, Behind) else before


def mix_on(
    before: Tensor | Behind, site: HyperSite, rms_eps: float, hc_eps: float, iters: int, norm: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | Unbalanced]:
    """`mix_in` of the streams in front of a sublayer -> x, the streams themselves, post, comb.

    For a few tokens on a GPU in one go with the `mix_out` of the sublayer before.
    """
    if isinstance(before, Behind) and before.streams.is_cuda:
        from engine.kernels.device import hyper_connections as device

        tokens, size = _shape(before.streams)
        if site.width == STREAMS * size and device.takes_between(tokens, size):
            made, beside = (m.parts, m.beside) if isinstance(m := before.made, Parts) else (m[:, None], None)
            return device.mix_between(
                made, beside, *before[1:], site.fn, site.base, site.scale, norm, rms_eps, hc_eps, iters
            )
    streams = streams_of(before)
    x, post, comb = mix_in(streams, site, rms_eps, hc_eps, iters, norm)
    return x, streams, post, comb


def mix_out(y: Tensor | Parts, streams: Tensor, post: Tensor, comb: Tensor | Unbalanced) -> Tensor:
    """The streams after the layer: y [T, D], streams [T, 4, D], post and comb of `mix_in` -> [T, 4, D].

    Stream k becomes post[k] * y + sum over j of comb[j, k] * streams[j]: comb is summed over its FIRST index.
    """
    if isinstance(y, Parts):
        from engine.kernels.device import hyper_connections as device

        return device.mix_out(y.parts, streams, post, comb, y.beside)
    tokens, size = _shape(streams)
    shape = (comb.logits if isinstance(comb, Unbalanced) else comb).shape
    if y.shape != (tokens, size) or post.shape != (tokens, STREAMS) or shape != (tokens, STREAMS, STREAMS):
        raise ValueError(
            f"y {list(y.shape)}, streams {list(streams.shape)}, post {list(post.shape)} and comb "
            f"{list(shape)} do not belong together"
        )
    if streams.is_cuda:
        from engine.kernels.device import hyper_connections as device

        return device.mix_out(y, streams, post, comb)
    if isinstance(comb, Unbalanced):
        comb = comb.balanced()
    if size % _LANES == 0 and (twin := native.function("penumbra_mix_out", *_MIX_OUT)) is not None:
        y, streams, post, comb = (fp32_rows(t).contiguous() for t in (y, streams, post, comb))
        out = torch.empty_like(streams)
        twin(
            y.data_ptr(), streams.data_ptr(), post.data_ptr(), comb.data_ptr(), tokens, size, out.data_ptr(),
            native.threads(),
        )  # fmt: skip
        return out
    out = post[:, :, None] * y[:, None, :]
    for j in range(STREAMS):
        out = out + comb[:, j, :, None] * streams[:, j, None, :]
    return out


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float, norm: Tensor | None = None
) -> Tensor:
    """The four streams as one.

    streams [T, 4, D], fn [4, 4D], base [4], scale [1], all fp32 -> [T, D]
    norm [D] or None: it goes through an RMSNorm of these weights.
    """
    tokens, size = _shape(streams)
    if fn.shape != (STREAMS, STREAMS * size) or base.shape != (STREAMS,) or scale.shape != (1,):
        raise ValueError(
            f"fn {list(fn.shape)}, base {list(base.shape)} and scale {list(scale.shape)} do not collapse "
            f"streams {list(streams.shape)}: expected [4, 4D], [4] and [1]"
        )
    if streams.is_cuda:
        from engine.kernels.device import hyper_connections as device

        return device.collapse(streams, fn, base, scale, rms_eps, hc_eps, norm)
    if size % _LANES == 0 and (twin := native.function("penumbra_collapse", *_COLLAPSE)) is not None:
        streams, fn, base, scale = (fp32_rows(t).contiguous() for t in (streams, fn, base, scale))
        x = streams.new_empty(tokens, size)
        twin(
            streams.data_ptr(), tokens, size, fn.data_ptr(), base.data_ptr(), scale.data_ptr(), rms_eps, hc_eps,
            x.data_ptr(), native.threads(),
        )  # fmt: skip
    else:
        x = _weigh(streams, _sigmoid(_projection(streams, fn, rms_eps) * scale + base) + hc_eps)
    return x if norm is None else rms_norm(x, norm, rms_eps)


def _shape(streams: Tensor) -> tuple[int, int]:
    """(T, D) of streams [T, 4, D]."""
    if streams.dim() != 3 or streams.shape[1] != STREAMS:
        raise ValueError(f"streams are [tokens, {STREAMS}, size]; got {list(streams.shape)}")
    return streams.shape[0], streams.shape[2]


def _projection(streams: Tensor, fn: Tensor, rms_eps: float) -> Tensor:
    """The flattened streams, scaled to unit mean square, times fn: [T, rows of fn]."""
    flat = streams.flatten(1)
    return safe_rows(flat, fn) * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + rms_eps)


def _weigh(streams: Tensor, weights: Tensor) -> Tensor:
    """Sum over j of weights[:, j] * streams[:, j], in order of j."""
    x = weights[:, 0, None] * streams[:, 0]
    for j in range(1, STREAMS):
        x = x + weights[:, j, None] * streams[:, j]
    return x


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid's vector body and scalar tail round differently, so a value would depend on its place.
    return 1 / (1 + torch.exp(-x))
