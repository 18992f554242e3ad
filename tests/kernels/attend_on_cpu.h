// What engine/csrc/attend.cuh leaves to whoever runs it.
#pragma once
#include "cuda_on_cpu.h"
#include "warp.cuh"

inline uint32_t times(uint32_t a, uint32_t b) {
    return bf16s(bf16_of(a) * bf16_of(b), bf16_of(a >> 16) * bf16_of(b >> 16));
}
inline uint32_t bytes_and_signs(uint32_t v, uint32_t selector) {
    uint32_t made = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t digit = selector >> 4 * i & 15, byte = v >> 8 * (digit & 3) & 255;
        made |= (digit & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return made;
}
inline Words read16(const u8* from) {
    Words to;
    std::memcpy(&to, from, 16);
    return to;
}
inline void read8(uint32_t (&to)[2], const u8* from) { std::memcpy(to, from, 8); }
