// What kernels with products of a warpgroup share, four warps at once (wgmma): barriers, what is queued and awaited, and
// products of 64 rows of bf16 by bf16 of shared memory, sums in registers.
//
// Both factors of those lie there in slabs, rows of 128 bytes (64 values), 16 bytes of row r at place(r, .), so that neither eight
// rows of one column of sixteens nor one row meet in a bank. Slabs begin at multiples of 1,024 bytes. A product takes 16
// inputs: from the first factor along its rows (`along`), from the second one along them or across (`across`).
//
// What threads wrote is there for products once they have called publish() and met. Products are queued; what they
// read and the sums they change belong to them until they were awaited.
#pragma once

#include "warp.cuh"

typedef unsigned long long u64;

#define SLAB_ROW 128  // bytes
__device__ __forceinline__ int place(int row, int sixteen) { return row * SLAB_ROW + (sixteen ^ (row & 7)) * 16; }

#ifndef ON_CPU
__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A named barrier (1 to 15) of `threads`, all of whose warps come to one of its calls, whichever.
__device__ __forceinline__ void meet(int name, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" :: "r"(name), "r"(threads) : "memory");
}
// Barriers in shared memory: a phase ends when as many have arrived as it was made for; phases are even and odd.
__device__ __forceinline__ void make_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Arrives when all that this thread has sent for is there.
__device__ __forceinline__ void arrive_when_there(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// Arrives, with the bytes that copies are to bring before its phase ends. By one lane, as `bring`.
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
        :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bring(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// As bring, of what is read once.
__device__ __forceinline__ void bring_once(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(once()) : "memory");
}
// Until the phase of this parity has ended; before the first one, an odd one has.
__device__ __forceinline__ void await(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}\n" :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}
// Two values as e4m3, the nearest even ones, at most 448, low in bits 0..7; and what such are.
__device__ __forceinline__ u32 e4m3s(float low, float high) {
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ void values_of(u32 e4m3s, float& low, float& high) {
    asm("{\n"
        ".reg .b32 both;\n"
        ".reg .f16 low, high;\n"
        "cvt.rn.f16x2.e4m3x2 both, %2;\n"
        "mov.b32 {low, high}, both;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}\n" : "=f"(low), "=f"(high) : "h"((unsigned short)e4m3s));
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all groups but the last LEFT are done, which those of `sums` are: that they change here keeps the compiler from
// reading them before.
template <int LEFT, int COUNT> __device__ __forceinline__ void await_products(float (&sums)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i]) :: "memory");
}

// sums of 64 rows by N columns, += or, without `add`, = 16 products each. Warp w has rows 16 w + lane / 4 + 8 r, a lane
// columns 8 j + 2 (lane % 4) + c of them: sums[4 j + 2 r + c].
#define FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define SUMS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_32 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_64 SUMS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_128 SUMS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// Both factors along.
__device__ __forceinline__ void products_along(float (&sums)[16], u64 first, u64 second, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" SUMS_16 "}, %16, %17, p, 1, 1, 0, 0;}"
        : SIXTEEN(0) : "l"(first), "l"(second), "r"((u32)add));
}
__device__ __forceinline__ void products_along(float (&sums)[32], u64 first, u64 second, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SUMS_32 "}, %32, %33, p, 1, 1, 0, 0;}"
        : SIXTEEN(0), SIXTEEN(16) : "l"(first), "l"(second), "r"((u32)add));
}
// Both factors along, of e4m3: 32 products each, of 32 bytes.
__device__ __forceinline__ void products_of_e4m3(float (&sums)[32], u64 first, u64 second, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" SUMS_32 "}, %32, %33, p, 1, 1;}"
        : SIXTEEN(0), SIXTEEN(16) : "l"(first), "l"(second), "r"((u32)add));
}
__device__ __forceinline__ void products_of_e4m3(float (&sums)[64], u64 first, u64 second, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" SUMS_64 "}, %64, %65, p, 1, 1;}"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48) : "l"(first), "l"(second), "r"((u32)add));
}
// The second one across: 256 columns.
__device__ __forceinline__ void products_across(float (&sums)[128], u64 first, u64 second) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" SUMS_128 "}, %128, %129, 1, 1, 1, 0, 1;"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112)
        : "l"(first), "l"(second));
}
#endif

// A factor for wgmma. Its bits 0-13 are its address, 16-29 and 32-45 two distances, all in units of 16 bytes; 49-51 are
// zero, as slabs begin where they do, 62-63 one, as 16 bytes lie at place(). Lower halves can be moved on, a unit a 16 bytes.
//
// Along: row r, input k at 128 r + 2 k from `at`, before place() moves it; the second distance is that of rows 8 apart,
// the first one means nothing. The next 16 inputs are 32 bytes on.
// Across: column n, input k at slab * (n / 64) + 2 (n % 64) + 128 k. The first distance is that of columns 64 apart, the
// second one that of inputs 8 apart. The next 16 inputs are 16 rows on.
__device__ __forceinline__ u32 along(u32 at) { return (at >> 4 & 0x3fff) | 1 << 16; }
__device__ __forceinline__ u32 across(u32 at, u32 slab) { return (at >> 4 & 0x3fff) | slab >> 4 << 16; }
__device__ __forceinline__ u64 factor(u32 lower) { return (u64)(8 * SLAB_ROW >> 4 | 1 << 30) << 32 | lower; }
