// The blocks of engine/csrc/index_scores.cu, one after another, on the CPU.
#include <cmath>
#include <deque>
#define fetch16 fetch16_at_once
#include "cuda_on_cpu.h"
#undef fetch16

#define __shared__
typedef unsigned long long Bits;
unsigned char memory[232448] __attribute__((aligned(1024)));
static Index gridDim;
static int faults;  // of the kernel: what a GPU may not do either

static int __clzll(long long x) { return x ? __builtin_clzll((Bits)x) : 64; }
static int __ffsll(long long x) { return __builtin_ffsll(x); }
static void fault(const char* what) {
    if (!faults++) std::fprintf(stderr, "%s\n", what);
}
static const unsigned char* settled(const unsigned char* at) { return at; }
static uint32_t shared_address(const void* at) { return (uint32_t)((const unsigned char*)at - memory); }

// A barrier's 8 bytes: how many it is made for, how many are still to come, and the parity of the phase that runs.
struct Barrier {
    uint16_t arrivals, missing;
    uint32_t parity;
};
static Barrier& at(Bits* barrier) { return *reinterpret_cast<Barrier*>(barrier); }
static void make_barrier(Bits* barrier, int arrivals) { at(barrier) = {(uint16_t)arrivals, (uint16_t)arrivals, 0}; }
static void arrive(Bits* barrier, int times) {
    Barrier& b = at(barrier);
    if (times > b.missing) return fault("more arrive at a barrier than it is made for");
    if ((b.missing -= times) == 0) b.missing = b.arrivals, b.parity ^= 1;
}

// Copies come late, a while after those of all others that were sent for before; until then there is nothing.
struct Copy {
    unsigned char* to;
    const void* from;
};
struct Delivery {
    std::vector<Copy> copies;
    Bits* barrier;
    long due;
};
static std::vector<std::vector<Copy>> sent;  // of a thread, since it last said what shall know of it
static std::deque<Delivery> deliveries;
static long polls;
static void fetch16(void* to, const void* from) {
    std::memset(to, 0xff, 16);
    sent[threadIdx.x].push_back({(unsigned char*)to, from});
}
static void arrive_when_there(Bits* barrier) {
    deliveries.push_back({std::move(sent[threadIdx.x]), barrier, polls + 600});
    sent[threadIdx.x].clear();
}
static void poll() {
    for (polls++; !deliveries.empty() && deliveries.front().due <= polls; deliveries.pop_front()) {
        for (const Copy& copy : deliveries.front().copies) std::memcpy(copy.to, copy.from, 16);
        arrive(deliveries.front().barrier, 1);
    }
}

// One warp may be slower than the others, who must not count on it.
static int slow_warp;
static void dawdle() {
    for (int i = 0; i < 2 && (int)threadIdx.x / 32 == slow_warp; i++) block::pause();
}
static void await(Bits* barrier, uint32_t parity) {
    dawdle();
    for (poll(); at(barrier).parity == parity; poll()) block::pause();
    block::sync_warp();
}

static struct { int count, times; } named[16];
static void pass_on(int name, int threads) {
    dawdle();
    block::sync_warp();
    if (++named[name].count == threads) named[name].count = 0, named[name].times++;
}
static void meet(int name, int threads) {
    int times = named[name].times;
    pass_on(name, threads);
    while (named[name].times == times) block::pause();
    block::sync_warp();
}
template <int> static void fewer_registers() {}
template <int> static void more_registers() {}

// wgmma reads shared memory at any time until it has been waited for, and owns its sums as long: they hold nothing until
// then, and what the factors were at first they must still be at last.
static const uint32_t IN_FLIGHT = 0x7fc0dead;
struct Product {
    Bits keys, queries;
    bool add;
};
struct Flight {
    std::vector<Product> products;
    std::vector<double> sums;
};
static std::vector<Flight> flights;

// 16 inputs of row `row` of a factor, by the descriptor's bits: PTX ISA, asynchronous warpgroup-level matrix shared memory
// layout, K-major, swizzle of 128 bytes: bits 4-6 of an address are changed by its bits 7-9.
static const unsigned char* inputs_of(Bits descriptor, int row, int sixteen) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fault("a factor that is not swizzled by 128 bytes");
    uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    uint32_t address = start + row / 8 * eight_rows + row % 8 * 128 + 16 * sixteen;
    address ^= (address >> 7 & 7) << 4;
    if (address < sizeof memory) return memory + address;
    fault("a factor outside of shared memory");
    return memory;
}
static std::vector<double> e4m3_values() {
    std::vector<double> values(256);
    for (int i = 0; i < 256; i++) {
        int exponent = i >> 3 & 15, mantissa = i & 7;
        double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
        values[i] = (i & 0x7f) == 0x7f ? NAN : i & 0x80 ? -size : size;
    }
    return values;
}
static void read_row(double (&row)[32], Bits descriptor, int number) {
    static const std::vector<double> values = e4m3_values();
    for (int half = 0; half < 2; half++) {
        const unsigned char* codes = inputs_of(descriptor, number, half);
        for (int i = 0; i < 16; i++) row[16 * half + i] = values[codes[i]];
    }
}
static void multiply(std::vector<double>& sums, int count, const Product& product) {
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    double keys[2][32], query[32];
    for (int r = 0; r < 2; r++) read_row(keys[r], product.keys, 16 * warp + lane / 4 + 8 * r);
    sums.resize(count);
    for (int i = 0; i < count; i += 4)
        for (int c = 0; c < 2; c++) {
            read_row(query, product.queries, 2 * i + lane % 4 * 2 + c);
            for (int r = 0; r < 2; r++) {
                double& sum = sums[i + 2 * r + c];
                if (!product.add) sum = 0;
                for (int k = 0; k < 32; k++) sum += keys[r][k] * query[k];
            }
        }
}
static void publish() {}
static void begin_products() { block::sync_warp(); }
static void close_products() {}
static float in_flight() {
    float value;
    std::memcpy(&value, &IN_FLIGHT, 4);
    return value;
}
template <int COUNT> static void products_of_e4m3(float (&sums)[COUNT], Bits keys, Bits queries, bool add) {
    Flight& flight = flights[threadIdx.x];
    if (block::exchange((uint32_t)keys)[0] != (uint32_t)keys || block::exchange((uint32_t)queries)[0] != (uint32_t)queries)
        fault("lanes multiply different factors");
    flight.products.push_back({keys, queries, add});
    multiply(flight.sums, COUNT, flight.products.back());
    std::fill(sums, sums + COUNT, in_flight());
}
template <int, int COUNT> static void await_products(float (&sums)[COUNT]) {
    dawdle();
    block::sync_warp();
    Flight& flight = flights[threadIdx.x];
    std::vector<double> late;
    for (const Product& product : flight.products) multiply(late, COUNT, product);
    for (int i = 0; i < COUNT; i++) {
        if (__float_as_uint(sums[i]) != IN_FLIGHT) fault("sums were touched in flight");
        if (late[i] != flight.sums[i] && !(late[i] != late[i] && flight.sums[i] != flight.sums[i]))
            fault("factors were written over in flight");
        sums[i] = (float)late[i];
    }
    flight = Flight();
}

#include "index_scores.cu"

struct Call {
    const u8* codes;
    const float* weights;
    const long long* positions;
    const int *segment, *page_table;
    const u8* pool;
    long long item_stride;
    float *scores, *maxima;
    int pages, tokens, k, together, stages;
};
static Call c;

template <void (*KERNEL)(PARAMETERS)> static void block_of() {
    KERNEL(c.codes, c.weights, c.positions, c.segment, c.page_table, c.pages, c.pool, c.item_stride, c.scores, c.maxima,
           c.tokens, c.k, c.together, c.stages);
}

// -> faults
extern "C" int run_scores(const Call* call, unsigned warpgroups, unsigned blocks, int slow) {
    c = *call;
    slow_warp = slow;
    faults = 0;
    gridDim.x = blocks *= (call->tokens + MOST_TOKENS - 1) / MOST_TOKENS;
    blockDim.x = 128 * warpgroups + 32 * SENDERS;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        std::fill(std::begin(memory), std::end(memory), 0xff);  // NaN
        flights.assign(blockDim.x, Flight());
        sent.assign(blockDim.x, {});
        block::run(blockDim.x, warpgroups == 2 ? block_of<penumbra_index_scores_2> : block_of<penumbra_index_scores_4>);
        if (!deliveries.empty()) fault("a block leaves before what it sent for is there");
        for (auto& name : named)
            if (name.count) fault("a block leaves a barrier that some wait at");
    }
    return faults;
}
extern "C" unsigned shared_bytes(int together, int stages) {
    Memory m = laid_out(memory, together, stages);
    return (unsigned)((const u8*)(m.fixed + 1) - memory);
}
