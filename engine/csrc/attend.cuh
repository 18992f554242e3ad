// What the attention kernels of a decode step share: which keys a token sees, where their rows lie, how codes become
// bf16.
//
// e4m3 bits moved into bf16's places are its value over 2^120, subnormals included, so one product of bf16 with a power
// of two decodes it exactly. The code 0x7f is no NaN here: rows that hold it have a scale of 255, which makes one.
#pragma once

#include "warp.cuh"

#define DIM 512
#define CHANNELS 64  // of a scale
#define WINDOW 128
#define PAGE_BITS 8
#define ROW_BYTES 576
#define NOPE_BYTES 448
#define SCALE_BYTES 8
#define NOTHING __uint_as_float(0xff800000u)  // -inf

#ifndef ON_CPU
__device__ __forceinline__ u32 times(u32 a, u32 b) {  // bf16
    u32 both;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}
// Through the L2 alone: a row is read once.
__device__ __forceinline__ Words read16(const u8* from) {
    Words to;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(to.w[0]), "=r"(to.w[1]), "=r"(to.w[2]), "=r"(to.w[3]) : "l"(from) : "memory");
    return to;
}
__device__ __forceinline__ void read8(u32 (&to)[2], const u8* from) {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
}
// Bytes of v as the selector's digits say, lowest first: 0 to 3 a byte, 8 to b eight times the sign of one.
__device__ __forceinline__ u32 bytes_and_signs(u32 v, u32 selector) {
    u32 made;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(made) : "r"(v), "r"(selector));
    return made;
}
#endif

// Where a key's row lies; null where there is no key.
struct __align__(16) Row {
    const u8 *codes, *scales;
};

// Rows in a pool, found through the table of one sequence's pages.
struct Source {
    const u8* items;
    long long stride;
    int bits;  // an item has 2^bits rows
    const int* table;
};

__device__ __forceinline__ Row row_of(const Source& source, int index) {
    const u8* item = source.items + source.table[index >> source.bits] * source.stride;
    int rows = 1 << source.bits, place = index & (rows - 1);
    return Row{item + place * ROW_BYTES, item + rows * ROW_BYTES + place * SCALE_BYTES};
}

// The keys of a token: WINDOW of the tokens up to it, then `finished` compressed ones.
struct Seen {
    Source raw, pooled;
    long long position, oldest;
    const int* selected;  // which ones, -1 for none; null for the first
    int finished;
};

__device__ __forceinline__ Row row_of_key(const Seen& seen, int key) {
    if (key < WINDOW) {
        long long slot = seen.position - (WINDOW - 1) + key;
        if (slot >= seen.oldest && slot >= 0) return row_of(seen.raw, (int)slot);
    } else if (key - WINDOW < seen.finished) {
        int index = seen.selected ? seen.selected[key - WINDOW] : key - WINDOW;
        if (index >= 0) return row_of(seen.pooled, index);
    }
    return Row{nullptr, nullptr};
}

// Bytes 2 I and 2 I + 1 of a word as e4m3 -> bf16 of 2^-120 their value.
template <int I> __device__ __forceinline__ u32 e4m3(u32 v) {
    return bytes_and_signs(v, I ? 0xb3a2 : 0x9180) << 4 & 0x87f087f0u;  // each byte under its sign
}

// What they are multiplied by for a scale of 2^(code - 127). bf16 has no power above 2^127: where code > LARGEST there
// is a second factor.
#define LARGEST 134
__device__ __forceinline__ u32 power_of(u32 code) {
    return (code == 255 ? 0x7fc0u : (code > LARGEST ? 254 : code + 120) << 7) * 0x10001u;
}
__device__ __forceinline__ u32 second_power_of(u32 code) { return (code - LARGEST + 127) * 0x00800080u; }
