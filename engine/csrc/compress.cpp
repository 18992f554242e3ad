// Compressors: neighbouring tokens pooled into one row, and the rings that carry unfinished blocks between steps.
//
// Every row is made by one function from the same tokens in the same order, whether a token comes from this step or
// from a ring, so where a prompt was cut can not show. All reads of a ring come before all writes to it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "simd.h"

using namespace penumbra;

namespace {

constexpr int64_t kPage = 256;
constexpr int64_t kC4 = 4, kC4Ring = 16;
constexpr int64_t kC128 = 128, kC128Ring = 256;

// One step's addresses; see engine/batch.py.
struct Step {
    int64_t segments, pages;
    const int32_t* offsets;
    const int64_t* starts;
    const int32_t *page_table, *swa_table, *slots;
};

// A token's values and gates. Those of this step lack their `ape` row; those from a ring hold it already.
struct Token {
    const float *values, *gates, *ape;
};

struct Block {
    int64_t segment, number, row;
};

// Blocks of `ratio` tokens that end in this step; fills positions and rows for the caller.
std::vector<Block> finished(const Step& step, int64_t ratio, int64_t* rows) {
    std::vector<Block> blocks;
    const int64_t per_page = kPage / ratio;
    for (int64_t s = 0; s < step.segments; ++s) {
        const int64_t start = step.starts[s], end = start + step.offsets[s + 1] - step.offsets[s];
        for (int64_t b = start / ratio; b < end / ratio; ++b) {
            rows[blocks.size()] = step.page_table[s * step.pages + b / per_page] * per_page + b % per_page;
            blocks.push_back({s, b, (int64_t)blocks.size()});
        }
    }
    return blocks;
}

// out[c] = sum of values * softmax of gates over the tokens, for channels [from, from + size) of every token.
void pool(const Token* tokens, const int64_t* from, int count, int64_t size, float* out) {
    for (int64_t c = 0; c < size; c += kWidth) {
        vec gates[kC128], top = splat<vec>(-__builtin_inff());
        for (int t = 0; t < count; ++t) {
            const int64_t at = from[t] + c;
            gates[t] = load<vec>(tokens[t].gates + at);
            if (tokens[t].ape) gates[t] += load<vec>(tokens[t].ape + at);
            top = max(top, gates[t]);
        }
        vec total = {}, weighted = {};
        for (int t = 0; t < count; ++t) {
            const vec e = exp(gates[t] - top);
            total += e;
            weighted += e * load<vec>(tokens[t].values + from[t] + c);
        }
        store(out + c, weighted / total);
    }
}

void finish(float* row, const float* norm, int64_t size, float eps, int64_t position, const float* freqs,
            int64_t pairs, bool rotate_keys) {
    norm_row(row, norm, size, eps, row);
    Turn turn;
    turn.set(position, freqs, pairs, 1.0f);
    rotate_row(row + size - 2 * pairs, turn, 2 * pairs);
    if (rotate_keys) hadamard_row(row, size);
}

// A ring row [values | gates + ape].
void remember(float* ring_row, const float* u, const float* g, const float* ape, int64_t width) {
    std::memcpy(ring_row, u, width * sizeof(float));
    for (int64_t c = 0; c < width; c += kWidth) store(ring_row + width + c, load<vec>(g + c) + load<vec>(ape + c));
}

}  // namespace

// u, g [T, 2 * size], u_stride and g_stride values between tokens; ring [items, 16, 4 * size]. Fills values [R, size]
// and rows [R]; R, left in count, is at most T / 4 + segments.
extern "C" void penumbra_compress_c4(const float* u, int64_t u_stride, const float* g, int64_t g_stride,
                                        const float* ape, const float* norm, float* ring, int64_t size,
                                        int64_t segments, int64_t pages, const int32_t* offsets,
                                        const int64_t* starts, const int32_t* page_table, const int32_t* swa_table,
                                        const float* freqs, int64_t pairs, float eps, int64_t rotate_keys,
                                        float* values, int64_t* rows, int64_t* count, int64_t threads) {
    const Step step{segments, pages, offsets, starts, page_table, swa_table, nullptr};
    const int64_t width = 2 * size;
    const auto ring_row = [&](int64_t s, int64_t p) {
        return ring + (swa_table[s * pages + p / kPage] * kC4Ring + p % kC4Ring) * 2 * width;
    };
    const auto blocks = finished(step, kC4, rows);
    *count = (int64_t)blocks.size();
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && blocks.size() > 8)
    for (size_t i = 0; i < blocks.size(); ++i) {
        const auto [s, b, row] = blocks[i];
        Token tokens[2 * kC4];
        int64_t from[2 * kC4];
        int n = 0;
        for (int64_t p = std::max<int64_t>(0, (b - 1) * kC4); p < (b + 1) * kC4; ++p, ++n) {
            const int64_t t = offsets[s] + p - starts[s];
            if (p < starts[s]) {
                const float* held = ring_row(s, p);
                tokens[n] = {held, held + width, nullptr};
            } else {
                tokens[n] = {u + t * u_stride, g + t * g_stride, ape + p % kC4 * width};
            }
            from[n] = p < b * kC4 ? 0 : size;  // the first half serves the next block, the second its own
        }
        float* out = values + row * size;
        pool(tokens, from, n, size, out);
        finish(out, norm, size, eps, b * kC4, freqs, pairs, rotate_keys != 0);
    }
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t start = starts[s], end = start + offsets[s + 1] - offsets[s];
        for (int64_t p = start; p < end; ++p) {
            if (p < end - kC4Ring && p % kPage < kPage - kC4Ring) continue;
            const int64_t t = offsets[s] + p - start;
            remember(ring_row(s, p), u + t * u_stride, g + t * g_stride, ape + p % kC4 * width, width);
        }
    }
}

// u, g [T, size]; ring [slots, 256, 2 * size]. R is at most T / 128 + segments.
extern "C" void penumbra_compress_c128(const float* u, int64_t u_stride, const float* g, int64_t g_stride,
                                          const float* ape, const float* norm, float* ring, int64_t size,
                                          int64_t segments, int64_t pages, const int32_t* offsets,
                                          const int64_t* starts, const int32_t* page_table, const int32_t* slots,
                                          const float* freqs, int64_t pairs, float eps, float* values, int64_t* rows,
                                          int64_t* count, int64_t threads) {
    const Step step{segments, pages, offsets, starts, page_table, nullptr, slots};
    const auto ring_row = [&](int64_t s, int64_t p) {
        return ring + (slots[s] * kC128Ring + p % kC128Ring) * 2 * size;
    };
    const auto blocks = finished(step, kC128, rows);
    *count = (int64_t)blocks.size();
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && blocks.size() > 1)
    for (size_t i = 0; i < blocks.size(); ++i) {
        const auto [s, b, row] = blocks[i];
        Token tokens[kC128];
        const int64_t from[kC128] = {};
        for (int64_t j = 0; j < kC128; ++j) {
            const int64_t p = b * kC128 + j, t = offsets[s] + p - starts[s];
            if (p < starts[s]) {
                const float* held = ring_row(s, p);
                tokens[j] = {held, held + size, nullptr};
            } else {
                tokens[j] = {u + t * u_stride, g + t * g_stride, ape + j * size};
            }
        }
        float* out = values + row * size;
        pool(tokens, from, kC128, size, out);
        finish(out, norm, size, eps, b * kC128, freqs, pairs, false);
    }
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t start = starts[s], end = start + offsets[s + 1] - offsets[s];
        for (int64_t p = std::max(start, end - kC128Ring); p < end; ++p) {
            const int64_t t = offsets[s] + p - start;
            remember(ring_row(s, p), u + t * u_stride, g + t * g_stride, ape + p % kC128 * size, size);
        }
    }
}
