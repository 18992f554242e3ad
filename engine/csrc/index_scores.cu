// The lightning indexer's scores: sum over heads of weight * relu(query . key), times the key's scale.
//
// Neighbouring tokens of a request are a group of up to four, which reads the request's keys once. The pages of all
// groups stand in one row, of which each block takes an equal part: it counts them itself, from positions, so that no
// kernel has to plan and pages that nobody sees cost nothing. In a block
//   two warps      send for pages of keys, and for a group's queries, as far ahead as there is room;
//   warpgroups     take turns at units: 64 keys times the heads of one token or two. A unit is four FP8 products of
//                  m64nNk32, keys as rows and heads as columns, and then relu, weights and the sum over heads in
//                  registers, while the products of the next warpgroup's unit run.
// A turn is handed on as soon as products are queued, so that tensor cores serve units one after another and
// warpgroups do not all wait for them, and then for the rest, at the same time.
//
// A thread sums its columns, and lanes their sums, in an order that neither group nor unit changes: a token's scores
// are the same bits in whatever company.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h).

#include "warpgroup.cuh"

#define PAGE 64  // keys
#define DIM 128  // bytes of a key, and of a head's query
#define HEADS 64
#define TILE (PAGE * DIM)  // bytes of a page's keys, and of a token's queries
#define SCALES (4 * PAGE)  // bytes; those of a token's weights are as many
#define MOST_TOKENS 64
#define MOST_STAGES 24  // a multiple of SENDERS, like any number of them: then one sender alone fills a stage
#define SENDERS 4  // warps: a warpgroup, for registers are given and taken by warpgroups

#define INFINITE __uint_as_float(0x7f800000u)

// That all lanes have the same value is something that the compiler can not know, and uniform registers are to spare.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(ALL, value, 0); }

#ifndef ON_CPU
// An address that the compiler knows nothing about, lest it computes each of its neighbours from the beginning.
__device__ __forceinline__ const u8* settled(const u8* at) {
    asm volatile("" : "+l"(at));
    return at;
}
__device__ __forceinline__ void arrive(u64* barrier, int times) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0], %1;}"
        :: "r"(shared_address(barrier)), "r"(times) : "memory");
}
// As meet(), for those who only say that they were there.
__device__ __forceinline__ void pass_on(int name, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" :: "r"(name), "r"(threads) : "memory");
}

// All warps of a warpgroup: how many registers a thread has from here on.
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}
#endif

// Up to four neighbouring tokens of a request, under the first one's number; its pages have numbers [begin, end).
struct Group {
    int begin, end, count, segment;
};

struct Fixed {
    u64 full[MOST_STAGES], empty[MOST_STAGES];  // of pages
    u64 asked[2], answered[2];                  // of queries: they are there; no product needs them any more
    Group groups[MOST_TOKENS];
    int sees[MOST_TOKENS];  // keys a token needs scores of
    float tops[4][2][2][4];  // [warpgroup][this unit's and the last one's][token][warp]
    int total, first_group;
};

// Dynamic shared memory. Everything but the factors' tiles is small.
struct Memory {
    u8 *keys, *queries, *scales, *weights;
    Fixed* fixed;
};
__device__ __forceinline__ Memory laid_out(u8* memory, int together, int stages) {
    Memory m;
    m.keys = memory;
    m.queries = m.keys + stages * TILE;
    m.scales = m.queries + 2 * together * TILE;
    m.weights = m.scales + stages * SCALES;
    m.fixed = reinterpret_cast<Fixed*>(m.weights + 2 * together * SCALES);
    return m;
}

#define PARAMETERS                                                                                                   \
    const u8 *codes, const float *weights, const long long *positions, const int *segment, const int *page_table,    \
        int pages, const u8 *pool, long long item_stride, float *scores, float *maxima, int tokens, int k,           \
        int together, int stages
#define PASSED                                                                                                       \
    codes, weights, positions, segment, page_table, pages, pool, item_stride, scores, maxima, tokens, k, together,   \
        stages

// One warp: the groups of the step, their pages, and the group in which the block's first page lies.
__device__ __forceinline__ void find_groups(
    Fixed& s, const long long* positions, const int* segment, int pages, int tokens, int k, int together, u32 block,
    u32 blocks) {
    int segments[2], reach[2], counts[2], ends[2];
    u64 starts = 0, leads = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int token = 32 * h + lane_id();
        bool there = token < tokens;
        segments[h] = there ? segment[token] : -1;
        long long finished = there ? (positions[token] + 1) >> 2 : 0;
        s.sees[token] = segments[h] >= 0 && finished > k ? (int)finished : 0;  // what is chosen whole needs no scores
    }
    if (tokens <= together) {  // one group, as a rule, and then soon found
        int first = uniform(segments[0]);
        u32 others = __ballot_sync(ALL, lane_id() < tokens && segments[0] != first);
        int most = (int)__reduce_max_sync(ALL, (u32)s.sees[lane_id()]), end = (most + PAGE - 1) / PAGE;
        if (others == 0) {
            if (lane_id() == 0) {
                s.total = end < pages ? end : pages;
                s.first_group = 0;
                s.groups[0] = Group{0, s.total, tokens, first};
            }
            return;
        }
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int before = __shfl_up_sync(ALL, segments[h], 1), last = __shfl_sync(ALL, segments[0], 31);
        bool follows = lane_id() ? before == segments[h] : h && last == segments[h];
        starts |= (u64)__ballot_sync(ALL, !follows) << 32 * h;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int token = 32 * h + lane_id();
        int start = 63 - __clzll((long long)(starts << (63 - token) >> (63 - token)));
        leads |= (u64)__ballot_sync(ALL, ((token - start) & (together - 1)) == 0) << 32 * h;
    }
    int total = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int token = 32 * h + lane_id();
        u64 later = leads >> token >> 1;
        counts[h] = later ? __ffsll((long long)later) : MOST_TOKENS - token;
        reach[h] = 0;
        if (leads >> token & 1)
            for (int i = 0; i < counts[h] && i < together; i++)
                reach[h] = s.sees[token + i] > reach[h] ? s.sees[token + i] : reach[h];
        reach[h] = (reach[h] + PAGE - 1) / PAGE;
        reach[h] = reach[h] < pages ? reach[h] : pages;
        ends[h] = reach[h];
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(ALL, ends[h], d);
            if (lane_id() >= d) ends[h] += other;
        }
        ends[h] += total;
        total = __shfl_sync(ALL, ends[h], 31);
    }
    int first = (int)((long long)total * block / blocks);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int token = 32 * h + lane_id(), begin = ends[h] - reach[h];
        s.groups[token] = Group{begin, ends[h], counts[h], segments[h]};
        if (begin <= first && first < ends[h]) s.first_group = token;
    }
    if (lane_id() == 0) s.total = total;
}

// Where a lane's 16 bytes of each 512 go: rows 0 to 3 of eight, and rows 4 to 7.
struct Places {
    int upper, lower;
};
template <int BYTES> __device__ __forceinline__ void fetch_rows(u8* to, const u8* from, Places places) {
    from = settled(from + 16 * lane_id());
    u8 *upper = to + places.upper, *lower = to + places.lower;
#pragma unroll
    for (int i = 0; i < BYTES; i += 1024) {
        fetch16(upper + i, from + i);
        fetch16(lower + i, from + i + 512);
    }
}

// One of the SENDERS warps: every SENDERS-th of pages [first, last). The first one sends for queries too, before it turns
// to a page those of all groups that begin up to there.
__device__ __forceinline__ void send(const Memory& m, int first, int last, int sender, PARAMETERS) {
    Fixed& s = *m.fixed;
    int row = lane_id() / 8, sixteen = lane_id() % 8, bytes = 16 * lane_id();
    Places places = {place(row, sixteen), place(row + 4, sixteen)};
    int owner = s.first_group, item = 0, stage = sender;
    u32 parity = 1;
    int asked = 0, group = uniform(owner), due = sender == 0 ? first : last;  // groups so far, the next, its first page
#pragma unroll 1
    for (int page = first + sender, turn = 0;; page += SENDERS, turn++) {
#pragma unroll 1
        while (due <= page && due < last) {
            int side = asked & 1, count = uniform(s.groups[group].count);
            await(&s.answered[side], (asked >> 1 & 1) ^ 1);
#pragma unroll 1
            for (int i = 0; i < TILE * count; i += 1024)
                fetch_rows<1024>(m.queries + side * together * TILE + i, codes + (long long)group * TILE + i, places);
#pragma unroll 1
            for (int i = bytes; i < SCALES * count; i += 512)
                fetch16(m.weights + side * together * SCALES + i, weights + group * HEADS + i / 4);
            arrive_when_there(&s.asked[side]);
            asked++;
            due = uniform(s.groups[group].end);
            if (due < last) do group += uniform(s.groups[group].count); while (uniform(s.groups[group].end) <= due);
        }
        if (page >= last) return;
        if (turn % 32 == 0) {  // a lane looks up one page of the next 32
            int own = page + SENDERS * lane_id();
            if (own < last) {
                while (own >= s.groups[owner].end) owner += s.groups[owner].count;
                item = page_table[(long long)s.groups[owner].segment * pages + own - s.groups[owner].begin];
            }
        }
        const u8* from = pool + __shfl_sync(ALL, item, turn % 32) * item_stride;
        await(&s.empty[stage], parity);
        fetch_rows<TILE>(m.keys + stage * TILE, from, places);
        if (bytes < SCALES) fetch16(m.scales + stage * SCALES + bytes, settled(from + bytes) + TILE);
        arrive_when_there(&s.full[stage]);
        stage += SENDERS;
        if (stage >= stages) {
            stage = sender;
            parity ^= 1;
        }
    }
}

// A warpgroup's units of a group: every GROUPS-th one, and so of pages that lie `step` apart, always the same tokens.
struct Share {
    int rounds;         // how many
    bool ends;          // the last of them is the last of the block
    int step;
    int page, sent;     // of the first: its page in the request, and how many the block took before it
    int row, half;      // first token of its units, in the step and among pairs of the group
};

template <int GROUPS, int N> __device__ __forceinline__ void take(
    const Memory& m, const Share& share, int side, int group, float* scores, float* maxima, int pages, int stages,
    int together) {
    Fixed& s = *m.fixed;
    int warp = uniform(warp_id() % 4), quad = lane_id() % 4;
    float halved[N][16];
#pragma unroll
    for (int t = 0; t < N; t++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u8* weights = m.weights + (side * together + 2 * share.half + t) * SCALES;
            Floats<2> two = reinterpret_cast<const Floats<2>*>(weights)[4 * j + quad];
            halved[t][2 * j] = 0.5f * two.f[0];
            halved[t][2 * j + 1] = 0.5f * two.f[1];
        }
    // Which sum a lane is left with: of two tokens two keys each, or of one token two keys, two lanes each.
    int token = N == 2 ? quad / 2 : 0, key = 16 * warp + lane_id() / 4 + 8 * (N == 2 ? quad % 2 : quad / 2);
    bool stores = N == 2 || quad % 2 == 0;
    int seen = s.sees[share.row + token] - share.page * PAGE;  // keys, from this page on
    int at = ((share.row + token) * pages + share.page) * PAGE + key;
    int step = share.step, stage = share.sent % stages;
    u32 parity = share.sent / stages & 1;
    u32 first_keys = shared_address(m.keys) / 16;
    u32 queries = shared_address(m.queries) / 16 + (side * together + 2 * share.half) * (TILE / 16);
    float* tops = s.tops[group][0][token];
    // The page before this one: all warps have left their maxima of it. Lanes of a token write the same.
    auto write_maximum = [&](int round) {
        Floats<4> top = *reinterpret_cast<const Floats<4>*>(tops + 8 * (round & 1));
        if (seen + step * PAGE > 0)
            maxima[(at - step * PAGE) / PAGE] = fmaxf(fmaxf(top.f[0], top.f[1]), fmaxf(top.f[2], top.f[3]));
    };
    for (int round = 0; round < share.rounds; round++) {
        await(&s.full[stage], parity);
        publish();
        meet(1 + group, 256);
        float sums[32 * N];
        u32 keys = first_keys + stage * (TILE / 16);
        begin_products();
#pragma unroll
        for (int i = 0; i < DIM / 32; i++)
            products_of_e4m3(sums, factor(keys + 2 * i), factor(queries + 2 * i), i > 0);
        close_products();
        if (!share.ends || round + 1 < share.rounds) pass_on(1 + (group + 1) % GROUPS, 256);
        if (warp == group && round) write_maximum(round - 1);  // another quarter of the multiprocessor for each
        float scale = reinterpret_cast<const float*>(m.scales + stage * SCALES)[key];
        await_products<0>(sums);
        __syncwarp();
        if (lane_id() == 0) arrive(&s.empty[stage], 2 * step / GROUPS);

        float values[2 * N];
#pragma unroll
        for (int t = 0; t < N; t++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float even = 0.0f, odd = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float a = sums[32 * t + 4 * j + 2 * r], b = sums[32 * t + 4 * j + 2 * r + 1];
                    // Twice a relu that keeps a NaN, which a maximum would lose.
                    even = fmaf(halved[t][2 * j], a + fabsf(a), even);
                    odd = fmaf(halved[t][2 * j + 1], b + fabsf(b), odd);
                }
                values[2 * t + r] = even + odd;
            }
        fold<2 * N, 2>(values);
        float score = values[0] * scale;
        if (score != score) score = INFINITE;
        if (key >= seen) score = -INFINITE;
        if (stores && seen > 0) scores[at] = score;
#pragma unroll
        for (int d = 1; d < 32; d *= 2)
            if (d != (N == 2 ? 2 : 1)) score = fmaxf(score, __shfl_xor_sync(ALL, score, d));
        tops[8 * (round & 1) + warp] = score;  // those of a token write the same
        seen -= step * PAGE;
        at += step * PAGE;
        stage += step;
        if (stage >= stages) {
            stage -= stages;
            parity ^= 1;
        }
    }
    meet(1 + GROUPS + group, 128);
    if (warp == group && share.rounds > 0) write_maximum(share.rounds - 1);
}

template <int GROUPS> __device__ __forceinline__ void score(u8* memory, PARAMETERS) {
    // A step of more tokens is several, each with blocks of its own.
    u32 steps = (tokens + MOST_TOKENS - 1) / MOST_TOKENS, blocks = gridDim.x / steps, block = blockIdx.x % blocks;
    int before_these = (int)(blockIdx.x / blocks) * MOST_TOKENS;
    codes += (long long)before_these * TILE;
    weights += before_these * HEADS;
    positions += before_these;
    segment += before_these;
    scores += (long long)before_these * pages * PAGE;
    maxima += (long long)before_these * pages;
    tokens = tokens - before_these < MOST_TOKENS ? tokens - before_these : MOST_TOKENS;
    Memory m = laid_out(memory, together, stages);
    Fixed& s = *m.fixed;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            make_barrier(&s.full[i], 32);
            make_barrier(&s.empty[i], 8);  // of four warps, twice
        }
        for (int i = 0; i < 2; i++) {
            make_barrier(&s.asked[i], 32);
            make_barrier(&s.answered[i], 4 * GROUPS);
        }
    }
    await_previous();
    if (warp_id() == 4 * GROUPS) find_groups(s, positions, segment, pages, tokens, k, together, block, blocks);
    __syncthreads();
    int total = uniform(s.total);
    int first = (int)((long long)total * block / blocks), last = (int)((long long)total * (block + 1) / blocks);
    if (first >= last) return;
    if (warp_id() >= 4 * GROUPS) {
        if (GROUPS == 4) fewer_registers<32>();
        send(m, first, last, uniform(warp_id() - 4 * GROUPS), PASSED);
        return;
    }
    if (GROUPS == 4) more_registers<112>();
    int group = uniform(warp_id() / 4), turn = 0, before = 0;  // groups and units
    if (group == GROUPS - 1) pass_on(1, 256);  // the first turn
    for (int page = first, token = uniform(s.first_group); page < last;) {
        int end = uniform(s.groups[token].end), count = uniform(s.groups[token].count);
        if (page < end) {
            int begin = uniform(s.groups[token].begin), side = turn & 1;
            if (last < end) end = last;
            // A page of more than two tokens is two units.
            int halves = count > 2 ? 2 : 1, units = (end - page) * halves, x = (group - before) & (GROUPS - 1);
            Share share;
            share.rounds = (units - x + GROUPS - 1) / GROUPS;
            share.ends = end == last && x + GROUPS * (share.rounds - 1) == units - 1;
            share.step = GROUPS / halves;
            share.half = x % halves;
            share.page = page - begin + x / halves;
            share.sent = page - first + x / halves;
            share.row = token + 2 * share.half;
            await(&s.asked[side], turn >> 1 & 1);
            if (count - 2 * share.half > 1)
                take<GROUPS, 2>(m, share, side, group, scores, maxima, pages, stages, together);
            else
                take<GROUPS, 1>(m, share, side, group, scores, maxima, pages, stages, together);
            if (lane_id() == 0) arrive(&s.answered[side], 1);
            turn++;
            before += units;
            page = end;
        }
        token += count;
    }
}

// Blocks: of each MOST_TOKENS tokens equally many, as many as there are multiprocessors, or fewer; `together` is 1, 2 or 4,
// `stages` a multiple of SENDERS.
// codes [tokens, HEADS, DIM] and weights [tokens, HEADS]; positions, segment [tokens]; page_table [., pages]; pool:
// item_stride bytes from page to page, TILE of keys and then SCALES of scales -> scores [tokens, pages * PAGE], maxima
// [tokens, pages]. Scores of keys that a token does not see are -inf, and those of pages of which it sees none, like
// all of a token that sees k keys or fewer, are not written.
extern "C" __global__ void __launch_bounds__(256 + 32 * SENDERS, 1) penumbra_index_scores_2(PARAMETERS) {
    extern __shared__ __align__(1024) u8 memory[];
    score<2>(memory, PASSED);
}
extern "C" __global__ void __launch_bounds__(512 + 32 * SENDERS, 1) penumbra_index_scores_4(PARAMETERS) {
    extern __shared__ __align__(1024) u8 memory[];
    score<4>(memory, PASSED);
}
