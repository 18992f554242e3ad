// e4m3 as Hopper converts and multiplies it: what the kernels' sources leave to whoever runs them.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

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
