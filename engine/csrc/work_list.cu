// The work of the experts of a step: the pairs of each, in order, in parts that have room for `room` of them.
//
// A block is an expert. Its warps walk over all picks, each over its stretch, twice: to count those of every expert, which
// tells where the expert's parts begin, then to write down its own pairs, whose ranks are known by then.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h).

#include "warp.cuh"

#define THREADS 512
#define WARPS 16

extern __shared__ __align__(16) unsigned char memory[];

// picks [pairs] of `experts` -> members [parts, block]: pairs of the expert owners[part], `pairs` where there is none;
// parts of nobody come last, their owner is -1. A part has places for `block`, of which `room` are used.
extern "C" __global__ void __launch_bounds__(THREADS) penumbra_work_list(
    const int* picks, int* members, int* owners, int pairs, int experts, int parts, int block, int room) {
    u32* sizes = reinterpret_cast<u32*>(memory);  // [experts]
    u32* own = sizes + experts;                   // [WARPS]
    int warp = warp_id(), lane = lane_id(), expert = blockIdx.x;
    for (int e = threadIdx.x; e < experts; e += THREADS) sizes[e] = 0;
    __syncthreads();
    await_previous();
    int stretch = (pairs + 32 * WARPS - 1) / (32 * WARPS) * 32, first = warp * stretch;
    int last = first + stretch < pairs ? first + stretch : pairs;
    u32 mine = 0;
#pragma unroll 4
    for (int p = first + lane; p < last; p += 32) {
        int pick = picks[p];
        mine += pick == expert;
        atomicAdd(&sizes[pick], 1);
    }
    mine = __reduce_add_sync(ALL, mine);
    if (lane == 0) own[warp] = mine;
    __syncthreads();
    u32 before = 0, used = 0;
    for (int e = lane; e < experts; e += 32) {
        u32 needed = (sizes[e] + room - 1) / room;
        used += needed;
        before += e < expert ? needed : 0;
    }
    before = __reduce_add_sync(ALL, before);
    used = __reduce_add_sync(ALL, used);
    u32 rank = __reduce_add_sync(ALL, lane < warp ? own[lane] : 0);
    int* to = members + before * block;
#pragma unroll 4
    for (int base = first; base < last; base += 32) {
        int p = base + lane;
        u32 found = __ballot_sync(ALL, p < last && picks[p] == expert);
        u32 at = rank + __popc(found & ((1u << lane) - 1));
        if (found >> lane & 1) to[at / room * block + at % room] = p;
        rank += __popc(found);
    }
    int size = sizes[expert], needed = (size + room - 1) / room;
    for (int n = threadIdx.x; n < needed * block; n += THREADS)
        if (n % block >= room || n / block * room + n % block >= size) to[n] = pairs;
    for (int n = threadIdx.x; n < needed; n += THREADS) owners[before + n] = expert;
    for (int n = used + blockIdx.x * THREADS + threadIdx.x; n < parts; n += gridDim.x * THREADS) owners[n] = -1;
    for (int n = used * block + blockIdx.x * THREADS + threadIdx.x; n < parts * block; n += gridDim.x * THREADS)
        members[n] = pairs;
}
