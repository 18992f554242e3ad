// Lightning TopK: the k largest of a row's scores, exactly, ties to the lower place, in ascending order of place.
//
// One block takes one row. The time goes into steps that wait for each other, so there are few of them:
//   bound   At least k scores reach the k-th largest of the maxima of any k or more groups of scores. What lies below
//           (an edge just under) it is out. In a long row the groups are tiles of 64, whose maxima are known; a row of
//           middling length is read whole, and each thread makes up to four groups. A short row has no bound.
//   sift    The unit is a quad, four neighbouring scores. Every warp lists those of its quads, in order of place, of
//           which a score reaches the edge. From here on they are about as many as there are threads.
//   choose  A histogram of 2,048 bins between the edge and the largest score. The bin with the k-th largest holds a few
//           keys, which are compared with one another; while it holds many it is split further.
//   emit    What lies above the k-th largest, and as many of its equals as there is room for, in order.
// If too many quads of a warp reach the edge for its list, all of them count: slower, and as exact. So it is with rows
// that none of this fits, which every step reads from memory.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "warp.cuh"

typedef unsigned short u16;

#define TILE 64           // scores whose maximum is known
#define MOST_TILES 4096   // that a bound is found from
#define MOST_QUADS 16384  // of a row that is read whole for one
#define BINS 2048
#define LISTED 8192  // quads, of all warps together
#define FEW 64       // keys that are compared with one another

#ifndef ON_CPU
// What is not a number counts as the largest.
__device__ __forceinline__ float larger(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
// The value and that of the d-th lower lane, if there is one.
template <unsigned d> __device__ __forceinline__ u32 and_lower(u32 value) {
    u32 sum;
    asm volatile(
        "{ .reg .pred there; shfl.sync.up.b32 %0|there, %1, %2, 0, 0xffffffff; @there add.u32 %0, %0, %1; }"
        : "=&r"(sum) : "r"(value), "n"(d));
    return sum;
}
// No -0, and all that is not a number alike.
__device__ __forceinline__ float plain(float x) {
    float y;
    asm("add.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}
// The pointer, in two registers, and not what it was computed from.
template <typename T> __device__ __forceinline__ T* computed(T* pointer) {
    asm volatile("" : "+l"(pointer));
    __builtin_assume(__isGlobal(pointer));
    return pointer;
}
#endif

template <int N> struct __align__(4 * N < 16 ? 4 * N : 16) Counts {
    u32 c[N];
};
// Keys of [low, high], of which there are `size`; the rank-th largest of these, from 1, is wanted.
struct __align__(16) Bin {
    u32 low, high;
    int rank, size;
};
// All above `edge` are chosen and the first `equals` equal to it.
struct __align__(8) Choice {
    u32 edge;
    int equals;
};

struct Shared {
    u32 histogram[BINS];  // empty but between a count and find_bin
    union {
        float tops[MOST_QUADS];  // the largest of each quad, in a row that is read whole
        u16 tiles[MOST_TILES];   // that reach the edge, in a long row
    };
    u16 quads[LISTED];
    u32 few[FEW], number_of_few;
    u32 low[32], high[32];
    int counts[32], equals[32];
    Bin bin;
    Choice choice;
};

// Larger scores have larger keys, and none has 0. Zeros are equal; a NaN is as large as infinity, so that it shows.
__device__ __forceinline__ u32 key_of(float score) {
    u32 bits = __float_as_uint(plain(score)), key = bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
    return key < 0xff800000u ? key : 0xff800000u;
}
__device__ __forceinline__ float score_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ float largest(const Floats<4>& x) { return larger(larger(x.f[0], x.f[1]), larger(x.f[2], x.f[3])); }
__device__ __forceinline__ Floats<4> quad_at(const float* from) { return *reinterpret_cast<const Floats<4>*>(from); }
__device__ __forceinline__ int within(int value, int most) { return value < 0 ? 0 : value < most ? value : most; }

// The sum over lower lanes.
__device__ __forceinline__ u32 lanes_before(u32 value) {
    u32 sum = and_lower<1>(value);
    sum = and_lower<2>(sum);
    sum = and_lower<4>(sum);
    sum = and_lower<8>(sum);
    return and_lower<16>(sum) - value;
}

// The sum over lower threads. One barrier, behind which `counts` holds the sums of warps.
__device__ __forceinline__ int threads_before(Shared& s, int value) {
    int before = (int)lanes_before(value);
    if (lane_id() == 31) s.counts[warp_id()] = before + value;
    __syncthreads();
    return before + (int)__reduce_add_sync(ALL, lane_id() < warp_id() ? (u32)s.counts[lane_id()] : 0);
}

// The least and the greatest over all threads. One barrier.
template <int THREADS> __device__ __forceinline__ void range_of(Shared& s, u32& low, u32& high) {
    low = __reduce_min_sync(ALL, low);
    high = __reduce_max_sync(ALL, high);
    if (lane_id() == 0) { s.low[warp_id()] = low; s.high[warp_id()] = high; }
    __syncthreads();
    low = __reduce_min_sync(ALL, s.low[lane_id() % (THREADS / 32)]);
    high = __reduce_max_sync(ALL, s.high[lane_id() % (THREADS / 32)]);
}

// 2^shift keys share a bin.
__device__ __forceinline__ int shift_for(u32 low, u32 high) {
    int bits = 32 - __clz((int)(high - low));
    return bits > 11 ? bits - 11 : 0;
}

// The keys of `bin` have been counted: the bin of these that holds the wanted one. Three barriers.
template <int THREADS> __device__ __forceinline__ Bin find_bin(Shared& s, const Bin& bin, int shift) {
    const int own = BINS / THREADS;
    __syncthreads();
    // The first thread has the highest bins. It leaves them empty for the next count.
    int first = BINS - own * (1 + (int)threadIdx.x);
    Counts<own>* mine = reinterpret_cast<Counts<own>*>(s.histogram + first);
    Counts<own> counts = *mine;
    *mine = Counts<own>{};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < own; i++) sum += counts.c[i];
    int before = threads_before(s, sum);
    if (before < bin.rank && bin.rank <= before + sum) {
        int i = own - 1, size = counts.c[own - 1];
#pragma unroll
        for (int j = own - 2; j >= 0; j--)
            if (before + size < bin.rank) {
                before += size;
                size = counts.c[j];
                i = j;
            }
        u32 low = bin.low + ((u32)(first + i) << shift), last = ((1u << shift) - 1);
        s.bin = Bin{low, bin.high - low < last ? bin.high : low + last, bin.rank - before, size};
    }
    __syncthreads();
    return s.bin;
}

struct Quad {
    u32 keys[4];  // 0 behind the row's end
    int place;
};

// A warp's list of quads, for which there is room for so many.
struct List {
    u16* quads;
    int at, room, count;  // at: among those of the block
    bool full;

    // NUMBER quads of every lane, the first ones of all lanes first: the chosen of them.
    template <int NUMBER> __device__ __forceinline__ void add(const bool (&chosen)[NUMBER], const int (&quad)[NUMBER]) {
        u16* to = quads + count;
        if (count + 32 * NUMBER > room) {
            full = true;
            to = quads;
        }
#pragma unroll
        for (int b = 0; b < NUMBER; b += 4) {
            // A byte for each of four rounds: how many there are in lower lanes, and then in earlier rounds too.
            u32 flags = 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (b + i < NUMBER && chosen[b + i]) flags += 1u << 8 * i;
            u32 before = lanes_before(flags), rounds = __shfl_sync(ALL, before + flags, 31) * 0x01010101u;
            before += rounds << 8;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (b + i < NUMBER && chosen[b + i]) to[before >> 8 * i & 255] = (u16)quad[b + i];
            to += rounds >> 24;
            count += (int)(rounds >> 24);
        }
    }
};

// A warp's quads in order of place, one after another to its lanes, each of which keeps its first ones.
template <int KEPT> struct Part {
    const Shared* s;
    const float* row;
    int length;
    int listed;     // where in s.quads it is said which they are; or -1
    bool in_tiles;  // all of s.tiles, from `first` on
    int first;      // or neighbours, from here on
    int count;
    Quad kept[KEPT];

    struct Raw {
        Floats<4> scores;
        int place;
    };
    // Where there is none the last one is read in its stead: no branch keeps loads from being on their way together.
    __device__ __forceinline__ Raw fetch(int i) const {
        int at = i < count ? i : count - 1;
        int quad = listed >= 0 ? s->quads[listed + at] : in_tiles ? s->tiles[first + at / 16] * 16 + at % 16 : first + at;
        return Raw{quad_at(row + 4 * quad), i < count ? 4 * quad : length};
    }
    __device__ __forceinline__ Quad quad_of(const Raw& raw) const {
        Quad quad;
        quad.place = raw.place;
#pragma unroll
        for (int i = 0; i < 4; i++) quad.keys[i] = key_of(raw.scores.f[i]);
        if (raw.place + 4 > length)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (raw.place + i >= length) quad.keys[i] = 0;
        return quad;
    }
    __device__ __forceinline__ void keep() {
        Raw raw[KEPT];
#pragma unroll
        for (int j = 0; j < KEPT; j++)
            if (32 * j < count) raw[j] = fetch(32 * j + lane_id());
#pragma unroll
        for (int j = 0; j < KEPT; j++) kept[j] = 32 * j < count ? quad_of(raw[j]) : Quad{{}, length};
    }
    // Those on the list, if it could take all.
    __device__ __forceinline__ void take(const List& list) {
        if (!list.full) {
            listed = list.at;
            count = list.count;
        }
        __syncwarp();
        keep();
    }
    template <typename Use> __device__ __forceinline__ void each(Use use) const {
#pragma unroll
        for (int j = 0; j < KEPT; j++)
            if (32 * j < count)
#pragma unroll
                for (int i = 0; i < 4; i++) use(kept[j].keys[i]);
#pragma unroll 1
        for (int start = 32 * KEPT; start < count; start += 128) {
            Raw raw[4];
#pragma unroll
            for (int j = 0; j < 4; j++) raw[j] = fetch(start + 32 * j + lane_id());
#pragma unroll 1
            for (int j = 0; j < 4; j++) {
                Quad quad = quad_of(raw[0]);
#pragma unroll
                for (int i = 0; i < 4; i++) use(quad.keys[i]);
#pragma unroll
                for (int i = 0; i < 3; i++) raw[i] = raw[i + 1];
            }
        }
    }
};

// The lower edge of the bin of the rank-th largest of a block's groups of scores, at least `rank` of which reach the
// least of all threads' `least`. A thread has the keys of the first `groups`; 0 for none.
template <int THREADS, int MOST>
__device__ __forceinline__ u32 bound(Shared& s, const u32 (&keys)[MOST], int groups, u32 least, int rank, u32& top) {
    top = 0;
#pragma unroll
    for (int i = 0; i < MOST; i++) top = keys[i] > top ? keys[i] : top;
    range_of<THREADS>(s, least, top);
    int shift = shift_for(least, top);
#pragma unroll
    for (int i = 0; i < MOST; i++)
        if (i < groups) {
            u32 key = keys[i] > least ? keys[i] : least;  // how many lie in the lowest bin does not matter
            atomicAdd(&s.histogram[(key - least) >> shift], 1u);
        }
    return find_bin<THREADS>(s, Bin{least, top, rank, 0}, shift).low;
}

// Where a warp has more quads than it keeps, those go that have nothing from `low` on.
template <int KEPT> __device__ __forceinline__ void prune(Part<KEPT>& part, const List& room, u32 low) {
    if (part.count <= 32 * KEPT || part.length > TILE * MOST_TILES) return;
    List list = room;
    float edge = score_of(low);
#pragma unroll 1
    for (int start = 0; start < part.count; start += 128) {
        int quad[4];
        bool chosen[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int i = start + 32 * j + lane_id();
            auto raw = part.fetch(i);
            quad[j] = raw.place / 4;
            chosen[j] = i < part.count && !(largest(raw.scores) < edge);
        }
        list.add(chosen, quad);  // not beyond what has been read
    }
    part.take(list);
}

// The rank-th largest of all warps' keys, which lie in [low, high].
template <int THREADS, int KEPT>
__device__ __forceinline__ Choice choose(Shared& s, Part<KEPT>& part, const List& list, u32 low, u32 high, int rank) {
    Bin bin = {low, high, rank, 0};
    int shift;
    do {
        shift = shift_for(bin.low, bin.high);
        part.each([&](u32 key) {
            if (key - bin.low <= bin.high - bin.low) atomicAdd(&s.histogram[(key - bin.low) >> shift], 1u);
        });
        bin = find_bin<THREADS>(s, bin, shift);
        prune(part, list, bin.low);
    } while (bin.size != bin.rank && bin.size > FEW && shift);
    if (bin.size == bin.rank) return Choice{bin.low - 1, 0};
    if (!shift) return Choice{bin.low, bin.rank};
    part.each([&](u32 key) {
        if (key - bin.low <= bin.high - bin.low) s.few[atomicAdd(&s.number_of_few, 1u)] = key;
    });
    __syncthreads();
    if ((int)threadIdx.x < bin.size) {
        u32 mine = s.few[threadIdx.x];
        int above = 0, equal = 0;
#pragma unroll 4
        for (int i = 0; i < bin.size; i++) {
            above += s.few[i] > mine;
            equal += s.few[i] == mine;
        }
        int equals = bin.rank - above;
        if (0 < equals && equals <= equal) s.choice = equals == equal ? Choice{mine - 1, 0} : Choice{mine, equals};
    }
    __syncthreads();
    return s.choice;
}

template <int KEPT> __device__ __forceinline__ void emit(Shared& s, const Part<KEPT>& part, Choice choice, int* out) {
    bool tied = choice.equals > 0;
    u32 above = 0, equal = 0;
    part.each([&](u32 key) { above += key > choice.edge; });
    if (tied) part.each([&](u32 key) { equal += key == choice.edge; });
    above = __reduce_add_sync(ALL, above);
    equal = __reduce_add_sync(ALL, equal);
    if (lane_id() == 0) { s.counts[warp_id()] = above; s.equals[warp_id()] = equal; }
    __syncthreads();
    bool lower = lane_id() < warp_id();
    int base = (int)__reduce_add_sync(ALL, lower ? (u32)s.counts[lane_id()] : 0), room = 0;
    if (tied) {
        int seen = (int)__reduce_add_sync(ALL, lower ? (u32)s.equals[lane_id()] : 0);
        room = within(choice.equals - seen, choice.equals);
        base += choice.equals - room;
    }
    int end = base + (int)above + within(equal, room);
#pragma unroll 1
    for (int start = 0; base < end; start += 32 * KEPT) {
        Quad quads[KEPT];
        bool chosen[KEPT][4];
        u32 ties = 0, counts = 0;  // a byte for each of the lane's quads
#pragma unroll
        for (int j = 0; j < KEPT; j++) {
            quads[j] = start ? part.quad_of(part.fetch(start + 32 * j + lane_id())) : part.kept[j];
#pragma unroll
            for (int i = 0; i < 4; i++) chosen[j][i] = quads[j].keys[i] > choice.edge;
        }
        if (tied) {
#pragma unroll
            for (int j = 0; j < KEPT; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) ties += (quads[j].keys[i] == choice.edge) << 8 * j;
            u32 before = lanes_before(ties), all = __shfl_sync(ALL, before + ties, 31);
#pragma unroll
            for (int j = 0; j < KEPT; j++) {
                int space = room - (int)(before >> 8 * j & 255);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (quads[j].keys[i] == choice.edge) chosen[j][i] = space-- > 0;
                room -= (int)(all >> 8 * j & 255);
            }
        }
#pragma unroll
        for (int j = 0; j < KEPT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) counts += chosen[j][i] << 8 * j;
        u32 before = lanes_before(counts), all = __shfl_sync(ALL, before + counts, 31);
#pragma unroll
        for (int j = 0; j < KEPT; j++) {
            int to = base + (int)(before >> 8 * j & 255);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (chosen[j][i]) out[to++] = quads[j].place + i;
            base += (int)(all >> 8 * j & 255);
        }
    }
}

// The maxima of a thread's tiles, as many of them as lie in the row's memory. Rows may begin anywhere.
template <int TOPS> __device__ __forceinline__ void read_tops(float (&tops)[TOPS], const float* maxima, int width) {
    bool aligned = ((long long)maxima & 15) == 0;
#pragma unroll
    for (int b = 0; b < TOPS; b += 4) {
        int at = TOPS * (int)threadIdx.x + b;
        if (aligned && at + 4 <= width) {
            Floats<4> four = quad_at(maxima + at);
#pragma unroll
            for (int i = 0; i < 4; i++) tops[b + i] = four.f[i];
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) tops[b + i] = at + i < width ? maxima[at + i] : 0.0f;
        }
    }
}

// scores   [rows, score_stride] fp32, of which row r has n = (positions[r] + 1) >> shift; whole tiles
// maxima   [rows, maxima_stride] fp32: of every tile; or null
// out      [rows, k] int32, k <= 2048
template <int THREADS>
__device__ __forceinline__ void topk(
    const float* scores, int score_stride, const float* maxima, int maxima_stride, const long long* positions,
    int shift, int k, int* out) {
    const int warps = THREADS / 32, own = MOST_TILES / THREADS;
    const int sent = 8, gathered = THREADS == 256 ? 12 : 6;  // of a lane's loads, on their way together
    const int kept = 1024 / THREADS;
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    int thread = threadIdx.x, lane = lane_id(), warp = warp_id();
#pragma unroll
    for (int i = 0; i < BINS / THREADS; i++) s.histogram[thread + THREADS * i] = 0;
    if (thread == 0) s.number_of_few = 0;
    await_previous();

    // What a row of any length may need is sent for together with its length.
    const float* row = computed(scores + (long long)blockIdx.x * score_stride);
    int n = (int)((u32)(positions[blockIdx.x] + 1) >> shift);
    Floats<4> near = {};
    if (4 * thread < score_stride) near = quad_at(row + 4 * thread);
    float maximum[own];
    if (maxima) read_tops<own>(maximum, maxima + (long long)blockIdx.x * maxima_stride, maxima_stride);
    out = computed(out + (long long)blockIdx.x * k);
    if (n <= k) {
        for (int i = thread; i < k; i += THREADS) out[i] = i < n ? i : -1;
        return;
    }

    int quads = (n + 3) / 4, tiles = (n + TILE - 1) / TILE;
    bool fits = quads <= MOST_QUADS && k <= 2 * THREADS;
    bool by_tiles = maxima && quads > THREADS && tiles > k && tiles <= MOST_TILES && (tiles >= 2 * k || !fits);
    bool whole = !by_tiles && quads > THREADS && quads >= 2 * k && fits;
    Part<kept> part;
    part.row = row;
    part.length = n;
    part.s = &s;
    part.listed = -1;
    part.in_tiles = by_tiles;
    // Those of the first loads, if that is enough.
    int share = quads <= THREADS ? 32 : (quads + warps - 1) / warps;
    part.first = warp * share;
    part.count = within(quads - part.first, share);
    const List empty = {s.quads + warp * (LISTED / warps), warp * (LISTED / warps), LISTED / warps, 0, false};
    u32 low = ALL, high = 0;
    if (by_tiles || whole) {
        u32 keys[own], least = ALL;
        int groups = own;
#pragma unroll
        for (int i = 0; i < own; i++) keys[i] = 0;
        if (by_tiles) {
            u32 most = 0;
#pragma unroll
            for (int i = 0; i < own; i++) keys[i] = key_of(maximum[i]);
            // The last tile may be a few scores only, of which none is large: it stands back.
            int full = n / TILE, mine = full - own * thread;
            if (mine < own) {
#pragma unroll
                for (int i = 0; i < own; i++)
                    if (own * thread + i >= tiles) keys[i] = 0;
            }
#pragma unroll
            for (int i = 0; i < own; i++) {
                least = i < mine && keys[i] < least ? keys[i] : least;
                most = keys[i] > most ? keys[i] : most;
            }
            if (k <= full / own) least = mine >= own ? most : ALL;
        } else {
            int full = n / 4;
            float none = score_of(0x007fffffu), top[4] = {none, none, none, largest(near)};  // -infinity
            s.tops[thread] = top[3];
#pragma unroll 1
            for (int start = THREADS; start < full; start += THREADS * sent) {
                Floats<4> x[sent];
#pragma unroll
                for (int b = 0; b < sent; b++) {
                    int q = start + THREADS * b + thread;
                    if (q < full) x[b] = quad_at(row + 4 * q);
                }
#pragma unroll
                for (int b = 0; b < sent; b++) {
                    int q = start + THREADS * b + thread;
                    if (q < full) {
                        float most = largest(x[b]);
                        s.tops[q] = most;
                        top[b % 4] = larger(top[b % 4], most);
                    }
                }
            }
            if (full < quads && thread == full % THREADS) {
                float most = row[4 * full];
#pragma unroll 1
                for (int i = 4 * full + 1; i < n; i++) most = larger(most, row[i]);
                s.tops[full] = most;
                top[3] = larger(top[3], most);
            }
            // As many groups that half of them or fewer reach the bound.
            float left = larger(top[0], top[1]), right = larger(top[2], top[3]);
            least = key_of(larger(left, right));
            if (k <= THREADS / 2) {
                groups = 1;
                keys[0] = least;
            } else if (k <= THREADS) {
                groups = 2;
                keys[0] = key_of(left);
                keys[1] = key_of(right);
            } else {
                groups = 4;
#pragma unroll
                for (int i = 0; i < 4; i++) keys[i] = key_of(top[i]);
                u32 lefts = key_of(left), rights = key_of(right);  // by keys, for a NaN is the largest
                least = lefts < rights ? lefts : rights;
            }
        }
        low = bound<THREADS>(s, keys, groups, least, k, high);
        float edge = score_of(low);
        List list = empty;
        if (by_tiles) {
            int survivors = 0;
#pragma unroll
            for (int i = 0; i < own; i++) survivors += keys[i] >= low;
            int at = threads_before(s, survivors);
            int listed = (int)__reduce_add_sync(ALL, lane < warps ? (u32)s.counts[lane] : 0);
#pragma unroll
            for (int i = 0; i < own; i++)
                if (keys[i] >= low) s.tiles[at++] = (u16)(own * thread + i);
            __syncthreads();
            share = (listed + warps - 1) / warps;
            part.first = warp * share;
            part.count = within(listed - part.first, share) * (TILE / 4);
            const float* from = computed(row + lane % 16 * 4);
#pragma unroll 1
            for (int start = 0; start < part.count; start += 32 * gathered) {
                const u16* tile = s.tiles + part.first + start / 16 + lane / 16;  // what lies behind the list is not used
                int quad[gathered];
                Floats<4> x[gathered];
                bool chosen[gathered];
#pragma unroll
                for (int b = 0; b < gathered; b++) quad[b] = tile[2 * b];
#pragma unroll
                for (int b = 0; b < gathered; b++)
                    if (start + 32 * b + lane < part.count) x[b] = quad_at(from + (u32)quad[b] * TILE);
#pragma unroll
                for (int b = 0; b < gathered; b++) {
                    chosen[b] = start + 32 * b + lane < part.count && !(largest(x[b]) < edge);
                    quad[b] = quad[b] * 16 + lane % 16;
                }
                list.add(chosen, quad);
            }
        } else {
#pragma unroll 1
            for (int start = 0; start < part.count; start += 32 * sent) {
                int quad[sent];
                bool chosen[sent];
#pragma unroll
                for (int b = 0; b < sent; b++) {
                    int i = start + 32 * b + lane;
                    quad[b] = part.first + i;
                    chosen[b] = i < part.count && !(s.tops[quad[b]] < edge);
                }
                list.add(chosen, quad);
            }
        }
        part.take(list);
    } else {
        if (quads <= THREADS) {
            part.kept[0] = part.quad_of({near, 4 * thread});
#pragma unroll
            for (int j = 1; j < kept; j++) part.kept[j] = Quad{{}, n};
        } else {
            part.keep();
        }
        part.each([&](u32 key) {
            low = key - 1 < low - 1 ? key : low;  // unless it is 0
            high = key > high ? key : high;
        });
        range_of<THREADS>(s, low, high);
    }
    emit(s, part, choose<THREADS>(s, part, empty, low, high, k), out);
}

#define TOPK(THREADS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, THREADS == 512 ? 2 : 1) penumbra_topk_rows_##THREADS( \
        const float* scores, int score_stride, const float* maxima, int maxima_stride, const long long* positions, \
        int shift, int k, int* out) {                                                                          \
        topk<THREADS>(scores, score_stride, maxima, maxima_stride, positions, shift, k, out);                  \
    }
TOPK(256)
TOPK(512)
TOPK(1024)
