// Row by row: hyper-connections, norms, rotary positions, the Hadamard rotation. One call does what would be a dozen
// torch operators, whose cost in a decode step is all in the calling.
#include <cstdint>

#include "kernels.h"
#include "simd.h"

using namespace penumbra;

namespace {

constexpr int kStreams = 4;
constexpr int64_t kAlone = 8;  // rows below which a second thread costs more than it brings

constexpr int kSiteRows = 2 * kStreams + kStreams * kStreams;

float inverse_rms(const float* x, int64_t size, float eps) {
    vec square = {};
    for (int64_t i = 0; i < size; i += kWidth) square += load<vec>(x + i) * load<vec>(x + i);
    return 1.0f / __builtin_sqrtf(sum(square) / (float)size + eps);
}

// out[t][r] = dot product of token t with row r of fn, for kTokens tokens that lie `size` apart and kRows rows; each is
// summed lane by lane and then across, however many are done side by side. Inputs 16 b to 16 b + 15 of row r lie at
// fn + r * row_stride + b * block_stride.
template <int kTokens, int kRows>
PENUMBRA_INLINE void project(const float* x, int64_t size, const float* fn, int64_t row_stride, int64_t block_stride,
                             float* out, int64_t out_stride) {
    vec sums[kTokens][kRows] = {};
    for (int64_t i = 0; i < size; i += kWidth) {
        const float* weights = fn + i / kLanes * block_stride + i % kLanes;
        vec v[kTokens];
        for (int t = 0; t < kTokens; ++t) v[t] = load<vec>(x + t * size + i);
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r) {
            const vec weight = load<vec>(weights + r * row_stride);
            for (int t = 0; t < kTokens; ++t) sums[t][r] += v[t] * weight;
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int r = 0; r < kRows; ++r) out[t * out_stride + r] = sum(sums[t][r]);
    }
}

// The weighted sum of the four streams.
PENUMBRA_INLINE void weigh(const float* streams, const float* weights, int64_t size, float* x) {
    for (int64_t i = 0; i < size; i += kWidth) {
        vec v = load<vec>(streams + i) * weights[0];
        for (int j = 1; j < kStreams; ++j) v += load<vec>(streams + j * size + i) * weights[j];
        store(x + i, v);
    }
}

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

PENUMBRA_INLINE v4 row_sum(v4 row) {
    row += __builtin_shuffle(row, i4{1, 0, 3, 2});
    return row + __builtin_shuffle(row, i4{2, 3, 0, 1});
}

// Sinkhorn's steps on a 4 x 4 matrix of logits, [from][to], in place: softmax of rows, then columns and rows in turn.
PENUMBRA_INLINE void doubly_stochastic(float* matrix, float eps, int64_t iters) {
    for (int from = 0; from < kStreams; ++from) {
        float* row = matrix + from * kStreams;
        float top = row[0];
        for (int to = 1; to < kStreams; ++to) top = row[to] > top ? row[to] : top;
        for (int to = 0; to < kStreams; ++to) row[to] -= top;
    }
    for (int i = 0; i < kStreams * kStreams; i += kWidth) store(matrix + i, exp(load<vec>(matrix + i)));
    v4 m[kStreams];
    std::memcpy(m, matrix, sizeof m);
    const auto columns = [&] {
        const v4 sums = (m[0] + m[1]) + (m[2] + m[3]) + eps;
        for (v4& row : m) row /= sums;
    };
    for (v4& row : m) row = row / row_sum(row) + eps;
    columns();
    for (int64_t i = 1; i < iters; ++i) {
        for (v4& row : m) row /= row_sum(row) + eps;
        columns();
    }
    std::memcpy(matrix, m, sizeof m);
}

PENUMBRA_INLINE void sigmoids(float* values, int count) {
    for (int i = 0; i < count; i += kWidth) store(values + i, sigmoid(load<vec>(values + i)));
}

}  // namespace

// streams [rows, 4, size] -> x [rows, size], post [rows, 4], comb [rows, 4, 4]. base [24], scale [3]; fn [24, 4 * size]
// stored as [4 * size / 16][24][16], so that it is read as one stream.
extern "C" void penumbra_mix_in(const float* streams, int64_t rows, int64_t size, const float* fn, const float* base,
                                const float* scale, float rms_eps, float hc_eps, int64_t iters, float* x, float* post,
                                float* comb, int64_t threads) {
    // fn outgrows the L1 cache, so three tokens share each of its lines; the sums of a part fill the registers.
    constexpr int kTokens = 3, kPart = kWidth == 16 ? 8 : 4, kPartAlone = kWidth == 16 ? kSiteRows : 12;
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
        sigmoids(gates, 2 * kStreams);
        for (int j = 0; j < kStreams; ++j) {
            post[t * kStreams + j] = 2 * gates[kStreams + j];
            gates[j] += hc_eps;
        }
        float* matrix = comb + t * kStreams * kStreams;
        for (int i = 0; i < kStreams * kStreams; ++i) {
            matrix[i] = mix[2 * kStreams + i] * scale[2] + base[2 * kStreams + i];
        }
        doubly_stochastic(matrix, hc_eps, iters);
        weigh(in, gates, size, x + t * size);
    };
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && rows >= kAlone)
    for (int64_t t = 0; t < rows; t += kTokens) {
        alignas(64) float mix[kTokens][kSiteRows];
        const int64_t count = rows - t < kTokens ? rows - t : kTokens;
        if (count == kTokens) {
            for (int part = 0; part < kSiteRows; part += kPart) {
                project<kTokens, kPart>(streams + t * width, width, fn + part * kLanes, kLanes, block,
                                        &mix[0][part], kSiteRows);
            }
        } else {
            for (int64_t i = 0; i < count; ++i) {
                for (int part = 0; part < kSiteRows; part += kPartAlone) {
                    project<1, kPartAlone>(streams + (t + i) * width, width, fn + part * kLanes, kLanes, block,
                                           &mix[i][part], kSiteRows);
                }
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
        const float *in = streams + t * kStreams * size, *p = post + t * kStreams, *c = comb + t * kStreams * kStreams;
        float* to = out + t * kStreams * size;
        for (int64_t i = 0; i < size; i += kWidth) {
            const vec v = load<vec>(y + t * size + i);
            vec old[kStreams];
            for (int j = 0; j < kStreams; ++j) old[j] = load<vec>(in + j * size + i);
            for (int k = 0; k < kStreams; ++k) {
                vec next = v * p[k];
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
        sigmoids(gates, kStreams);
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
            } else if (out != in) {
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
        if (y != x) std::memcpy(y + t * size, x + t * size, size * sizeof(float));
        hadamard_row(y + t * size, size);
    }
}
