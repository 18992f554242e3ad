// Enough of CUDA to run one block of a kernel on a CPU: a thread of the block is a fiber, barriers switch between them.
// Warp operations wait for their 32 lanes, so a kernel in which lanes part ways before one hangs here and is refused.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <setjmp.h>
#include <ucontext.h>

#define ON_CPU
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim;

namespace block {
struct Fiber {
    ucontext_t context;  // for the first switch to it alone: later ones jump, which spares two system calls
    jmp_buf here;
    std::vector<char> stack;
    bool begun = false, done = false;
    long barriers = 0, warps = 0, parts = 0;
    long steps() const { return barriers + warps + parts; }
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static unsigned current;
static std::vector<uint32_t> lane_values;
static void (*body)();
static bool eager = false, backwards = false;  // whether a warp goes as far as it can by itself; the last warp first
static bool left = false;  // whether a thread wants other blocks to go on

inline void pause() {
    if (_setjmp(fibers[current].here) == 0) _longjmp(scheduler, 1);
}
inline void resume(unsigned i) {
    current = threadIdx.x = i;
    if (_setjmp(scheduler)) return;
    if (fibers[i].begun) _longjmp(fibers[i].here, 1);
    fibers[i].begun = true;
    setcontext(&fibers[i].context);
}
inline bool reached(unsigned first, unsigned count, long Fiber::*counter, long wanted) {
    for (unsigned i = first; i < first + count; i++)
        if (!fibers[i].done && fibers[i].*counter < wanted) return false;
    return true;
}
inline void wait(unsigned first, unsigned count, long Fiber::*counter) {
    long wanted = ++(fibers[current].*counter);
    while (!reached(first, count, counter, wanted)) pause();
}
inline void sync_warp() { wait(current / 32 * 32, 32, &Fiber::warps); }
// The values of all lanes. Two sets take turns, so that a lane which is ahead by one overwrites nobody's.
inline const uint32_t* exchange(uint32_t value) {
    uint32_t* values = lane_values.data() + (fibers[current].warps % 2 ? lane_values.size() / 2 : 0);
    values[current] = value;
    sync_warp();
    return values + current / 32 * 32;
}
inline void enter() {
    body();
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}
inline void begin(unsigned threads, void (*kernel)()) {
    body = kernel;
    fibers = std::vector<Fiber>(threads);
    lane_values.assign(2 * threads, 0);
    for (unsigned i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.stack.resize(64 << 10);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
}
// For other blocks to go on at once.
inline void leave() {
    left = true;
    pause();
}
// As far as the block's threads come by themselves, or to where one leaves. Whether all are done.
inline bool go_on() {
    unsigned threads = fibers.size();
    left = false;
    for (unsigned idle = 0; idle < 3;) {
        long moved = 0;
        bool all = true;
        for (unsigned warps = (threads + 31) / 32, w = 0; w < warps; w++) {
            unsigned first = (backwards ? warps - 1 - w : w) * 32;
            long went;
            do {
                went = 0;
                for (unsigned i = first; i < std::min(first + 32, threads); i++) {
                    Fiber& f = fibers[i];
                    if (f.done) continue;
                    long was = f.steps();
                    resume(i);
                    went += f.steps() - was + f.done;
                    all &= f.done;
                    if (left) return false;
                }
                moved += went;
            } while (eager && went);
        }
        if (all) return true;
        idle = moved ? 0 : idle + 1;
    }
    return false;
}
inline void run(unsigned threads, void (*kernel)()) {
    begin(threads, kernel);
    if (!go_on()) { std::fprintf(stderr, "the threads of the block wait for each other\n"); std::abort(); }
}
}  // namespace block

inline void __syncthreads() { block::wait(0, block::fibers.size(), &block::Fiber::barriers); }
inline uint32_t __float_as_uint(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t atomicAdd(uint32_t* at, uint32_t more) { uint32_t old = *at; *at += more; return old; }
inline uint32_t __ballot_sync(uint32_t, bool on) {
    uint32_t bits = 0;
    const uint32_t* seen = block::exchange(on);
    for (int i = 0; i < 32; i++) bits |= (seen[i] ? 1u : 0u) << i;
    return bits;
}
template <typename T> T shuffled(T value, int from) { return (T)block::exchange((uint32_t)value)[from & 31]; }
template <typename T> T __shfl_sync(uint32_t, T value, int lane) { return shuffled(value, lane); }
template <typename T> T __shfl_xor_sync(uint32_t, T value, int mask) { return shuffled(value, (threadIdx.x & 31) ^ mask); }
inline float __shfl_xor_sync(uint32_t, float value, int mask) {
    uint32_t bits = shuffled(__float_as_uint(value), (threadIdx.x & 31) ^ mask);
    std::memcpy(&value, &bits, 4);
    return value;
}
template <typename T> T __shfl_up_sync(uint32_t, T value, int d) {
    int lane = threadIdx.x & 31;
    return shuffled(value, lane >= d ? lane - d : lane);
}
inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
    const uint32_t* seen = block::exchange(value);
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= (seen[i] == value ? 1u : 0u) << i;
    return bits;
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    const uint32_t* seen = block::exchange(value);
    return *std::max_element(seen, seen + 32);
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
    const uint32_t* seen = block::exchange(value);
    return *std::min_element(seen, seen + 32);
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
    const uint32_t* seen = block::exchange(value);
    uint32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += seen[i];
    return sum;
}
inline float __shfl_sync(uint32_t, float value, int lane) {
    uint32_t bits = shuffled(__float_as_uint(value), lane);
    std::memcpy(&value, &bits, 4);
    return value;
}

// What engine/csrc/warp.cuh leaves to whoever runs it. Copies are there at once.
inline float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline void __syncwarp() { block::sync_warp(); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t made = 0;
    for (int i = 0; i < 4; i++) made |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return made;
}
inline void await_previous() {}
inline void let_next_begin() {}
inline void fetch16(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void fetch16_or_zeros(void* to, const void* from) {
    if (from) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
}
inline void close_group() {}
template <int> void await_groups() { block::sync_warp(); }
inline float bf16_of(uint32_t bits) { return __uint_as_float(bits << 16); }
inline uint32_t bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t bf16s(float low, float high) { return bf16(low) | bf16(high) << 16; }
// m16n8k16 of two-byte values that `value` makes floats of.
template <typename Value>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value) {
    static float first[16][32][8], second[16][32][4];  // of a warp's lanes
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int i = 0; i < 8; i++) first[warp][lane][i] = value(a[i / 2] >> 16 * (i % 2) & 0xffff);
    for (int i = 0; i < 4; i++) second[warp][lane][i] = value((i < 2 ? b0 : b1) >> 16 * (i % 2) & 0xffff);
    block::sync_warp();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 * 4, column = (lane % 4 * 2 + i % 2) * 4;
        double sum = c[i];
        for (int quad = 0; quad < 4; quad++)
            for (int k = 0; k < 4; k++)
                sum += (double)first[warp][row + quad][k / 2 * 4 + i / 2 * 2 + k % 2] * second[warp][column + quad][k];
        c[i] = (float)sum;
    }
    block::sync_warp();
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(c, a, b0, b1, bf16_of); }
