// What the kernels of a decode step share: lanes and their words, copies to shared memory, sums over a warp, products on
// tensor cores, and an early beginning.
//
// A kernel begins while the one in front of it ends (programmatic dependent launch). It calls await_previous before it
// touches what another may read or write, and may have read its weights before: they never change. Every kernel waits,
// even where it would need nothing, so that what is in front of the one in front has ended too.
//
// A short kernel calls let_next_begin first of all: those behind it are products, which send for weights meanwhile. What
// is in front of it may then still run when the next one begins, which must not touch more than weights before it waits.
//
// On a CPU, tests/kernels/cuda_on_cpu.h brings its own of what stands between #ifndef ON_CPU and #endif.
#pragma once

typedef unsigned int u32;
typedef unsigned char u8;

#define ALL 0xffffffffu  // lanes

struct __align__(16) Words {
    u32 w[4];
};
template <int N> struct __align__(4 * N) Floats {
    float f[N];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

#ifndef ON_CPU
// Until the kernels in front have ended and all they wrote can be read; then the next one may take multiprocessors that
// are free.
__device__ __forceinline__ void await_previous() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// The next kernel may take multiprocessors that are free as soon as all blocks of this one have begun.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// For what is read once a step, as weights are: the L2 gives it up before anything else, and keeps kernels' code and the
// small tensors between them.
__device__ __forceinline__ unsigned long long once() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// 16 bytes on their way to shared memory; what a lane sends for, in groups that come in order.
__device__ __forceinline__ void fetch16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// Likewise, of what is read once.
__device__ __forceinline__ void fetch16_once(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
        :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "l"(once()) : "memory");
}
// Likewise, zeros if `from` is null.
__device__ __forceinline__ void fetch16_or_zeros(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(from ? 16 : 0) : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void await_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
    __syncwarp();
}
// m16n8k16: a lane has rows lane / 4 and lane / 4 + 8 of the first factor at inputs 2 (lane % 4) + {0, 1} (a[0], a[1]) and
// + {8, 9} (a[2], a[3]), column lane / 4 of the second at the same ones, columns 2 (lane % 4) + {0, 1} of the sum.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 bf16s(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif

template <int COUNT, int DISTANCE> __device__ __forceinline__ void fold(float* values) {
    if constexpr (COUNT == 1) {
        values[0] += __shfl_xor_sync(ALL, values[0], DISTANCE);
    } else {
        bool upper = lane_id() & DISTANCE;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            float low = values[i], high = values[i + COUNT / 2];
            values[i] = (upper ? high : low) + __shfl_xor_sync(ALL, upper ? low : high, DISTANCE);
        }
    }
    if constexpr (DISTANCE > 1) fold<(COUNT > 1 ? COUNT / 2 : 1), DISTANCE / 2>(values);
}

// COUNT values of each lane -> the sum of value `lane * COUNT / 32` over all lanes. The order of its terms is that of
// any other count.
template <int COUNT> __device__ __forceinline__ float sum_of_own(float (&values)[COUNT]) {
    fold<COUNT, 16>(values);
    return values[0];
}
