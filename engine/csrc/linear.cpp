// Matrix products whose rows do not know their neighbours.
//
// A matrix [N, K] is stored as panels of 32 outputs, each panel [K][32], the last one padded with zeros. In bf16 the
// 32 outputs of one k are 16 words of 32 bits: output i in the low half, output 16 + i in the high half, so that a
// shift and a mask turn one load into two fp32 vectors.
//
// An output is one chain of fused multiply-adds over k from zero. Tiles only choose how many chains run side by side,
// so neither the number of rows nor the number of threads can reach a bit of the result.
#include "kernels.h"
#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace penumbra {
namespace {

constexpr int kVectors = kPanel / kWidth;
constexpr int kSums = kWidth == 16 ? 24 : 12;  // accumulators at once: three quarters of the registers
constexpr int kTile = kSums > kVectors ? kSums / kVectors : 1;  // rows a tile
constexpr int kDirect = kTile < 6 ? kTile : 6;  // rows read where they lie: their lines fit the ways of the L1 cache
constexpr int64_t kBlock = 96;                  // rows packed at a time, so weights are streamed once for 96 rows
constexpr int64_t kAlone = 1 << 16;  // multiply-adds below which a second thread costs more than it brings

// widen: one k of a panel, 32 weights, as vectors in output order.
struct Bf16 {
    static constexpr int64_t kBytes = 2;
    PENUMBRA_INLINE void widen(const char* row, vec* out) {
        constexpr int kHalves = kVectors / 2;
        for (int j = 0; j < kHalves; ++j) {
            uvec words;
            std::memcpy(&words, row + j * sizeof words, sizeof words);
            out[j] = bits_to_float(words << 16);
            out[kHalves + j] = bits_to_float(words & 0xffff0000u);
        }
    }
};

struct Fp32 {
    static constexpr int64_t kBytes = 4;
    PENUMBRA_INLINE void widen(const char* row, vec* out) {
        for (int j = 0; j < kVectors; ++j) out[j] = load<vec>((const float*)row + j * kWidth);
    }
};

// Stores the part of a panel's 32 outputs that lies in [first, last); y[0] is output `first`.
PENUMBRA_INLINE void put(float* y, int64_t first, int64_t last, int64_t column, const vec* sums) {
    if (column >= first && column + kPanel <= last) {
        for (int j = 0; j < kVectors; ++j) store(y + (column - first) + j * kWidth, sums[j]);
        return;
    }
    float all[kPanel];
    for (int j = 0; j < kVectors; ++j) store(all + j * kWidth, sums[j]);
    for (int64_t n = std::max(column, first); n < std::min(column + kPanel, last); ++n) y[n - first] = all[n - column];
}

// kRows rows times kPanels neighbouring panels. Row m's input k is x[m][k], or packed[k * kRows + m] if x is null.
template <typename W, int kRows, int kPanels, bool kPackedRows>
void tile(const float* const* x, const float* packed, const char* panels, int64_t inputs, int64_t column,
          int64_t first, int64_t last, float* const* y) {
    constexpr int kWide = kPanels * kVectors;
    vec sums[kRows][kWide] = {};
    const int64_t stride = inputs * kPanel * W::kBytes;
    const float* rows[kRows];
    if (!kPackedRows) {
        for (int m = 0; m < kRows; ++m) rows[m] = x[m];
    }
    for (int64_t k = 0; k < inputs; ++k) {
        vec weights[kWide];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
            W::widen(panels + p * stride + k * kPanel * W::kBytes, weights + p * kVectors);
        }
#pragma GCC unroll 12
        for (int m = 0; m < kRows; ++m) {
            const vec value = splat<vec>(kPackedRows ? packed[k * kRows + m] : rows[m][k]);
#pragma GCC unroll 8
            for (int j = 0; j < kWide; ++j) sums[m][j] += value * weights[j];
        }
    }
    for (int m = 0; m < kRows; ++m) {
        for (int p = 0; p < kPanels; ++p) put(y[m], first, last, column + p * kPanel, sums[m] + p * kVectors);
    }
}

// Few rows: several panels at once, enough chains to hide the latency of a multiply-add.
template <typename W, int kRows>
void few(const float* const* x, const Packed& w, int64_t first, int64_t last, float* const* y) {
    constexpr int kRoom = kSums / (kRows * kVectors), kPanels = kRoom < 1 ? 1 : kRoom > 4 ? 4 : kRoom;
    const int64_t stride = w.inputs * kPanel * W::kBytes;
    int64_t panel = first / kPanel;
    const int64_t end = (last + kPanel - 1) / kPanel;
    const char* data = (const char*)w.data;
    for (; panel + kPanels <= end; panel += kPanels) {
        tile<W, kRows, kPanels, false>(x, nullptr, data + panel * stride, w.inputs, panel * kPanel, first, last, y);
    }
    for (; panel < end; ++panel) {
        tile<W, kRows, 1, false>(x, nullptr, data + panel * stride, w.inputs, panel * kPanel, first, last, y);
    }
}

// f(std::integral_constant<int, n>) for the n in [1, kMost] that is only known at run time.
template <int kMost, typename F>
PENUMBRA_INLINE void with_constant(int64_t n, F f) {
    if constexpr (kMost > 0) {
        if (n == kMost) return f(std::integral_constant<int, kMost>{});
        with_constant<kMost - 1>(n, f);
    }
}

// Many rows: each tile of them is rewritten as [K][rows] once, then meets every panel. Read in place, rows whose
// distance is a multiple of 4 KiB would push each other out of the cache at every step. Where registers are few, tiles
// are low and would widen the same bf16 over and over, so a panel is widened once for all.
template <typename W>
void many(const float* const* x, int64_t count, const Packed& w, int64_t first, int64_t last, float* const* y) {
    thread_local std::vector<float> scratch;
    constexpr bool kWiden = W::kBytes < 4 && kWidth < 16;
    const int64_t inputs = w.inputs, stride = inputs * kPanel * W::kBytes;
    if ((int64_t)scratch.size() < (kBlock + kPanel) * inputs) scratch.resize((kBlock + kPanel) * inputs);
    float *packed = scratch.data(), *wide = packed + kBlock * inputs;
    for (int64_t block = 0; block < count; block += kBlock) {
        const int64_t rows = std::min(kBlock, count - block);
        for (int64_t m = 0; m < rows; m += kTile) {
            const int64_t height = std::min<int64_t>(kTile, rows - m);
            float* out = packed + m * inputs;
            for (int64_t i = 0; i < height; ++i) {
                const float* row = x[block + m + i];
                for (int64_t k = 0; k < inputs; ++k) out[k * height + i] = row[k];
            }
        }
        for (int64_t panel = first / kPanel; panel * kPanel < last; ++panel) {
            const char* data = (const char*)w.data + panel * stride;
            if constexpr (kWiden) {
                for (int64_t k = 0; k < inputs; ++k) {
                    vec weights[kVectors];
                    W::widen(data + k * kPanel * W::kBytes, weights);
                    for (int j = 0; j < kVectors; ++j) store(wide + k * kPanel + j * kWidth, weights[j]);
                }
                data = (const char*)wide;
            }
            for (int64_t m = 0; m < rows; m += kTile) {
                const int64_t height = std::min<int64_t>(kTile, rows - m);
                with_constant<kTile>(height, [&](auto n) {
                    tile<std::conditional_t<kWiden, Fp32, W>, n.value, 1, true>(
                        nullptr, packed + m * inputs, data, inputs, panel * kPanel, first, last, y + block + m);
                });
            }
        }
    }
}

template <typename W>
void multiply_as(const float* const* x, int64_t rows, const Packed& w, int64_t first, int64_t last, float* const* y) {
    if (rows > kDirect) return many<W>(x, rows, w, first, last, y);
    with_constant<kDirect>(rows, [&](auto n) { few<W, n.value>(x, w, first, last, y); });
}

}  // namespace

void multiply(const float* const* x, int64_t rows, const Packed& w, int64_t first, int64_t last, float* const* y) {
    if (w.half) {
        multiply_as<Bf16>(x, rows, w, first, last, y);
    } else {
        multiply_as<Fp32>(x, rows, w, first, last, y);
    }
}

void multiply_parallel(const float* const* x, int64_t rows, const Packed& w, int64_t first, int64_t last,
                       float* const* y, int threads) {
    if (threads <= 1 || rows * (last - first) * w.inputs < kAlone) return multiply(x, rows, w, first, last, y);
#pragma omp parallel num_threads(threads)
    {
        const int64_t begin = first / kPanel, count = (last + kPanel - 1) / kPanel - begin;
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t from = std::max(first, (begin + count * me / team) * kPanel);
        const int64_t to = std::min(last, (begin + count * (me + 1) / team) * kPanel);
        if (from < to) {
            std::vector<float*> mine(rows);
            for (int64_t m = 0; m < rows; ++m) mine[m] = y[m] + (from - first);
            multiply(x, rows, w, from, to, mine.data());
        }
    }
}

}  // namespace penumbra

using namespace penumbra;

// x [rows, groups * inputs] with x_stride values between rows, packed [groups * outputs, inputs] -> y likewise
// contiguous [rows, groups * outputs]. Group g's inputs meet group g's outputs alone; groups = 1 is a plain product.
extern "C" void penumbra_linear(const float* x, int64_t x_stride, int64_t rows, const void* packed, int64_t half,
                                int64_t groups, int64_t outputs, int64_t inputs, float* y, int64_t threads) {
    const Packed w{packed, half != 0, groups * outputs, inputs};
    std::vector<const float*> from(rows);
    std::vector<float*> to(rows);
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t m = 0; m < rows; ++m) {
            from[m] = x + m * x_stride + g * inputs;
            to[m] = y + m * groups * outputs + g * outputs;
        }
        multiply_parallel(from.data(), rows, w, g * outputs, (g + 1) * outputs, to.data(), (int)threads);
    }
}
