// Scores of every visible C4 row and the exact best k, in one pass. engine/kernels/index_topk.py says what.
//
// A few keys at a time are turned so that a vector holds one dimension of several keys: no sum then crosses lanes,
// and bytes are turned before they grow to floats. A score is one chain of fused multiply-adds per head over the
// dimensions in one fixed order, and one over the heads; tiles only choose how many chains run side by side. The
// choice keeps no list of all scores: what can no longer be among the best k is dropped as it comes.
//
// Where the machine multiplies bf16, most keys never get that far. An e4m3 value is exact in bf16, so rounding the
// queries alone gives a score at twice the speed, and a bound on what the rounding can have changed: a key is scored in
// full only if it could still be among the best. The choice is the same.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace penumbra {
namespace {

constexpr int kUnit = kWidth == 16 ? 32 : 16;  // keys at a time; a page holds whole units
constexpr int kGroups = kUnit / kWidth;
constexpr int64_t kAlone = 4096;  // scores of single heads below which a second thread costs more than it brings
constexpr int64_t kRoughFrom = 8192;  // blocks; of fewer, too many have to be scored in full
constexpr int kMostRows = (kWidth == 16 ? 16 : 8) / kGroups;  // half the registers are accumulators

#if defined(__AVX512BW__)
constexpr int kWide = 64;
#elif defined(__AVX2__)
constexpr int kWide = 32;
#else
constexpr int kWide = 16;
#endif
typedef uint8_t wide __attribute__((vector_size(kWide)));

// Byte numbers that interleave two vectors within each sixteen bytes: their halves at 0, or those at 8.
template <int kHalf, size_t... kByte>
constexpr wide interleaving(std::index_sequence<kByte...>) {
    return wide{(uint8_t)(kByte / 16 * 16 + kHalf + kByte % 16 / 2 + kByte % 2 * kWide)...};
}

// Whose rows these are, one after the other: division is slow.
struct Owner {
    int64_t heads, token, left;

    Owner(int64_t row, int64_t heads) : heads(heads), token(row / heads), left(heads - row % heads) {}

    void next() {
        if (--left == 0) ++token, left = heads;
    }
};

// The e4m3 bytes of a unit, [sixteen][place][16 keys]; places run through the dimensions in the order of `dimension`.
struct ByteKeys {
    static constexpr int kSlices = kWide / 16;
    alignas(64) uint8_t bytes[kUnit * kIndexDim];

    explicit ByteKeys(int64_t) {}

    static int64_t dimension(int64_t place) {
        return place / kWide * kWide + place % kSlices * 16 + place % kWide / kSlices;
    }

    // The keys lie one behind the other.
    void turn(const uint8_t* rows) {
        constexpr auto bytes_of = std::make_index_sequence<kWide>();
        constexpr wide low = interleaving<0>(bytes_of), high = interleaving<8>(bytes_of);
        uint8_t* target = bytes;
        for (int64_t first = 0; first < kUnit; first += 16) {
            for (int64_t start = 0; start < kIndexDim; start += kWide) {
                wide a[16], b[16];
#pragma GCC unroll 16
                for (int k = 0; k < 16; ++k) std::memcpy(&a[k], rows + (first + k) * kIndexDim + start, kWide);
                // A perfect shuffle turns the 8 bits of (key, dimension) by one place; four of them swap the two.
#pragma GCC unroll 4
                for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
                    for (int k = 0; k < 8; ++k) {
                        b[2 * k] = __builtin_shuffle(a[k], a[k + 8], low);
                        b[2 * k + 1] = __builtin_shuffle(a[k], a[k + 8], high);
                    }
#pragma GCC unroll 16
                    for (int k = 0; k < 16; ++k) a[k] = b[k];
                }
                std::memcpy(target, a, sizeof a);
                target += sizeof a;
            }
        }
    }

    vec get(int group, int64_t place) const {
        const int key = group * kWidth;
        return e4m3_to_float(bytes + (key / 16 * kIndexDim + place) * 16 + key % 16);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PENUMBRA_ROUGH 1
constexpr bool kHaveRough = true;

// A unit's keys in bf16, as [pair][sixteen][16 keys] words of two dimensions. Values are 2^-8 of what they were, so
// that the exponent's bias can be put in by an OR. Subnormal e4m3 values, and zero, come out up to kRoughError (of the
// right size) away.
struct RoughKeys {
    static constexpr float kScale = 256.0f, kRoughError = 0.0078125f;
    static constexpr float kLargest = 480.0f;  // what NaN's code comes out as; the largest value is 448
    alignas(64) uint32_t words[kIndexDim / 2 * kUnit];

    // The dimension in the lower or the upper half of a pair's words. Every four bytes of a key make two pairs.
    static int64_t dimension(int64_t pair, int64_t upper) { return pair / 2 * 4 + pair % 2 + 2 * upper; }

    // The keys lie one behind the other; those at `next` are wanted soon.
    void set(const uint8_t* rows, const uint8_t* next) {
        const __m512i mask = _mm512_set1_epi16((short)0x87f0), bias = _mm512_set1_epi16(112 << 7);
        constexpr int kMaskOr = 0xea;  // a & b | c
        for (int64_t first = 0; first < kUnit; first += 16) {
            for (int64_t start = 0; start < kIndexDim; start += 64) {
                __m512i a[16], b[16];
#pragma GCC unroll 16
                for (int k = 0; k < 16; ++k) {
                    const int64_t at = (first + k) * kIndexDim + start;
                    a[k] = _mm512_loadu_si512(rows + at);
                    // Into the second cache, and spread out: the first has room for few requests at a time.
                    _mm_prefetch((const char*)next + at, _MM_HINT_T1);
                }
                // Sixteen keys of sixteen times four bytes, turned: by twos, fours, then whole quarters.
#pragma GCC unroll 8
                for (int k = 0; k < 16; k += 2) {
                    b[k] = _mm512_maskz_unpacklo_epi32(kAll, a[k], a[k + 1]);
                    b[k + 1] = _mm512_maskz_unpackhi_epi32(kAll, a[k], a[k + 1]);
                }
#pragma GCC unroll 4
                for (int k = 0; k < 16; k += 4) {
                    a[k] = _mm512_maskz_unpacklo_epi64(0xff, b[k], b[k + 2]);
                    a[k + 1] = _mm512_maskz_unpackhi_epi64(0xff, b[k], b[k + 2]);
                    a[k + 2] = _mm512_maskz_unpacklo_epi64(0xff, b[k + 1], b[k + 3]);
                    a[k + 3] = _mm512_maskz_unpackhi_epi64(0xff, b[k + 1], b[k + 3]);
                }
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    b[k] = quarters<0x88>(a[k], a[k + 4]);
                    b[k + 4] = quarters<0xdd>(a[k], a[k + 4]);
                    b[k + 8] = quarters<0x88>(a[k + 8], a[k + 12]);
                    b[k + 12] = quarters<0xdd>(a[k + 8], a[k + 12]);
                }
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    a[k] = quarters<0x88>(b[k], b[k + 8]);
                    a[k + 4] = quarters<0x88>(b[k + 4], b[k + 12]);
                    a[k + 8] = quarters<0xdd>(b[k], b[k + 8]);
                    a[k + 12] = quarters<0xdd>(b[k + 4], b[k + 12]);
                }
                uint32_t* target = words + start / 2 * kUnit + first;
#pragma GCC unroll 16
                for (int four = 0; four < 16; ++four, target += 2 * kUnit) {
                    // The shift right copies the sign into the exponent, where the mask takes it out again.
                    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(a[four], 8), 4);
                    const __m512i odd = _mm512_srai_epi16(a[four], 4);
                    _mm512_store_si512(target, _mm512_ternarylogic_epi32(even, mask, bias, kMaskOr));
                    _mm512_store_si512(target + kUnit, _mm512_ternarylogic_epi32(odd, mask, bias, kMaskOr));
                }
            }
        }
    }

  private:
    static constexpr uint16_t kAll = 0xffff;  // full masks fold away and keep GCC 12 from a false warning

    template <int kWhich>
    PENUMBRA_INLINE __m512i quarters(__m512i a, __m512i b) {
        return _mm512_maskz_shuffle_i32x4(kAll, a, b, kWhich);
    }
};

// As `add_heads`, with queries [pair][kRows] of two bf16.
template <int kRows>
void add_rough(const uint32_t* __restrict queries, const float* weight, const RoughKeys& keys, int64_t row,
               int64_t heads, float* scores) {
    __m512 dot[kRows][kGroups];
    for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < kGroups; ++g) dot[r][g] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < kIndexDim / 2; ++pair, queries += kRows) {
        __m512bh key[kGroups];
        for (int g = 0; g < kGroups; ++g)
            key[g] = (__m512bh)_mm512_load_si512(keys.words + pair * kUnit + g * kWidth);
        for (int r = 0; r < kRows; ++r) {
            const __m512bh query = (__m512bh)_mm512_set1_epi32((int)queries[r]);
            for (int g = 0; g < kGroups; ++g) dot[r][g] = _mm512_dpbf16_ps(dot[r][g], key[g], query);
        }
    }
    Owner owner{row, heads};
    for (int r = 0; r < kRows; ++r, owner.next()) {
        float* score = scores + owner.token * kUnit;
        for (int g = 0; g < kGroups; ++g) {
            vec all;
            std::memcpy(&all, &dot[r][g], sizeof all);
            const vec positive = all < 0.0f ? vec{} : all;
            store(score + g * kWidth, load<vec>(score + g * kWidth) + weight[row + r] * positive);
        }
    }
}

// The nearest bf16, ties to even. NaN stays NaN.
PENUMBRA_INLINE uint16_t bf16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
#else
constexpr bool kHaveRough = false;
#endif

// The float32 values of a unit, [dimension][keys].
struct FloatKeys {
    std::vector<float> values;
    int64_t dim;

    explicit FloatKeys(int64_t dim) : values(dim * kUnit), dim(dim) {}

    static int64_t dimension(int64_t place) { return place; }

    void turn(const uint8_t* rows) {
        for (int64_t k = 0; k < kUnit; ++k)
            for (int64_t d = 0; d < dim; ++d) std::memcpy(&values[d * kUnit + k], rows + (k * dim + d) * 4, 4);
    }

    vec get(int group, int64_t place) const { return load<vec>(&values[place * kUnit + group * kWidth]); }
};

// scores[(row + r) / heads] += weight[row + r] * relu(query r . key) for kRows queries and a unit of keys. The queries
// lie as [place][kRows].
template <int kRows, typename Keys>
void add_heads(const float* __restrict queries, const float* weight, const Keys& keys, int64_t dim, int64_t row,
               int64_t heads, float* scores) {
    vec dot[kRows][kGroups] = {};
    for (int64_t place = 0; place < dim; ++place, queries += kRows) {
        vec key[kGroups];
        for (int g = 0; g < kGroups; ++g) key[g] = keys.get(g, place);
        for (int r = 0; r < kRows; ++r)
            for (int g = 0; g < kGroups; ++g) dot[r][g] += queries[r] * key[g];
    }
    Owner owner{row, heads};
    for (int r = 0; r < kRows; ++r, owner.next()) {
        float* score = scores + owner.token * kUnit;
        for (int g = 0; g < kGroups; ++g) {
            const vec positive = dot[r][g] < 0.0f ? vec{} : dot[r][g];  // NaN stays
            store(score + g * kWidth, load<vec>(score + g * kWidth) + weight[row + r] * positive);
        }
    }
}

// How many of the rows from `row` on go through the keys together.
PENUMBRA_INLINE int64_t together(int64_t row, int64_t rows) {
    int64_t n = kMostRows;
    while (n > rows - row) n /= 2;
    return n;
}

// One bit a lane of a comparison's result.
PENUMBRA_INLINE uint32_t lanes_set(ivec mask) {
#if defined(__AVX512F__)
    __m512i v;
    std::memcpy(&v, &mask, sizeof v);
    return _mm512_test_epi32_mask(v, v);
#elif defined(__AVX2__)
    __m256 v;
    std::memcpy(&v, &mask, sizeof v);
    return _mm256_movemask_ps(v);
#else
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}

// Scores as integers of the same order. NaN ranks with +infinity, so that a broken key is chosen and shows; -0 is 0.
PENUMBRA_INLINE ivec ranks(vec score) {
    const vec x = score == score ? score : splat<vec>(__builtin_inff());
    ivec bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits ^= (bits >> 31) & 0x7fffffff;
    return bits == -1 ? ivec{} : bits;
}

// The best k of a growing list, lower places first among equals.
class Best {
  public:
    explicit Best(int64_t k) : k_(k), ranks_(2 * k + 4 * kWidth), places_(2 * k + 4 * kWidth) {}

    // Whether k have been kept, so that most of what comes need not be looked at.
    bool full() const { return full_; }

    // Once full: a score must exceed this to be kept.
    float threshold() const {
        const int32_t bits = worst_ ^ ((worst_ >> 31) & 0x7fffffff);
        float score;
        std::memcpy(&score, &bits, sizeof score);
        return score;
    }

    // More candidates, of which the `wanted` lanes count. Places must come in order.
    void offer(ivec rank, ivec places, ivec wanted) {
        if (full_) wanted &= rank > worst_;  // an equal one comes too late: its place is higher
        uint32_t set = lanes_set(wanted);
        if (!set) return;
        if (size_ + 2 * kWidth > (int64_t)ranks_.size()) {
            shrink();
            offer(rank, places, wanted);
            return;
        }
        for (; set; set &= set - 1) {
            const int lane = __builtin_ctz(set);
            ranks_[size_] = rank[lane];
            places_[size_++] = places[lane];
        }
    }

    // Takes over what another list kept, all of whose places are higher.
    void absorb(const Best& later) {
        const int64_t room = size_ + later.size_ + 2 * kWidth;
        if (room > (int64_t)ranks_.size()) ranks_.resize(room), places_.resize(room);
        for (int64_t i = 0; i < later.size_; ++i) {
            if (full_ && later.ranks_[i] <= worst_) continue;
            ranks_[size_] = later.ranks_[i];
            places_[size_++] = later.places_[i];
        }
        if (size_ > k_) shrink();
    }

    // Writes the best k, at least k having been offered, in ascending order.
    void take(int32_t* out) {
        if (size_ > k_) shrink();
        std::copy(places_.begin(), places_.begin() + k_, out);
    }

  private:
    // Keeps the best k. The k-th greatest rank is the greatest one that at least k reach: 32 halvings of the range,
    // each a vector sweep, beat sorting and take the same time whatever the scores.
    void shrink() {
        for (int64_t i = size_; i < size_ + kWidth; ++i) ranks_[i] = INT32_MIN;  // fills the last vector
        int64_t low = INT32_MIN, high = INT32_MAX;
        while (low < high) {
            const int64_t middle = low + (high - low + 1) / 2;
            ivec reached = {};
            for (int64_t i = 0; i < size_; i += kWidth) reached -= at(i) >= (int32_t)middle;
            int64_t count = 0;
            for (int i = 0; i < kWidth; ++i) count += reached[i];
            if (count >= k_) low = middle;
            else high = middle - 1;
        }
        worst_ = (int32_t)low;
        full_ = true;
        int64_t equals = k_;
        for (int64_t i = 0; i < size_; ++i) equals -= ranks_[i] > worst_;
        int64_t kept = 0;
        for (int64_t i = 0; i < size_; ++i) {
            const bool keep = ranks_[i] > worst_ || (ranks_[i] == worst_ && equals-- > 0);
            ranks_[kept] = ranks_[i];
            places_[kept] = places_[i];
            kept += keep;
        }
        size_ = kept;
    }

    ivec at(int64_t i) const {
        ivec v;
        std::memcpy(&v, &ranks_[i], sizeof v);
        return v;
    }

    int64_t k_, size_ = 0;
    bool full_ = false;  // k have been kept, the least of them `worst_`
    int32_t worst_ = 0;
    std::vector<int32_t> ranks_, places_;
};

struct Search {
    const float* q;  // [T, H, D]
    const float* w;  // [T, H]
    const int64_t* positions;
    const int32_t* page_table;  // [B, P]
    int64_t pages, heads, dim;
    const Pool& pool;
    int64_t k;
    int32_t* out;  // [T, k]

    int64_t visible(int64_t token) const { return (positions[token] + 1) / 4; }

    // Tokens [first, first + count) of one segment, whose keys are dealt out over `parts` threads.
    void tile(int64_t segment, int64_t first, int64_t count, int64_t parts) const {
        for (; count > 0 && visible(first) <= k; ++first, --count) {
            int32_t* target = out + first * k;
            for (int64_t b = 0; b < k; ++b) target[b] = b < visible(first) ? (int32_t)b : -1;
        }
        if (count == 0) return;
        const int32_t* table = page_table + segment * pages;
        if (pool.codec == kIndexV4) search<ByteKeys>(table, first, count, parts);
        else search<FloatKeys>(table, first, count, parts);
    }

    template <typename Keys>
    void search(const int32_t* table, int64_t first, int64_t count, int64_t parts) const {
        const int64_t end = visible(first + count - 1);
        std::vector<float> queries(count * heads * dim);
        lay_out<Keys>(first * heads, count * heads, queries.data());
        Rough rough;
        if constexpr (kHaveRough && std::is_same_v<Keys, ByteKeys>) {
            if (end > kRoughFrom) rough = prepare(first, count);
        }
        const int64_t num_pages = (end + pool.rows_per_item - 1) / pool.rows_per_item;
        std::vector<std::vector<Best>> best(parts, std::vector<Best>(count, Best(k)));
#pragma omp parallel for num_threads(parts) if (parts > 1)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t from = num_pages * part / parts * pool.rows_per_item;
            const int64_t to = std::min(num_pages * (part + 1) / parts * pool.rows_per_item, end);
            scan<Keys>(table, first, count, queries, rough, from, to, best[part]);
        }
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t part = 1; part < parts; ++part) best[0][t].absorb(best[part][t]);
            best[0][t].take(out + (first + t) * k);
        }
    }

    // Query rows [row, row + rows) as `add_heads` reads them.
    template <typename Keys>
    void lay_out(int64_t start, int64_t rows, float* queries) const {
        for (int64_t row = 0, m; row < rows; row += m) {
            m = together(row, rows);
            for (int64_t place = 0; place < dim; ++place)
                for (int64_t r = 0; r < m; ++r)
                    queries[row * dim + place * m + r] = q[(start + row + r) * dim + Keys::dimension(place)];
        }
    }

    // Queries of a tile for the rough scores; without any, every key is scored in full.
    struct Rough {
        std::vector<uint32_t> queries;  // of the whole tile, as `add_rough` reads them
        std::vector<float> alone;       // token by token, as `add_heads` reads them
        std::vector<float> error;       // a token's score, before its key's scale, is at most this much higher
    };

    Rough prepare(int64_t first, int64_t count) const {
        Rough rough;
#ifdef PENUMBRA_ROUGH
        const int64_t rows = count * heads;
        rough.queries.resize(rows * dim / 2);
        rough.alone.resize(rows * dim);
        for (int64_t row = 0, m; row < rows; row += m) {
            m = together(row, rows);
            for (int64_t pair = 0; pair < dim / 2; ++pair) {
                for (int64_t r = 0; r < m; ++r) {
                    const float* x = q + (first * heads + row + r) * dim;
                    const uint32_t low = bf16_of(x[RoughKeys::dimension(pair, 0)] * RoughKeys::kScale);
                    const uint32_t high = bf16_of(x[RoughKeys::dimension(pair, 1)] * RoughKeys::kScale);
                    rough.queries[row * dim / 2 + pair * m + r] = high << 16 | low;
                }
            }
        }
        for (int64_t t = 0; t < count; ++t) {
            lay_out<ByteKeys>((first + t) * heads, heads, &rough.alone[t * heads * dim]);
            double error = 0;
            for (int64_t h = 0; h < heads; ++h) {
                const float* x = q + ((first + t) * heads + h) * dim;
                double changed = 0, size = 0;
                for (int64_t d = 0; d < dim; ++d) {
                    const double rounded =
                        float_of((uint32_t)bf16_of(x[d] * RoughKeys::kScale) << 16) / RoughKeys::kScale;
                    changed += std::fabs(x[d] - rounded);
                    size += std::fabs(rounded);
                }
                // The last term is what float32 loses in either chain of products and heads, with room to spare.
                const double lost = (changed + size) * (double)(4 * dim + 4 * heads) * 0x1p-24;
                error += std::fabs((double)w[(first + t) * heads + h]) *
                         (RoughKeys::kLargest * (changed + lost) + RoughKeys::kRoughError * size);
            }
            rough.error.push_back((float)(error * 1.001));
        }
#endif
        return rough;
    }

    // Blocks [from, to), which begin on a page.
    template <typename Keys>
    void scan(const int32_t* table, int64_t first, int64_t count, const std::vector<float>& queries,
              const Rough& rough, int64_t from, int64_t to, std::vector<Best>& best) const {
        const int64_t n = pool.rows_per_item, rows = count * heads;
        const int64_t row_bytes = pool.codec == kIndexV4 ? kIndexDim : dim * 4;
        const float* weight = w + first * heads;
        Keys keys(dim);
        std::vector<float> scores(count * kUnit);
        const auto score = [&](const float* x, const float* weight, int64_t rows) {
            std::fill(scores.begin(), scores.begin() + rows / heads * kUnit, 0.0f);
            for (int64_t row = 0, m; row < rows; row += m) {
                m = together(row, rows);
                const float* some = x + row * dim;
                if (m == kMostRows) add_heads<kMostRows>(some, weight, keys, dim, row, heads, scores.data());
                else if (m == 4) add_heads<4>(some, weight, keys, dim, row, heads, scores.data());
                else if (m == 2) add_heads<2>(some, weight, keys, dim, row, heads, scores.data());
                else add_heads<1>(some, weight, keys, dim, row, heads, scores.data());
            }
        };
#ifdef PENUMBRA_ROUGH
        RoughKeys rough_keys;
        std::vector<std::vector<int32_t>> maybe(rough.error.size());  // blocks to score in full, of each token
        const auto settle = [&](int64_t t) {
            alignas(64) uint8_t gathered[kUnit * kIndexDim];
            alignas(64) float scales[kUnit];
            auto& blocks = maybe[t];
            blocks.resize(blocks.size() + kUnit, blocks.back());  // fills the last unit
            const int64_t real = blocks.size() - kUnit;
            for (int64_t i = 0; i < real; i += kUnit) {
                for (int64_t j = 0; j < kUnit; ++j) {
                    const int64_t b = blocks[i + j];
                    const uint8_t* item = pool.item(table[b / n]);
                    std::memcpy(gathered + j * kIndexDim, item + b % n * kIndexDim, kIndexDim);
                    std::memcpy(scales + j, item + n * kIndexDim + b % n * 4, 4);
                }
                keys.turn(gathered);
                score(&rough.alone[t * heads * dim], weight + t * heads, heads);
                for (int64_t j = 0; j < kUnit; j += kWidth) {
                    ivec places;
                    std::memcpy(&places, &blocks[i + j], sizeof places);
                    const vec all = load<vec>(&scores[j]) * load<vec>(scales + j);
                    best[t].offer(ranks(all), places, kCounted<vec> + (int32_t)(i + j) < (int32_t)real);
                }
            }
            blocks.clear();
        };
#endif
        for (int64_t start = from; start < to; start += kUnit) {
            const uint8_t* item = pool.item(table[start / n]);
            const uint8_t* unit = item + start % n * row_bytes;
            const int64_t ahead = std::min(start + 2 * kUnit, to - 1);
            const uint8_t* next = pool.item(table[ahead / n]) + ahead % n * row_bytes;
            const float* scales = (const float*)(item + n * kIndexDim) + start % n;
#ifdef PENUMBRA_ROUGH
            const auto full = [](const Best& b) { return b.full(); };
            if constexpr (std::is_same_v<Keys, ByteKeys>) {
                if (!rough.error.empty() && std::all_of(best.begin(), best.end(), full)) {
                    rough_keys.set(unit, next);
                    std::fill(scores.begin(), scores.end(), 0.0f);
                    for (int64_t row = 0, m; row < rows; row += m) {
                        m = together(row, rows);
                        const uint32_t* x = &rough.queries[row * dim / 2];
                        if (m == kMostRows) add_rough<kMostRows>(x, weight, rough_keys, row, heads, scores.data());
                        else if (m == 4) add_rough<4>(x, weight, rough_keys, row, heads, scores.data());
                        else if (m == 2) add_rough<2>(x, weight, rough_keys, row, heads, scores.data());
                        else add_rough<1>(x, weight, rough_keys, row, heads, scores.data());
                    }
                    for (int64_t t = 0; t < count; ++t) {
                        const float threshold = best[t].threshold();
                        for (int g = 0; g < kGroups; ++g) {
                            const vec about = load<vec>(&scores[t * kUnit + g * kWidth]) + rough.error[t];
                            const ivec places = kCounted<vec> + (int32_t)(start + g * kWidth);
                            const ivec hopeless = about * load<vec>(scales + g * kWidth) <= threshold;  // NaN is not
                            uint32_t set = lanes_set(~hopeless & (places < (int32_t)visible(first + t)));
                            for (; set; set &= set - 1)
                                maybe[t].push_back((int32_t)(start + g * kWidth) + __builtin_ctz(set));
                        }
                        if ((int64_t)maybe[t].size() >= kUnit) settle(t);
                    }
                    continue;
                }
            }
#endif
            for (int64_t i = 0; i < kUnit * row_bytes; i += 64) __builtin_prefetch(next + i);
            keys.turn(unit);
            score(queries.data(), weight, rows);
            for (int64_t t = 0; t < count; ++t) {
                for (int g = 0; g < kGroups; ++g) {
                    vec all = load<vec>(&scores[t * kUnit + g * kWidth]);
                    if (pool.codec == kIndexV4) all *= load<vec>(scales + g * kWidth);
                    const ivec places = kCounted<vec> + (int32_t)(start + g * kWidth);
                    best[t].offer(ranks(all), places, places < (int32_t)visible(first + t));
                }
            }
        }
#ifdef PENUMBRA_ROUGH
        for (int64_t t = 0; t < (int64_t)maybe.size(); ++t)
            if (!maybe[t].empty()) settle(t);
#endif
    }
};

struct Tile {
    int64_t segment, first, count;
};

}  // namespace
}  // namespace penumbra

extern "C" void penumbra_index_topk(const float* q, const float* w, const int64_t* positions, const int32_t* offsets,
                                    const int32_t* page_table, int64_t segments, int64_t pages, int64_t heads,
                                    int64_t dim, const penumbra::Pool* pool, int64_t k, int32_t* out, int64_t threads) {
    using namespace penumbra;
    const Search search{q, w, positions, page_table, pages, heads, dim, *pool, k, out};
    // About 64 rows of queries a tile: turning a key then costs little beside its products.
    const int64_t most = std::max<int64_t>(1, 64 / heads);
    std::vector<Tile> tiles;
    for (int64_t s = 0; s < segments; ++s)
        for (int64_t t = offsets[s]; t < offsets[s + 1]; t += most)
            tiles.push_back({s, t, std::min<int64_t>(most, offsets[s + 1] - t)});
    // A decode step has few tiles, and they differ in length as its sequences do: the keys of each are dealt out. Of
    // many tiles each is one thread's.
    if (threads > 1 && (int64_t)tiles.size() < 8 * threads) {
        for (const Tile& t : tiles) {
            const bool worth = search.visible(t.first + t.count - 1) * t.count * heads >= kAlone;
            search.tile(t.segment, t.first, t.count, worth ? threads : 1);
        }
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < (int64_t)tiles.size(); ++i)
        search.tile(tiles[i].segment, tiles[i].first, tiles[i].count, 1);
}
