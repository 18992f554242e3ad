"""Attention over a 128-token window plus compressed rows: the plain, C4 and C128 layers of DeepSeek-V4.

Shapes: T tokens, D hidden, H query heads, K head size, I index heads, J index head size. All activations float32.
One KV vector per token is key and value of every head. Rows go through the pools before they are attended, in prefill
and decode alike, so both see the same (quantised) values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from engine.batch import StepMeta
from engine.cache.pools import KvPools
from engine.config import C4_RATIO, C128_RATIO, ModelConfig
from engine.kernels.beside import beside
from engine.kernels.compress import Latents, Pooling, write_c4, write_c128
from engine.kernels.index_topk import select_blocks
from engine.kernels.linear import Matrix, grouped_linear, linear, linears, stacked
from engine.kernels.norm_rope import linears_of_normed, query, rope_frequencies
from engine.kernels.rows import RowPool, write_latents
from engine.kernels.sparse_attention import sparse_attention


class LayerTensors(Protocol):
    """The checkpoint's tensors of one layer, by official name below `layers.{n}.`.

    Matrices may come as the checkpoint quantised them (`Fp8Weight`, `Fp4Stack`), where a GPU is to multiply by them.
    """

    def __call__(self, name: str) -> Any: ...


def layer_frequencies(config: ModelConfig, ratio: int) -> Tensor:
    """Rope frequencies of everything in a layer: YaRN over the compressed base wherever there is a compressor."""
    if ratio == 0:
        return rope_frequencies(config.rope_theta, config.rope_dim, None)
    yarn = (config.rope_factor, config.rope_original_positions, config.rope_beta_fast, config.rope_beta_slow)
    return rope_frequencies(config.compress_rope_theta, config.rope_dim, yarn)


@dataclass(frozen=True, slots=True)
class Compressor:
    """Pools neighbouring tokens into one row: 8 overlapping tokens every 4, or 128 every 128."""

    wkv: Matrix
    wgate: Matrix
    ape: Tensor
    norm: Tensor

    @classmethod
    def of(cls, tensors: LayerTensors, prefix: str) -> Compressor:
        return cls(
            wkv=Matrix.prepare(tensors(f"{prefix}.wkv.weight")),
            wgate=Matrix.prepare(tensors(f"{prefix}.wgate.weight")),
            ape=tensors(f"{prefix}.ape").float().contiguous(),
            norm=tensors(f"{prefix}.norm.weight").float(),
        )


class Indexer:
    """Picks the C4 rows a query reads: the top-k by sum_h w_h relu(q_h . key), lower block first on ties."""

    def __init__(self, config: ModelConfig, tensors: LayerTensors) -> None:
        self.heads, self.head_dim, self.topk = config.index_heads, config.index_head_dim, config.index_topk
        self.wq_b = Matrix.prepare(tensors("attn.indexer.wq_b.weight"))
        self.weights_proj = Matrix.prepare(tensors("attn.indexer.weights_proj.weight"))
        self.compressor = Compressor.of(tensors, "attn.indexer.compressor")
        self.weight_scale = self.head_dim**-0.5 * self.heads**-0.5

    def select(self, q: Tensor, weights: Tensor, meta: StepMeta, freqs: Tensor, pools: KvPools, layer: int) -> Tensor:
        """What `wq_b` and `weights_proj` made, [T, I * J] and [T, I] -> [T, topk] int32 block numbers, ascending, -1
        past the end.
        """
        q = q.view(-1, self.heads, self.head_dim)
        keys, half = pools.index[layer], self.wq_b.half
        return select_blocks(q, weights, self.weight_scale, freqs, keys, meta, self.topk, half)


class Attention:
    def __init__(self, config: ModelConfig, layer: int, tensors: LayerTensors) -> None:
        self.layer, self.ratio = layer, config.compress_ratios[layer]
        self.heads, self.head_dim, self.groups = config.num_heads, config.head_dim, config.o_groups
        self.eps = config.rms_norm_eps
        tensors = _stacked(tensors, self.ratio)
        self.wq_a = Matrix.prepare(tensors("attn.wq_a.weight"))
        self.q_norm = tensors("attn.q_norm.weight").float()
        self.wq_b = Matrix.prepare(tensors("attn.wq_b.weight"))
        self.wkv = Matrix.prepare(tensors("attn.wkv.weight"))
        self.kv_norm = tensors("attn.kv_norm.weight").float()
        self.sink = tensors("attn.attn_sink").float()
        self.freqs = layer_frequencies(config, self.ratio).to(self.sink.device)
        self.wo_a = Matrix.prepare(tensors("attn.wo_a.weight"))
        self.wo_b = Matrix.prepare(tensors("attn.wo_b.weight"))
        self.compressor = Compressor.of(tensors, "attn.compressor") if self.ratio else None
        self.indexer = Indexer(config, tensors) if self.ratio == C4_RATIO else None
        self.of_x = [self.wq_a, self.wkv]  # all that is multiplied by the tokens
        if self.compressor is not None:
            self.of_x += [self.compressor.wkv, self.compressor.wgate]
        if self.indexer is not None:
            c = self.indexer.compressor
            self.of_x += [c.wkv, c.wgate, self.indexer.weights_proj]

    def __call__(self, x: Tensor, meta: StepMeta, window_rows: Tensor, pools: KvPools) -> Tensor:
        """x [T, D] (site-normed) -> [T, D]. Writes this step's rows and rings; window_rows [T] are the tokens' own."""
        low, kv, *more = linears(x, self.of_x)
        # A row closed by a token is visible to that very token: write before attending.
        window, compressed, selected = pools.window[self.layer], None, None
        written = Latents(window, window_rows, kv, self.kv_norm)
        with beside(x) as other:
            with other():
                self._write(written, more, meta, pools)
            if self.indexer is not None:
                # First, for its kernels wait for each other, which the product of the queries hides.
                (index_q,) = linears_of_normed(low, self.q_norm, self.eps, [self.indexer.wq_b])
                with other():
                    selected = self.indexer.select(index_q, more[-1], meta, self.freqs, pools, self.layer)
            (q,) = linears_of_normed(low, self.q_norm, self.eps, [self.wq_b])
            q = query(q.view(-1, self.heads, self.head_dim), meta.positions, self.freqs, self.eps)
        if self.compressor is not None:
            compressed = (pools.c128 if self.indexer is None else pools.c4)[self.layer]
        scale, half = self.head_dim**-0.5, self.wq_b.half
        out = sparse_attention(q, self.sink, meta, window, compressed, self.ratio, selected, scale, half, self.freqs)
        out = out.view(out.shape[0], self.groups, -1)
        return linear(grouped_linear(out, self.wo_a, self.groups), self.wo_b)

    def write_window(self, x: Tensor, positions: Tensor, rows: Tensor, window: RowPool) -> None:
        """Write the keys of tokens x [T, D] at `positions` [T] to `rows` [T] of the layer's window."""
        write_latents(window, rows, linear(x, self.wkv), self.kv_norm, positions, self.freqs, self.eps)

    def _write(self, window: Latents, more: list[Tensor], meta: StepMeta, pools: KvPools) -> None:
        """Everything that later tokens read; more is what `of_x` made beside the queries' and the window's."""
        writing = meta if meta.write_table is None else replace(meta, page_table=meta.write_table)
        if self.compressor is None:
            write_latents(*window, meta.positions, self.freqs, self.eps)
        elif self.indexer is None:
            main = self._pooling(self.compressor, more, pools.c128_ring, pools.c128)
            write_c128(window, main, writing, self.freqs, self.eps)
        else:
            main = self._pooling(self.compressor, more, pools.c4_ring, pools.c4)
            index = self._pooling(self.indexer.compressor, more[2:], pools.index_ring, pools.index)
            # Keys that are quantised are Hadamard-turned before.
            write_c4(window, main, index, writing, self.freqs, self.eps, rotate_keys=pools.layout == "v4")

    def _pooling(
        self, c: Compressor, projected: list[Tensor], rings: dict[int, Tensor], pools: dict[int, RowPool]
    ) -> Pooling:
        u, g, *_ = projected
        return Pooling(u, g, c.ape, c.norm, rings[self.layer], pools[self.layer])


def _stacked(tensors: LayerTensors, ratio: int) -> LayerTensors:
    """The same tensors, of which those that the tokens are multiplied by lie as `stacked` says."""
    sites = {0: (), C4_RATIO: ("compressor", "indexer.compressor"), C128_RATIO: ("compressor",)}[ratio]
    names = [f"attn.{site}.{name}.weight" for site in sites for name in ("wkv", "wgate")]
    if ratio == C4_RATIO:
        names.append("attn.indexer.weights_proj.weight")
    found = dict(zip(names, stacked([tensors(name) for name in names]), strict=True))
    return lambda name: found.pop(name) if name in found else tensors(name)
