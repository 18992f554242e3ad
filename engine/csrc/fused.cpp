// Row by row: hyper-connections, norms, rotary positions, the Hadamard rotation. One call does what would be a dozen
// torch operators, whose cost in a decode step is all in the calling.
#include <cstdint>

#include "simd.h"

using namespace penumbra;

namespace {

constexpr int kStreams = 4;
constexpr int64_t kAlone = 8;  // rows below which a second thread costs more than it brings

// kRows dot products of x with the rows of fn, each summed lane by lane and then across, and x's own square.
template <int kRows>
PENUMBRA_INLINE void project(const float* x, const float* fn, int64_t size, float eps, float* out) {
    v16 square = {}, sums[kRows] = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const v16 v = load(x + i);
        square += v * v;
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r) sums[r] += v * load(fn + r * size + i);
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(square) / (float)size + eps);
    for (int r = 0; r < kRows; ++r) out[r] = sum(sums[r]) * scale;
}

// The weighted sum of the four streams.
PENUMBRA_INLINE void weigh(const float* streams, const float* weights, int64_t size, float* x) {
    for (int64_t i = 0; i < size; i += kLanes) {
        v16 v = load(streams + i) * weights[0];
        for (int j = 1; j < kStreams; ++j) v += load(streams + j * size + i) * weights[j];
        store(x + i, v);
    }
}

// Lane 4 * from + to. Each sum is the same in all lanes it covers.
PENUMBRA_INLINE v16 row_sums(v16 m) {
    m += exchange<1>(m);
    return m + exchange<2>(m);
}

PENUMBRA_INLINE v16 column_sums(v16 m) {
    m += exchange<4>(m);
    return m + exchange<8>(m);
}

PENUMBRA_INLINE v16 doubly_stochastic(v16 logits, float eps, int64_t iters) {
    v16 top = max(logits, exchange<1>(logits));
    top = max(top, exchange<2>(top));
    v16 m = exp(logits - top);
    m = m / row_sums(m) + eps;
    m = m / (column_sums(m) + eps);
    for (int64_t i = 1; i < iters; ++i) {
        m = m / (row_sums(m) + eps);
        m = m / (column_sums(m) + eps);
    }
    return m;
}

}  // namespace

// streams [rows, 4, size] -> x [rows, size], post [rows, 4], comb [rows, 4, 4]. fn [24, 4 * size], base [24], scale [3].
extern "C" void penumbra_mix_in(const float* streams, int64_t rows, int64_t size, const float* fn, const float* base,
                                const float* scale, float rms_eps, float hc_eps, int64_t iters, float* x, float* post,
                                float* comb, int64_t threads) {
    constexpr int kRows = 2 * kStreams + kStreams * kStreams;
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && rows >= kAlone)
    for (int64_t t = 0; t < rows; ++t) {
        const float* in = streams + t * kStreams * size;
        alignas(64) float mix[kRows];
        project<kRows>(in, fn, kStreams * size, rms_eps, mix);
        alignas(64) float gates[kLanes] = {};
        for (int j = 0; j < kStreams; ++j) {
            gates[j] = mix[j] * scale[0] + base[j];
            gates[kStreams + j] = mix[kStreams + j] * scale[1] + base[kStreams + j];
        }
        store(gates, sigmoid(load(gates)));
        for (int j = 0; j < kStreams; ++j) {
            post[t * kStreams + j] = 2 * gates[kStreams + j];
            gates[j] += hc_eps;
        }
        const v16 logits = load(mix + 2 * kStreams) * scale[2] + load(base + 2 * kStreams);
        store(comb + t * kLanes, doubly_stochastic(logits, hc_eps, iters));
        weigh(in, gates, size, x + t * size);
    }
}

// y [rows, size], streams and out [rows, 4, size]: out[k] = post[k] * y + sum over j of comb[j][k] * streams[j].
extern "C" void penumbra_mix_out(const float* y, const float* streams, const float* post, const float* comb,
                                 int64_t rows, int64_t size, float* out, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && rows >= kAlone)
    for (int64_t t = 0; t < rows; ++t) {
        const float *in = streams + t * kStreams * size, *p = post + t * kStreams, *c = comb + t * kLanes;
        float* to = out + t * kStreams * size;
        for (int64_t i = 0; i < size; i += kLanes) {
            const v16 v = load(y + t * size + i);
            v16 old[kStreams];
            for (int j = 0; j < kStreams; ++j) old[j] = load(in + j * size + i);
            for (int k = 0; k < kStreams; ++k) {
                v16 next = v * p[k];
                for (int j = 0; j < kStreams; ++j) next += old[j] * c[j * kStreams + k];
                store(to + k * size + i, next);
            }
        }
    }
}

// streams [rows, 4, size] -> x [rows, size]. fn [4, 4 * size], base [4], scale [1].
extern "C" void penumbra_collapse(const float* streams, int64_t rows, int64_t size, const float* fn, const float* base,
                                  const float* scale, float rms_eps, float hc_eps, float* x, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && rows >= kAlone)
    for (int64_t t = 0; t < rows; ++t) {
        const float* in = streams + t * kStreams * size;
        alignas(64) float gates[kLanes] = {};
        project<kStreams>(in, fn, kStreams * size, rms_eps, gates);
        for (int j = 0; j < kStreams; ++j) gates[j] = gates[j] * scale[0] + base[j];
        store(gates, sigmoid(load(gates)));
        for (int j = 0; j < kStreams; ++j) gates[j] += hc_eps;
        weigh(in, gates, size, x + t * size);
    }
}

// x [rows, size] with x_stride values between rows -> y [rows, size]: norm, if `norm`; times weight, if there is one;
// then, if there are positions, the trailing 2 * pairs channels turned. Row t belongs to token t / heads.
extern "C" void penumbra_norm_rotate(const float* x, int64_t x_stride, int64_t rows, int64_t size, int64_t heads,
                                     int64_t norm, const float* weight, float eps, const int64_t* positions,
                                     const float* freqs, int64_t pairs, float direction, float* y, int64_t threads) {
    const int64_t tokens = rows / heads;
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && rows >= kAlone)
    for (int64_t t = 0; t < tokens; ++t) {
        Turn turn;
        if (positions) turn.set(positions[t], freqs, pairs, direction);
        for (int64_t row = t * heads; row < (t + 1) * heads; ++row) {
            const float* in = x + row * x_stride;
            float* out = y + row * size;
            if (norm) {
                norm_row(in, weight, size, eps, out);
            } else {
                std::memcpy(out, in, size * sizeof(float));
            }
            if (positions) rotate_row(out + size - 2 * pairs, turn, 2 * pairs);
        }
    }
}

// Each of `rows` rows of x times the Hadamard matrix over sqrt(size), into y.
extern "C" void penumbra_hadamard(const float* x, int64_t rows, int64_t size, float* y, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && rows >= kAlone)
    for (int64_t t = 0; t < rows; ++t) {
        std::memcpy(y + t * size, x + t * size, size * sizeof(float));
        hadamard_row(y + t * size, size);
    }
}
