// What engine/csrc/panels.cuh leaves to whoever runs it: copies that come when they are waited for, until when their place
// holds NaN, and e4m3 as Hopper multiplies it.
#pragma once
#include <array>
#include <cmath>
#include <map>
#include "cuda_on_cpu.h"

#define __shared__
unsigned char memory[232448] __attribute__((aligned(128)));
typedef unsigned long long u64;

// A barrier: phases that have ended, arrivals that this one lacks, those that each needs.
struct Phases { uint16_t ended, lacks, needs, none; };
static Phases& phases(u64* barrier) { return *(Phases*)barrier; }
static void arrived(u64* barrier) {
    Phases& p = phases(barrier);
    if (p.needs == 0xffff || p.lacks == 0) std::abort();
    if (--p.lacks == 0) p.ended++, p.lacks = p.needs;
}
struct Copy { void* to; const void* from; uint32_t bytes; };
struct Delivery { uint32_t bytes; std::vector<Copy> copies; };  // bytes that are expected
static std::map<u64*, Delivery> copies;
static void make_barrier(u64* barrier, int arrivals) {
    phases(barrier) = Phases{0, (uint16_t)arrivals, (uint16_t)arrivals, 0};
}
static void publish() {}
static void expect(u64* barrier, uint32_t bytes) {
    if (copies.count(barrier)) std::abort();
    copies[barrier] = Delivery{bytes, {}};
}
static void bring(void* to, const void* from, uint32_t bytes, u64* barrier) {
    if (!copies.count(barrier) || (uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) std::abort();
    std::memset(to, 0xff, bytes);
    copies[barrier].copies.push_back(Copy{to, from, bytes});
}
static void await(u64* barrier, uint32_t turn) {
    if (phases(barrier).needs == 0xffff) std::abort();
    while ((phases(barrier).ended & 1) == turn) {
        auto found = copies.find(barrier);
        if (found == copies.end()) {
            block::pause();
            continue;
        }
        uint32_t bytes = 0;
        for (const Copy& copy : found->second.copies) {
            std::memcpy(copy.to, copy.from, copy.bytes);
            bytes += copy.bytes;
        }
        if (bytes != found->second.bytes) std::abort();
        copies.erase(found);
        arrived(barrier);
    }
}
static void arrive(u64* barrier) {
    block::sync_warp();
    if (threadIdx.x % 32 == 0) arrived(barrier);
}

static float e4m3_made(uint32_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float size = (code & 127) == 127 ? NAN : exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return code & 128 ? -size : size;
}
static float e4m3_of(uint32_t code) {
    static const std::array<float, 256> values = [] {
        std::array<float, 256> made;
        for (int n = 0; n < 256; n++) made[n] = e4m3_made(n);
        return made;
    }();
    return values[code & 255];
}
static uint32_t e4m3(float x) {
    uint32_t sign = std::signbit(x) ? 128 : 0;
    x = std::fabs(x);
    if (x != x) return sign | 127;
    if (x >= 448) return sign | 126;
    int exponent = x < 0.015625f ? -6 : std::ilogb(x);
    float last = std::ldexp(1.0f, exponent - 3);
    uint32_t count = (uint32_t)std::nearbyint(x / last);  // 8..16 of a normal one
    return sign | (exponent == -6 && x < 0.015625f ? count : (uint32_t)(exponent + 6) * 8 + count);
}
static uint32_t e4m3s(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
static void values_of(uint32_t both, float& low, float& high) { low = e4m3_of(both & 255); high = e4m3_of(both >> 8 & 255); }

// Hopper's wgmma of e4m3 keeps `kept` = 13 bits behind the point of products, and of the sum they are added to, that are all
// shifted to the largest exponent among them, and as many of the new sum's mantissa, and cuts off the rest. Here all bits,
// where it is 0.
static int kept = 0;
static double cut_off(double x, int last) { return std::ldexp(std::trunc(std::ldexp(x, -last)), last); }
static int exponent_of(float x) { return x == 0 ? -126 : std::max(-6, std::ilogb(x)); }
static float multiplied(const float (&a)[32], const float (&b)[32], float before) {
    double sum = before;
    if (!kept) {
        for (int k = 0; k < 32; k++) sum += (double)a[k] * b[k];
        return (float)sum;
    }
    int most = before == 0 || before != before ? -999 : std::ilogb(before);
    for (int k = 0; k < 32; k++) most = std::max(most, exponent_of(a[k]) + exponent_of(b[k]));
    sum = cut_off(sum, most - kept);
    for (int k = 0; k < 32; k++) sum += cut_off((double)a[k] * b[k], most - kept);
    return (float)(sum != 0 && sum == sum ? cut_off(sum, std::ilogb(sum) - kept) : sum);
}
