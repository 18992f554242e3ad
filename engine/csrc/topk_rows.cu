// Lightning TopK: the k largest of a row's scores, exactly, ties to the lower place, in ascending order of place.
//
// One block of 1024 threads takes one row, in four steps that never leave the chip:
//   1. tiles   At least k scores reach the k-th largest of the maxima over 64 scores, so a tile whose maximum lies
//              below (an edge just under) it can not matter.
//   2. gather  Scores of the other tiles that reach that edge go to shared memory, in order of place.
//   3. select  The k-th largest of those, by histograms over the range that is left, 2,048 bins a pass.
//   4. emit    What lies above it, and as many of its equals as there is room for, in order.
// A row of up to DIRECT scores whose tiles are too few to rule any out is taken whole. A row whose survivors do not fit
// (most of it is equal) is read from memory in every pass instead: slower, and as exact.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h).

#include "warp.cuh"

typedef unsigned long long u64;

#define THREADS 1024
#define WARPS 32
#define TILE 64
#define BINS 2048
#define DIRECT 32768
#define LISTED 16384
#define MAX_TILES 4096
#define KEPT 16

struct Shared {
    u32 keys[DIRECT];  // or LISTED keys, and their places behind them
    u32 histogram[BINS];
    unsigned short tiles[MAX_TILES];
    u32 low[WARPS], high[WARPS];
    int counts[WARPS], equals[WARPS];
    u32 bin_edge, bin_last;
    int bin_rank, bin_count;
};

// Larger scores have larger keys. Zeros are equal; a NaN is as large as infinity, so that it shows.
__device__ __forceinline__ u32 key_of(float score) {
    u32 bits = __float_as_uint(score);
    if (score != score) bits = 0x7f800000u;
    if (score == 0.0f) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct InMemory {
    const float* row;
    __device__ __forceinline__ u32 operator()(int i) const { return key_of(row[i]); }
};

struct OnChip {
    const u32* keys;
    __device__ __forceinline__ u32 operator()(int i) const { return keys[i]; }
};


// The sum over lower lanes.
__device__ __forceinline__ int lanes_before(int value) {
    int sum = value;
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane_id() >= d) sum += other;
    }
    return sum - value;
}

// The sum over lower threads, and over all. Two barriers.
__device__ __forceinline__ int threads_before(Shared& s, int value, int& total) {
    int before = lanes_before(value);
    if (lane_id() == 31) s.counts[warp_id()] = before + value;
    __syncthreads();
    int mine = s.counts[lane_id()];
    int warps = lanes_before(mine);
    total = __shfl_sync(0xffffffffu, warps + mine, 31);
    before += __shfl_sync(0xffffffffu, warps, warp_id());
    __syncthreads();
    return before;
}

// The least and the greatest over all threads. Two barriers.
__device__ __forceinline__ void range_of(Shared& s, u32& low, u32& high) {
    for (int d = 16; d > 0; d /= 2) {
        u32 l = __shfl_xor_sync(0xffffffffu, low, d), h = __shfl_xor_sync(0xffffffffu, high, d);
        low = l < low ? l : low;
        high = h > high ? h : high;
    }
    if (lane_id() == 0) { s.low[warp_id()] = low; s.high[warp_id()] = high; }
    __syncthreads();
    low = s.low[lane_id()];
    high = s.high[lane_id()];
    for (int d = 16; d > 0; d /= 2) {
        u32 l = __shfl_xor_sync(0xffffffffu, low, d), h = __shfl_xor_sync(0xffffffffu, high, d);
        low = l < low ? l : low;
        high = h > high ? h : high;
    }
    __syncthreads();
}

__device__ __forceinline__ void clear_histogram(Shared& s) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.histogram[i] = 0;
    __syncthreads();
}

// 2^shift keys share a bin.
__device__ __forceinline__ int shift_for(u32 low, u32 high) {
    int bits = 32 - __clz((int)(high - low));
    return bits > 11 ? bits - 11 : 0;
}

// After the histogram is complete: which bin holds the rank-th largest (from 1), its edges, the rank within and its size.
__device__ __forceinline__ void find_bin(Shared& s, u32 low, u32 high, int shift, int rank) {
    __syncthreads();
    int first = BINS - 1 - 2 * (int)threadIdx.x;  // a thread looks at two bins, the highest thread first
    int a = s.histogram[first], b = s.histogram[first - 1], total;
    int before = threads_before(s, a + b, total);
    if (before < rank && rank <= before + a + b) {
        bool upper = rank <= before + a;
        int bin = upper ? first : first - 1;
        u32 edge = low + ((u32)bin << shift);
        u32 last = edge + ((shift ? 1u << shift : 1u) - 1);
        s.bin_edge = edge;
        s.bin_last = last < edge || last > high ? high : last;
        s.bin_rank = upper ? rank - before : rank - before - a;
        s.bin_count = upper ? a : b;
    }
    __syncthreads();
}

// Exactly `rank` keys are chosen: all above `edge` and the first `equals` equal to it.
struct Choice {
    u32 edge;
    int equals;
};

template <typename Keys>
__device__ Choice choose(Shared& s, Keys keys, int count, int rank, bool crowded) {
    u32 low = 0xffffffffu, high = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        u32 key = keys(i);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    range_of(s, low, high);
    for (;;) {
        int shift = shift_for(low, high);
        clear_histogram(s);
        // Every lane takes part in every round, for the lanes of a warp count together where bins are crowded.
        for (int start = 0; start < count; start += THREADS) {
            int i = start + threadIdx.x;
            u32 key = i < count ? keys(i) : 0;
            bool counted = i < count && key >= low && key <= high;
            u32 bin = counted ? (key - low) >> shift : BINS;
            if (!crowded) {
                if (counted) atomicAdd(&s.histogram[bin], 1u);
            } else {
                u32 alike = __match_any_sync(0xffffffffu, bin);
                if (counted && (alike & ((1u << lane_id()) - 1)) == 0) atomicAdd(&s.histogram[bin], (u32)__popc(alike));
            }
        }
        find_bin(s, low, high, shift, rank);
        low = s.bin_edge;
        high = s.bin_last;
        rank = s.bin_rank;
        int size = s.bin_count;
        __syncthreads();
        if (size == rank) return Choice{low - 1, 0};  // all of the bin; no key is 0
        if (shift == 0) return Choice{low, rank};
    }
}

// places: of each key, or null where the i-th key is the i-th score.
template <typename Keys>
__device__ void emit(Shared& s, Keys keys, const u32* places, int count, Choice choice, int* out) {
    int per_warp = ((count + WARPS - 1) / WARPS + 31) / 32 * 32;
    int begin = warp_id() * per_warp, end = begin + per_warp < count ? begin + per_warp : count;
    int above = 0, equal = 0;
    for (int start = begin; start < end; start += 32) {
        int i = start + lane_id();
        u32 key = i < end ? keys(i) : 0;
        above += __popc(__ballot_sync(0xffffffffu, i < end && key > choice.edge));
        equal += __popc(__ballot_sync(0xffffffffu, i < end && key == choice.edge));
    }
    if (lane_id() == 0) { s.counts[warp_id()] = above; s.equals[warp_id()] = equal; }
    __syncthreads();
    int equals = s.equals[lane_id()];
    int equals_before = lanes_before(equals);
    int room = choice.equals - equals_before;
    int taken = s.counts[lane_id()] + (room <= 0 ? 0 : room < equals ? room : equals);
    int base = __shfl_sync(0xffffffffu, lanes_before(taken), warp_id());
    int seen = __shfl_sync(0xffffffffu, equals_before, warp_id());
    u32 lower = (1u << lane_id()) - 1;
    for (int start = begin; start < end; start += 32) {
        int i = start + lane_id();
        u32 key = i < end ? keys(i) : 0;
        bool tie = i < end && key == choice.edge;
        u32 ties = __ballot_sync(0xffffffffu, tie);
        bool mine = i < end && (key > choice.edge || (tie && seen + __popc(ties & lower) < choice.equals));
        u32 chosen = __ballot_sync(0xffffffffu, mine);
        if (mine) out[base + __popc(chosen & lower)] = places ? (int)places[i] : i;
        base += __popc(chosen);
        seen += __popc(ties);
    }
}

// scores   [rows, score_stride] fp32, of which row r has n = (positions[r] + 1) / ratio
// maxima   [rows, maxima_stride] fp32: of every 64 scores
// out      [rows, k] int32, k <= THREADS * 2
extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_topk_rows(
    const float* scores, long long score_stride, const float* maxima, long long maxima_stride,
    const long long* positions, int ratio, int k, int* out) {
    extern __shared__ __align__(16) unsigned char memory[];
    await_previous();
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const float* row = scores + blockIdx.x * score_stride;
    out += (long long)blockIdx.x * k;
    int n = (int)((positions[blockIdx.x] + 1) / ratio);
    for (int i = threadIdx.x; i < k; i += THREADS)
        if (n <= k) out[i] = i < n ? i : -1;
    if (n <= k) return;
    int tiles = (n + TILE - 1) / TILE;

    if (tiles <= k || tiles > MAX_TILES) {
        if (n <= DIRECT) {
            for (int i = threadIdx.x; i < n; i += THREADS) s.keys[i] = key_of(row[i]);
            __syncthreads();
            Choice choice = choose(s, OnChip{s.keys}, n, k, false);
            emit(s, OnChip{s.keys}, nullptr, n, choice, out);
        } else {
            Choice choice = choose(s, InMemory{row}, n, k, true);
            emit(s, InMemory{row}, nullptr, n, choice, out);
        }
        return;
    }

    // 1. tiles: a thread looks at four neighbours.
    const float* tops = maxima + blockIdx.x * maxima_stride;
    u32 top[4], low = 0xffffffffu, high = 0;
    for (int j = 0; j < 4; j++) {
        int tile = 4 * (int)threadIdx.x + j;
        top[j] = tile < tiles ? key_of(tops[tile]) : 0;
        if (tile < tiles) {
            low = top[j] < low ? top[j] : low;
            high = top[j] > high ? top[j] : high;
        }
    }
    range_of(s, low, high);
    int shift = shift_for(low, high);
    clear_histogram(s);
    for (int j = 0; j < 4; j++)
        if (4 * (int)threadIdx.x + j < tiles) atomicAdd(&s.histogram[(top[j] - low) >> shift], 1u);
    find_bin(s, low, high, shift, k);
    u32 edge = s.bin_edge;
    int survives = 0;
    for (int j = 0; j < 4; j++) survives += top[j] >= edge && top[j] != 0;
    int listed, at = threads_before(s, survives, listed);
    for (int j = 0; j < 4; j++)
        if (top[j] >= edge && top[j] != 0) s.tiles[at++] = (unsigned short)(4 * threadIdx.x + j);
    __syncthreads();

    // 2. gather: a warp takes a run of tiles, two scores a lane, and keeps the first of them in registers.
    int per_warp = (listed + WARPS - 1) / WARPS;
    int begin = warp_id() * per_warp, end = begin + per_warp < listed ? begin + per_warp : listed;
    u32 kept[KEPT][2];
    int count = 0;
#pragma unroll
    for (int t = 0; t < KEPT; t++) {
        int place = begin + t < end ? (int)s.tiles[begin + t] * TILE + 2 * lane_id() : n;
        kept[t][0] = place < n ? key_of(row[place]) : 0;
        kept[t][1] = place + 1 < n ? key_of(row[place + 1]) : 0;
    }
#pragma unroll
    for (int t = 0; t < KEPT; t++)
        count += __popc(__ballot_sync(0xffffffffu, kept[t][0] >= edge)) + __popc(__ballot_sync(0xffffffffu, kept[t][1] >= edge));
    for (int t = begin + KEPT; t < end; t++) {
        int place = (int)s.tiles[t] * TILE + 2 * lane_id();
        u32 a = place < n ? key_of(row[place]) : 0, b = place + 1 < n ? key_of(row[place + 1]) : 0;
        count += __popc(__ballot_sync(0xffffffffu, a >= edge)) + __popc(__ballot_sync(0xffffffffu, b >= edge));
    }
    int survivors, base = threads_before(s, lane_id() == 0 ? count : 0, survivors);
    if (survivors > LISTED) {
        Choice choice = choose(s, InMemory{row}, n, k, true);
        emit(s, InMemory{row}, nullptr, n, choice, out);
        return;
    }
    base = __shfl_sync(0xffffffffu, base, 0);
    u32* places = s.keys + LISTED;
    u32 lower = (1u << lane_id()) - 1;
#pragma unroll
    for (int t = 0; t < KEPT; t++) {
        u32 first = __ballot_sync(0xffffffffu, kept[t][0] >= edge), second = __ballot_sync(0xffffffffu, kept[t][1] >= edge);
        int to = base + __popc(first & lower) + __popc(second & lower);
        if (begin + t < end) {
            u32 place = (u32)s.tiles[begin + t] * TILE + 2 * lane_id();
            if (kept[t][0] >= edge) { s.keys[to] = kept[t][0]; places[to++] = place; }
            if (kept[t][1] >= edge) { s.keys[to] = kept[t][1]; places[to] = place + 1; }
        }
        base += __popc(first) + __popc(second);
    }
    for (int t = begin + KEPT; t < end; t++) {
        u32 place = (u32)s.tiles[t] * TILE + 2 * lane_id();
        u32 a = (int)place < n ? key_of(row[place]) : 0, b = (int)place + 1 < n ? key_of(row[place + 1]) : 0;
        u32 first = __ballot_sync(0xffffffffu, a >= edge), second = __ballot_sync(0xffffffffu, b >= edge);
        int to = base + __popc(first & lower) + __popc(second & lower);
        if (a >= edge) { s.keys[to] = a; places[to++] = place; }
        if (b >= edge) { s.keys[to] = b; places[to] = place + 1; }
        base += __popc(first) + __popc(second);
    }
    __syncthreads();

    // 3. and 4.
    Choice choice = choose(s, OnChip{s.keys}, survivors, k, false);
    emit(s, OnChip{s.keys}, places, survivors, choice, out);
}
