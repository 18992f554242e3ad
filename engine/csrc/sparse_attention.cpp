// Attention of one latent head over rows read straight from page bytes. engine/kernels/sparse_attention.py says what.
//
// Keys are decoded sixteen at a time into a buffer that all heads, and all queries of a tile, then share. Softmax is
// online: each (token, head) keeps its greatest logit, its sum and its output, and visits its blocks of keys in one
// order: the window by position, C128 rows by number, selected rows by their place in the list. A block starts at a
// multiple of sixteen of that count and of nothing else, and a query's share of a block is a range of it. Hence a
// (token, head) goes through the same operations whatever the tile, the chunk or the thread it is computed in.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace penumbra {
namespace {

constexpr int64_t kBlock = 16;   // keys decoded at a time: 32 KiB of them at width 512
constexpr int64_t kWindow = 128;
constexpr int64_t kGroupRows = 4;  // heads that go through a block together
// Accumulators at once: 16 of AVX-512's 32 registers, 8 of the others' 16.
constexpr int kDotRows = kWidth == 16 ? 4 : 2, kValueVectors = kWidth == 16 ? 4 : 2;

// Lanes with bit kBit clear come from a and its partner lanes, the others from b: one level of several sums at once.
template <int kBit>
PENUMBRA_INLINE vec fold(vec a, vec b) {
    constexpr ivec lanes = kCounted<vec>;
    constexpr ivec from_b = (lanes & kBit) * (kWidth / kBit);
    return __builtin_shuffle(a, b, lanes + from_b) + __builtin_shuffle(a, b, (lanes ^ kBit) + from_b);
}

// Lane i of the result is the sum of all lanes of a[i], for kWidth vectors, always in the same tree.
template <int kBit = kWidth / 2>
PENUMBRA_INLINE vec sums(vec* a) {
    for (int i = 0; i < kBit; ++i) a[i] = fold<kBit>(a[i], a[i + kBit]);
    if constexpr (kBit > 1) return sums<kBit / 2>(a);
    return a[0];
}

// logits[r * kBlock + k] = q[r] . keys[k] for the four keys from `keys` on; dim is a multiple of 16.
template <int kRows>
void four_dots(const float* __restrict q, const float* __restrict keys, int64_t stride, int64_t dim, float* logits) {
    constexpr int kAtOnce = kRows < kDotRows ? kRows : kDotRows;
    vec all[16] = {};
    for (int first = 0; first < kRows; first += kAtOnce) {
        vec sum[kAtOnce][4] = {};
        for (int64_t d = 0; d < dim; d += kWidth) {
            vec key[4];
            for (int k = 0; k < 4; ++k) key[k] = load<vec>(keys + k * stride + d);
            for (int r = 0; r < kAtOnce; ++r) {
                const vec x = load<vec>(q + std::min(first + r, kRows - 1) * stride + d);
                for (int k = 0; k < 4; ++k) sum[r][k] += x * key[k];
            }
        }
        for (int r = 0; r < kAtOnce; ++r)
            for (int k = 0; k < 4; ++k) all[std::min(first + r, kRows - 1) * 4 + k] = sum[r][k];
    }
    float dots[16];
    for (int i = 0; i < 16; i += kWidth) store(dots + i, sums(all + i));
    for (int r = 0; r < kRows; ++r) std::memcpy(logits + r * kBlock, dots + r * 4, 16);
}

// o[r] += weights[r][k] * keys[k] over k in [low, high), kVectors vectors wide.
template <int kRows, int kVectors>
PENUMBRA_INLINE void add_values(float* __restrict o, const float* __restrict weights, const float* __restrict keys,
                                int64_t stride, int64_t low, int64_t high) {
    vec sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load<vec>(o + r * stride + v * kWidth);
    for (int64_t k = low; k < high; ++k) {
        vec key[kVectors];
        for (int v = 0; v < kVectors; ++v) key[v] = load<vec>(keys + k * stride + v * kWidth);
        for (int r = 0; r < kRows; ++r) {
            const vec weight = splat<vec>(weights[r * kBlock + k]);
            for (int v = 0; v < kVectors; ++v) sum[r][v] += weight * key[v];
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(o + r * stride + v * kWidth, sum[r][v]);
}

PENUMBRA_INLINE float greatest_of(vec v) {
    if constexpr (kWidth > 8) v = max(v, exchange<8>(v));
    if constexpr (kWidth > 4) v = max(v, exchange<4>(v));
    v = max(v, exchange<2>(v));
    return max(v, exchange<1>(v))[0];
}

struct Online {
    float top;  // the greatest logit so far, the sink's included
    float sum;  // of exp(logit - top)
};

// Turns one row's logits of a block into weights, and rescales what was gathered when a greater logit turns up. Not
// inlined: one body, so that the compiler contracts the same multiplications into the same fused ones everywhere.
__attribute__((noinline)) void weigh(float* logits, float scale, int64_t low, int64_t high, Online& state, float* o,
                                     int64_t dim) {
    vec greatest = splat<vec>(-__builtin_inff());
    for (int i = 0; i < kBlock; i += kWidth) {
        const ivec lanes = kCounted<vec> + i;
        const ivec seen = (lanes >= (int32_t)low) & (lanes < (int32_t)high);
        const vec logit = seen ? load<vec>(logits + i) * scale : splat<vec>(-__builtin_inff());
        store(logits + i, logit);
        greatest = max(greatest, logit);
    }
    const float top = std::max(state.top, greatest_of(greatest));
    if (top > state.top) {
        const float shrink = exp(splat<vec>(state.top - top))[0];
        state.top = top;
        state.sum *= shrink;
        for (int64_t d = 0; d < dim; d += kWidth) store(o + d, load<vec>(o + d) * shrink);
    }
    vec total = {};
    for (int i = 0; i < kBlock; i += kWidth) {
        const vec weights = exp(load<vec>(logits + i) - top);
        total += weights;
        store(logits + i, weights);
    }
    state.sum += sum(total);
}

template <int kRows>
void attend_rows(const float* q, const float* keys, int64_t stride, int64_t dim, float scale, int64_t low,
                 int64_t high, Online* state, float* o) {
    alignas(64) float logits[kRows * kBlock];
    for (int64_t k = low / 4 * 4; k < high; k += 4) four_dots<kRows>(q, keys + k * stride, stride, dim, logits + k);
    for (int r = 0; r < kRows; ++r) weigh(logits + r * kBlock, scale, low, high, state[r], o + r * stride, dim);
    int64_t d = 0;
    for (; d + kValueVectors * kWidth <= dim; d += kValueVectors * kWidth)
        add_values<kRows, kValueVectors>(o + d, logits, keys + d, stride, low, high);
    for (; d < dim; d += kWidth) add_values<kRows, 1>(o + d, logits, keys + d, stride, low, high);
}

// A thread's memory, kept between calls: fresh pages would cost more than a small step computes.
struct Workspace {
    std::vector<float> memory;
    std::vector<Online> online;

    float* floats(int64_t count) {
        if ((int64_t)memory.size() < count + kLanes) memory.resize(count + kLanes);
        return (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
    }
};

struct Attention {
    const float* q;         // [T, H, D]
    const float* sink;      // [H]
    float* out;             // [T, H, D]
    const int64_t* positions;
    const int32_t* page_table;  // [B, P]
    const int32_t* swa_table;
    const int64_t* oldest;  // [B] or null: no window row before this position
    int64_t pages, heads, dim;
    const Pool* window;
    const Pool* compressed;
    int64_t ratio;
    const int32_t* selected;  // [T, K]
    int64_t num_selected;
    float scale;

    void tile(int64_t segment, int64_t first, int64_t count) const;
};

// The place of row b of a sequence: rows_per_item of them lie in each page of its table.
struct Rows {
    const Pool& pool;
    const int32_t* table;

    void decode(int64_t b, float* x) const {
        const uint32_t n = (uint32_t)pool.rows_per_item, row = (uint32_t)b;
        decode_row(pool, table[row / n], row % n, x);
    }
    void prefetch(int64_t b) const {
        const uint32_t n = (uint32_t)pool.rows_per_item, row = (uint32_t)b;
        const uint8_t* p = row_data(pool, table[row / n], row % n);
        for (int64_t i = 0; i < kLatentBytes; i += 64) __builtin_prefetch(p + i);
    }
};

// Tokens [first, first + count) of one segment.
void Attention::tile(int64_t segment, int64_t first, int64_t count) const {
    static thread_local Workspace workspace;
    const int64_t width = (dim + kLanes - 1) / kLanes * kLanes;
    const int64_t stride = width + kLanes;  // an odd number of cache lines: keys do not crowd into a few L1 sets
    const int64_t rows = count * heads;
    float* keys = workspace.floats((kBlock + 2 * rows) * stride);
    float* queries = keys + kBlock * stride;
    float* outputs = queries + rows * stride;
    workspace.online.resize(rows);
    Online* online = workspace.online.data();

    std::fill(keys, queries, 0.0f);
    std::fill(outputs, outputs + rows * stride, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
        const float* source = q + (first * heads + r) * dim;
        std::copy(source, source + dim, queries + r * stride);
        std::fill(queries + r * stride + dim, queries + r * stride + width, 0.0f);
        const float logit = sink[r % heads];
        online[r] = {logit, logit == -__builtin_inff() ? 0.0f : 1.0f};
    }

    const auto attend = [&](int64_t token, int64_t low, int64_t high) {
        for (int64_t h = 0; h < heads; h += kGroupRows) {
            const int64_t r = token * heads + h;
            const float* x = queries + r * stride;
            float* o = outputs + r * stride;
            switch (std::min(kGroupRows, heads - h)) {
                case 4: attend_rows<4>(x, keys, stride, width, scale, low, high, online + r, o); break;
                case 3: attend_rows<3>(x, keys, stride, width, scale, low, high, online + r, o); break;
                case 2: attend_rows<2>(x, keys, stride, width, scale, low, high, online + r, o); break;
                default: attend_rows<1>(x, keys, stride, width, scale, low, high, online + r, o);
            }
        }
    };

    // Rows [from(token), to(token)) of a sequence, neighbours sharing nearly all of theirs.
    const auto attend_ranges = [&](const Rows& source, auto from, auto to) {
        const int64_t begin = from(0), end = to(count - 1);  // both grow with the token
        for (int64_t block = begin / kBlock * kBlock; block < end; block += kBlock) {
            for (int64_t k = std::max(block, begin); k < std::min(block + kBlock, end); ++k)
                source.decode(k, keys + (k - block) * stride);
            for (int64_t k = block + kBlock; k < std::min(block + 2 * kBlock, end); ++k) source.prefetch(k);
            for (int64_t token = 0; token < count; ++token) {
                const int64_t low = std::max(from(token), block), high = std::min(to(token), block + kBlock);
                if (low < high) attend(token, low - block, high - block);
            }
        }
    };

    const int64_t position = positions[first], floor = oldest ? oldest[segment] : 0;
    attend_ranges(
        Rows{*window, swa_table + segment * pages},
        [&](int64_t token) { return std::max(position + token - kWindow + 1, floor); },
        [&](int64_t token) { return position + token + 1; });

    if (ratio == 128) {
        attend_ranges(
            Rows{*compressed, page_table + segment * pages}, [](int64_t) { return (int64_t)0; },
            [&](int64_t token) { return (position + token + 1) / 128; });
    } else if (ratio == 4) {
        const Rows source{*compressed, page_table + segment * pages};
        const auto list = [&](int64_t token) { return selected + (first + token) * num_selected; };
        const auto length = [&](int64_t token) {
            return std::find(list(token), list(token) + num_selected, -1) - list(token);
        };
        int64_t longest = 0;
        std::vector<int64_t> lengths(count);
        for (int64_t token = 0; token < count; ++token)
            longest = std::max(longest, lengths[token] = length(token));
        for (int64_t block = 0; block < longest; block += kBlock) {
            const int32_t* decoded = nullptr;  // the list whose block lies in `keys`, and how much of it
            int64_t num_decoded = 0;
            for (int64_t token = 0; token < count; ++token) {
                const int64_t high = std::min(lengths[token] - block, kBlock);
                if (high <= 0) continue;
                const int32_t* picks = list(token) + block;
                // Until a sequence outgrows the selection all lists are alike; later ones still share stretches.
                if (!decoded || high > num_decoded || !std::equal(picks, picks + high, decoded)) {
                    for (int64_t k = 0; k < high; ++k) source.decode(picks[k], keys + k * stride);
                    decoded = picks, num_decoded = high;
                }
                const int64_t next = token + 1 < count ? token + 1 : 0, ahead = next ? block : block + kBlock;
                for (int64_t k = ahead; k < std::min(ahead + kBlock, lengths[next]); ++k)
                    source.prefetch(list(next)[k]);
                attend(token, 0, high);
            }
        }
    }

    for (int64_t r = 0; r < rows; ++r) {
        const float inverse = 1.0f / online[r].sum;
        float* target = out + (first * heads + r) * dim;
        for (int64_t d = 0; d < dim; ++d) target[d] = outputs[r * stride + d] * inverse;
    }
}

struct Tile {
    int64_t segment, first, count;
};

}  // namespace
}  // namespace penumbra

extern "C" void penumbra_sparse_attention(const float* q, const float* sink, float* out, const int64_t* positions,
                                          const int32_t* offsets, const int32_t* page_table, const int32_t* swa_table,
                                          const int64_t* oldest, int64_t segments, int64_t pages, int64_t heads,
                                          int64_t dim, const penumbra::Pool* window,
                                          const penumbra::Pool* compressed, int64_t ratio, const int32_t* selected,
                                          int64_t num_selected, float scale, int64_t threads) {
    using namespace penumbra;
    const Attention attention{q,     sink, out,    positions,  page_table, swa_table, oldest,       pages,
                              heads, dim,  window, compressed, ratio,      selected,  num_selected, scale};
    // About 32 rows a tile: a decoded key is then used often enough that decoding hardly shows, and queries and
    // outputs stay in the L2. With several threads, no more than a thread's share.
    const int64_t share = (offsets[segments] + threads - 1) / threads;
    const int64_t most = std::max<int64_t>(1, std::min(32 / heads, share));
    std::vector<Tile> tiles;
    for (int64_t s = 0; s < segments; ++s)
        for (int64_t t = offsets[s]; t < offsets[s + 1]; t += most)
            tiles.push_back({s, t, std::min<int64_t>(most, offsets[s + 1] - t)});
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && tiles.size() > 1)
    for (int64_t i = 0; i < (int64_t)tiles.size(); ++i)
        attention.tile(tiles[i].segment, tiles[i].first, tiles[i].count);
}
