// The blocks of engine/csrc/linears_fp8.cu, one after another, on the CPU.
#include <cmath>
#include <deque>
#include "cuda_on_cpu.h"
#include "e4m3_on_cpu.h"

#define __shared__
typedef unsigned long long u64;
unsigned char memory[232448] __attribute__((aligned(1024)));
static unsigned char published[sizeof memory];  // what products see of it
static int faults;                              // of the kernel: what a GPU may not do either

static void fault(const char* what) {
    if (!faults++) std::fprintf(stderr, "%s\n", what);
}
static uint32_t shared_address(const void* at) { return (uint32_t)((const unsigned char*)at - memory); }
// What threads write themselves, and have not published.
static std::vector<unsigned char*> written;
static void store(void* to, uint32_t word) {
    std::memcpy(to, &word, 4);
    std::memset(published + shared_address(to), 0xff, 4);
    written.push_back((unsigned char*)to);
}
static float largest(float a, float b) { return a != a || b != b ? NAN : std::max(std::fabs(a), std::fabs(b)); }
static float inverse_root(float x) { return 1.0f / std::sqrt(x); }

// A barrier's 8 bytes: how many it is made for, how many are still to come, and the parity of the phase that runs.
struct Barrier {
    uint16_t arrivals, missing;
    uint32_t parity;
};
static Barrier& at(u64* barrier) { return *reinterpret_cast<Barrier*>(barrier); }
static void make_barrier(u64* barrier, int arrivals) { at(barrier) = {(uint16_t)arrivals, (uint16_t)arrivals, 0}; }

// Copies come late, a while after those of all others that were sent for before; until then there is nothing.
struct Copy {
    unsigned char* to;
    const void* from;
    int bytes;
};
struct Delivery {
    std::vector<Copy> copies;
    u64* barrier;
    long due;
};
static std::vector<std::vector<Copy>> sent;  // of a thread, since it last said what shall know of it
static std::deque<Delivery> deliveries;
static std::vector<Copy> unpublished;
static long polls;
static void fetch(void* to, const void* from, int bytes) {
    if ((uintptr_t)to % bytes || (uintptr_t)from % bytes) fault("a copy of bytes that are not aligned");
    std::memset(to, 0xff, bytes);
    std::memset(published + shared_address(to), 0xff, bytes);
    sent[threadIdx.x].push_back({(unsigned char*)to, from, bytes});
}
static void fetch16_once(void* to, const void* from) { fetch(to, from, 16); }
static void fetch4(void* to, const void* from) { fetch(to, from, 4); }
static void arrive_when_there(u64* barrier) {
    deliveries.push_back({std::move(sent[threadIdx.x]), barrier, polls + 40});
    sent[threadIdx.x].clear();
}
static void poll() {
    for (polls++; !deliveries.empty() && deliveries.front().due <= polls; deliveries.pop_front()) {
        for (const Copy& copy : deliveries.front().copies) {
            std::memcpy(copy.to, copy.from, copy.bytes);
            unpublished.push_back(copy);
        }
        Barrier& b = at(deliveries.front().barrier);
        if (b.missing == 0) fault("more arrive at a barrier than it is made for");
        if (--b.missing == 0) b.missing = b.arrivals, b.parity ^= 1;
    }
}
static void await(u64* barrier, uint32_t parity) {
    for (poll(); at(barrier).parity == parity; poll()) block::pause();
    block::sync_warp();
}
static void publish() {
    for (const Copy& copy : unpublished) std::memcpy(published + shared_address(copy.to), copy.to, copy.bytes);
    unpublished.clear();
    for (unsigned char* to : written) std::memcpy(published + shared_address(to), to, 4);
    written.clear();
}
static struct { int count, times; } named[16];
static void meet(int name, int threads) {
    int times = named[name].times;
    block::sync_warp();
    if (++named[name].count == threads) named[name].count = 0, named[name].times++;
    while (named[name].times == times) block::pause();
    block::sync_warp();
}

// 16 inputs of a row of a factor, by the descriptor's bits: PTX ISA, asynchronous warpgroup-level matrix shared memory
// layout, K-major, swizzle of 128 bytes: bits 4-6 of an address are changed by its bits 7-9.
static const unsigned char* inputs_of(u64 descriptor, int row, int sixteen) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fault("a factor that is not swizzled by 128 bytes");
    uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    uint32_t address = start + row / 8 * eight_rows + row % 8 * 128 + 16 * sixteen;
    address ^= (address >> 7 & 7) << 4;
    if (address < sizeof memory) return published + address;
    fault("a factor outside of shared memory");
    return published;
}

// wgmma reads shared memory at any time until it has been waited for, and owns its sums as long: they hold nothing until
// then. Of factors that are not at last what they were at first nothing is known.
static const uint32_t IN_FLIGHT = 0x7fc0dead;
struct Product {
    float* sums;
    u64 weights, terms;
    int batch;
    std::vector<float> first;
};
static std::vector<std::deque<Product>> pending;
static std::vector<int> batches;
static std::vector<char> begun;
static std::vector<float> made(u64 weights, u64 terms) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    std::vector<float> sums(8);
    for (int i = 0; i < 8; i++) {
        int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const unsigned char* a[2] = {inputs_of(weights, row, 0), inputs_of(weights, row, 1)};
        const unsigned char* b[2] = {inputs_of(terms, column, 0), inputs_of(terms, column, 1)};
        double sum = 0;
        int most = -999;
        for (int k = 0; k < 32 && kept; k++)
            most = std::max(most, exponent_of(e4m3_of(a[k / 16][k % 16])) + exponent_of(e4m3_of(b[k / 16][k % 16])));
        for (int k = 0; k < 32; k++) {
            double product = (double)e4m3_of(a[k / 16][k % 16]) * e4m3_of(b[k / 16][k % 16]);
            sum += kept ? cut_off(product, most - kept) : product;
        }
        sums[i] = (float)(kept && sum != 0 && sum == sum ? cut_off(sum, std::ilogb(sum) - kept) : sum);
    }
    return sums;
}
static void begin_products() {
    block::sync_warp();
    begun[threadIdx.x] = true;
}
static void close_products() { batches[threadIdx.x]++; }
static void multiply(float (&sums)[8], u64 weights, u64 terms) {
    if (!begun[threadIdx.x]) fault("registers of a product that nobody has fenced");
    for (u64 factor : {weights, terms})
        if (block::exchange((uint32_t)factor)[0] != (uint32_t)factor) fault("lanes multiply different factors");
    pending[threadIdx.x].push_back({sums, weights, terms, batches[threadIdx.x], made(weights, terms)});
    for (float& sum : sums) std::memcpy(&sum, &IN_FLIGHT, 4);
}
template <int LEFT> static void await_products(float (&)[8]) {
    block::sync_warp();
    begun[threadIdx.x] = false;
    auto& mine = pending[threadIdx.x];
    for (; !mine.empty() && mine.front().batch < batches[threadIdx.x] - LEFT; mine.pop_front()) {
        const Product& product = mine.front();
        std::vector<float> last = made(product.weights, product.terms);
        for (int i = 0; i < 8; i++) {
            if (__float_as_uint(product.sums[i]) != IN_FLIGHT) fault("sums were touched in flight");
            product.sums[i] = last[i] == product.first[i] ? last[i] : NAN;
        }
    }
}

#include "linears_fp8.cu"

struct Linears { const float* x; const float* norm; float* y; const Matrix* matrices; long long x_row; int tokens, inputs, per_group, tiles, share, stages, width; float eps; };
struct Gated { const float* x; float* y; const Matrix* both; long long x_row; int tokens, inputs, tiles, share, stages, width; float limit; };
static Linears l;
static Gated s;

// -> faults
static int blocks(int tiles, int share, void (*kernel)()) {
    faults = 0;
    blockDim.x = THREADS;
    for (blockIdx.x = 0; blockIdx.x < (unsigned)((tiles + share - 1) / share); blockIdx.x++) {
        std::fill(std::begin(memory), std::end(memory), 0xff);  // NaN
        std::fill(std::begin(published), std::end(published), 0xff);
        sent.assign(THREADS, {});
        written.clear();
        pending.assign(THREADS, {});
        batches.assign(THREADS, 0);
        begun.assign(THREADS, false);
        block::run(THREADS, kernel);
        if (!deliveries.empty()) fault("a block leaves before what it sent for is there");
        for (auto& queue : pending)
            if (!queue.empty()) fault("a block leaves products that nobody awaits");
        for (auto& name : named)
            if (name.count) fault("a block leaves a barrier that some wait at");
    }
    return faults;
}

#define ENTRY_OF(I) l.matrices[I].weights, l.matrices[I].scales, l.matrices[I].rows,
#define RUN_LINEARS(N)                                                                                                \
    [] {                                                                                                              \
        if (l.norm)                                                                                                   \
            penumbra_fp8_linears_normed_##N(EACH(ENTRY_OF) l.x, l.x_row, l.norm, l.eps, l.y, l.tokens, l.inputs,      \
                                            l.per_group, l.tiles, l.share, l.stages);                                 \
        else                                                                                                          \
            penumbra_fp8_linears_##N(EACH(ENTRY_OF) l.x, l.x_row, l.y, l.tokens, l.inputs, l.per_group, l.tiles,      \
                                     l.share, l.stages);                                                              \
    }
#define RUN_GATED(N)                                                                                                  \
    [] {                                                                                                              \
        const Matrix &gate = s.both[0], &up = s.both[1];                                                              \
        penumbra_fp8_gated_##N(gate.weights, gate.scales, up.weights, up.scales, gate.rows, s.x, s.x_row, s.y,        \
                               s.tokens, s.inputs, s.limit, s.tiles, s.share, s.stages);                              \
    }
extern "C" void order(int eager, int backwards) { block::eager = eager; block::backwards = backwards; }
extern "C" void keep(int bits) { kept = bits; }
extern "C" unsigned shared_bytes(unsigned inputs, unsigned tokens, unsigned stages) {
    return FOURS * stages * STAGE + sizeof(Fixed) + inputs / BLOCK * (TOKENS * 8 + (tokens > 4 ? 16 : 8) * SLAB_ROW);
}
extern "C" int run_linears(const Linears* call) {
    l = *call;
    return l.width == 16 ? blocks(l.tiles, l.share, RUN_LINEARS(16)) : blocks(l.tiles, l.share, RUN_LINEARS(32));
}
extern "C" int run_gated(const Gated* call) {
    s = *call;
    return s.width == 16 ? blocks(s.tiles, s.share, RUN_GATED(16)) : blocks(s.tiles, s.share, RUN_GATED(32));
}
