// Row by row: hyper-connections, norms, rotary positions, the Hadamard rotation. One call does what would be a dozen
// torch operators, whose cost in a decode step is all in the calling.
#include <cstdint>

#include "simd.h"

using namespace penumbra;

namespace {

constexpr int kStreams = 4;
constexpr int64_t kAlone = 8;  // rows below which a second thread costs more than it brings

constexpr int kSiteRows = 2 * kStreams + kStreams * kStreams;

float inverse_rms(const float* x, int64_t size, float eps) {
    v16 square = {};
    for (int64_t i = 0; i < size; i += kLanes) square += load(x + i) * load(x + i);
    return 1.0f / __builtin_sqrtf(sum(square) / (float)size + eps);
}

// out[t][r] = dot product of token t with row r of fn, for kTokens tokens that lie `size` apart and kRows rows; each is
// summed lane by lane and then across, however many are done side by side. fn holds 16 inputs of row r at
// r * row_stride + block * block_stride.
template <int kTokens, int kRows>
PENUMBRA_INLINE void project(const float* x, int64_t size, const float* fn, int64_t row_stride, int64_t block_stride,
                             float* out, int64_t out_stride) {
    v16 sums[kTokens][kRows] = {};
    for (int64_t i = 0; i < size; i += kLanes, fn += block_stride) {
        v16 v[kTokens];
        for (int t = 0; t < kTokens; ++t) v[t] = load(x + t * size + i);
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r) {
            const v16 weight = load(fn + r * row_stride);
            for (int t = 0; t < kTokens; ++t) sums[t][r] += v[t] * weight;
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int r = 0; r < kRows; ++r) out[t * out_stride + r] = sum(sums[t][r]);
    }
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

// streams [rows, 4, size] -> x [rows, size], post [rows, 4], comb [rows, 4, 4]. base [24], scale [3]; fn [24, 4 * size]
// stored as [4 * size / 16][24][16], so that it is read as one stream.
extern "C" void penumbra_mix_in(const float* streams, int64_t rows, int64_t size, const float* fn, const float* base,
                                const float* scale, float rms_eps, float hc_eps, int64_t iters, float* x, float* post,
                                float* comb, int64_t threads) {
    // fn outgrows the L1 cache, so three tokens share each of its lines; three by eight sums fill the registers.
    constexpr int kTokens = 3, kPart = kSiteRows / kTokens;
    const int64_t width = kStreams * size, block = kSiteRows * kLanes;
    const auto one = [&](int64_t t, float* mix) {
        const float* in = streams + t * width;
        const float rms = inverse_rms(in, width, rms_eps);
        for (int r = 0; r < kSiteRows; ++r) mix[r] *= rms;
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
    };
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && rows >= kAlone)
    for (int64_t t = 0; t < rows; t += kTokens) {
        alignas(64) float mix[kTokens][kSiteRows];
        const int64_t count = rows - t < kTokens ? rows - t : kTokens;
        if (count == kTokens) {
            for (int part = 0; part < kSiteRows; part += kPart) {
                project<kTokens, kPart>(streams + t * width, width, fn + part * kLanes, kLanes, block, &mix[0][part],
                                        kSiteRows);
            }
        } else {
            for (int64_t i = 0; i < count; ++i) {
                project<1, kSiteRows>(streams + (t + i) * width, width, fn, kLanes, block, mix[i], kSiteRows);
            }
        }
        for (int64_t i = 0; i < count; ++i) one(t + i, mix[i]);
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
        const float rms = inverse_rms(in, kStreams * size, rms_eps);
        project<1, kStreams>(in, kStreams * size, fn, kStreams * size, kLanes, gates, kStreams);
        for (int j = 0; j < kStreams; ++j) gates[j] = gates[j] * rms * scale[0] + base[j];
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
