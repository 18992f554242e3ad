// How rows lie in a pool, and their codec. engine/kernels/rows.py says what every byte means.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace penumbra {

typedef uint8_t b16 __attribute__((vector_size(16)));
typedef int8_t s16 __attribute__((vector_size(16)));
typedef uint16_t h16 __attribute__((vector_size(32)));

constexpr int64_t kNope = 448, kRope = 64, kGroup = 64;  // of a v4 latent
constexpr int64_t kLatentBytes = kNope + 2 * kRope, kLatentScaleBytes = kNope / kGroup + 1;
constexpr int64_t kIndexDim = 128;

enum Codec : int64_t { kExact = 0, kLatentV4 = 1, kIndexV4 = 2 };

// Mirrors `_NativePool` in engine/kernels/rows.py, field for field.
struct Pool {
    uint8_t* data;
    int64_t item_bytes;
    int64_t rows_per_item;
    int64_t dim;
    int64_t codec;

    uint8_t* item(int64_t index) const { return data + index * item_bytes; }
};

PENUMBRA_INLINE u16 float_bits(v16 v) {
    u16 bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

PENUMBRA_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Sixteen bytes, sign-extended. By intrinsic: GCC 12 would convert them one at a time. The full masks fold away and
// keep its header from a false warning.
PENUMBRA_INLINE u16 widen(const uint8_t* p) {
    i16 wide;
#if defined(__AVX512F__)
    const __m512i v = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
    std::memcpy(&wide, &v, sizeof wide);
#elif defined(__AVX2__)
    const __m256i v[2] = {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
    std::memcpy(&wide, v, sizeof wide);
#else
    s16 bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    wide = __builtin_convertvector(bytes, i16);
#endif
    return (u16)wide;
}

// The low byte of every lane.
PENUMBRA_INLINE void narrow(u16 v, uint8_t* p) {
#if defined(__AVX512F__)
    __m512i wide;
    std::memcpy(&wide, &v, sizeof wide);
    _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(0xffff, wide));
#else
    const b16 bytes = __builtin_convertvector(v, b16);
    std::memcpy(p, &bytes, sizeof bytes);
#endif
}

// Sixteen e4m3 values. The byte's seven low bits become the top of an fp32 mantissa and the bottom of its exponent,
// 120 powers of two too small; the product puts them right, subnormals included. Codes 0x7f and 0xff (NaN) come out
// as +-480: they are written only under a NaN scale, which makes them NaN again.
PENUMBRA_INLINE v16 e4m3_to_float(const uint8_t* p) {
    const u16 bits = (widen(p) << 20) & 0x87f00000u;  // sign extension has filled bits 31 to 27 with the sign
    return bits_to_float(bits) * float_of((127 + 120) << 23);
}

PENUMBRA_INLINE v16 bf16_to_float(const uint8_t* p) {
    h16 halves;
    std::memcpy(&halves, p, sizeof halves);
    return bits_to_float(__builtin_convertvector(halves, u16) << 16);
}

// Sixteen values to the nearest e4m3, ties to even, after clamping to +-448. NaN is not looked for.
PENUMBRA_INLINE void float_to_e4m3(v16 x, uint8_t* p) {
    const u16 bits = float_bits(x);
    v16 size = bits_to_float(bits & 0x7fffffffu);
    size = size > 448.0f ? splat(448.0f) : size;
    const u16 b = float_bits(size);
    const u16 normal = ((b + 0x7ffff + ((b >> 20) & 1)) >> 20) - (120 << 3);
    // Below 2^-6 the codes are multiples of 2^-9, the last place of fp32 numbers near 2^14: adding rounds to it.
    const u16 subnormal = float_bits(size + 16384.0f) - float_bits(splat(16384.0f));
    narrow((size < 0.015625f ? subnormal : normal) | ((bits >> 24) & 0x80), p);
}

PENUMBRA_INLINE void float_to_bf16(v16 x, uint8_t* p) {
    const u16 bits = float_bits(x);
    const u16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u16 half = x == x ? rounded : u16{} + 0x7fc0;
    const h16 halves = __builtin_convertvector(half, h16);
    std::memcpy(p, &halves, sizeof halves);
}

// The biased exponent of the scale of `size` values (a multiple of 16): 2^ceil(log2(max(amax, 1e-4) / 448)), and 255,
// which is NaN, when one of them is not finite.
PENUMBRA_INLINE uint32_t scale_exponent(const float* x, int64_t size) {
    u16 top = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const u16 a = float_bits(load(x + i)) & 0x7fffffffu;  // as integers, so that NaN is the greatest
        top = a > top ? a : top;
    }
    uint32_t amax = 0;
    for (int i = 0; i < kLanes; ++i) amax = top[i] > amax ? top[i] : amax;
    if (amax >= 0x7f800000u) return 255;
    uint32_t floor;
    const float least = 1e-4f;
    std::memcpy(&floor, &least, sizeof floor);
    if (amax < floor) amax = floor;
    // 448 is 1.75 * 2^8: a mantissa up to 1.75 stays on its power of two, anything above carries into the next.
    return ((amax + 0x1fffff) >> 23) - 8;
}

PENUMBRA_INLINE void quantise(const float* x, int64_t size, uint32_t exponent, uint8_t* codes) {
    if (exponent == 255) {
        std::memset(codes, 0x7f, size);
        return;
    }
    const float inverse = float_of((254 - exponent) << 23);
    for (int64_t i = 0; i < size; i += kLanes) float_to_e4m3(load(x + i) * inverse, codes + i);
}

PENUMBRA_INLINE void encode_row(const Pool& pool, int64_t index, int64_t offset, const float* x) {
    const int64_t n = pool.rows_per_item;
    uint8_t* item = pool.item(index);
    if (pool.codec == kLatentV4) {
        uint8_t* data = item + offset * kLatentBytes;
        uint8_t* scales = item + n * kLatentBytes + offset * kLatentScaleBytes;
        for (int64_t g = 0; g < kNope / kGroup; ++g) {
            const uint32_t exponent = scale_exponent(x + g * kGroup, kGroup);
            scales[g] = (uint8_t)exponent;
            quantise(x + g * kGroup, kGroup, exponent, data + g * kGroup);
        }
        scales[kNope / kGroup] = 0;
        for (int64_t i = 0; i < kRope; i += kLanes) float_to_bf16(load(x + kNope + i), data + kNope + 2 * i);
    } else if (pool.codec == kIndexV4) {
        const uint32_t exponent = scale_exponent(x, kIndexDim);
        quantise(x, kIndexDim, exponent, item + offset * kIndexDim);
        const float scale = exponent == 255 ? __builtin_nanf("") : float_of(exponent << 23);
        std::memcpy(item + n * kIndexDim + offset * 4, &scale, sizeof scale);
    } else {
        std::memcpy(item + offset * pool.dim * 4, x, pool.dim * 4);
    }
}

// Where a row's first byte lies, for prefetching.
PENUMBRA_INLINE const uint8_t* row_data(const Pool& pool, int64_t index, int64_t offset) {
    const int64_t stride = pool.codec == kLatentV4 ? kLatentBytes : pool.codec == kIndexV4 ? kIndexDim : pool.dim * 4;
    return pool.item(index) + offset * stride;
}

PENUMBRA_INLINE void decode_row(const Pool& pool, int64_t index, int64_t offset, float* x) {
    const int64_t n = pool.rows_per_item;
    const uint8_t* item = pool.item(index);
    if (pool.codec == kLatentV4) {
        const uint8_t* data = item + offset * kLatentBytes;
        const uint8_t* scales = item + n * kLatentBytes + offset * kLatentScaleBytes;
        for (int64_t g = 0; g < kNope / kGroup; ++g) {
            const float scale = scales[g] == 255 ? __builtin_nanf("") : float_of((uint32_t)scales[g] << 23);
            for (int64_t i = g * kGroup; i < (g + 1) * kGroup; i += kLanes) store(x + i, e4m3_to_float(data + i) * scale);
        }
        for (int64_t i = 0; i < kRope; i += kLanes) store(x + kNope + i, bf16_to_float(data + kNope + 2 * i));
    } else if (pool.codec == kIndexV4) {
        float scale;
        std::memcpy(&scale, item + n * kIndexDim + offset * 4, sizeof scale);
        for (int64_t i = 0; i < kIndexDim; i += kLanes) store(x + i, e4m3_to_float(item + offset * kIndexDim + i) * scale);
    } else {
        std::memcpy(x, item + offset * pool.dim * 4, pool.dim * 4);
    }
}

}  // namespace penumbra
