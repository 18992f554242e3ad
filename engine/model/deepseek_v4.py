"""DeepSeek-V4 from token ids to logits: embedding, four residual streams mixed by hyper-connections, layers, head.

Shapes: T tokens, S of them wanted at the head, D hidden, V vocabulary. Activations are float32; matrices keep the
precision of the checkpoint, which bfloat16 holds exactly.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.cache.pools import KvPools
from engine.config import ModelConfig
from engine.kernels import addresses, native
from engine.kernels.hyper_connections import Behind, HyperSite, collapse, embedded, mix_in, mix_on, streams_of
from engine.kernels.linear import Matrix, linear
from engine.kernels.rows import RowPool
from engine.model.attention import Attention, LayerTensors
from engine.model.fused import FusedForward
from engine.model.moe import MixtureOfExperts


class Layer:
    def __init__(self, config: ModelConfig, layer: int, tensors: LayerTensors) -> None:
        self.config = config
        self.attention = Attention(config, layer, tensors)
        self.moe = MixtureOfExperts(config, layer, tensors)
        self.attn_norm = tensors("attn_norm.weight").float()
        self.ffn_norm = tensors("ffn_norm.weight").float()
        self.attn_site, self.ffn_site = (
            HyperSite(*(tensors(f"hc_{site}_{part}").float() for part in ("fn", "base", "scale")))
            for site in ("attn", "ffn")
        )

    def __call__(
        self, streams: Tensor | Behind, token_ids: Tensor, meta: StepMeta, window_rows: Tensor, pools: KvPools
    ) -> Behind:
        """streams [T, 4, D], or those behind the layer before -> those behind this one."""
        c = self.config
        how = c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters
        x, streams, post, comb = mix_on(streams, self.attn_site, *how, self.attn_norm)
        between = Behind(self.attention(x, meta, window_rows, pools), streams, post, comb)
        x, streams, post, comb = mix_on(between, self.ffn_site, *how, self.ffn_norm)
        return Behind(self.moe(x, token_ids), streams, post, comb)

    def write_window(self, streams: Tensor, positions: Tensor, rows: Tensor, window: RowPool) -> None:
        """Write the keys of tokens with `streams` [T, 4, D], and nothing else of what the layer does."""
        c = self.config
        x, _, _ = mix_in(streams, self.attn_site, c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters, self.attn_norm)
        self.attention.write_window(x, positions, rows, window)


class DeepseekV4:
    """The model, without any state of its own: rows and rings live in the pools it is given."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
        """Takes the checkpoint's tensors by official name, as `load_checkpoint` returns them, and empties the dict.

        Raises KeyError for a tensor the loader should have refused to miss.
        """
        self.config = config
        self.embedding = tensors.pop("embed.weight")
        self.device = self.embedding.device
        self.layers = []
        for n in range(config.num_layers):
            self.layers.append(Layer(config, n, partial(take, tensors, f"layers.{n}.")))
        self.head_fn, self.head_base, self.head_scale = (
            tensors.pop(f"hc_head_{part}").float() for part in ("fn", "base", "scale")
        )
        self.norm = tensors.pop("norm.weight").float()
        self.head = Matrix.prepare(tensors.pop("head.weight"))
        self.fused = FusedForward.of(self)  # None: every step is composed of single kernels

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, meta: StepMeta, wanted: Tensor, pools: KvPools) -> Tensor:
        """token_ids [T] int64, wanted [S] int64 token rows -> logits [S, V] float32, where the model is.

        `wanted` ascends and names no row twice. Row by row, the bits do not depend on the other rows, on where a
        prompt was cut into steps, or on threads.
        """
        if self.fused is not None and native.library() is not None:
            return self.fused.forward(token_ids, meta, wanted, pools)
        return self.read_out(self.streams(token_ids, meta, pools)[wanted.to(self.device)])

    @torch.inference_mode()
    def streams(self, token_ids: Tensor, meta: StepMeta, pools: KvPools) -> Tensor:
        """token_ids [T] int64 -> [T, 4, D], the residual streams behind the last layer: what a draft layer reads."""
        if self.fused is not None and native.library() is not None:
            return self.fused.streams(token_ids, meta, pools)
        token_ids, meta = token_ids.to(self.device), meta.to(self.device)
        rows = window_rows(meta)
        streams: Tensor | Behind = embedded(self.embedding, token_ids)
        for layer in self.layers:
            streams = layer(streams, token_ids, meta, rows, pools)
        return streams_of(streams)

    @torch.inference_mode()
    def read_out(self, streams: Tensor) -> Tensor:
        """streams [S, 4, D] -> logits [S, V]."""
        c = self.config
        site = self.head_fn, self.head_base, self.head_scale
        return linear(collapse(streams, *site, c.rms_norm_eps, c.hc_eps, self.norm), self.head)


def window_rows(meta: StepMeta) -> Tensor:
    """[T] int64: each token's own row in a window pool; a row of the sink where its page is not mapped."""
    return addresses.window_rows(meta.positions, meta.segment, meta.swa_table)


def take(tensors: dict[str, Tensor], prefix: str, name: str) -> Tensor:
    """Remove and return the tensor `prefix` + `name`."""
    return tensors.pop(prefix + name)
