// Vectors of fp32, and the few functions of them that the kernels share.
//
// GCC vector extensions, so one source serves AVX-512, AVX2 and whatever else. Every function here treats all lanes
// alike: a value's bits never depend on its place in an array, which is what makes a row's result independent of its
// neighbours. NaN in gives NaN out.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // everything below is inlined; no vector crosses a call

namespace penumbra {

template <int kCount>
struct Vector {
    typedef float floats __attribute__((vector_size(4 * kCount)));
    typedef int32_t ints __attribute__((vector_size(4 * kCount)));
    typedef uint32_t words __attribute__((vector_size(4 * kCount)));
};

// Sixteen lanes on every machine.
constexpr int kLanes = 16;
typedef Vector<kLanes>::floats v16;
typedef Vector<kLanes>::ints i16;
typedef Vector<kLanes>::words u16;

// As many lanes as a register holds: for products and sums, where a vector kept in two registers or in memory would
// cost more than it saves. Divides 16.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef Vector<kWidth>::floats vec;
typedef Vector<kWidth>::ints ivec;
typedef Vector<kWidth>::words uvec;

#define PENUMBRA_INLINE static inline __attribute__((always_inline))

template <typename V = v16>
PENUMBRA_INLINE V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <typename V>
PENUMBRA_INLINE void store(float* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

template <typename V = v16>
PENUMBRA_INLINE V splat(float x) {
    return V{} + x;
}

template <typename V>
PENUMBRA_INLINE V max(V a, V b) {
    return a < b ? b : a;
}

template <typename U>
PENUMBRA_INLINE auto bits_to_float(U bits) {
    typename Vector<sizeof(U) / 4>::floats v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

template <typename V>
using IntsOf = typename Vector<sizeof(V) / 4>::ints;

template <typename I, int... kLane>
constexpr I counted(std::integer_sequence<int, kLane...>) {
    return I{kLane...};
}

// 0, 1, 2, ... in as many lanes as V has.
template <typename V>
constexpr IntsOf<V> kCounted = counted<IntsOf<V>>(std::make_integer_sequence<int, sizeof(V) / 4>{});

// Lanes whose numbers differ in bit `kBit`, exchanged.
template <int kBit, typename V>
PENUMBRA_INLINE V exchange(V v) {
    return __builtin_shuffle(v, kCounted<V> ^ kBit);
}

// The sum of all lanes, always added up in the same tree.
template <typename V>
PENUMBRA_INLINE float sum(V v) {
    if constexpr (sizeof(V) > 32) v += exchange<8>(v);
    if constexpr (sizeof(V) > 16) v += exchange<4>(v);
    v += exchange<2>(v);
    v += exchange<1>(v);
    return v[0];
}

// exp(x) to about 1 ulp; 0 below -87.3, infinity above 88.7.
template <typename V>
PENUMBRA_INLINE V exp(V x) {
    const V low = splat<V>(-87.33654f), high = splat<V>(88.72283f);
    V t = x < low ? low : x;
    t = t > high ? high : t;
    const V magic = splat<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const V shifted = t * 1.44269504f + magic;
    const V n = shifted - magic;
    V r = t - n * 0.693145752f;  // ln 2 in two parts, the first short enough for exact products
    r = r - n * 1.42860677e-6f;
    V p = splat<V>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // n = 128 is out of an exponent's range, so scale in two halves.
    typedef IntsOf<V> I;
    typedef typename Vector<sizeof(V) / 4>::words U;
    I whole;
    std::memcpy(&whole, &shifted, sizeof whole);
    whole = (whole << 9) >> 9;  // the low mantissa bits hold n, signed
    const I half = whole >> 1;
    const V y = p * bits_to_float((U)((half + 127) << 23)) * bits_to_float((U)((whole - half + 127) << 23));
    V out = x < low ? V{} : y;
    return x > high ? splat<V>(__builtin_inff()) : out;
}

template <typename V>
PENUMBRA_INLINE V sigmoid(V x) {
    return 1.0f / (1.0f + exp(-x));
}

// x / (1 + exp(-x)) of the gate clamped from above, times the clamped other half.
template <typename V>
PENUMBRA_INLINE V swiglu(V gate, V up, float limit) {
    const V top = splat<V>(limit), bottom = splat<V>(-limit);
    gate = gate > top ? top : gate;
    up = up > top ? top : up;
    up = up < bottom ? bottom : up;
    return gate / (1.0f + exp(-gate)) * up;
}

// Half as many lanes, for what needs double precision on the way.
constexpr int kHalf = kWidth / 2;
typedef double dhalf __attribute__((vector_size(8 * kHalf)));
typedef int64_t lhalf __attribute__((vector_size(8 * kHalf)));
typedef float fhalf __attribute__((vector_size(4 * kHalf)));
typedef int32_t ihalf __attribute__((vector_size(4 * kHalf)));

// Sines and cosines of fp32 angles below about 2^30 radians. The turns are taken off in double precision: at position
// 900,000 an fp32 reduction would keep no digit.
PENUMBRA_INLINE void sincos(fhalf angle, fhalf& sine, fhalf& cosine) {
    const dhalf magic = dhalf{} + 6755399441055744.0;  // 1.5 * 2^52
    const dhalf a = __builtin_convertvector(angle, dhalf);
    const dhalf shifted = a * 0.63661977236758134308 + magic;
    const dhalf quarters = shifted - magic;
    dhalf r = a - quarters * 1.57079632679489655800;
    r = r - quarters * 6.12323399573676603587e-17;
    const fhalf x = __builtin_convertvector(r, fhalf);
    const fhalf x2 = x * x;
    fhalf s = fhalf{} - 1.9515295891e-4f;
    s = s * x2 + 8.3321608736e-3f;
    s = s * x2 - 1.6666654611e-1f;
    s = s * x2 * x + x;
    fhalf c = fhalf{} + 2.443315711809948e-5f;
    c = c * x2 - 1.388731625493765e-3f;
    c = c * x2 + 4.166664568298827e-2f;
    c = c * (x2 * x2) - 0.5f * x2 + 1.0f;
    lhalf whole;
    std::memcpy(&whole, &shifted, sizeof whole);
    const ihalf quadrant = __builtin_convertvector(whole, ihalf);  // its low bits count quarter turns
    const fhalf first = (quadrant & 1) != 0 ? c : s, second = (quadrant & 1) != 0 ? s : c;
    sine = (quadrant & 2) != 0 ? -first : first;
    cosine = ((quadrant + 1) & 2) != 0 ? -second : second;
}

// x * weight / rms(x) for one row; weight may be null. size is a multiple of 16; y may be x.
PENUMBRA_INLINE void norm_row(const float* x, const float* weight, int64_t size, float eps, float* y) {
    vec even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
        const vec a = load<vec>(x + i), b = load<vec>(x + i + kWidth);
        even += a * a;
        odd += b * b;
    }
    if (i < size) {
        const vec a = load<vec>(x + i);
        even += a * a;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(even + odd) / (float)size + eps);
    for (i = 0; i < size; i += kWidth) {
        const vec scaled = load<vec>(x + i) * scale;
        store(y + i, weight ? load<vec>(weight + i) * scaled : scaled);
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
        for (int64_t i = 0; i < pairs; i += kHalf) {
            fhalf f, s, c;
            std::memcpy(&f, freqs + i, sizeof f);
            sincos(f * p, s, c);
            for (int j = 0; j < kHalf; ++j) {
                cosine[2 * (i + j)] = cosine[2 * (i + j) + 1] = c[j];
                sine[2 * (i + j)] = -direction * s[j];
                sine[2 * (i + j) + 1] = direction * s[j];
            }
        }
    }
};

// Rotates `channels` (a multiple of 16) values starting at x, in place.
PENUMBRA_INLINE void rotate_row(float* x, const Turn& turn, int64_t channels) {
    for (int64_t i = 0; i < channels; i += kWidth) {
        const vec v = load<vec>(x + i);
        store(x + i, v * load<vec>(turn.cosine + i) + exchange<1>(v) * load<vec>(turn.sine + i));
    }
}

template <int kBit>
PENUMBRA_INLINE vec butterfly(vec v) {
    const vec other = exchange<kBit>(v);
    return (kCounted<vec> & kBit) != 0 ? other - v : v + other;
}

// The Sylvester Hadamard transform of one row over sqrt(size), in place; size a power of two of at least 16.
PENUMBRA_INLINE void hadamard_row(float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += kWidth) {
        vec v = butterfly<2>(butterfly<1>(load<vec>(x + i)));
        if constexpr (kWidth > 4) v = butterfly<4>(v);
        if constexpr (kWidth > 8) v = butterfly<8>(v);
        store(x + i, v);
    }
    for (int64_t half = kWidth; half < size; half *= 2) {
        for (int64_t block = 0; block < size; block += 2 * half) {
            for (int64_t i = block; i < block + half; i += kWidth) {
                const vec a = load<vec>(x + i), b = load<vec>(x + i + half);
                store(x + i, a + b);
                store(x + i + half, a - b);
            }
        }
    }
    const float scale = (float)(1.0 / __builtin_sqrt((double)size));
    for (int64_t i = 0; i < size; i += kWidth) store(x + i, load<vec>(x + i) * scale);
}

}  // namespace penumbra
