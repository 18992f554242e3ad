// What engine/csrc/warpgroup.cuh leaves to whoever runs it. Whoever includes this says where shared memory begins:
// `memory`, at a multiple of 1,024 bytes.
//
// A GPU does queued products at any time until they are awaited. Here a thread does its own of them as soon as it can
// (`late` off), which shows inputs that are not there yet, or as late as it may (on): which shows those overwritten too
// early, and sums that nobody awaited.
#pragma once
#include "cuda_on_cpu.h"

namespace warpgroup {
static bool late;
struct Product {
    float* sums;
    int columns, group;
    uint64_t first, second;
    bool across, add;
};
static std::vector<Product> queues[1024];
static int groups[1024];  // that a thread has closed

inline float value(uint64_t address) {
    address ^= (address >> 7 & 7) << 4;  // swizzled by 128 bytes
    uint16_t bits;
    std::memcpy(&bits, memory + address, 2);
    return bf16_of(bits);
}
struct Factor {
    uint64_t at, first, second;
    explicit Factor(uint64_t bits)
        : at((bits & 0x3fff) << 4), first((bits >> 16 & 0x3fff) << 4), second((bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != 1 || bits >> 49 & 7 || bits >> 46 & 7 || bits >> 52 & 0x3ff) std::abort();
    }
    float along(int row, int k) const { return value(at + row / 8 * second + row % 8 * 128 + 2 * k); }
    float across(int n, int k) const { return value(at + n / 64 * first + n % 64 * 2 + k / 8 * second + k % 8 * 128); }
};
inline void compute(const Product& p) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    Factor first(p.first), second(p.second);
    float rows[2][16];
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 16; k++) rows[r][k] = first.along(16 * warp + lane / 4 + 8 * r, k);
    for (int j = 0; j < p.columns / 8; j++)
        for (int c = 0; c < 2; c++) {
            int n = 8 * j + lane % 4 * 2 + c;
            float column[16];
            for (int k = 0; k < 16; k++) column[k] = p.across ? second.across(n, k) : second.along(n, k);
            for (int r = 0; r < 2; r++) {
                float& sum = p.sums[4 * j + 2 * r + c];
                double total = p.add ? sum : 0.0;
                for (int k = 0; k < 16; k++) total += (double)rows[r][k] * column[k];
                sum = (float)total;
            }
        }
}
inline void queue(float* sums, int columns, uint64_t first, uint64_t second, bool across, bool add) {
    unsigned thread = threadIdx.x;
    Product product{sums, columns, groups[thread], first, second, across, add};
    if (late) queues[thread].push_back(product);
    else compute(product);
}
}  // namespace warpgroup

inline uint32_t shared_address(const void* at) { return (uint32_t)((const unsigned char*)at - memory); }
inline void publish() {}
inline void meet(int, int threads) {
    if ((size_t)threads != block::fibers.size()) std::abort();
    __syncthreads();
}
inline void begin_products() {}
inline void close_products() { warpgroup::groups[threadIdx.x]++; }
template <int LEFT, int COUNT> void await_products(float (&)[COUNT]) {
    auto& queue = warpgroup::queues[threadIdx.x];
    size_t done = 0;
    while (done < queue.size() && queue[done].group < warpgroup::groups[threadIdx.x] - LEFT)
        warpgroup::compute(queue[done++]);
    queue.erase(queue.begin(), queue.begin() + done);
}
template <int COUNT> void products_along(float (&sums)[COUNT], uint64_t first, uint64_t second, bool add) {
    warpgroup::queue(sums, 2 * COUNT, first, second, false, add);
}
inline void products_across(float (&sums)[128], uint64_t first, uint64_t second) {
    warpgroup::queue(sums, 256, first, second, true, true);
}
