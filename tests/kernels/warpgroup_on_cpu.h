// What engine/csrc/warpgroup.cuh leaves to whoever runs it. Whoever includes this says where shared memory begins:
// `memory`, at a multiple of 1,024 bytes.
//
// A GPU does queued products at any time until they are awaited. Here a thread does its own of them at once and again when
// they are awaited, and finds a fault if they have become others: inputs that came too late or went too early. Until then
// their sums are away, and what is there instead nobody may use or change.
//
// Where it is watched who writes what, products may not read what its writer has not published.
#pragma once
#include "cuda_on_cpu.h"
#include <map>

namespace warpgroup {
static int faults;
inline void fault(const char* what) {
    if (!faults++) std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
}

// Of 8 bytes each of shared memory: the thread that wrote them and has not published them, from 1 on.
static std::vector<uint16_t> writers;
static std::vector<uint64_t> seen;
static std::vector<std::vector<uint32_t>> unpublished;  // of a thread
inline void find_written() {
    static const size_t STRIDE = 64;
    const uint64_t* now = reinterpret_cast<const uint64_t*>(memory);
    for (size_t from = 0; from < seen.size(); from += STRIDE) {
        if (!std::memcmp(now + from, &seen[from], STRIDE * 8)) continue;
        for (size_t i = from; i < from + STRIDE; i++)
            if (now[i] != seen[i]) {
                seen[i] = now[i];
                writers[i] = threadIdx.x + 1;
                unpublished[threadIdx.x].push_back(i);
            }
    }
}
inline void watch(bool on) {
    seen.clear();
    writers.clear();
    block::before_others = on ? find_written : nullptr;
    if (!on) return;
    seen.resize(sizeof memory / 8);
    std::memcpy(seen.data(), memory, sizeof memory);
    writers.resize(seen.size());
    unpublished.assign(1024, {});
}

struct Product {
    float* sums;
    int columns, group;
    uint64_t first, second;
    bool across, add;
    std::vector<double> made;
};
static std::vector<Product> queues[1024];
static int groups[1024];                                 // that a thread has closed
static std::map<float*, std::vector<float>> away[1024];  // a thread's sums under way
#define AWAY 0xffc0deadu

inline float value(uint64_t address) {
    address ^= (address >> 7 & 7) << 4;  // swizzled by 128 bytes
    if (!writers.empty() && writers[address / 8]) fault("products read what has not been published");
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
// What is to be added to sums.
inline std::vector<double> products(const Product& p) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    Factor first(p.first), second(p.second);
    float rows[2][16];
    std::vector<double> made(p.columns / 2);
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 16; k++) rows[r][k] = first.along(16 * warp + lane / 4 + 8 * r, k);
    for (int j = 0; j < p.columns / 8; j++)
        for (int c = 0; c < 2; c++) {
            int n = 8 * j + lane % 4 * 2 + c;
            float column[16];
            for (int k = 0; k < 16; k++) column[k] = p.across ? second.across(n, k) : second.along(n, k);
            double sums[2] = {};
            for (int k = 0; k < 16; k++)
                for (int r = 0; r < 2; r++) sums[r] += (double)rows[r][k] * column[k];
            for (int r = 0; r < 2; r++) made[4 * j + 2 * r + c] = sums[r];
        }
    return made;
}
inline void queue(float* sums, int columns, uint64_t first, uint64_t second, bool across, bool add) {
    Product product{sums, columns, groups[threadIdx.x], first, second, across, add, {}};
    product.made = products(product);
    auto& own = away[threadIdx.x][sums];
    if (own.empty()) {
        own.assign(sums, sums + columns / 2);
        uint32_t bits = AWAY;
        for (int i = 0; i < columns / 2; i++) std::memcpy(sums + i, &bits, 4);
    }
    queues[threadIdx.x].push_back(std::move(product));
}
inline void finish(const Product& p) {
    auto made = products(p);
    if (std::memcmp(made.data(), p.made.data(), made.size() * sizeof made[0])) fault("what products read has changed");
    auto& sums = away[threadIdx.x][p.sums];
    for (size_t i = 0; i < sums.size(); i++) sums[i] = (float)((p.add ? sums[i] : 0.0) + made[i]);
}
inline void await(int left) {
    auto& queue = queues[threadIdx.x];
    auto& own = away[threadIdx.x];
    size_t done = 0;
    while (done < queue.size() && queue[done].group < groups[threadIdx.x] - left) finish(queue[done++]);
    queue.erase(queue.begin(), queue.begin() + done);
    // Sums come back when no product of theirs is left.
    for (auto it = own.begin(); it != own.end();) {
        float* sums = it->first;
        if (std::any_of(queue.begin(), queue.end(), [=](const Product& p) { return p.sums == sums; })) {
            ++it;
            continue;
        }
        for (size_t i = 0; i < it->second.size(); i++) {
            if (__float_as_uint(sums[i]) != AWAY) fault("sums under way were changed");
            sums[i] = it->second[i];
        }
        it = own.erase(it);
    }
}

// A warpgroup may be slower than others behind every barrier, who must not count on it: -1 for none.
static int slow = -1;
inline void dawdle() {
    for (int i = 0; i < 40 && (int)threadIdx.x / 128 == slow; i++) {
        block::fibers[block::current].parts++;
        block::pause();
    }
}

// Named barriers.
struct Barrier {
    int threads = 0, there = 0;
    long phase = 0;
    bool came[1024] = {};
};
static Barrier barriers[16];
inline void come(Barrier& b, int threads) {
    if (b.there && b.threads != threads) fault("a barrier of other threads");
    if (b.came[threadIdx.x]) fault("a thread comes to a barrier twice");
    block::fibers[block::current].parts++;
    b.threads = threads;
    b.came[threadIdx.x] = true;
    if (++b.there < threads) return;
    b.there = 0;
    b.phase++;
    std::fill(std::begin(b.came), std::end(b.came), false);
}
// When a block has ended.
inline void check() {
    for (auto& queue : queues)
        if (!queue.empty()) fault("products that nobody awaited");
    for (auto& b : barriers)
        if (b.there) fault("a barrier that not all came to");
}
}  // namespace warpgroup

inline uint32_t shared_address(const void* at) { return (uint32_t)((const unsigned char*)at - memory); }
inline void publish() {
    if (warpgroup::writers.empty()) return;
    warpgroup::find_written();
    auto& own = warpgroup::unpublished[threadIdx.x];
    for (uint32_t i : own)
        if (warpgroup::writers[i] == threadIdx.x + 1) warpgroup::writers[i] = 0;
    own.clear();
}
inline void pass_on(int name, int threads) {
    warpgroup::come(warpgroup::barriers[name], threads);
    warpgroup::dawdle();
}
inline void meet(int name, int threads) {
    auto& barrier = warpgroup::barriers[name];
    long phase = barrier.phase;
    warpgroup::come(barrier, threads);
    while (barrier.phase == phase) block::pause();
    warpgroup::dawdle();
}
inline void begin_products() {}
inline void close_products() { warpgroup::groups[threadIdx.x]++; }
template <int LEFT> void await_products() { warpgroup::await(LEFT); }
template <int LEFT, int COUNT> void await_products(float (&)[COUNT]) { warpgroup::await(LEFT); }
template <int COUNT> void products_along(float (&sums)[COUNT], uint64_t first, uint64_t second, bool add) {
    warpgroup::queue(sums, 2 * COUNT, first, second, false, add);
}
inline void products_across(float (&sums)[128], uint64_t first, uint64_t second) {
    warpgroup::queue(sums, 256, first, second, true, true);
}
