"""Norms, rotary positions and the Hadamard rotation: what happens to one row at a time.

T tokens, H heads, D head size. Everything is fp32, and a row's result depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.linear import Matrix, fp32_rows, linears
from engine.kernels.native import FLOAT, INT, POINTER

_LANES = 16
"""Rows and rotated parts the C++ twins take are a multiple of this long; others keep to the reference."""
_MAX_ROPE_DIM = 512
_NORM_ROTATE = (
    POINTER, INT, INT, INT, INT, INT, POINTER, FLOAT, POINTER, POINTER, INT, FLOAT, POINTER, INT,
)  # fmt: skip
_HADAMARD = (POINTER, INT, INT, POINTER, INT)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> x scaled to unit mean square, times weight."""
    return _norm_rotate(x, weight=weight, eps=eps)


def linears_of_normed(x: Tensor, norm: Tensor, eps: float, matrices: Sequence[Matrix]) -> list[Tensor]:
    """`linears` of x [T, K] that goes through an RMSNorm of these weights [K] first."""
    if not x.is_cuda:
        return linears(rms_norm(x, norm, eps), matrices)
    from engine.kernels.device import linear as device

    if wrong := [m for m in matrices if x.dim() != 2 or x.shape[1] != m.inputs or norm.shape != (m.inputs,)]:
        raise ValueError(
            f"x {list(x.shape)} and norm {list(norm.shape)} do not fit a [{wrong[0].outputs}, {wrong[0].inputs}] matrix"
        )
    return device.products(x, [(matrix.data, matrix.scales) for matrix in matrices], norm, eps)


def head_norm(q: Tensor, eps: float) -> Tensor:
    """q [T, H, D], each head scaled to unit mean square; there is no weight."""
    return _norm_rotate(q, eps=eps)


def rope_frequencies(theta: float, rope_dim: int, yarn: tuple[float, int, float, float] | None = None) -> Tensor:
    """Radians per token of each channel pair: [rope_dim / 2] fp32.

    yarn is (factor, original positions, beta_fast, beta_slow): pairs that turn more than beta_fast times over
    the original context stay as they are, those that turn less than beta_slow times are slowed by `factor`,
    and the ones between are blended. The blend is done in fp32 in this very order: the model was trained on
    these bits, and at position 900,000 one more bit in a frequency is a visible angle.
    """
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.int64).float() / rope_dim
    freqs = 1.0 / (theta**exponents)
    if yarn is None:
        return freqs
    factor, original, beta_fast, beta_slow = yarn

    def pair(turns: float) -> float:
        return rope_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(beta_fast)), 0)
    high: float = min(math.ceil(pair(beta_slow)), rope_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (freqs / factor) * ramp + freqs * (1 - ramp)


def rotate(x: Tensor, positions: Tensor, freqs: Tensor, inverse: bool = False) -> Tensor:
    """Turn the trailing channel pairs (2i, 2i+1) of every row by its token's position.

    x [T, ..., D], positions [T] int64, freqs [rope_dim / 2] -> a new tensor of x's shape
    The angle is fp32(position) * fp32(frequency), one rounded product, as the model was trained with.
    """
    return _norm_rotate(x, positions=positions, freqs=freqs, inverse=inverse)


def _norm_rotate(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float | None = None,
    positions: Tensor | None = None,
    freqs: Tensor | None = None,
    inverse: bool = False,
) -> Tensor:
    """Every row of x [T, ..., D]: normed where `eps` is given, then turned where `positions` are."""
    size, rope_dim = x.shape[-1], 0 if freqs is None else 2 * freqs.shape[0]
    if (weight is not None and weight.shape != (size,)) or rope_dim > size:
        raise ValueError(f"rows of {size} values do not fit this weight or {rope_dim} rotated channels")
    if positions is not None and positions.shape != (x.shape[0],):
        raise ValueError(f"{list(positions.shape)} positions for {x.shape[0]} tokens")
    if x.is_cuda:
        from engine.kernels.device import norm_rope as device

        return device.norm_rotate(x, weight, eps, positions, freqs, inverse)
    fits = size % _LANES == 0 and rope_dim % _LANES == 0 and rope_dim <= _MAX_ROPE_DIM
    twin = native.function("penumbra_norm_rotate", *_NORM_ROTATE) if fits else None
    if twin is None:
        if eps is not None:
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
            x = x if weight is None else weight * x
        return x if positions is None or freqs is None else _turned(x, positions, freqs, inverse)
    # Names, not temporaries: what an address was taken of must outlive the call.
    x = fp32_rows(x) if x.dim() <= 2 else fp32_rows(x).contiguous()
    weight = None if weight is None else fp32_rows(weight)
    freqs = None if freqs is None else fp32_rows(freqs)
    positions = None if positions is None else positions.long().contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.numel() // size
    twin(
        x.data_ptr(), x.stride(-2) if x.dim() > 1 else size, rows, size, max(rows // max(x.shape[0], 1), 1),
        eps is not None, None if weight is None else weight.data_ptr(), eps or 0.0,
        None if positions is None else positions.data_ptr(), None if freqs is None else freqs.data_ptr(),
        rope_dim // 2, -1.0 if inverse else 1.0, y.data_ptr(), native.threads(),
    )  # fmt: skip
    return y


def _turned(x: Tensor, positions: Tensor, freqs: Tensor, inverse: bool) -> Tensor:
    rope_dim = 2 * freqs.shape[0]
    angle = positions.float()[:, None] * freqs
    shape = (x.shape[0], *[1] * (x.dim() - 2), freqs.shape[0])
    cos, sin = angle.cos().view(shape), angle.sin().view(shape)
    if inverse:
        sin = -sin
    out = x.clone()
    even, odd = x[..., -rope_dim::2], x[..., -rope_dim + 1 :: 2]
    out[..., -rope_dim::2] = even * cos - odd * sin
    out[..., -rope_dim + 1 :: 2] = even * sin + odd * cos
    return out


def hadamard(x: Tensor) -> Tensor:
    """Each row of x [..., D] times the Sylvester Hadamard matrix over sqrt(D); D a power of two.

    It spreads an outlier over the whole row before quantisation. Orthogonal, so the dot product of two rows
    that both went through it is unchanged.
    """
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two, not {size} channels")
    if x.is_cuda:
        from engine.kernels.device import norm_rope as device

        return device.hadamard(x)
    if size >= _LANES and (twin := native.function("penumbra_hadamard", *_HADAMARD)) is not None:
        x = fp32_rows(x).contiguous()
        y = torch.empty_like(x)
        twin(x.data_ptr(), x.numel() // size, size, y.data_ptr(), native.threads())
        return y
    rows = x.reshape(-1, size)
    half = 1
    while half < size:
        pairs = rows.view(-1, size // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack((a + b, a - b), dim=2).view(-1, size)
        half *= 2
    return (rows * size**-0.5).view(x.shape)


def query(q: Tensor, positions: Tensor, freqs: Tensor, eps: float) -> Tensor:
    """Attention queries from their raw projection: head norm, then rotation. q [T, H, D] -> [T, H, D]."""
    return _norm_rotate(q, eps=eps, positions=positions, freqs=freqs)


def latent(kv: Tensor, weight: Tensor, positions: Tensor, freqs: Tensor, eps: float) -> Tensor:
    """The KV row of each token from its raw projection: norm, then rotation. kv [T, D] -> [T, D]."""
    return _norm_rotate(kv, weight=weight, eps=eps, positions=positions, freqs=freqs)
