// The blocks of engine/csrc/work_list.cu, one after another, on the CPU.
#include "cuda_on_cpu.h"

#define __shared__
unsigned char memory[49152] __attribute__((aligned(16)));
static Index gridDim;

#include "work_list.cu"

struct Call {
    const int* picks;
    int *members, *owners;
    int pairs, experts, parts, block, room;
};
static Call c;

extern "C" void order(int eager, int backwards) { block::eager = eager; block::backwards = backwards; }
extern "C" void run_work_list(const Call* call, unsigned grid) {
    c = *call;
    blockDim.x = THREADS;
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        std::memset(memory, 0xff, sizeof memory);
        block::run(THREADS, [] {
            penumbra_work_list(c.picks, c.members, c.owners, c.pairs, c.experts, c.parts, c.block, c.room);
        });
    }
}
