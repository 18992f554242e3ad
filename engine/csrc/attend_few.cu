// Attention of few tokens over their window and compressed rows, keys split over blocks: each block's part of
// the softmax, and the merging of the parts. In such a step all is latency, so the work of a block is short and wide.
//
// To make a part a block takes a token, a run of its key tiles (32 keys) and 16 R of its heads; its eight warps cut the
// channels. A warp's 64 channels of a row share a scale (the last warp has the rope values), so a warp fetches, decodes
// and multiplies its own part of the rows, and meets the others twice a tile:
//
//   logits   decoded rows lie in the warp's own shared memory; 16 bytes of a key are operands of two mma m16n8k16 as
//            they are, with channels in the order in which lanes hold them, the queries' too
//   weights  the warps' sums are added up in order, each warp for 2 R heads: the running maximum, the softmax's weights
//   values   the weights times the same rows, which ldmatrix turns on their way
//
// To merge, a block takes a head of a token and sends for the parts of eight splits at once.
//
// Sums are added in a fixed order that does not depend on R: the same bits every time, in any company.
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "attend.cuh"

#define THREADS 256
#define WARPS 8  // CHANNELS each
#define TILE 32
#define LISTED 512   // keys whose rows are looked up at once
#define AHEAD 2      // tiles on their way at once
#define MERGERS 128  // threads of a block that merges, four channels each
#define MERGED 8     // parts that are on their way at once

#ifndef ON_CPU
// Four 8 x 8 matrices of 16 bits, transposed: lanes 8 i to 8 i + 7 name the rows of matrix i, in shared memory.
__device__ __forceinline__ void turned(u32 (&to)[4], const Words* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}
#endif

extern __shared__ __align__(16) unsigned char memory[];

// Decoded rows: bf16 pairs of a warp's channels. 16 bytes lie where place() says, so that neither eight lanes that take
// the same of eight keys, nor four of each of two, meet in a bank. Likewise codes, 16 bytes of twice the channels.
typedef Words Tile[TILE][CHANNELS / 8];
typedef Words Codes[TILE][CHANNELS / 16];
__device__ __forceinline__ int place(int key, int sixteen) { return sixteen ^ ((key & 1) << 2 | (key >> 1 & 3)); }
__device__ __forceinline__ int place_of_codes(int key, int sixteen) { return place(key, sixteen) & 3; }

template <int R> struct Shared {
    Row rows[LISTED];
    Codes codes[AHEAD][WARPS - 1];  // as they come
    Tile rope[AHEAD];
    Tile values[WARPS - 1];                 // decoded
    float logits[WARPS][16 * R][TILE + 8];  // the pads keep lanes of a warp in banks of their own
    u32 weights[16 * R][TILE / 2 + 4];      // bf16 pairs
    float shrink[16 * R];
    u32 there[LISTED / TILE];  // a bit for each key of a tile
};

// Sends for the warp's part of a tile. -> the scale of key lane_id().
template <int R> __device__ __forceinline__ u32 send_for(Shared<R>& s, int tile, int count) {
    u32 scale = 0;
    if (tile < count) {
        const Row* rows = s.rows + tile * TILE;
        int stage = tile % AHEAD, warp = warp_id(), lane = lane_id();
        // A key has 2^bits times 16 bytes here: 128 of rope values, 64 of codes.
        int bits = warp == WARPS - 1 ? 3 : 2, last = (1 << bits) - 1;
        Words* to = warp == WARPS - 1 ? &s.rope[stage][0][0] : &s.codes[stage][warp][0][0];
#pragma unroll 4
        for (int i = lane; i < TILE << bits; i += 32) {
            int key = i >> bits, sixteen = i & last;
            const u8* from = rows[key].codes;
            if (from) from += warp * CHANNELS + sixteen * 16;
            fetch16_or_zeros(to + (key << bits) + (place(key, sixteen) & last), from);
        }
        if (rows[lane].codes) scale = rows[lane].scales[warp];
    }
    close_group();
    return scale;
}

// Decodes the warp's channels of key lane_id(). code: its scale, 2^(code - 127).
__device__ __forceinline__ void decode(Tile& values, const Codes& codes, u32 code) {
    int key = lane_id();
    u32 power = power_of(code), second = second_power_of(code);
#pragma unroll
    for (int i = 0; i < CHANNELS / 16; i++) {
        Words sixteen = codes[key][place_of_codes(key, i)];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Words pairs;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                pairs.w[2 * j] = times(e4m3<0>(sixteen.w[2 * h + j]), power);
                pairs.w[2 * j + 1] = times(e4m3<1>(sixteen.w[2 * h + j]), power);
            }
            values[key][place(key, 2 * i + h)] = pairs;
        }
    }
    if (code > LARGEST)
#pragma unroll 1
        for (int i = 0; i < CHANNELS / 8; i++)
            for (int j = 0; j < 4; j++) values[key][i].w[j] = times(values[key][i].w[j], second);
}

// The warp's channels of the queries of 16 R heads, as operands. A product's inputs are four channels of each lane of a
// quad, those that are half of 16 bytes of a key.
template <int R> struct Queries {
    u32 a[R][4][4];
};

template <int R> __device__ __forceinline__ void read_queries(Queries<R>& to, const float* q) {
    int row = lane_id() / 4, first = warp_id() * CHANNELS + (lane_id() & 3) * 8;
    Floats<4> fours[R][2][4];  // channels first + i / 2 * 32 + i % 2 * 4
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                fours[r][h][i] = *reinterpret_cast<const Floats<4>*>(
                    q + (16 * r + 8 * h + row) * DIM + first + i / 2 * 32 + i % 2 * 4);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Floats<4>& four = fours[r][h][i];
                to.a[r][i][h] = bf16s(four.f[0], four.f[1]);
                to.a[r][i][2 + h] = bf16s(four.f[2], four.f[3]);
            }
}

// The warp's part of a tile's logits, into shared memory: over its own channels.
template <int R> __device__ __forceinline__ void score(Shared<R>& s, const Queries<R>& queries, const Tile& values) {
    float logits[R][4][4] = {};
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int key = 8 * n + lane_id() / 4;
            Words pairs = values[key][place(key, 4 * h + (lane_id() & 3))];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int r = 0; r < R; r++)
                    mma_bf16(logits[r][n], queries.a[r][2 * h + i], pairs.w[2 * i], pairs.w[2 * i + 1]);
        }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                *reinterpret_cast<Floats<2>*>(
                    &s.logits[warp_id()][16 * r + 8 * h + lane_id() / 4][8 * n + 2 * (lane_id() & 3)]) =
                    Floats<2>{{logits[r][n][2 * h], logits[r][n][2 * h + 1]}};
}

// What a lane knows of the softmax of head 2 R warp + lane / (16 / R): the keys are those at lane % (16 / R) * 2 R.
template <int R> struct Softmax {
    float top, totals[R];  // a total for each pair of keys, so that it does not matter how many a lane has
};

// One tile more: adds up the warps' logits, leaves weights and what earlier sums shrink by in shared memory.
template <int R> __device__ __forceinline__ void weigh(Shared<R>& s, Softmax<R>& of, u32 there, float scale) {
    const int LANES = 16 / R;
    int head = warp_id() * 2 * R + lane_id() / LANES, key = lane_id() % LANES * 2 * R;
    float logits[2 * R] = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        Floats<2 * R> more = *reinterpret_cast<const Floats<2 * R>*>(&s.logits[w][head][key]);
#pragma unroll
        for (int j = 0; j < 2 * R; j++) logits[j] += more.f[j];
    }
    float higher = of.top;
#pragma unroll
    for (int j = 0; j < 2 * R; j++) {
        logits[j] = there >> (key + j) & 1 ? logits[j] * scale : NOTHING;
        higher = fmaxf(higher, logits[j]);
    }
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) higher = fmaxf(higher, __shfl_xor_sync(ALL, higher, d));
    // Before the first key nothing is known: exp(-inf - -inf) is kept from being NaN.
    float floor = higher == NOTHING ? 0.0f : higher, shrink = expf(of.top - floor);
#pragma unroll
    for (int j = 0; j < R; j++) {
        float low = expf(logits[2 * j] - floor), high = expf(logits[2 * j + 1] - floor);
        of.totals[j] = of.totals[j] * shrink + (low + high);
        s.weights[head][key / 2 + j] = bf16s(low, high);
    }
    if (lane_id() % LANES == 0) s.shrink[head] = shrink;
    of.top = higher;
}

// Adds a tile's weighted values to sums [R][8 channels at a time][4].
template <int R>
__device__ __forceinline__ void add_values(float (&sums)[R][8][4], const Shared<R>& s, const Tile& values) {
    int row = lane_id() / 4, quad = lane_id() & 3;
#pragma unroll
    for (int r = 0; r < R; r++) {
        float upper = s.shrink[16 * r + row], lower = s.shrink[16 * r + 8 + row];
#pragma unroll
        for (int c = 0; c < 8; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][c][i] *= i < 2 ? upper : lower;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 a[R][4];
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[r][i] = s.weights[16 * r + i % 2 * 8 + row][8 * half + i / 2 * 4 + quad];
#pragma unroll
        for (int c = 0; c < 8; c += 2) {
            u32 b[4];
            int key = 16 * half + (lane_id() & 15);
            turned(b, &values[key][place(key, c + lane_id() / 16)]);
#pragma unroll
            for (int r = 0; r < R; r++) {
                mma_bf16(sums[r][c], a[r], b[0], b[1]);
                mma_bf16(sums[r][c + 1], a[r], b[2], b[3]);
            }
        }
    }
}

// window: 256 rows an item; pool: null, or 2^pool_bits rows an item, each of 2^(8 - pool_bits) tokens.
// q [tokens, heads, DIM]; positions, segment [tokens]; tables [., pages]; oldest [.] or null; selected [tokens, picks],
// -1 for none -> parts [tokens, splits, heads, DIM], sums not yet divided; tops, totals [tokens, splits, heads]. A split
// without keys has a top of -inf and a total of 0, and its part is not written.
#define PARAMETERS                                                                                                   \
    const float *q, const long long *positions, const int *segment, const int *page_table, const int *swa_table,     \
        const long long *oldest, int pages, const u8 *window, long long window_stride, const u8 *pool,               \
        long long pool_stride, int pool_bits, const int *selected, int picks, float *parts, float *tops,             \
        float *totals, int heads, int splits, float scale
#define PASSED                                                                                                       \
    q, positions, segment, page_table, swa_table, oldest, pages, window, window_stride, pool, pool_stride,           \
        pool_bits, selected, picks, parts, tops, totals, heads, splits, scale

template <int R> __device__ __forceinline__ void attend(PARAMETERS) {
    Shared<R>& s = *reinterpret_cast<Shared<R>*>(memory);
    int blocks = heads / (16 * R), split = blockIdx.x / blocks % splits;
    long long token = blockIdx.x / (blocks * splits);
    int first_head = (int)blockIdx.x % blocks * 16 * R;
    await_previous();
    long long position = positions[token], seg = segment[token];
    Queries<R> queries;
    read_queries<R>(queries, q + (token * heads + first_head) * DIM);
    int finished = 0;
    if (pool) finished = (int)((position + 1) >> (PAGE_BITS - pool_bits));
    if (selected && finished > picks) finished = picks;
    int tiles = WINDOW / TILE + (finished + TILE - 1) / TILE, share = (tiles + splits - 1) / splits;
    int begin = split * share, end = begin + share < tiles ? begin + share : tiles;
    long long at = (long long)blockIdx.x * 16 * R;  // of its first head in tops
    if (begin >= end) {
        if (threadIdx.x < 16 * R) {
            tops[at + threadIdx.x] = NOTHING;
            totals[at + threadIdx.x] = 0.0f;
        }
        return;
    }
    Seen seen = {{window, window_stride, PAGE_BITS, swa_table + seg * pages},
                 {pool, pool_stride, pool_bits, page_table + seg * pages},
                 position, oldest ? oldest[seg] : 0, selected ? selected + token * picks : nullptr, finished};
    bool rope = warp_id() == WARPS - 1;
    float sums[R][8][4] = {};
    Softmax<R> softmax = {NOTHING, {}};
    for (int first = begin; first < end; first += LISTED / TILE) {
        __syncthreads();  // the last list has been read by all
        for (int i = threadIdx.x; i < LISTED && first * TILE + i < end * TILE; i += THREADS) {
            Row row = row_of_key(seen, first * TILE + i);
            s.rows[i] = row;
            u32 there = __ballot_sync(ALL, row.codes != nullptr);
            if (lane_id() == 0) s.there[i / TILE] = there;
        }
        __syncthreads();
        int count = end - first < LISTED / TILE ? end - first : LISTED / TILE;
        u32 code = 0, next = 0;  // scales of key lane_id()
        for (int tile = -AHEAD; tile < count; tile++) {
            if (tile >= 0) {
                await_groups<AHEAD - 1>();
                const Tile& values = rope ? s.rope[tile % AHEAD] : s.values[warp_id()];
                if (!rope) decode(s.values[warp_id()], s.codes[tile % AHEAD][warp_id()], code);
                __syncwarp();
                score<R>(s, queries, values);
                __syncthreads();
                weigh<R>(s, softmax, s.there[tile], scale);
                __syncthreads();
                add_values<R>(sums, s, values);
            }
            __syncwarp();  // the stage and the values have been read
            code = next;
            next = send_for<R>(s, tile + AHEAD, count);
        }
    }
    float total = softmax.totals[0];
#pragma unroll
    for (int j = 1; j < R; j++) total += softmax.totals[j];
    const int LANES = 16 / R;
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) total += __shfl_xor_sync(ALL, total, d);
    if (lane_id() % LANES == 0) {
        int head = warp_id() * 2 * R + lane_id() / LANES;
        tops[at + head] = softmax.top;
        totals[at + head] = total;
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float* to = parts + (at + 16 * r + 8 * h + lane_id() / 4) * DIM + warp_id() * CHANNELS;
            to += 2 * (lane_id() & 3);
#pragma unroll
            for (int c = 0; c < 8; c++)
                *reinterpret_cast<Floats<2>*>(to + 8 * c) = Floats<2>{{sums[r][c][2 * h], sums[r][c][2 * h + 1]}};
        }
}

// Blocks: [tokens][splits][heads / 16 R].
extern "C" __global__ void __launch_bounds__(THREADS, 2) penumbra_attend_few_1(PARAMETERS) { attend<1>(PASSED); }
extern "C" __global__ void __launch_bounds__(THREADS) penumbra_attend_few_2(PARAMETERS) { attend<2>(PASSED); }

// parts, tops, totals of all splits -> out [tokens, heads, DIM]: their softmax, with sink [heads] in it, a logit that
// has no value. With freqs [pairs, an even number] the last channels, in pairs, are turned back by the token's
// position. Blocks: [tokens][heads].
extern "C" __global__ void __launch_bounds__(MERGERS) penumbra_attend_merge(
    const float* parts, const float* tops, const float* totals, const float* sink, const long long* positions,
    const float* freqs, int pairs, float* out, int heads, int splits) {
    let_next_begin();
    int token = blockIdx.x / heads, head = blockIdx.x % heads, channel = 4 * threadIdx.x;
    await_previous();
    float drain = sink[head], angles[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int pair = channel / 2 + i - (DIM / 2 - pairs);
        if (freqs && pair >= 0) angles[i] = (float)positions[token] * freqs[pair];
    }
    long long first = (long long)token * splits * heads + head;  // of split 0 in tops
    float highest = drain;
    for (int split = lane_id(); split < splits; split += 32)
        highest = fmaxf(highest, tops[first + (long long)split * heads]);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, d));
    if (highest == NOTHING) highest = 0.0f;
    float total = 0.0f, sums[4] = {};
    for (int start = 0; start < splits; start += 32) {
        bool there = start + lane_id() < splits;
        long long at = first + (long long)(start + lane_id()) * heads;
        float own = there ? totals[at] : 0.0f, weight = there ? expf(tops[at] - highest) : 0.0f;
        total += own * weight;
        // A split without keys left its part unwritten.
        for (u32 left = __ballot_sync(ALL, own != 0.0f); left;) {
            Floats<4> some[MERGED];
            float weights[MERGED];
            int split = 0;
#pragma unroll
            for (int i = 0; i < MERGED; i++) {
                // The last one again where there are no more, for nothing: with a condition on each load the compiler
                // would save registers by waiting for one after the other.
                if (left) split = __ffs(left) - 1;
                weights[i] = left ? __shfl_sync(ALL, weight, split) : 0.0f;
                left &= left - 1;
                const float* from = parts + (first + (long long)(start + split) * heads) * DIM + channel;
                some[i] = *reinterpret_cast<const Floats<4>*>(from);
            }
#pragma unroll
            for (int i = 0; i < MERGED; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[j] += weights[i] * some[i].f[j];
        }
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) total += __shfl_xor_sync(ALL, total, d);
    total += expf(drain - highest);
    float share = 1.0f / total;
    Floats<4> result;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float even = sums[2 * i] * share, odd = sums[2 * i + 1] * share, sine = 0.0f, cosine = 1.0f;
        if (freqs && channel >= DIM - 2 * pairs) sincosf(angles[i], &sine, &cosine);
        result.f[2 * i] = even * cosine + odd * sine;
        result.f[2 * i + 1] = odd * cosine - even * sine;
    }
    *reinterpret_cast<Floats<4>*>(out + (long long)blockIdx.x * DIM + channel) = result;
}
