// The e4m3 matrices of one launch, whose tiles of rows are counted through all of them.
#pragma once

#include "warp.cuh"

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
