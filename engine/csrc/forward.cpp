// The whole model in one call: the same kernels in the same order as engine/model composes them in Python, which says
// what every line means. In a decode step the calls between them would cost more than the kernels, and in prefill
// every intermediate would be fresh memory for the system to clear.
//
// One thing is done better than there: what only the head reads is computed only for the rows the head reads. The last
// layer writes KV and rings for every token, but attends and thinks for the wanted ones alone.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace penumbra {
namespace {

// The structures below are mirrored in engine/model/fused.py, field for field.

struct Weight {
    const void* data;
    int64_t half, outputs, inputs;
};

struct Compressor {
    Weight wkv, wgate;
    const float *ape, *norm;
};

struct Site {
    const float *fn, *base, *scale;
};

struct Layer {
    int64_t ratio;
    Site attn_site, ffn_site;
    const float *attn_norm, *ffn_norm;
    Weight wq_a, wq_b, wkv, wo_a, wo_b;
    const float *q_norm, *kv_norm, *sink, *freqs;
    Compressor compressor;             // ratio 4 and 128
    Compressor index_compressor;       // ratio 4, as what follows
    Weight index_wq_b, index_weights;
    Weight gate;
    const float* bias;     // null in a layer that routes by table
    const int64_t* table;  // [vocab, picks]
    const void *w1, *w3, *w2;
    int64_t experts_half;
    Weight shared_w1, shared_w3, shared_w2;
};

struct Model {
    int64_t num_layers, hidden, heads, head_dim, pairs, groups;
    int64_t index_heads, index_dim, topk;
    int64_t experts, picks, inner, sinkhorn_iters;
    float rms_eps, hc_eps, routed_scaling, swiglu_limit, attention_scale, index_scale;
    const Layer* layers;
    Site head_site;
    const float* norm;
    Weight head;
};

struct LayerPools {
    const Pool *window, *compressed, *index;
    float *ring, *index_ring;
};

// Some of a step's tokens, and where they belong; see engine/batch.py.
struct Tokens {
    int64_t rows, segments, pages;
    const int64_t* ids;
    const int64_t* positions;
    const int32_t* offsets;
    const int64_t* starts;
    const int32_t *segment, *page_table, *write_table, *swa_table, *slots;
};

constexpr int64_t kPageTokens = 256, kStreams = 4;

// Memory for one step, kept for the next.
class Arena {
  public:
    void reset() { used_ = 0; }

    float* floats(int64_t count) { return (float*)bytes(count * 4); }

    template <typename T>
    T* array(int64_t count) {
        return (T*)bytes(count * sizeof(T));
    }

  private:
    struct Piece {
        std::vector<char> memory;
        char* begin() { return (char*)(((uintptr_t)memory.data() + 63) / 64 * 64); }
    };

    // Pieces are taken in the same order in every step, so piece i finds its size again.
    void* bytes(int64_t count) {
        if (used_ == (int64_t)pieces_.size()) pieces_.emplace_back();
        Piece& piece = pieces_[used_++];
        if ((int64_t)piece.memory.size() < count + 64) piece.memory = std::vector<char>(count + 64);
        return piece.begin();
    }

    std::vector<Piece> pieces_;
    int64_t used_ = 0;
};

struct Forward {
    const Model& m;
    const LayerPools* pools;
    Arena& arena;
    int64_t threads;

    // Buffers of the widest intermediates, shared by all layers.
    float *streams, *x, *post, *comb, *normed, *q_low, *q, *attended, *kv, *u, *g, *low, *y, *shared;
    float *index_q, *index_w, *closed;
    int64_t *window_rows, *closed_rows;
    int32_t *selected, *picks;
    float* pick_weights;

    void linear(const float* in, int64_t rows, const Weight& w, float* out) const {
        penumbra_linear(in, w.inputs, rows, w.data, w.half, 1, w.outputs, w.inputs, out, threads);
    }

    void rms_norm(const float* in, int64_t rows, int64_t size, const float* weight, float* out) const {
        penumbra_norm_rotate(in, size, rows, size, 1, 1, weight, m.rms_eps, nullptr, nullptr, 0, 1.0f, out, threads);
    }

    void mix_in(const Site& site, int64_t rows, const float* norm) const {
        penumbra_mix_in(streams, rows, m.hidden, site.fn, site.base, site.scale, m.rms_eps, m.hc_eps,
                        m.sinkhorn_iters, x, post, comb, threads);
        rms_norm(x, rows, m.hidden, norm, normed);
    }

    void mix_out(int64_t rows) const {
        penumbra_mix_out(y, streams, post, comb, rows, m.hidden, streams, threads);
    }

    void reserve(const Tokens& all) {
        const int64_t t = all.rows, wide = m.heads * m.head_dim;
        int64_t u_width = 0, low_width = 0, q_low_width = 0;
        for (int64_t n = 0; n < m.num_layers; ++n) {
            const Layer& l = m.layers[n];
            if (l.ratio) u_width = std::max(u_width, l.compressor.wkv.outputs);
            if (l.ratio == 4) u_width = std::max(u_width, l.index_compressor.wkv.outputs);
            low_width = std::max(low_width, l.wo_a.outputs);
            q_low_width = std::max(q_low_width, l.wq_a.outputs);
        }
        streams = arena.floats(t * kStreams * m.hidden);
        x = arena.floats(t * m.hidden);
        post = arena.floats(t * kStreams);
        comb = arena.floats(t * kStreams * kStreams);
        normed = arena.floats(t * m.hidden);
        q_low = arena.floats(t * q_low_width);
        q = arena.floats(t * wide);
        attended = arena.floats(t * wide);
        kv = arena.floats(t * m.head_dim);
        u = arena.floats(t * u_width);
        g = arena.floats(t * u_width);
        low = arena.floats(t * low_width);
        y = arena.floats(t * m.hidden);
        shared = arena.floats(t * m.hidden);
        index_q = arena.floats(t * m.index_heads * m.index_dim);
        index_w = arena.floats(t * m.index_heads);
        closed = arena.floats((t / 4 + all.segments) * std::max(m.head_dim, m.index_dim));
        window_rows = arena.array<int64_t>(t);
        closed_rows = arena.array<int64_t>(t / 4 + all.segments);
        selected = arena.array<int32_t>(t * m.topk);
        picks = arena.array<int32_t>(t * m.picks);
        pick_weights = arena.floats(t * m.picks);
    }

    // The rows and rings every later token may read, from the normed inputs of all tokens.
    void write_state(const Layer& l, const LayerPools& p, const Tokens& all) const {
        linear(normed, all.rows, l.wkv, kv);
        penumbra_norm_rotate(kv, m.head_dim, all.rows, m.head_dim, 1, 1, l.kv_norm, m.rms_eps, all.positions, l.freqs,
                             m.pairs, 1.0f, kv, threads);
        penumbra_write_rows(p.window, window_rows, kv, all.rows, threads);
        if (l.ratio == 0) return;
        compress(l, l.compressor, m.head_dim, p.ring, *p.compressed, false, all);
        if (l.ratio == 4) {
            compress(l, l.index_compressor, m.index_dim, p.index_ring, *p.index, p.index->codec == kIndexV4, all);
        }
    }

    void compress(const Layer& l, const Compressor& c, int64_t size, float* ring, const Pool& out, bool rotate_keys,
                  const Tokens& all) const {
        const int64_t width = c.wkv.outputs;
        linear(normed, all.rows, c.wkv, u);
        linear(normed, all.rows, c.wgate, g);
        int64_t count = 0;
        if (l.ratio == 4) {
            penumbra_compress_c4(u, width, g, width, c.ape, c.norm, ring, size, all.segments, all.pages, all.offsets,
                                 all.starts, all.write_table, all.swa_table, l.freqs, m.pairs, m.rms_eps, rotate_keys,
                                 closed, closed_rows, &count, threads);
        } else {
            penumbra_compress_c128(u, width, g, width, c.ape, c.norm, ring, size, all.segments, all.pages,
                                   all.offsets, all.starts, all.write_table, all.slots, l.freqs, m.pairs, m.rms_eps,
                                   closed, closed_rows, &count, threads);
        }
        penumbra_write_rows(&out, closed_rows, closed, count, threads);
    }

    // Attention of the given tokens, whose rows are written, into y.
    void attend(const Layer& l, const LayerPools& p, const Tokens& t) const {
        linear(normed, t.rows, l.wq_a, q_low);
        rms_norm(q_low, t.rows, l.wq_a.outputs, l.q_norm, q_low);
        linear(q_low, t.rows, l.wq_b, q);
        penumbra_norm_rotate(q, m.head_dim, t.rows * m.heads, m.head_dim, m.heads, 1, nullptr, m.rms_eps,
                             t.positions, l.freqs, m.pairs, 1.0f, q, threads);
        if (l.ratio == 4) {
            const int64_t index_rows = t.rows * m.index_heads;
            linear(q_low, t.rows, l.index_wq_b, index_q);
            penumbra_norm_rotate(index_q, m.index_dim, index_rows, m.index_dim, m.index_heads, 0, nullptr, 0.0f,
                                 t.positions, l.freqs, m.pairs, 1.0f, index_q, threads);
            if (p.index->codec == kIndexV4) penumbra_hadamard(index_q, index_rows, m.index_dim, index_q, threads);
            linear(normed, t.rows, l.index_weights, index_w);
            for (int64_t i = 0; i < index_rows; ++i) index_w[i] *= m.index_scale;
            penumbra_index_topk(index_q, index_w, t.positions, t.offsets, t.page_table, t.segments, t.pages,
                                m.index_heads, m.index_dim, p.index, m.topk, selected, threads);
        }
        penumbra_sparse_attention(q, l.sink, attended, t.positions, t.offsets, t.page_table, t.swa_table, nullptr,
                                  t.segments, t.pages, m.heads, m.head_dim, p.window, p.compressed, l.ratio,
                                  l.ratio == 4 ? selected : nullptr, l.ratio == 4 ? m.topk : 0, m.attention_scale,
                                  threads);
        penumbra_norm_rotate(attended, m.head_dim, t.rows * m.heads, m.head_dim, m.heads, 0, nullptr, 0.0f,
                             t.positions, l.freqs, m.pairs, -1.0f, attended, threads);
        penumbra_linear(attended, m.heads * m.head_dim, t.rows, l.wo_a.data, l.wo_a.half, m.groups,
                        l.wo_a.outputs / m.groups, l.wo_a.inputs, low, threads);
        linear(low, t.rows, l.wo_b, y);
    }

    // Experts of the given tokens into y. False: a routing table named an expert that does not exist.
    bool think(const Layer& l, const Tokens& t) const {
        int64_t bad = -1;
        if (l.table) {
            for (int64_t i = 0; i < t.rows; ++i)
                for (int64_t j = 0; j < m.picks; ++j)
                    picks[i * m.picks + j] = (int32_t)l.table[t.ids[i] * m.picks + j];
        }
        penumbra_route(normed, m.hidden, t.rows, l.gate.data, l.gate.half, m.experts, m.hidden, l.bias, m.picks,
                       m.routed_scaling, picks, pick_weights, &bad, threads);
        if (bad >= 0) return false;
        penumbra_routed_experts(normed, m.hidden, t.rows, picks, pick_weights, m.picks, m.experts, m.hidden, m.inner,
                                l.w1, l.w3, l.w2, l.experts_half, m.swiglu_limit, y, &bad, threads);
        penumbra_mlp(normed, m.hidden, t.rows, l.shared_w1.data, l.shared_w3.data, l.shared_w2.data,
                     l.shared_w1.half, m.hidden, l.shared_w1.outputs, m.swiglu_limit, shared, threads);
        for (int64_t i = 0; i < t.rows * m.hidden; ++i) y[i] += shared[i];
        return true;
    }

    // Rows `which` of a buffer, moved to its front. Ascending, so none is overwritten before it has moved.
    void keep(float* buffer, int64_t width, const int64_t* which, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) std::memmove(buffer + i * width, buffer + which[i] * width, width * 4);
    }

    bool run(const Tokens& all, const void* embedded, bool half, const int64_t* which, int64_t count, float* logits,
             float* all_streams) {
        reserve(all);
        for (int64_t t = 0; t < all.rows; ++t) {
            const int32_t* table = all.swa_table + all.segment[t] * all.pages;
            const int64_t p = all.positions[t];
            window_rows[t] = table[p / kPageTokens] * kPageTokens + p % kPageTokens;
            float* to = streams + t * kStreams * m.hidden;
            for (int64_t d = 0; d < m.hidden; ++d) {
                const int64_t at = t * m.hidden + d;
                to[d] = half ? float_of((uint32_t)((const uint16_t*)embedded)[at] << 16) : ((const float*)embedded)[at];
            }
            for (int64_t j = 1; j < kStreams; ++j) std::memcpy(to + j * m.hidden, to, m.hidden * sizeof(float));
        }
        Tokens tokens = all;
        for (int64_t n = 0; n < m.num_layers; ++n) {
            const Layer& l = m.layers[n];
            mix_in(l.attn_site, tokens.rows, l.attn_norm);
            write_state(l, pools[n], all);
            if (n == m.num_layers - 1 && count < all.rows && !all_streams) {
                if (count == 0) return true;
                tokens = wanted(all, which, count);
                keep(streams, kStreams * m.hidden, which, count);
                keep(normed, m.hidden, which, count);
                keep(post, kStreams, which, count);
                keep(comb, kStreams * kStreams, which, count);
            }
            attend(l, pools[n], tokens);
            mix_out(tokens.rows);
            mix_in(l.ffn_site, tokens.rows, l.ffn_norm);
            if (!think(l, tokens)) return false;
            mix_out(tokens.rows);
        }
        if (all_streams) {
            std::memcpy(all_streams, streams, all.rows * kStreams * m.hidden * sizeof(float));
            return true;
        }
        penumbra_collapse(streams, count, m.hidden, m.head_site.fn, m.head_site.base, m.head_site.scale, m.rms_eps,
                          m.hc_eps, x, threads);
        rms_norm(x, count, m.hidden, m.norm, normed);
        linear(normed, count, m.head, logits);
        return true;
    }

    // Chosen tokens as segments of one token each.
    Tokens wanted(const Tokens& all, const int64_t* which, int64_t count) const {
        auto* ids = arena.array<int64_t>(count);
        auto* positions = arena.array<int64_t>(count);
        auto* offsets = arena.array<int32_t>(count + 1);
        auto* segment = arena.array<int32_t>(count);
        auto* page_table = arena.array<int32_t>(count * all.pages);
        auto* swa_table = arena.array<int32_t>(count * all.pages);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t from = all.segment[which[i]] * all.pages;
            ids[i] = all.ids[which[i]];
            positions[i] = all.positions[which[i]];
            offsets[i] = segment[i] = (int32_t)i;
            std::copy(all.page_table + from, all.page_table + from + all.pages, page_table + i * all.pages);
            std::copy(all.swa_table + from, all.swa_table + from + all.pages, swa_table + i * all.pages);
        }
        offsets[count] = (int32_t)count;
        return {count,   count,      all.pages, ids,       positions, offsets, positions,
                segment, page_table, nullptr,   swa_table, nullptr};  // nothing is written for them any more
    }
};

}  // namespace
}  // namespace penumbra

// tokens.ids are within the vocabulary; embedded is their rows of the embedding, bf16 if `half`, else fp32. `which`
// [count] are the rows whose logits are wanted, ascending, none twice; logits [count, V]. With all_streams [T, 4, D] the
// streams behind the last layer go there instead, and no logits are made. bad becomes 1 when a routing table names an
// expert that does not exist, else 0.
extern "C" void penumbra_forward(const penumbra::Model* model, const penumbra::LayerPools* pools,
                                 const penumbra::Tokens* tokens, const void* embedded, int64_t half,
                                 const int64_t* which, int64_t count, float* logits, float* all_streams,
                                 int64_t* bad, int64_t threads) {
    using namespace penumbra;
    static thread_local Arena arena;
    arena.reset();
    Forward forward{*model, pools, arena, threads};
    *bad = forward.run(*tokens, embedded, half != 0, which, count, logits, all_streams) ? 0 : 1;
}
