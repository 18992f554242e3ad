// The blocks of engine/csrc/sample_rows.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__ static
using std::exp;
using std::log;
static double as_double(unsigned long long bits) { double x; std::memcpy(&x, &bits, 8); return x; }
#include "sample_rows.cu"

struct Call {
    const float* logits;
    const Row* rows;
    Part* parts;
    const int* candidates;
    int* drawn;
    const int* segment;
    const long long* positions;
    long long row_stride;
    int count, vocabulary;
};
static Call c;

extern "C" void run_parts(const Call* call) {
    c = *call;
    blockDim.x = THREADS;
    for (blockIdx.x = 0; blockIdx.x < (unsigned)c.count * SPANS; blockIdx.x++)
        block::run(THREADS, [] { 
            penumbra_sample_parts(c.logits, c.row_stride, c.rows, c.segment, c.positions, c.parts, c.vocabulary);
        });
}
extern "C" void run_rows(const Call* call) {
    c = *call;
    blockDim.x = CANDIDATES;
    for (blockIdx.x = 0; blockIdx.x < (unsigned)c.count; blockIdx.x++)
        block::run(CANDIDATES, [] {
            penumbra_sample_rows(c.logits, c.row_stride, c.rows, c.segment, c.positions, c.parts, c.candidates, c.drawn);
        });
}
extern "C" unsigned part_bytes() { return sizeof(Part); }
