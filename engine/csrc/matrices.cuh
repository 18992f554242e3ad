// The e4m3 matrices of one launch, whose tiles of rows are counted through all of them; and tokens as they multiply them.
#pragma once

#include "warpgroup.cuh"

#define MATRICES 8

// [rows, inputs] e4m3, and a scale for 128 x 128 of them.
struct Matrix {
    const u8* weights;
    const float* scales;
    int rows;
};

// Where a tile of rows is: its matrix, its first row there, and the rows of all matrices in front of that.
struct Place {
    Matrix of;
    int row, before;
};
template <int NEXT> __device__ __forceinline__ void pass(const Matrix (&matrices)[MATRICES], Place& found) {
    if constexpr (NEXT < MATRICES)
        if (found.row >= found.of.rows) {
            found = {matrices[NEXT], found.row - found.of.rows, found.before + found.of.rows};
            pass<NEXT + 1>(matrices, found);
        }
}
__device__ __forceinline__ Place place_of(const Matrix (&matrices)[MATRICES], int row) {
    Place found = {matrices[0], row, 0};
    pass<1>(matrices, found);
    return found;
}

// A warp's 128 values as two e4m3 terms each: x = unit (c0 + c1 / 16). A lane has four, `most` the bits of the largest
// magnitude of these; terms: a word of each. Gives back their unit, which is no number where one of them is none.
__device__ __forceinline__ float terms_of(Floats<4> x, u32 most, u32 (&terms)[2]) {
    // The largest comes to lie between 128 and 256, as far as there are powers of two.
    int exponent = (int)(__reduce_max_sync(ALL, most) >> 23);
    bool finite = exponent < 255;
    exponent = exponent < 8 ? 8 : exponent;
    float factor = __uint_as_float((u32)(261 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 4; i++) x.f[i] *= factor;
    u32 low = e4m3s(x.f[0], x.f[1]), high = e4m3s(x.f[2], x.f[3]);
    Floats<4> held;
    values_of(low, held.f[0], held.f[1]);
    values_of(high, held.f[2], held.f[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) x.f[i] = (x.f[i] - held.f[i]) * 16.0f;
    terms[0] = low | high << 16;
    terms[1] = e4m3s(x.f[0], x.f[1]) | e4m3s(x.f[2], x.f[3]) << 16;
    return __uint_as_float(finite ? (u32)(exponent - 7) << 23 : 0x7fc00000u);
}
