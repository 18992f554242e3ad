// The blocks of engine/csrc/linears_some.cu, one after another, on the CPU; those of a cluster at once.
#include <cmath>
#include <deque>
#define fetch16 fetch16_at_once
#include "cuda_on_cpu.h"
#include "e4m3_on_cpu.h"
#undef fetch16

// The fibers are a cluster's threads, the blocks' one behind the other.
static unsigned block_threads, cluster;
static unsigned rank() { return block::current / block_threads; }
#define threadIdx (Index{block::current % block_threads})
#define blockIdx (Index{cluster + rank()})
#define __syncthreads() block::wait(rank() * block_threads, block_threads, &block::Fiber::barriers)
#define __cluster_dims__(n)
typedef unsigned long long u64;
static const uint32_t SHARED = 232448;
alignas(1024) static unsigned char memories[2 * SHARED];
alignas(1024) static unsigned char published[2 * SHARED];  // what products see of it
#define memory (memories + rank() * SHARED)
static int faults;  // of the kernel: what a GPU may not do either
static Index gridDim;

static void fault(const char* what) {
    if (!faults++) std::fprintf(stderr, "%s\n", what);
}
static uint32_t shared_address(const void* at) { return (uint32_t)((const unsigned char*)at - memory); }
static float inverse_root(float x) { return 1.0f / std::sqrt(x); }

// A barrier's 8 bytes: how many it is made for, how many and how many bytes are still to come, and the phase's parity.
struct Barrier {
    uint8_t arrivals, missing;
    uint16_t parity;
    int32_t bytes;

    void check() {
        if (missing == 0 && bytes == 0) missing = arrivals, parity ^= 1;
    }
    void arrive() {
        if (missing-- == 0) fault("more arrive at a barrier than it is made for");
        check();
    }
};
static Barrier& at(u64* barrier) { return *reinterpret_cast<Barrier*>(barrier); }
static void make_barrier(u64* barrier, int arrivals) { at(barrier) = {(uint8_t)arrivals, (uint8_t)arrivals, 0, 0}; }
static void arrive(u64* barrier) { at(barrier).arrive(); }
// What goes to another block of the cluster must find it there.
static void look_for(unsigned block) {
    bool there = false;
    for (unsigned i = 0; i < block_threads; i++) there |= !block::fibers[block * block_threads + i].done;
    if (!there) fault("something is sent to a block that has left");
}
static void arrive_at(u64* barrier, uint32_t block) {
    look_for(block);
    at((u64*)((unsigned char*)barrier - memory + memories + block * SHARED)).arrive();
}
static void meet_cluster() { block::wait(0, block::fibers.size(), &block::Fiber::parts); }
static void expect(u64* barrier, uint32_t bytes) {
    at(barrier).bytes += bytes;
    at(barrier).arrive();
}

// Copies come late, a while after those of all others that were sent for before; until then there is nothing.
struct Copy {
    unsigned char* to;
    const void* from;
    uint32_t bytes;
};
struct Delivery {
    std::vector<Copy> copies;
    u64* barrier;
    bool bulk;
    long due;
};
static std::vector<std::vector<Copy>> sent;  // of a thread, since it last said what shall know of it
static std::deque<Delivery> deliveries;
static std::vector<Copy> unpublished;
static long polls;
static Copy begun_copy(void* to, const void* from, uint32_t bytes) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) fault("a copy of bytes that are not aligned");
    std::memset(to, 0xff, bytes);
    std::memset(published + ((unsigned char*)to - memories), 0xff, bytes);
    return {(unsigned char*)to, from, bytes};
}
static void fetch16(void* to, const void* from) { sent[block::current].push_back(begun_copy(to, from, 16)); }
static void arrive_when_there(u64* barrier) {
    deliveries.push_back({std::move(sent[block::current]), barrier, false, polls + 400});
    sent[block::current].clear();
}
static void bring(void* to, const void* from, uint32_t bytes, u64* barrier) {
    if (at(barrier).arrivals == 0xff) fault("a barrier that is not made yet");
    deliveries.push_back({{begun_copy(to, from, bytes)}, barrier, true, polls + 400});
}
static void bring_to_both(void* to, const void* from, uint32_t bytes, u64* barrier) {
    for (unsigned block = 0; block < 2; block++) {
        look_for(block);
        long there = ((long)block - (long)rank()) * SHARED;
        bring((unsigned char*)to + there, from, bytes, (u64*)((unsigned char*)barrier + there));
    }
}
static void poll() {
    for (polls++; !deliveries.empty() && deliveries.front().due <= polls; deliveries.pop_front()) {
        const Delivery& delivery = deliveries.front();
        for (const Copy& copy : delivery.copies) {
            std::memcpy(copy.to, copy.from, copy.bytes);
            if (delivery.bulk) std::memcpy(published + (copy.to - memories), copy.from, copy.bytes);
            else unpublished.push_back(copy);
        }
        Barrier& b = at(delivery.barrier);
        if (!delivery.bulk) b.arrive();
        else b.bytes -= delivery.copies[0].bytes, b.check();
    }
}
static void await(u64* barrier, uint32_t parity) {
    for (poll(); at(barrier).parity == parity; poll()) block::pause();
    block::sync_warp();
}
static void publish() {
    for (const Copy& copy : unpublished) std::memcpy(published + (copy.to - memories), copy.to, copy.bytes);
    unpublished.clear();
}

// 32 inputs of a row, by the descriptor's bits: PTX ISA, asynchronous warpgroup-level matrix shared memory layout,
// K-major, swizzle of 128 bytes: bits 4-6 of an address are changed by its bits 7-9.
static std::vector<float> inputs_of(u64 descriptor, int row) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fault("a factor that is not swizzled by 128 bytes");
    uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    std::vector<float> inputs;
    for (int k = 0; k < 32; k++) {
        uint32_t address = start + row / 8 * eight_rows + row % 8 * 128 + k;
        address ^= (address >> 7 & 7) << 4;
        if (address >= SHARED) {
            fault("a factor outside of shared memory");
            address = 0;
        }
        inputs.push_back(e4m3_of(published[rank() * SHARED + address]));
    }
    return inputs;
}

// wgmma reads shared memory at any time until it has been waited for, and owns its sums as long: they hold nothing until
// then, and what the factors were at first they must still be at last.
static const uint32_t IN_FLIGHT = 0x7fc0dead;
struct Product {
    float* sums;
    u64 terms, weights;
    int count, batch;
    bool add;
    std::vector<float> first;
};
static std::vector<std::deque<Product>> pending;
static std::vector<int> batches;
static std::vector<char> begun;
// With what the sums are added to, where the product adds.
static std::vector<float> made(const Product& p, const float* before) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    std::vector<float> rows[2] = {inputs_of(p.terms, 16 * warp + lane / 4), inputs_of(p.terms, 16 * warp + lane / 4 + 8)};
    std::vector<float> sums(p.count);
    for (int j = 0; j < p.count / 4; j++)
        for (int c = 0; c < 2; c++) {
            std::vector<float> column = inputs_of(p.weights, 8 * j + lane % 4 * 2 + c);
            for (int r = 0; r < 2; r++) {
                int i = 4 * j + 2 * r + c;
                double sum = before ? before[i] : 0;
                if (kept) {
                    int most = sum == 0 || sum != sum ? -999 : std::ilogb(sum);
                    for (int k = 0; k < 32; k++) most = std::max(most, exponent_of(rows[r][k]) + exponent_of(column[k]));
                    sum = cut_off(sum, most - kept);
                    for (int k = 0; k < 32; k++) sum += cut_off((double)rows[r][k] * column[k], most - kept);
                    if (sum != 0 && sum == sum) sum = cut_off(sum, std::ilogb(sum) - kept);
                } else {
                    for (int k = 0; k < 32; k++) sum += (double)rows[r][k] * column[k];
                }
                sums[i] = (float)sum;
            }
        }
    return sums;
}
static void begin_products() {
    block::sync_warp();
    begun[block::current] = true;
}
static void close_products() {
    begun[block::current] = false;
    batches[block::current]++;
}
template <int COUNT> static void products_of_e4m3(float (&sums)[COUNT], u64 terms, u64 weights, bool add) {
    if (!begun[block::current]) fault("registers of a product that nobody has fenced");
    for (u64 factor : {terms, weights})
        if (block::exchange((uint32_t)factor)[0] != (uint32_t)factor) fault("lanes multiply different factors");
    Product product{sums, terms, weights, COUNT, batches[block::current], add, {}};
    product.first = made(product, nullptr);
    pending[block::current].push_back(product);
    for (float& sum : sums) {
        if (add && __float_as_uint(sum) != IN_FLIGHT) fault("a chain of products was broken");
        std::memcpy(&sum, &IN_FLIGHT, 4);
    }
}
template <int LEFT, int COUNT> static void await_products(float (&)[COUNT]) {
    block::sync_warp();
    auto& mine = pending[block::current];
    for (; !mine.empty() && mine.front().batch < batches[block::current] - LEFT; mine.pop_front()) {
        const Product& product = mine.front();
        std::vector<float> last = made(product, nullptr);
        if (std::memcmp(last.data(), product.first.data(), 4 * last.size())) fault("factors were written over in flight");
        if (product.add) last = made(product, product.sums);
        for (int i = 0; i < product.count; i++) {
            if (!product.add && __float_as_uint(product.sums[i]) != IN_FLIGHT) fault("sums were touched in flight");
            product.sums[i] = last[i];
        }
    }
}

#include "linears_some.cu"

struct Call {
    const float* x;
    const float* norm;
    u8* terms;
    float* units;
    float* y;
    const Matrix* matrices;
    long long x_row;
    int tokens, inputs, groups, tiles, own, rows, parts, grid, items;
    float eps;
};
static Call c;

// -> faults
static int blocks(unsigned grid, unsigned block_size, void (*kernel)(), unsigned together = 1) {
    faults = 0;
    blockDim.x = block_threads = block_size;
    gridDim.x = grid;
    unsigned threads = block_size * together;
    for (cluster = 0; cluster < grid; cluster += together) {
        std::fill(std::begin(memories), std::end(memories), 0xff);  // NaN
        std::fill(std::begin(published), std::end(published), 0xff);
        sent.assign(threads, {});
        pending.assign(threads, {});
        batches.assign(threads, 0);
        begun.assign(threads, false);
        block::run(threads, kernel);
        if (!deliveries.empty()) fault("a block leaves before what it sent for is there");
        for (auto& queue : pending)
            if (!queue.empty()) fault("a block leaves products that nobody awaits");
    }
    return faults;
}

#define ENTRY_OF(I) c.matrices[I].weights, c.matrices[I].scales, c.matrices[I].rows,
#define RUN(TILES)                                                                                                    \
    [] {                                                                                                              \
        penumbra_some_products_##TILES(EACH(ENTRY_OF) c.terms, c.units, c.tiles, c.y, c.tokens, c.rows,               \
                                       c.inputs / BLOCK, c.parts, c.rows / c.groups, c.items);                        \
    }
extern "C" void order(int eager, int backwards) { block::eager = eager; block::backwards = backwards; }
extern "C" void keep(int bits) { kept = bits; }
extern "C" unsigned shared_bytes(unsigned own) {
    return own == 1   ? Shape<1>::STAGES * Shape<1>::STAGE + sizeof(Fixed<1>)
           : own == 2 ? Shape<2>::STAGES * Shape<2>::STAGE + sizeof(Fixed<2>)
                      : Shape<4>::STAGES * Shape<4>::STAGE + sizeof(Fixed<4>);
}
extern "C" int run_terms(const Call* call) {
    c = *call;
    if (c.norm)
        return blocks(c.tokens, std::min(c.inputs / BLOCK, 32) * 32, [] {
            penumbra_some_terms_normed(c.x, c.x_row, c.norm, c.eps, c.terms, c.units, c.tiles, c.inputs / BLOCK);
        });
    int all = c.inputs / BLOCK * c.groups;
    return blocks(c.tokens * ((all + 7) / 8), SPLITTERS, [] {
        penumbra_some_terms(c.x, c.x_row, c.terms, c.units, c.tiles, c.inputs / BLOCK * c.groups);
    });
}
extern "C" int run_products(const Call* call) {
    c = *call;
    return c.own == 1 ? blocks(c.grid, THREADS, RUN(1)) : blocks(c.grid, THREADS, c.own == 2 ? +RUN(2) : +RUN(4), 2);
}
// y = parts
struct Added { const float* parts; float* y; long long count; int number; };
static Added a;
extern "C" int run_added(const Added* call) {
    a = *call;
    return blocks((a.count + 255) / 256, 256, [] { penumbra_some_added(a.parts, a.y, a.count, a.number); });
}
