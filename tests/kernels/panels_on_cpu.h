// What engine/csrc/panels.cuh leaves to whoever runs it: copies that come when they are waited for, until when their place
// holds NaN, and e4m3 as Hopper multiplies it.
#pragma once
#include <map>
#include "cuda_on_cpu.h"
#include "e4m3_on_cpu.h"

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
static void bring_once(void* to, const void* from, uint32_t bytes, u64* barrier) { bring(to, from, bytes, barrier); }
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
