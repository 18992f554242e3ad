// The one matrix product every kernel uses; see linear.cpp for the layout of a packed matrix.
#pragma once

#include <cstdint>

namespace penumbra {

// Outputs are packed in panels of 32, each [inputs][32].
constexpr int kPanel = 32;

struct Packed {
    const void* data;
    bool half;  // bf16, else fp32
    int64_t outputs;
    int64_t inputs;

    int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
};

// y[m][n - first] = sum over k of x[m][k] * w[n][k], for n in [first, last), on the calling thread.
// x and y are one pointer a row. Each sum runs over k in order, in one accumulator, whatever the number of rows.
void multiply(const float* const* x, int64_t rows, const Packed& w, int64_t first, int64_t last, float* const* y);

// The same over all threads of the current team's choosing: outputs are dealt out in whole panels.
void multiply_parallel(const float* const* x, int64_t rows, const Packed& w, int64_t first, int64_t last,
                       float* const* y, int threads);

}  // namespace penumbra
