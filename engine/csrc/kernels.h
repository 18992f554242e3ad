// Every kernel that Python or another kernel calls. Each is explained where it is defined.
#pragma once

#include <cstdint>

namespace penumbra {
struct Pool;
}

extern "C" {

void penumbra_linear(const float* x, int64_t x_stride, int64_t rows, const void* packed, int64_t half, int64_t groups,
                     int64_t outputs, int64_t inputs, float* y, int64_t threads);

void penumbra_routed_experts(const float* x, int64_t x_stride, int64_t tokens, const int32_t* picks,
                             const float* weights, int64_t k, int64_t experts, int64_t hidden, int64_t inner,
                             const void* gate, const void* up, const void* down, int64_t half, float limit, float* y,
                             int64_t* bad, int64_t threads);

void penumbra_mlp(const float* x, int64_t x_stride, int64_t rows, const void* w1, const void* w3, const void* w2,
                  int64_t half, int64_t hidden, int64_t inner, float limit, float* y, int64_t threads);

void penumbra_route(const float* x, int64_t x_stride, int64_t rows, const void* gate, int64_t half, int64_t experts,
                    int64_t hidden, const float* bias, int64_t k, float scaling, int32_t* picks, float* weights,
                    int64_t* bad, int64_t threads);

void penumbra_mix_in(const float* streams, int64_t rows, int64_t size, const float* fn, const float* base,
                     const float* scale, float rms_eps, float hc_eps, int64_t iters, float* x, float* post,
                     float* comb, int64_t threads);

void penumbra_mix_out(const float* y, const float* streams, const float* post, const float* comb, int64_t rows,
                      int64_t size, float* out, int64_t threads);

void penumbra_collapse(const float* streams, int64_t rows, int64_t size, const float* fn, const float* base,
                       const float* scale, float rms_eps, float hc_eps, float* x, int64_t threads);

void penumbra_norm_rotate(const float* x, int64_t x_stride, int64_t rows, int64_t size, int64_t heads, int64_t norm,
                          const float* weight, float eps, const int64_t* positions, const float* freqs, int64_t pairs,
                          float direction, float* y, int64_t threads);

void penumbra_hadamard(const float* x, int64_t rows, int64_t size, float* y, int64_t threads);

void penumbra_compress_c4(const float* u, int64_t u_stride, const float* g, int64_t g_stride, const float* ape,
                          const float* norm, float* ring, int64_t size, int64_t segments, int64_t pages,
                          const int32_t* offsets, const int64_t* starts, const int32_t* page_table,
                          const int32_t* swa_table, const float* freqs, int64_t pairs, float eps, int64_t rotate_keys,
                          float* values, int64_t* rows, int64_t* count, int64_t threads);

void penumbra_compress_c128(const float* u, int64_t u_stride, const float* g, int64_t g_stride, const float* ape,
                            const float* norm, float* ring, int64_t size, int64_t segments, int64_t pages,
                            const int32_t* offsets, const int64_t* starts, const int32_t* page_table,
                            const int32_t* slots, const float* freqs, int64_t pairs, float eps, float* values,
                            int64_t* rows, int64_t* count, int64_t threads);

void penumbra_write_rows(const penumbra::Pool* pool, const int64_t* rows, const float* values, int64_t count,
                         int64_t threads);

void penumbra_read_rows(const penumbra::Pool* pool, const int64_t* rows, float* values, int64_t count,
                        int64_t threads);

void penumbra_index_topk(const float* q, const float* w, const int64_t* positions, const int32_t* offsets,
                         const int32_t* page_table, int64_t segments, int64_t pages, int64_t heads, int64_t dim,
                         const penumbra::Pool* pool, int64_t k, int32_t* out, int64_t threads);

void penumbra_sparse_attention(const float* q, const float* sink, float* out, const int64_t* positions,
                               const int32_t* offsets, const int32_t* page_table, const int32_t* swa_table,
                               const int64_t* oldest, int64_t segments, int64_t pages, int64_t heads, int64_t dim,
                               const penumbra::Pool* window, const penumbra::Pool* compressed, int64_t ratio,
                               const int32_t* selected, int64_t num_selected, float scale, int64_t threads);
}
