// Sixteen fp32 lanes, and the few functions of them that the kernels share.
//
// GCC vector extensions, so one source runs as AVX-512, as two AVX2 halves, or as anything else. Every function
// here treats all lanes alike: a value's bits never depend on its place in an array, which is what makes a row's
// result independent of its neighbours. NaN in gives NaN out.
#pragma once

#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // everything below is inlined; no vector crosses a call

namespace penumbra {

constexpr int kLanes = 16;

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef double d8 __attribute__((vector_size(64)));
typedef float f8 __attribute__((vector_size(32)));

#define PENUMBRA_INLINE static inline __attribute__((always_inline))

PENUMBRA_INLINE v16 load(const float* p) {
    v16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

PENUMBRA_INLINE void store(float* p, v16 v) { std::memcpy(p, &v, sizeof v); }

PENUMBRA_INLINE v16 splat(float x) { return v16{} + x; }

PENUMBRA_INLINE v16 max(v16 a, v16 b) { return a < b ? b : a; }

PENUMBRA_INLINE v16 bits_to_float(u16 bits) {
    v16 v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// Lanes whose numbers differ in bit `kBit`, exchanged.
template <int kBit>
PENUMBRA_INLINE v16 exchange(v16 v) {
    constexpr i16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(v, lanes ^ kBit);
}

// The sum of all lanes, always added up in the same tree.
PENUMBRA_INLINE float sum(v16 v) {
    v += exchange<8>(v);
    v += exchange<4>(v);
    v += exchange<2>(v);
    v += exchange<1>(v);
    return v[0];
}

// exp(x) to about 1 ulp; 0 below -87.3, infinity above 88.7.
PENUMBRA_INLINE v16 exp(v16 x) {
    const v16 low = splat(-87.33654f), high = splat(88.72283f);
    v16 t = x < low ? low : x;
    t = t > high ? high : t;
    const v16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const v16 shifted = t * 1.44269504f + magic;
    const v16 n = shifted - magic;
    v16 r = t - n * 0.693145752f;  // ln 2 in two parts, the first short enough for exact products
    r = r - n * 1.42860677e-6f;
    v16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // n = 128 is out of an exponent's range, so scale in two halves.
    i16 whole;
    std::memcpy(&whole, &shifted, sizeof whole);
    whole = (whole << 9) >> 9;  // the low mantissa bits hold n, signed
    const i16 half = whole >> 1;
    const v16 y = p * bits_to_float((u16)((half + 127) << 23)) * bits_to_float((u16)((whole - half + 127) << 23));
    v16 out = x < low ? v16{} : y;
    return x > high ? splat(__builtin_inff()) : out;
}

PENUMBRA_INLINE v16 sigmoid(v16 x) { return 1.0f / (1.0f + exp(-x)); }

// x / (1 + exp(-x)) of the gate clamped from above, times the clamped other half.
PENUMBRA_INLINE v16 swiglu(v16 gate, v16 up, float limit) {
    const v16 top = splat(limit), bottom = splat(-limit);
    gate = gate > top ? top : gate;
    up = up > top ? top : up;
    up = up < bottom ? bottom : up;
    return gate / (1.0f + exp(-gate)) * up;
}

// Sine and cosine of eight fp32 angles below about 2^30 radians. The turns are taken off in double precision: at
// position 900,000 an fp32 reduction would keep no digit.
PENUMBRA_INLINE void sincos_half(f8 angle, f8& sine, f8& cosine) {
    const d8 magic = d8{} + 6755399441055744.0;  // 1.5 * 2^52
    const d8 a = __builtin_convertvector(angle, d8);
    const d8 shifted = a * 0.63661977236758134308 + magic;
    const d8 quarters = shifted - magic;
    d8 r = a - quarters * 1.57079632679489655800;
    r = r - quarters * 6.12323399573676603587e-17;
    const f8 x = __builtin_convertvector(r, f8);
    const f8 x2 = x * x;
    f8 s = f8{} - 1.9515295891e-4f;
    s = s * x2 + 8.3321608736e-3f;
    s = s * x2 - 1.6666654611e-1f;
    s = s * x2 * x + x;
    f8 c = f8{} + 2.443315711809948e-5f;
    c = c * x2 - 1.388731625493765e-3f;
    c = c * x2 + 4.166664568298827e-2f;
    c = c * (x2 * x2) - 0.5f * x2 + 1.0f;
    typedef int64_t l8 __attribute__((vector_size(64)));
    typedef int32_t n8 __attribute__((vector_size(32)));
    l8 whole;
    std::memcpy(&whole, &shifted, sizeof whole);
    const n8 quadrant = __builtin_convertvector(whole, n8);
    const f8 first = (quadrant & 1) != 0 ? c : s, second = (quadrant & 1) != 0 ? s : c;
    sine = (quadrant & 2) != 0 ? -first : first;
    cosine = ((quadrant + 1) & 2) != 0 ? -second : second;
}

// x * weight / rms(x) for one row; weight may be null. size is a multiple of 16; y may be x.
PENUMBRA_INLINE void norm_row(const float* x, const float* weight, int64_t size, float eps, float* y) {
    v16 even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
        const v16 a = load(x + i), b = load(x + i + kLanes);
        even += a * a;
        odd += b * b;
    }
    if (i < size) {
        const v16 a = load(x + i);
        even += a * a;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(even + odd) / (float)size + eps);
    for (i = 0; i < size; i += kLanes) {
        const v16 scaled = load(x + i) * scale;
        store(y + i, weight ? load(weight + i) * scaled : scaled);
    }
}

constexpr int kMaxPairs = 256;

// One token's rotation, ready for `rotate_row`: each cosine twice, each sine as (-, +).
struct Turn {
    alignas(64) float cosine[2 * kMaxPairs];
    alignas(64) float sine[2 * kMaxPairs];

    // pairs is a multiple of 8; direction is +1, or -1 to turn back.
    inline __attribute__((always_inline)) void set(int64_t position, const float* freqs, int64_t pairs,
                                                   float direction) {
        const float p = (float)position;
        for (int64_t i = 0; i < pairs; i += 8) {
            f8 f, s, c;
            std::memcpy(&f, freqs + i, sizeof f);
            sincos_half(f * p, s, c);
            for (int j = 0; j < 8; ++j) {
                cosine[2 * (i + j)] = cosine[2 * (i + j) + 1] = c[j];
                sine[2 * (i + j)] = -direction * s[j];
                sine[2 * (i + j) + 1] = direction * s[j];
            }
        }
    }
};

// Rotates `channels` (a multiple of 16) values starting at x, in place.
PENUMBRA_INLINE void rotate_row(float* x, const Turn& turn, int64_t channels) {
    for (int64_t i = 0; i < channels; i += kLanes) {
        const v16 v = load(x + i);
        store(x + i, v * load(turn.cosine + i) + exchange<1>(v) * load(turn.sine + i));
    }
}

template <int kBit>
PENUMBRA_INLINE v16 butterfly(v16 v) {
    constexpr i16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const v16 other = exchange<kBit>(v);
    return (lanes & kBit) != 0 ? other - v : v + other;
}

// The Sylvester Hadamard transform of one row over sqrt(size), in place; size a power of two of at least 16.
PENUMBRA_INLINE void hadamard_row(float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) {
        store(x + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))))));
    }
    for (int64_t half = kLanes; half < size; half *= 2) {
        for (int64_t block = 0; block < size; block += 2 * half) {
            for (int64_t i = block; i < block + half; i += kLanes) {
                const v16 a = load(x + i), b = load(x + i + half);
                store(x + i, a + b);
                store(x + i + half, a - b);
            }
        }
    }
    const float scale = (float)(1.0 / __builtin_sqrt((double)size));
    for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(x + i) * scale);
}

}  // namespace penumbra
