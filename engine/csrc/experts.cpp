// The mixture of experts: routing, the routed experts of a whole batch, and the shared expert.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "simd.h"

using namespace penumbra;

namespace {

constexpr int64_t kRowsPerTask = 96;

std::vector<const float*> rows_of(const float* base, int64_t stride, int64_t rows) {
    std::vector<const float*> out(rows);
    for (int64_t m = 0; m < rows; ++m) out[m] = base + m * stride;
    return out;
}

std::vector<float*> rows_of(float* base, int64_t stride, int64_t rows) {
    std::vector<float*> out(rows);
    for (int64_t m = 0; m < rows; ++m) out[m] = base + m * stride;
    return out;
}

// gate[i] becomes swiglu(gate[i], up[i]). Rows are padded to whole vectors, for the last one reaches past the end.
void activate(float* gate, const float* up, int64_t count, float limit) {
    for (int64_t i = 0; i < count; i += kWidth) store(gate + i, swiglu(load<vec>(gate + i), load<vec>(up + i), limit));
}

// One set of rows through one expert; gate and up are [rows, padded inner size] of scratch.
void expert(const float* const* x, int64_t rows, const Packed& w1, const Packed& w3, const Packed& w2, float limit,
            float* const* y) {
    const int64_t inner = w1.outputs, padded = (inner + kWidth - 1) / kWidth * kWidth;
    thread_local std::vector<float> scratch;
    if ((int64_t)scratch.size() < 2 * rows * padded) scratch.resize(2 * rows * padded);
    float *gate = scratch.data(), *up = gate + rows * padded;
    const auto gates = rows_of(gate, padded, rows), ups = rows_of(up, padded, rows);
    multiply(x, rows, w1, 0, inner, gates.data());
    multiply(x, rows, w3, 0, inner, ups.data());
    activate(gate, up, rows * padded, limit);
    const auto inners = rows_of((const float*)gate, padded, rows);
    multiply(inners.data(), rows, w2, 0, w2.outputs, y);
}

float score(float z) { return std::sqrt((z < 0 ? 0 : z) + std::log1p(std::exp(-std::fabs(z)))); }

}  // namespace

// picks, weights [tokens, k]; gate, up [experts] packed [inner, hidden], down [experts] packed [hidden, inner];
// y [tokens, hidden]. bad becomes -1, or the place in `picks` of an expert that does not exist.
extern "C" void penumbra_routed_experts(const float* x, int64_t x_stride, int64_t tokens, const int32_t* picks,
                                      const float* weights, int64_t k, int64_t experts, int64_t hidden,
                                        int64_t inner, const void* gate, const void* up, const void* down,
                                        int64_t half, float limit, float* y, int64_t* bad, int64_t threads) {
    *bad = -1;
    const int64_t total = tokens * k;
    std::vector<int64_t> begin(experts + 1, 0);
    for (int64_t i = 0; i < total; ++i) {
        if (picks[i] < 0 || picks[i] >= experts) {
            *bad = i;
            return;
        }
        ++begin[picks[i] + 1];
    }
    struct Task {
        int64_t expert, from, to;
    };
    std::vector<Task> tasks;
    for (int64_t e = 0; e < experts; ++e) {
        for (int64_t from = 0; from < begin[e + 1]; from += kRowsPerTask) {
            const int64_t to = std::min(from + kRowsPerTask, begin[e + 1]);
            tasks.push_back({e, begin[e] + from, begin[e] + to});
        }
        begin[e + 1] += begin[e];
    }
    std::vector<int64_t> order(total);  // places in `picks`, by expert
    {
        std::vector<int64_t> next(begin.begin(), begin.end() - 1);
        for (int64_t i = 0; i < total; ++i) order[next[picks[i]]++] = i;
    }
    const int64_t bytes = half ? 2 : 4;
    const int64_t gate_bytes = (inner + kPanel - 1) / kPanel * kPanel * hidden * bytes;
    const int64_t down_bytes = (hidden + kPanel - 1) / kPanel * kPanel * inner * bytes;
    thread_local std::vector<float> kept;
    if ((int64_t)kept.size() < total * hidden) kept.resize(total * hidden);
    float* outputs = kept.data();
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < (int64_t)tasks.size(); ++t) {
            const Task& task = tasks[t];
            const int64_t rows = task.to - task.from;
            const float* from[kRowsPerTask];
            float* to[kRowsPerTask];
            for (int64_t i = 0; i < rows; ++i) {
                from[i] = x + order[task.from + i] / k * x_stride;
                to[i] = outputs + order[task.from + i] * hidden;
            }
            const Packed w1{(const char*)gate + task.expert * gate_bytes, half != 0, inner, hidden};
            const Packed w3{(const char*)up + task.expert * gate_bytes, half != 0, inner, hidden};
            const Packed w2{(const char*)down + task.expert * down_bytes, half != 0, hidden, inner};
            expert(from, rows, w1, w3, w2, limit, to);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            float* out = y + t * hidden;
            const float* in = outputs + t * k * hidden;
            for (int64_t d = 0; d < hidden; ++d) out[d] = weights[t * k] * in[d];
            for (int64_t j = 1; j < k; ++j) {
                const float weight = weights[t * k + j];
                for (int64_t d = 0; d < hidden; ++d) out[d] += weight * in[j * hidden + d];
            }
        }
    }
}

extern "C" void penumbra_mlp(const float* x, int64_t x_stride, int64_t rows, const void* w1, const void* w3,
                             const void* w2, int64_t half, int64_t hidden, int64_t inner, float limit, float* y,
                             int64_t threads) {
    const Packed gate_w{w1, half != 0, inner, hidden}, up_w{w3, half != 0, inner, hidden};
    const Packed down_w{w2, half != 0, hidden, inner};
    const int64_t padded = (inner + kWidth - 1) / kWidth * kWidth;
    thread_local std::vector<float> scratch;
    if ((int64_t)scratch.size() < 2 * rows * padded) scratch.resize(2 * rows * padded);
    float *gate = scratch.data(), *up = gate + rows * padded;
    const auto in = rows_of(x, x_stride, rows);
    const auto gates = rows_of(gate, padded, rows), ups = rows_of(up, padded, rows);
    multiply_parallel(in.data(), rows, gate_w, 0, inner, gates.data(), (int)threads);
    multiply_parallel(in.data(), rows, up_w, 0, inner, ups.data(), (int)threads);
    activate(gate, up, rows * padded, limit);
    const auto inners = rows_of((const float*)gate, padded, rows);
    const auto out = rows_of(y, hidden, rows);
    multiply_parallel(inners.data(), rows, down_w, 0, hidden, out.data(), (int)threads);
}

// Scores every expert, then picks: the k best of score + bias if there is a bias, else the ones in `picks` already.
// x [rows, hidden], gate packed [experts, hidden], bias [experts] or null, picks and weights [rows, k].
// bad becomes -1, or the place in `picks` of an expert that does not exist.
extern "C" void penumbra_route(const float* x, int64_t x_stride, int64_t rows, const void* gate, int64_t half,
                               int64_t experts, int64_t hidden, const float* bias, int64_t k, float scaling,
                               int32_t* picks, float* weights, int64_t* bad, int64_t threads) {
    *bad = -1;
    thread_local std::vector<float> scratch, biased;
    if ((int64_t)scratch.size() < rows * experts) scratch.resize(rows * experts);
    biased.resize(experts);
    const Packed w{gate, half != 0, experts, hidden};
    const auto in = rows_of(x, x_stride, rows);
    const auto out = rows_of(scratch.data(), experts, rows);
    multiply_parallel(in.data(), rows, w, 0, experts, out.data(), (int)threads);
    for (int64_t t = 0; t < rows; ++t) {
        float* s = scratch.data() + t * experts;
        int32_t* pick = picks + t * k;
        float* weight = weights + t * k;
        if (bias) {
            for (int64_t e = 0; e < experts; ++e) {
                s[e] = score(s[e]);
                biased[e] = s[e] + bias[e];
                if (std::isnan(biased[e])) biased[e] = -INFINITY;  // still a valid pick; its weight stays NaN
            }
            for (int64_t j = 0; j < k; ++j) {
                const auto best = std::max_element(biased.begin(), biased.end());  // the first of equals
                pick[j] = (int32_t)(best - biased.begin());
                *best = -INFINITY;
            }
        } else {
            for (int64_t j = 0; j < k; ++j) {
                if (pick[j] < 0 || pick[j] >= experts) {
                    *bad = t * k + j;
                    return;
                }
            }
        }
        float sum = 0;
        for (int64_t j = 0; j < k; ++j) {
            weight[j] = bias ? s[pick[j]] : score(s[pick[j]]);
            sum += weight[j];
        }
        for (int64_t j = 0; j < k; ++j) weight[j] = weight[j] / (sum + 1e-20f) * scaling;
    }
}
