// Attention of few tokens over many keys, keys split over blocks: each block's part of the softmax, and the
// merging of the parts. Where attend_few.cu is short, this is dense: a block takes 64 heads of a token, which are the rows
// of wgmma, so a key is decoded once for all of them.
//
// Decoded keys lie in shared memory as bf16, a slab for 64 channels (warpgroup.cuh): along their rows they are keys, across
// them values. Two warpgroups share the work, each with the sums of 256 channels. What is no product is done under products.
// Once the weights of a tile t of 64 keys are there, whose parts of 32 are a and b, there come:
//
//   products                     first warpgroup         second one
//   weights times values of a                            decodes b of tile t + 1 to where that of t - 1 was
//   queries times keys of t + 1                          decodes a of tile t + 2 to where that of t was
//   weights times values of b    weights of tile t + 1
//
// Products of a tile follow those of the one before without a gap if weights are there by then. In between the first
// warpgroup waits for keys, the second one for places, and until queries times keys are done, which weights wait for.
//
// A tile of 32 keys has no a, and places for three tiles instead of two: decoding is a tile ahead of queries times keys, and
// no product is left when weights are there.
//
// A decoder's rows come from memory straight into registers; where they lie is found in two steps, each a tile ahead of the
// next.
//
// A row's weights are relative to its highest logit so far or one that is up to SLACK below it: sums are shrunk when one
// rises further, which is seldom after the first tile.
//
// Parts are halves of their own power of two for each row of 256, for what blocks write and read back is most of the
// traffic: 64 KB each. They are in the order in which lanes hold sums, so that a lane writes 16 bytes: value 2 j + c of
// lane q of a quad is channel 8 j + 2 q + c of 32. A block that has all of a token's keys writes what merging would make.
//
// Logits here are those times log2 e. Sums are added in a fixed order: the same bits every time, in any company.
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "attend.cuh"
#include "warpgroup.cuh"

#define THREADS 256
#define HEADS 64                // of a block
#define SLABS (DIM / CHANNELS)  // of a key
#define HALF (DIM / 2)          // channels of a warpgroup
#define LOG2_E 1.4426950408889634f
#define BATCH 4    // heads whose queries are on their way at once
#define TURNED 64  // channels at most, the last ones
#define PART 32    // keys that are decoded in one go
#define SLACK 8.0f // weights are 2^8 at most

// Barriers by name: all meet; one warpgroup meets there and the other passes on.
enum { WEIGHTS = 1, KEYS_THERE, PLACE_FREE, LOGITS };

#ifndef ON_CPU
// As meet(), for those who only say that they were there.
__device__ __forceinline__ void pass_on(int name, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" :: "r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 halves(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ Floats<2> of_halves(u32 both) {
    Floats<2> two;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(two.f[0]), "=f"(two.f[1]) : "r"(both));
    return two;
}
#endif

extern __shared__ __align__(1024) unsigned char memory[];

template <int KEYS> struct Shared {
    static constexpr int TILES = KEYS == PART ? 3 : 2;
    u8 queries[SLABS][HEADS * SLAB_ROW];
    u8 keys[TILES][SLABS][KEYS * SLAB_ROW];
    u8 weights[2 * KEYS / CHANNELS][HEADS * SLAB_ROW];  // of two tiles
    float bias[TILES][KEYS];                            // 0, or -inf where there is no key
    float shrink[2][HEADS];                             // what earlier sums are multiplied by, of two tiles
};

// Where weights of a tile begin, even and odd ones in turn; a bit that those of its neighbour do not have.
template <int KEYS> __device__ __forceinline__ u32 weights_of(int tile) {
    return (tile & 1) * (KEYS == PART ? SLAB_ROW / 2 : HEADS * SLAB_ROW);
}

__device__ __forceinline__ int group_warp() { return warp_id() & 3; }
__device__ __forceinline__ int quad() { return lane_id() & 3; }
// The first of the two heads of a lane, eight apart.
__device__ __forceinline__ int lane_head() { return 16 * group_warp() + lane_id() / 4; }

// Some of the queries of a warp's 16 heads; a lane has channels 128 i + 4 lane.
struct Queries {
    Floats<4> rows[BATCH][4];
};

__device__ __forceinline__ void send_for(Queries& to, const float* q, int batch) {
    q += (16 * group_warp() + batch * BATCH) * DIM + 4 * lane_id();
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) to.rows[b][i] = *reinterpret_cast<const Floats<4>*>(q + b * DIM + 128 * i);
}

// Queries of the block's heads, into shared memory; the first batch has been sent for. For the first warpgroup.
template <int KEYS> __device__ __forceinline__ void read_queries(Shared<KEYS>& s, Queries& next, const float* q) {
    int lane = lane_id(), first = 16 * group_warp();
#pragma unroll
    for (int batch = 0; batch < 16 / BATCH; batch++) {
        Queries now = next;
        auto& rows = now.rows;
        if (batch + 1 < 16 / BATCH) send_for(next, q, batch + 1);
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u8* to = s.queries[2 * i + lane / 16] + place(first + batch * BATCH + b, lane % 16 / 2) + lane % 2 * 8;
                const Floats<4>& four = rows[b][i];
                *reinterpret_cast<unsigned long long*>(to) =
                    (unsigned long long)bf16s(four.f[2], four.f[3]) << 32 | bf16s(four.f[0], four.f[1]);
            }
    }
}

// A lane of the second warpgroup has key 8 warp + lane / 4 of a part, a quarter of each group's codes.
__device__ __forceinline__ int lane_key() { return 8 * group_warp() + lane_id() / 4; }
// Sixteen t of those of the rope values that a lane has: neighbours' are not in the same banks.
__device__ __forceinline__ int rope_sixteen(int t) { return quad() + 4 * ((lane_key() + t) & 1); }

// Of a lane's key in two parts that follow one another in their places: of the nearer one its row and item, of the other
// one its row; -1 for none.
struct Ahead {
    int index, item, next;
};
struct Codes {
    Words nope[SLABS - 1], rope[2];
    u32 scales[2];
    bool there;
};

// The compiler awaits all that is on its way from memory when it awaits anything. So this is for before more is sent for.
__device__ __forceinline__ void settle(Ahead& of) {
    of.item = __shfl_sync(ALL, of.item, lane_id());
    of.next = __shfl_sync(ALL, of.next, lane_id());
}

// No lane branches on what comes from memory, so that it waits for it in the next step only.
__device__ __forceinline__ void look_up(Ahead& of, const Seen& seen, int key, int next_key, int limit) {
    of.index = of.next;
    const Source& source = key < WINDOW ? seen.raw : seen.pooled;
    of.item = source.table[(of.index < 0 ? 0 : of.index) >> source.bits];
    of.next = index_of_key(seen, next_key, limit);
}

__device__ __forceinline__ void send_for(Codes& to, const Ahead& of, const Seen& seen, int key) {
    to.there = of.index >= 0;
    to.scales[0] = to.scales[1] = 0;
#pragma unroll
    for (int g = 0; g < SLABS - 1; g++) to.nope[g] = Words{};
#pragma unroll
    for (int t = 0; t < 2; t++) to.rope[t] = Words{};
    if (to.there) {
        Row row = row_in(key < WINDOW ? seen.raw : seen.pooled, of.item, of.index);
#pragma unroll
        for (int g = 0; g < SLABS - 1; g++) to.nope[g] = read16(row.codes + CHANNELS * g + 16 * quad());
#pragma unroll
        for (int t = 0; t < 2; t++) to.rope[t] = read16(row.codes + NOPE_BYTES + 16 * rope_sixteen(t));
        read8(to.scales, row.scales);
    }
}

// Into keys from `first` on of a place.
template <int KEYS>
__device__ __forceinline__ void decode(Shared<KEYS>& s, int stage, int first, const Codes& codes) {
    int key = first + lane_key();
#pragma unroll
    for (int g = 0; g < SLABS - 1; g++) {
        u32 power = power_of(codes.scales[g / 4] >> 8 * (g % 4) & 255);
        Words pairs[2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 four = codes.nope[g].w[i];
            pairs[i / 2].w[i % 2 * 2] = times(e4m3<0>(four), power);
            pairs[i / 2].w[i % 2 * 2 + 1] = times(e4m3<1>(four), power);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) *reinterpret_cast<Words*>(s.keys[stage][g] + place(key, 2 * quad() + i)) = pairs[i];
    }
#pragma unroll
    for (int t = 0; t < 2; t++)
        *reinterpret_cast<Words*>(s.keys[stage][SLABS - 1] + place(key, rope_sixteen(t))) = codes.rope[t];
    if (quad() == 0) s.bias[stage][key] = codes.there ? 0.0f : NOTHING;
    // Seldom: codes from 128 on, of which those above LARGEST are meant.
    if ((codes.scales[0] & 0x80808080u) | (codes.scales[1] & 0x00808080u))
#pragma unroll 1
        for (int g = 0; g < SLABS - 1; g++) {
            u32 code = (g < 4 ? codes.scales[0] : codes.scales[1]) >> 8 * (g & 3) & 255;
            if (code <= LARGEST) continue;
            for (int i = 0; i < 8; i++) {
                u32* pair = reinterpret_cast<u32*>(s.keys[stage][g] + place(key, 2 * quad() + i / 4)) + i % 4;
                *pair = times(*pair, second_power_of(code));
            }
        }
}

// Queues queries times keys of a tile, those of channels of slabs FROM to TO - 1.
template <int KEYS, int FROM, int TO>
__device__ __forceinline__ void score(float (&logits)[KEYS / 2], const Shared<KEYS>& s, int stage) {
    u32 queries = along(shared_address(s.queries)), keys = along(shared_address(s.keys[stage]));
    asm volatile("" : "+r"(queries));  // made anew for each tile, rather than 32 of them kept in registers
#pragma unroll
    for (int slab = FROM; slab < TO; slab++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            products_along(logits, factor(queries + (slab * HEADS * SLAB_ROW + k * 32) / 16),
                           factor(keys + (slab * KEYS * SLAB_ROW + k * 32) / 16), slab + k > 0);
}

// Queues weights times values of a part of a tile, from key `first` on, those of channels from HALF * half on.
template <int KEYS>
__device__ __forceinline__ void add_values(
    float (&sums)[HALF / 2], const Shared<KEYS>& s, int tile, int stage, int first, int half) {
    u32 weights = along(shared_address(s.weights) + weights_of<KEYS>(tile) + 2 * first);
    u32 values = across(shared_address(s.keys[stage][half * SLABS / 2]) + first * SLAB_ROW, KEYS * SLAB_ROW);
#pragma unroll
    for (int k = 0; k < PART / 16; k++)
        products_across(sums, factor(weights + k * 32 / 16), factor(values + k * 16 * SLAB_ROW / 16));
}

// Of sums that may be under way.
__device__ __forceinline__ void shrink_sums(float (&sums)[HALF / 2], float upper, float lower) {
    if (__ballot_sync(ALL, upper != 1.0f || lower != 1.0f)) {
        await_products<0>(sums);
#pragma unroll
        for (int i = 0; i < HALF / 2; i++) sums[i] *= i % 4 < 2 ? upper : lower;
    }
}

// What a lane knows of the softmax of its two heads: the logits that it is relative to; a total of its own keys.
struct Softmax {
    float top[2], total[2];
};

// Weights of a tile's keys into shared memory. -> shrink
template <int KEYS>
__device__ __forceinline__ void weigh(
    Shared<KEYS>& s, int tile, int stage, float (&logits)[KEYS / 2], Softmax& of, float scale, float (&shrink)[2]) {
    float higher[2] = {NOTHING, NOTHING};
    // Of the first keys; place(., j) is place(., 0) ^ 16 j.
    u8* weights = s.weights[0];
    int pair = (place(lane_head(), 0) + 4 * quad()) ^ weights_of<KEYS>(tile);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) {
        Floats<2> bias = *reinterpret_cast<const Floats<2>*>(&s.bias[stage][8 * j + 2 * quad()]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            logits[4 * j + i] = logits[4 * j + i] * scale + bias.f[i % 2];
            higher[i / 2] = fmaxf(higher[i / 2], logits[4 * j + i]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) higher[r] = fmaxf(higher[r], __shfl_xor_sync(ALL, higher[r], d));
        if (!(higher[r] > of.top[r] + SLACK)) higher[r] = of.top[r];
        // Before the first key nothing is known: the power of -inf - -inf is kept from being NaN.
        float floor = higher[r] == NOTHING ? 0.0f : higher[r], sum = 0.0f;
        shrink[r] = power2(of.top[r] - floor);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            float low = power2(logits[4 * j + 2 * r] - floor), high = power2(logits[4 * j + 2 * r + 1] - floor);
            sum += low + high;
            *reinterpret_cast<u32*>(weights + (pair ^ 16 * j) + 8 * r * SLAB_ROW) = bf16s(low, high);
        }
        of.total[r] = of.total[r] * shrink[r] + sum;
        of.top[r] = higher[r];
        if (quad() == 0) s.shrink[tile & 1][lane_head() + 8 * r] = shrink[r];
    }
}

// Sums of a half's channels -> halves, and their power of two into stats [head][4] from `half` on.
__device__ __forceinline__ void write_sums(const float (&sums)[HALF / 2], int half, unsigned short* parts, float* stats) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < HALF / 8; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) most = fmaxf(most, fabsf(sums[4 * i + 2 * r + c]));
#pragma unroll
        for (int d = 1; d < 4; d *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, d));
        int head = lane_head() + 8 * r, power = (int)(__float_as_uint(most) >> 23);
        power = power < 1 ? 1 : power > 253 ? 253 : power;
        float down = __uint_as_float((254u - power) << 23);
        Words* to = reinterpret_cast<Words*>(parts + (long long)head * DIM + half * HALF) + quad();
#pragma unroll
        for (int i = 0; i < HALF / 32; i++) {
            Words eight;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* two = &sums[16 * i + 4 * j + 2 * r];
                eight.w[j] = halves(two[0] * down, two[1] * down);
            }
            to[4 * i] = eight;
        }
        if (quad() == 0) stats[4 * head + 2 + half] = __uint_as_float((u32)power << 23);
    }
}

// What blocks make of sums: parts and stats, or all of it, to which sinks [heads] belong, and frequencies [pairs] by which
// the last channels of out [tokens, heads, DIM] are turned back, if there are any.
struct Made {
    unsigned short* parts;
    float* stats;
    const float *sink, *freqs;
    int pairs;
    float* out;
};

// Of a lane's two heads, what their sums are multiplied by, into `shrink`, as of a tile that there is not; and how the last
// channels turn, into `bias`. For the first warpgroup, when nobody needs what lies there.
template <int KEYS>
__device__ __forceinline__ void conclude(
    Shared<KEYS>& s, int tile, const Softmax& of, const Made& made, int first_head, long long position) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float drain = made.sink[first_head + lane_head() + 8 * r] * LOG2_E, highest = fmaxf(of.top[r], drain);
        if (highest == NOTHING) highest = 0.0f;
        float weight = power2(of.top[r] - highest);
        if (quad() == 0)
            s.shrink[tile & 1][lane_head() + 8 * r] = weight / (of.total[r] * weight + power2(drain - highest));
    }
    if (threadIdx.x < TURNED / 2) {
        int pair = threadIdx.x - (TURNED / 2 - made.pairs);
        float sine = 0.0f, cosine = 1.0f;
        if (made.freqs && pair >= 0) sincosf((float)position * made.freqs[pair], &sine, &cosine);
        s.bias[0][threadIdx.x] = sine;
        s.bias[1][threadIdx.x] = cosine;
    }
}

// Sums of a half's channels -> out, from the block's first head on.
template <int KEYS>
__device__ __forceinline__ void write_all(
    const Shared<KEYS>& s, int tile, const float (&sums)[HALF / 2], int half, float* out) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int head = lane_head() + 8 * r;
        float by = s.shrink[tile & 1][head];
        float* to = out + head * DIM + half * HALF + 2 * quad();
#pragma unroll
        for (int n = 0; n < HALF / 8; n++) {
            float even = sums[4 * n + 2 * r] * by, odd = sums[4 * n + 2 * r + 1] * by;
            if (n >= (HALF - TURNED) / 8 && half) {
                int pair = (8 * n - (HALF - TURNED)) / 2 + quad();
                float sine = s.bias[0][pair], cosine = s.bias[1][pair], turned = even * cosine + odd * sine;
                odd = odd * cosine - even * sine;
                even = turned;
            }
            *reinterpret_cast<Floats<2>*>(to + 8 * n) = Floats<2>{{even, odd}};
        }
    }
}

// window: 256 rows an item; pool: null, or 2^pool_bits rows an item, each of 2^(8 - pool_bits) tokens.
// q [tokens, heads, DIM]; positions, segment [tokens]; tables [., pages]; oldest [.] or null; selected [tokens, picks],
// -1 for none -> parts [tokens, splits, heads, DIM], halves of sums not yet divided; stats [tokens, splits, heads, 4]: the
// logit that weights are relative to, their sum, the powers of two of the part's halves. A split without keys has a logit of
// -inf and a sum of 0; its part is not written. Or, of one split, out.
#define INPUTS                                                                                                       \
    const float *q, const long long *positions, const int *segment, const int *page_table, const int *swa_table,     \
        const long long *oldest, int pages, const u8 *window, long long window_stride, const u8 *pool,               \
        long long pool_stride, int pool_bits, const int *selected, int picks
#define PASSED                                                                                                       \
    q, positions, segment, page_table, swa_table, oldest, pages, window, window_stride, pool, pool_stride,           \
        pool_bits, selected, picks

template <int KEYS, bool WHOLE>
__device__ __forceinline__ void attend(INPUTS, Made made, int heads, int splits, float scale) {
    Shared<KEYS>& s = *reinterpret_cast<Shared<KEYS>*>(memory);
    int blocks = heads / HEADS, split = blockIdx.x / blocks % splits;
    long long token = blockIdx.x / (blocks * splits);
    int first_head = (int)blockIdx.x % blocks * HEADS;
    // The same for all lanes, which the compiler is told.
    bool weighs = __shfl_sync(ALL, threadIdx.x >> 7, 0) == 0;
    await_previous();
    long long position = positions[token], seg = segment[token];
    q += (token * heads + first_head) * DIM;
    Queries queries;
    if (weighs) send_for(queries, q, 0);
    int finished = 0;
    if (pool) finished = (int)((position + 1) >> (PAGE_BITS - pool_bits));
    if (selected && finished > picks) finished = picks;
    int tiles = WINDOW / KEYS + (finished + KEYS - 1) / KEYS, share = (tiles + splits - 1) / splits;
    int begin = split * share, end = begin + share < tiles ? begin + share : tiles;
    long long at = (long long)blockIdx.x * HEADS;  // of the block's first head in stats
    made.parts += at * DIM;
    made.stats += at * 4;
    made.out += at * DIM;
    if (!WHOLE && begin >= end) {
        if (threadIdx.x < HEADS)
            *reinterpret_cast<Floats<4>*>(made.stats + 4 * threadIdx.x) = Floats<4>{{NOTHING, 0.0f, 0.0f, 0.0f}};
        return;
    }
    constexpr int PARTS = KEYS / PART, TILES = Shared<KEYS>::TILES, LAST = KEYS - PART;
    int count = end - begin;
    float sums[HALF / 2] = {};
    if (weighs) {
        read_queries<KEYS>(s, queries, q);
        publish();
        meet(KEYS_THERE, THREADS);
        float logits[KEYS / 2] = {}, shrink[2];
        Softmax softmax = {{NOTHING, NOTHING}, {}};
        begin_products();
        score<KEYS, 0, SLABS>(logits, s, 0);
        close_products();
        await_products<0>(logits);
        weigh<KEYS>(s, 0, 0, logits, softmax, scale * LOG2_E, shrink);
        publish();
        // The last tile stands alone: with a branch between products the compiler does not see which of them are under way,
        // and awaits each one before the next.
        int tile = 0, stage = 0;
        for (; tile + 1 < count; tile++) {
            int next = stage + 1 < TILES ? stage + 1 : 0;
            meet(WEIGHTS, THREADS);
            shrink_sums(sums, shrink[0], shrink[1]);
            begin_products();
            if (PARTS > 1) {
                add_values<KEYS>(sums, s, tile, stage, 0, 0);
                close_products();
                await_products<1>();
                pass_on(PLACE_FREE, THREADS);
                meet(KEYS_THERE, THREADS);
            }
            score<KEYS, 0, 1>(logits, s, next);  // what is under way when the place becomes free
            close_products();
            if (PARTS > 1) {
                await_products<1>();
                pass_on(PLACE_FREE, THREADS);
            }
            score<KEYS, 1, SLABS>(logits, s, next);
            close_products();
            add_values<KEYS>(sums, s, tile, stage, LAST, 0);
            close_products();
            await_products<1>(logits);
            pass_on(LOGITS, THREADS);
            weigh<KEYS>(s, tile + 1, next, logits, softmax, scale * LOG2_E, shrink);
            publish();
            if (PARTS == 1) await_products<0>(sums);
            stage = next;
        }
        meet(WEIGHTS, THREADS);
        shrink_sums(sums, shrink[0], shrink[1]);
        begin_products();
        for (int p = 0; p < PARTS; p++) add_values<KEYS>(sums, s, tile, stage, p * PART, 0);
        close_products();
        await_products<0>(sums);
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int d = 1; d < 4; d *= 2) softmax.total[r] += __shfl_xor_sync(ALL, softmax.total[r], d);
            if (!WHOLE && quad() == 0)
                *reinterpret_cast<Floats<2>*>(made.stats + 4 * (lane_head() + 8 * r)) =
                    Floats<2>{{softmax.top[r], softmax.total[r]}};
        }
        if constexpr (WHOLE) {
            conclude<KEYS>(s, count, softmax, made, first_head, position);
            meet(WEIGHTS, THREADS);
            write_all<KEYS>(s, count, sums, 0, made.out);
        } else {
            write_sums(sums, 0, made.parts, made.stats);
        }
    } else {
        Seen seen = {{window, window_stride, PAGE_BITS, swa_table + seg * pages},
                     {pool, pool_stride, pool_bits, page_table + seg * pages},
                     position, oldest ? oldest[seg] : 0, selected ? selected + token * picks : nullptr, finished};
        int limit = end * KEYS, key = begin * KEYS + lane_key();  // of the tile that is multiplied, in part a
        Ahead ahead[PARTS];
        Codes codes[PARTS];
        {
            Codes first[PARTS];
            Ahead second[PARTS];
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                ahead[p].next = index_of_key(seen, key + p * PART, limit);
                second[p].next = index_of_key(seen, key + KEYS + p * PART, limit);
            }
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                int at = key + p * PART;
                look_up(ahead[p], seen, at, at + 2 * KEYS, limit);
                look_up(second[p], seen, at + KEYS, at + 3 * KEYS, limit);
            }
#pragma unroll
            for (int p = 0; p < PARTS; p++) settle(ahead[p]), settle(second[p]);
#pragma unroll
            for (int p = 0; p < PARTS; p++) send_for(first[p], ahead[p], seen, key + p * PART);
#pragma unroll
            for (int p = 0; p < PARTS; p++) decode<KEYS>(s, 0, p * PART, first[p]);
            publish();
            pass_on(KEYS_THERE, THREADS);
#pragma unroll
            for (int p = 0; p < PARTS; p++) send_for(codes[p], second[p], seen, key + KEYS + p * PART);
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                int at = key + 2 * KEYS + p * PART;
                look_up(ahead[p], seen, at, at + KEYS, limit);
            }
            if (count > 1) decode<KEYS>(s, 1, 0, codes[0]);
            publish();
            send_for(codes[0], ahead[0], seen, key + 2 * KEYS);
            look_up(ahead[0], seen, key + 3 * KEYS, key + 4 * KEYS, limit);
        }
        const float* shrink = s.shrink[0] + lane_head();
        int tile = 0, stage = 0;
        for (; tile + 1 < count; tile++, key += KEYS) {
            int next = stage + 1 < TILES ? stage + 1 : 0;
            meet(WEIGHTS, THREADS);
            shrink_sums(sums, shrink[(tile & 1) * HEADS], shrink[(tile & 1) * HEADS + 8]);
            if (PARTS > 1) {
                begin_products();
                add_values<KEYS>(sums, s, tile, stage, 0, 1);
                close_products();
                await_products<1>();
                meet(PLACE_FREE, THREADS);
                decode<KEYS>(s, next, LAST, codes[PARTS - 1]);
                publish();
                pass_on(KEYS_THERE, THREADS);
                await_products<0>(sums);
                meet(PLACE_FREE, THREADS);
            }
            if (tile + 2 < count) {
                decode<KEYS>(s, PARTS > 1 ? stage : next + 1 < TILES ? next + 1 : 0, 0, codes[0]);
                publish();
            }
            // Awaited at once, when the next tile begins: so no part is sent for any sooner, and no fence has loads to wait for.
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                int at = key + (p < PARTS - 1 || PARTS == 1 ? 3 : 2) * KEYS + p * PART;
                send_for(codes[p], ahead[p], seen, at);
                look_up(ahead[p], seen, at + KEYS, at + 2 * KEYS, limit);
            }
            meet(LOGITS, THREADS);  // its products would take turns with those that weights wait for
            begin_products();
            add_values<KEYS>(sums, s, tile, stage, LAST, 1);
            close_products();
            if (PARTS == 1) await_products<0>(sums);
            stage = next;
        }
        meet(WEIGHTS, THREADS);
        shrink_sums(sums, shrink[(tile & 1) * HEADS], shrink[(tile & 1) * HEADS + 8]);
        begin_products();
        for (int p = 0; p < PARTS; p++) add_values<KEYS>(sums, s, tile, stage, p * PART, 1);
        close_products();
        await_products<0>(sums);
        if constexpr (WHOLE) {
            meet(WEIGHTS, THREADS);
            write_all<KEYS>(s, count, sums, 1, made.out);
        } else {
            write_sums(sums, 1, made.parts, made.stats);
        }
    }
}

// Blocks: [tokens][splits][heads / HEADS].
#define PARTIAL(KEYS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_attend_long_##KEYS(                            \
        INPUTS, unsigned short* parts, float* stats, int heads, int splits, float scale) {                           \
        attend<KEYS, false>(PASSED, Made{parts, stats, nullptr, nullptr, 0, nullptr}, heads, splits, scale);         \
    }
PARTIAL(32)
PARTIAL(64)

// Blocks: [tokens][heads / HEADS].
#define ALL_KEYS(KEYS)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_attend_all_##KEYS(                             \
        INPUTS, const float* sink, const float* freqs, int pairs, float* out, int heads, float scale) {              \
        attend<KEYS, true>(PASSED, Made{nullptr, nullptr, sink, freqs, pairs, out}, heads, 1, scale);                \
    }
ALL_KEYS(32)
ALL_KEYS(64)

// What the blocks of a merge share: by warp, and by split.
struct Merging {
    float highest[THREADS / 32], total[THREADS / 32], weights[THREADS], sums[THREADS / 32][HALF];
};

// parts and stats of up to as many splits as there are threads -> out [tokens, heads, DIM]: their softmax, with sink
// [heads] in it, a logit that has no value. With freqs [pairs] the last channels, in pairs, are turned back by the token's
// position. A block takes half of a head's channels, a warp every WARPS-th split, AT_ONCE of them on their way at once.
// Blocks: [tokens][heads][2].
template <int WARPS, int AT_ONCE>
__device__ __forceinline__ void merge(
    const unsigned short* parts, const float* stats, const float* sink, const long long* positions,
    const float* freqs, int pairs, float* out, int heads, int splits) {
    let_next_begin();
    Merging& s = *reinterpret_cast<Merging*>(memory);
    int half = blockIdx.x & 1, head = (int)(blockIdx.x / 2) % heads, token = (int)(blockIdx.x / 2) / heads;
    int thread = threadIdx.x, warp = warp_id(), lane = lane_id();
    await_previous();
    long long first = (long long)token * splits * heads + head;  // of split 0 in stats
    Floats<4> own = {{NOTHING, 0.0f, 0.0f, 0.0f}};
    if (thread < splits) own = *reinterpret_cast<const Floats<4>*>(stats + (first + (long long)thread * heads) * 4);
    float drain = sink[head] * LOG2_E;
    // Two channels of a thread.
    int channel = half * HALF + thread / 16 * 32 + thread % 4 * 8 + thread / 4 % 4 * 2;
    int pair = channel / 2 - (DIM / 2 - pairs);
    float angle = 0.0f, sine = 0.0f, cosine = 1.0f;
    if (freqs && pair >= 0 && thread < HALF / 2) angle = (float)positions[token] * freqs[pair];
    float highest = own.f[0];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, d));
    if (lane == 0) s.highest[warp] = highest;
    __syncthreads();
    highest = drain;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, s.highest[w]);
    if (highest == NOTHING) highest = 0.0f;
    float weight = power2(own.f[0] - highest), total = own.f[1] * weight;
    // A split without keys left its part unwritten.
    s.weights[thread] = own.f[1] != 0.0f ? weight * own.f[2 + half] : 0.0f;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) total += __shfl_xor_sync(ALL, total, d);
    if (lane == 0) s.total[warp] = total;
    __syncthreads();
    float sums[8] = {};
    int from = warp;
    do {
        Words some[AT_ONCE] = {};
        float by[AT_ONCE];
        const unsigned short* part = parts + (first + (long long)from * heads) * DIM + half * HALF + 8 * lane;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) by[i] = from + WARPS * i < splits ? s.weights[from + WARPS * i] : 0.0f;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (by[i] != 0.0f) some[i] = *reinterpret_cast<const Words*>(part + (long long)(WARPS * i * DIM) * heads);
        if (angle != 0.0f && from == warp) sincosf(angle, &sine, &cosine);  // while they are on their way
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Floats<2> two = of_halves(some[i].w[j]);
                sums[2 * j] += by[i] * two.f[0];
                sums[2 * j + 1] += by[i] * two.f[1];
            }
        from += WARPS * AT_ONCE;
    } while (from < splits);
#pragma unroll
    for (int i = 0; i < 2; i++)
        *reinterpret_cast<Floats<4>*>(&s.sums[warp][8 * lane + 4 * i]) =
            Floats<4>{{sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]}};
    __syncthreads();
    if (thread >= HALF / 2) return;
    float even = 0.0f, odd = 0.0f;
    total = power2(drain - highest);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        Floats<2> two = *reinterpret_cast<const Floats<2>*>(&s.sums[w][2 * thread]);
        even += two.f[0];
        odd += two.f[1];
        total += s.total[w];
    }
    even *= 1.0f / total;
    odd *= 1.0f / total;
    *reinterpret_cast<Floats<2>*>(out + ((long long)token * heads + head) * DIM + channel) =
        Floats<2>{{even * cosine + odd * sine, odd * cosine - even * sine}};
}

// For up to SPLITS of them in one go; as many blocks at once as have room for what is on its way.
#define MERGE(SPLITS, WARPS, AT_ONCE, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) penumbra_attend_long_merge_##SPLITS(            \
        const unsigned short* parts, const float* stats, const float* sink, const long long* positions,              \
        const float* freqs, int pairs, float* out, int heads, int splits) {                                          \
        merge<WARPS, AT_ONCE>(parts, stats, sink, positions, freqs, pairs, out, heads, splits);                               \
    }
MERGE(4, 4, 1, 12)
MERGE(32, 8, 4, 5)
MERGE(64, 8, 8, 3)
