// How rows lie in a pool, and their codec. engine/kernels/rows.py says what every byte means.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace penumbra {

constexpr int64_t kNope = 448, kRope = 64, kGroup = 64;  // of a v4 latent
constexpr int64_t kLatentBytes = kNope + 2 * kRope, kLatentScaleBytes = kNope / kGroup + 1;
constexpr int64_t kIndexDim = 128;

enum Codec : int64_t { kExact = 0, kLatentV4 = 1, kIndexV4 = 2 };

// Mirrors `_NativePool` in engine/kernels/rows.py, field for field.
struct Pool {
    uint8_t* data;
    int64_t item_stride;  // bytes from one item to the next
    int64_t rows_per_item;
    int64_t dim;
    int64_t codec;

    uint8_t* item(int64_t index) const { return data + index * item_stride; }
};

PENUMBRA_INLINE uvec float_bits(vec v) {
    uvec bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

PENUMBRA_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// kWidth bytes, sign-extended. By intrinsic: GCC 12 would convert them one at a time. The full masks fold away and
// keep its header from a false warning.
PENUMBRA_INLINE uvec widen_bytes(const uint8_t* p) {
    uvec out;
#if defined(__AVX512F__)
    const __m512i v = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
    std::memcpy(&out, &v, sizeof out);
#elif defined(__AVX2__)
    const __m256i v = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
    std::memcpy(&out, &v, sizeof out);
#else
    for (int i = 0; i < kWidth; ++i) out[i] = (uint32_t)(int32_t)(int8_t)p[i];
#endif
    return out;
}

// kWidth unsigned 16-bit words, extended.
PENUMBRA_INLINE uvec widen_words(const uint8_t* p) {
    uvec out;
#if defined(__AVX512F__)
    const __m512i v = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
    std::memcpy(&out, &v, sizeof out);
#elif defined(__AVX2__)
    const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    std::memcpy(&out, &v, sizeof out);
#else
    uint16_t words[kWidth];
    std::memcpy(words, p, sizeof words);
    for (int i = 0; i < kWidth; ++i) out[i] = words[i];
#endif
    return out;
}

// The low T of every lane.
template <typename T>
PENUMBRA_INLINE void narrow(uvec v, uint8_t* p) {
    typedef T narrowed __attribute__((vector_size(sizeof(T) * kWidth)));
    const narrowed out = __builtin_convertvector(v, narrowed);
    std::memcpy(p, &out, sizeof out);
}

// e4m3 values. A byte's seven low bits become the top of an fp32 mantissa and the bottom of its exponent, 120 powers of
// two too small; the product puts them right, subnormals included. Codes 0x7f and 0xff (NaN) come out as +-480: they
// are written only under a NaN scale, which makes them NaN again.
PENUMBRA_INLINE vec e4m3_to_float(const uint8_t* p) {
    const uvec bits = (widen_bytes(p) << 20) & 0x87f00000u;  // sign extension has put the sign into bits 31 to 27
    return bits_to_float(bits) * float_of((127 + 120) << 23);
}

PENUMBRA_INLINE vec bf16_to_float(const uint8_t* p) { return bits_to_float(widen_words(p) << 16); }

// Values to the nearest e4m3, ties to even, after clamping to +-448. NaN is not looked for.
PENUMBRA_INLINE void float_to_e4m3(vec x, uint8_t* p) {
    const uvec bits = float_bits(x);
    vec size = bits_to_float(bits & 0x7fffffffu);
    size = size > 448.0f ? splat<vec>(448.0f) : size;
    const uvec b = float_bits(size);
    const uvec normal = ((b + 0x7ffff + ((b >> 20) & 1)) >> 20) - (120 << 3);
    // Below 2^-6 the codes are multiples of 2^-9, the last place of fp32 numbers near 2^14: adding rounds to it.
    const uvec subnormal = float_bits(size + 16384.0f) - float_bits(splat<vec>(16384.0f));
    narrow<uint8_t>((size < 0.015625f ? subnormal : normal) | ((bits >> 24) & 0x80), p);
}

PENUMBRA_INLINE void float_to_bf16(vec x, uint8_t* p) {
    const uvec bits = float_bits(x);
    const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    narrow<uint16_t>(x == x ? rounded : uvec{} + 0x7fc0, p);
}

// The biased exponent of the scale of `size` values (a multiple of 16): 2^ceil(log2(max(amax, 1e-4) / 448)), and 255,
// which is NaN, when one of them is not finite.
PENUMBRA_INLINE uint32_t scale_exponent(const float* x, int64_t size) {
    uvec top = {};
    for (int64_t i = 0; i < size; i += kWidth) {
        const uvec a = float_bits(load<vec>(x + i)) & 0x7fffffffu;  // as integers, so that NaN is the greatest
        top = a > top ? a : top;
    }
    uint32_t amax = 0;
    for (int i = 0; i < kWidth; ++i) amax = top[i] > amax ? top[i] : amax;
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
    for (int64_t i = 0; i < size; i += kWidth) float_to_e4m3(load<vec>(x + i) * inverse, codes + i);
}

// Stores `size` e4m3 values times their scale.
PENUMBRA_INLINE void dequantise(const uint8_t* codes, int64_t size, float scale, float* x) {
    for (int64_t i = 0; i < size; i += kWidth) store(x + i, e4m3_to_float(codes + i) * scale);
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
        for (int64_t i = 0; i < kRope; i += kWidth) float_to_bf16(load<vec>(x + kNope + i), data + kNope + 2 * i);
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
            dequantise(data + g * kGroup, kGroup, scale, x + g * kGroup);
        }
        for (int64_t i = 0; i < kRope; i += kWidth) store(x + kNope + i, bf16_to_float(data + kNope + 2 * i));
    } else if (pool.codec == kIndexV4) {
        float scale;
        std::memcpy(&scale, item + n * kIndexDim + offset * 4, sizeof scale);
        dequantise(item + offset * kIndexDim, kIndexDim, scale, x);
    } else {
        std::memcpy(x, item + offset * pool.dim * 4, pool.dim * 4);
    }
}

}  // namespace penumbra
