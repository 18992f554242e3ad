// The page checksum at memory speed; its definition is in engine/kernels/checksum.py.
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

using penumbra::kWidth;

constexpr int64_t kWords = kWidth / 2;
typedef uint64_t wide __attribute__((vector_size(8 * kWords)));
constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;

// Adds sum of words[i] * (2 * (first + i) + 1) over one region's item.
//
// Multiplications are spared by running sums: after n steps `later` = sum of step j's words times (n - j), so the sum
// of j times words is n * now - later, and each vector costs two additions.
uint64_t weighted(const char* data, int64_t count, uint64_t first) {
    constexpr int kChains = 4;  // neighbouring vectors; one chain of additions would wait on itself
    wide now[kChains] = {}, later[kChains] = {};
    const int64_t steps = count / (kWords * kChains);
    for (int64_t j = 0; j < steps; ++j) {
        for (int c = 0; c < kChains; ++c) {
            wide words;
            std::memcpy(&words, data + (j * kChains + c) * sizeof words, sizeof words);
            now[c] += words;
            later[c] += now[c];
        }
    }
    uint64_t total = 0;
    for (int c = 0; c < kChains; ++c) {
        for (int64_t lane = 0; lane < kWords; ++lane) {
            const uint64_t places = (uint64_t)steps * now[c][lane] - later[c][lane];
            const uint64_t start = first + c * kWords + lane;
            total += now[c][lane] * (2 * start + 1) + 2 * kWords * kChains * places;
        }
    }
    for (int64_t i = steps * kWords * kChains; i < count; ++i) {
        uint64_t word;
        std::memcpy(&word, data + i * sizeof word, sizeof word);
        total += word * (2 * (first + i) + 1);
    }
    return total;
}

}  // namespace

// regions, strides and bytes [num_regions]: where item 0 lies, bytes from item to item, bytes of an item.
extern "C" void penumbra_item_checksums(const char* const* regions, const int64_t* strides, const int64_t* bytes,
                                        int64_t num_regions, const int64_t* items, int64_t num_items, uint64_t* out,
                                        int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && num_items > 1)
    for (int64_t i = 0; i < num_items; ++i) {
        uint64_t total = 0, first = 0;
        for (int64_t r = 0; r < num_regions; ++r) {
            total += weighted(regions[r] + items[i] * strides[r], bytes[r] / 8, first);
            first += bytes[r] / 8;
        }
        out[i] = total * kMultiplier;
    }
}
