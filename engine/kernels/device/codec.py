"""Roundings and codes shared by the kernels, in integer arithmetic: the same bits on a GPU and in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.device import INTERPRETED

EXACT_BF16 = tl.constexpr(not INTERPRETED)
"""Whether a cast to bf16 rounds to nearest even, as hardware does."""


@triton.jit
def bf16_bits(x):
    """fp32 -> the 16 bits of its bfloat16, nearest even, as uint16; a NaN stays one."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def operand(x, HALF: tl.constexpr):
    """fp32 as a product takes it: rounded to bf16 with HALF, as it is without."""
    if not HALF:
        taken = x
    elif EXACT_BF16:
        taken = x.to(tl.bfloat16)
    else:
        taken = (bf16_bits(x).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return taken


@triton.jit
def exact(x, HALF: tl.constexpr):
    """fp32 that bf16 can hold, or any with HALF off, as a product takes it."""
    if HALF and EXACT_BF16:
        taken = x.to(tl.bfloat16)
    else:
        taken = x
    return taken


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp32 for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_exponent(amax):
    """The smallest e with max(amax, 1e-4) <= 448 * 2^e, as fp32 rounds the quotient; 128 if not finite."""
    bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
    # 448 is 1.75 * 2^8: a larger mantissa needs one power more.
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.where(amax < float("inf"), exponent, 128)


@triton.jit
def e4m3_bits(x):
    """fp32 within +-448 -> its e4m3 code, nearest even, as uint8."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the last place of 16384.
    small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def quantised(x, exponent):
    """x / 2^exponent as e4m3 codes, clamped to +-448; all NaN where the exponent says that the group is broken."""
    inverse = power_of_two(tl.where(exponent == 128, 0, -exponent))
    scaled = tl.minimum(tl.maximum(x * inverse, -448.0), 448.0)
    return tl.where(exponent == 128, 0x7F, e4m3_bits(scaled)).to(tl.uint8)


@triton.jit
def e4m3_value(codes):
    """uint8 e4m3 codes -> fp32, exactly."""
    return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def hadamard_row(row, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """row [SIZE] times the Sylvester Hadamard matrix, unscaled; adds in the reference's order. STEPS = log2(SIZE)."""
    for _ in tl.static_range(STEPS):
        a, b = tl.split(tl.reshape(row, (SIZE // 2, 2)))
        row = tl.reshape(tl.permute(tl.join(a + b, a - b), (1, 0)), (SIZE,))
    return row


@triton.jit
def rotated(row, position, freqs, SIZE: tl.constexpr, PAIRS: tl.constexpr, sign):
    """row [SIZE] with its trailing PAIRS channel pairs turned by `position`, an int64; freqs points at [PAIRS] fp32."""
    even, odd = tl.split(tl.reshape(row, (SIZE // 2, 2)))
    pair = tl.arange(0, SIZE // 2) - (SIZE // 2 - PAIRS)
    turning = pair >= 0
    angle = position.to(tl.float32) * tl.load(freqs + pair, mask=turning, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle) * sign
    turned = tl.join(tl.where(turning, even * cos - odd * sin, even), tl.where(turning, even * sin + odd * cos, odd))
    return tl.reshape(turned, (SIZE,))
