// FP4 experts as they lie in memory, for the kernels that multiply by them in e4m3.
//
// Weights are not as the checkpoint has them but in panels (engine/kernels/device/experts_few.py makes those), so that
// little is left to do for each: a panel is 64 rows, in steps of 256 inputs that lie one behind the other. A step is the
// 16 rows of each of four warps: what its lanes load, 16 bytes at a time and in order, then the scales:
//
//   [4 pairs of groups][32 lanes] of four words, [2 halves of the step][16 rows] of a word: four UE8M0 codes
//
// A lane's words are row lane / 4 and row lane / 4 + 8 at 8 inputs of a group of 32, then of the next group: inputs
// 4 (lane % 4) + 0..3 and those 16 later. gate and up share panels: a warp's upper eight rows are gate's, the lower up's.
//
// A word is eight e2m1 weights, which `unpack` spreads over the bytes of two words. Sign, exponent and mantissa come to
// e4m3's places (mask M), where they are the value over 2^6; a weight of the second four is stored xor-ed with bits that
// the shifts bring along, so that two shifts and a mask are all it needs.
//
// On a CPU, tests/kernels/panels_on_cpu.h brings its own of what stands between #ifndef ON_CPU and #endif.
#pragma once

#include "warpgroup.cuh"

#define STEP 256  // inputs
#define M 0x9c9c9c9cu

#ifndef ON_CPU
// Of a phase of a barrier, and all that the warp has read and written before.
__device__ __forceinline__ void arrive(u64* barrier) {
    __syncwarp();
    if (lane_id() == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
#endif

struct __align__(16) Step {
    Words weights[4][32];
    u32 scales[32];
};

__device__ __forceinline__ void unpack(u32 w, u32& first, u32& second) {
    first = w & M;
    second = (w << 2 ^ w >> 2) & M;
}
