"""The whole forward pass in one call of the C++ library (engine/csrc/forward.cpp), for models whose rows it takes.

The layers of this package say what is computed; this only hands their tensors over. Same bits, without the cost of
some 160 calls and as many allocations a step.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.cache.pools import KvPools
from engine.config import C4_RATIO, C128_RATIO
from engine.kernels import native
from engine.kernels.hyper_connections import STREAMS, HyperSite
from engine.kernels.linear import Matrix
from engine.model.attention import Compressor, Indexer

if TYPE_CHECKING:
    from engine.model.deepseek_v4 import DeepseekV4, Layer

_P, _I, _F = native.POINTER, native.INT, native.FLOAT
_FORWARD = (_P, _P, _P, _P, _I, _P, _I, _P, _P, _P, _I)
_LANES = 16


class _Weight(ctypes.Structure):
    _fields_ = (("data", _P), ("half", _I), ("outputs", _I), ("inputs", _I))


class _Compressor(ctypes.Structure):
    _fields_ = (("wkv", _Weight), ("wgate", _Weight), ("ape", _P), ("norm", _P))


class _Site(ctypes.Structure):
    _fields_ = (("fn", _P), ("base", _P), ("scale", _P))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("ratio", _I), ("attn_site", _Site), ("ffn_site", _Site), ("attn_norm", _P), ("ffn_norm", _P),
        ("wq_a", _Weight), ("wq_b", _Weight), ("wkv", _Weight), ("wo_a", _Weight), ("wo_b", _Weight),
        ("q_norm", _P), ("kv_norm", _P), ("sink", _P), ("freqs", _P),
        ("compressor", _Compressor), ("index_compressor", _Compressor), ("index_wq_b", _Weight),
        ("index_weights", _Weight), ("gate", _Weight), ("bias", _P), ("table", _P),
        ("w1", _P), ("w3", _P), ("w2", _P), ("experts_half", _I),
        ("shared_w1", _Weight), ("shared_w3", _Weight), ("shared_w2", _Weight),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        ("num_layers", _I), ("hidden", _I), ("heads", _I), ("head_dim", _I), ("pairs", _I), ("groups", _I),
        ("index_heads", _I), ("index_dim", _I), ("topk", _I),
        ("experts", _I), ("picks", _I), ("inner", _I), ("sinkhorn_iters", _I),
        ("rms_eps", _F), ("hc_eps", _F), ("routed_scaling", _F), ("swiglu_limit", _F), ("attention_scale", _F),
        ("index_scale", _F),
        ("layers", _P), ("head_site", _Site), ("norm", _P), ("head", _Weight),
    )  # fmt: skip


class _LayerPools(ctypes.Structure):
    _fields_ = (("window", _P), ("compressed", _P), ("index", _P), ("ring", _P), ("index_ring", _P))


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("rows", _I), ("segments", _I), ("pages", _I), ("ids", _P), ("positions", _P), ("offsets", _P),
        ("starts", _P), ("segment", _P), ("page_table", _P), ("write_table", _P), ("swa_table", _P), ("slots", _P),
    )  # fmt: skip


class FusedForward:
    """One model's tensors as the C++ library reads them. Keeps them alive."""

    def __init__(self, model: DeepseekV4) -> None:
        c = model.config
        self._kept: list[object] = [model]
        self._vocab = c.vocab_size
        self._embedding = model.embedding.contiguous()
        self._pools: tuple[KvPools, ctypes.Array[_LayerPools]] | None = None
        layers = (_Layer * c.num_layers)(*(self._layer(layer) for layer in model.layers))
        fn, base, scale = (self._at(t) for t in (model.head_fn, model.head_base, model.head_scale))
        self._model = _Model(
            num_layers=c.num_layers, hidden=c.hidden_size, heads=c.num_heads, head_dim=c.head_dim,
            pairs=c.rope_dim // 2, groups=c.o_groups, index_heads=c.index_heads, index_dim=c.index_head_dim,
            topk=c.index_topk, experts=c.num_experts, picks=c.experts_per_token, inner=c.moe_intermediate_size,
            sinkhorn_iters=c.hc_sinkhorn_iters, rms_eps=c.rms_norm_eps, hc_eps=c.hc_eps,
            routed_scaling=c.routed_scaling_factor, swiglu_limit=c.swiglu_limit,
            attention_scale=c.head_dim**-0.5, index_scale=c.index_head_dim**-0.5 * c.index_heads**-0.5,
            layers=ctypes.addressof(layers), head_site=_Site(fn, base, scale), norm=self._at(model.norm),
            head=_weight(model.head),
        )  # fmt: skip
        self._kept.append(layers)

    @classmethod
    def of(cls, model: DeepseekV4) -> FusedForward | None:
        """None where the library was not built, or a row is no multiple of the sixteen lanes its kernels take."""
        c = model.config
        widths = (c.hidden_size, c.head_dim, c.rope_dim, c.q_lora_rank, c.index_head_dim)
        packed = model.head.packed and all(layer.attn_site.packed for layer in model.layers)
        return cls(model) if packed and not any(width % _LANES for width in widths) else None

    def forward(self, token_ids: Tensor, meta: StepMeta, wanted: Tensor, pools: KvPools) -> Tensor:
        """As `DeepseekV4.forward`."""
        logits = torch.empty(len(wanted), self._vocab)
        self._run(token_ids, meta, pools, wanted, logits, None)
        return logits

    def streams(self, token_ids: Tensor, meta: StepMeta, pools: KvPools) -> Tensor:
        """As `DeepseekV4.streams`."""
        streams = torch.empty(len(token_ids), STREAMS, self._model.hidden)
        self._run(token_ids, meta, pools, None, None, streams)
        return streams

    def _run(
        self,
        token_ids: Tensor,
        meta: StepMeta,
        pools: KvPools,
        wanted: Tensor | None,
        logits: Tensor | None,
        streams: Tensor | None,
    ) -> None:
        run = native.function("penumbra_forward", *_FORWARD)
        assert run is not None
        embedded = self._embedding[token_ids]
        segments, pages = meta.page_table.shape
        write_table = meta.page_table if meta.write_table is None else meta.write_table
        tokens = _Tokens(
            len(token_ids), segments, pages, token_ids.data_ptr(), meta.positions.data_ptr(), meta.offsets.data_ptr(),
            meta.starts.data_ptr(), meta.segment.data_ptr(), meta.page_table.data_ptr(), write_table.data_ptr(),
            meta.swa_table.data_ptr(), meta.slots.data_ptr(),
        )  # fmt: skip
        broken = ctypes.c_int64()
        layer_pools = self._layer_pools(pools)
        run(
            ctypes.addressof(self._model), ctypes.addressof(layer_pools), ctypes.addressof(tokens),
            embedded.data_ptr(), embedded.dtype == torch.bfloat16, None if wanted is None else wanted.data_ptr(),
            0 if wanted is None else len(wanted), None if logits is None else logits.data_ptr(),
            None if streams is None else streams.data_ptr(), ctypes.byref(broken), native.threads(),
        )  # fmt: skip
        if broken.value:
            raise ValueError(
                "a token was routed to an expert that does not exist. The checkpoint's routing table is broken, or "
                "the layer's experts are not all loaded."
            )

    def _layer_pools(self, pools: KvPools) -> ctypes.Array[_LayerPools]:
        # Read once and never through `self` again: two threads may run one model over pools of their own.
        last = self._pools
        if last is None or last[0] is not pools:
            made = (_LayerPools * self._model.num_layers)()
            for n, layer in enumerate(made):
                layer.window = pools.window[n].address
                if n in pools.c4:
                    layer.compressed, layer.index = pools.c4[n].address, pools.index[n].address
                    layer.ring, layer.index_ring = pools.c4_ring[n].data_ptr(), pools.index_ring[n].data_ptr()
                elif n in pools.c128:
                    layer.compressed, layer.ring = pools.c128[n].address, pools.c128_ring[n].data_ptr()
            self._pools = last = pools, made
        return last[1]

    def _layer(self, layer: Layer) -> _Layer:
        a, moe = layer.attention, layer.moe
        w1, w3, w2 = (_weight(w) for w in (moe.shared_gate, moe.shared_up, moe.shared_down))
        made = _Layer(
            ratio=a.ratio, attn_site=self._site(layer.attn_site), ffn_site=self._site(layer.ffn_site),
            attn_norm=self._at(layer.attn_norm), ffn_norm=self._at(layer.ffn_norm),
            wq_a=_weight(a.wq_a), wq_b=_weight(a.wq_b), wkv=_weight(a.wkv), wo_a=_weight(a.wo_a),
            wo_b=_weight(a.wo_b), q_norm=self._at(a.q_norm), kv_norm=self._at(a.kv_norm), sink=self._at(a.sink),
            freqs=self._at(a.freqs), gate=_weight(moe.gate),
            bias=None if moe.bias is None else self._at(moe.bias),
            table=None if moe.table is None else self._at(moe.table),
            w1=self._at(moe.experts.gate), w3=self._at(moe.experts.up), w2=self._at(moe.experts.down),
            experts_half=moe.experts.gate.dtype == torch.bfloat16, shared_w1=w1, shared_w3=w3, shared_w2=w2,
        )  # fmt: skip
        if a.ratio in (C4_RATIO, C128_RATIO):
            assert a.compressor is not None
            made.compressor = self._compressor(a.compressor)
        if a.ratio == C4_RATIO:
            assert isinstance(a.indexer, Indexer)
            made.index_compressor = self._compressor(a.indexer.compressor)
            made.index_wq_b, made.index_weights = _weight(a.indexer.wq_b), _weight(a.indexer.weights_proj)
        return made

    def _compressor(self, c: Compressor) -> _Compressor:
        return _Compressor(_weight(c.wkv), _weight(c.wgate), self._at(c.ape), self._at(c.norm))

    def _site(self, site: HyperSite) -> _Site:
        return _Site(self._at(site.packed_fn), self._at(site.base), self._at(site.scale))

    def _at(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _weight(matrix: Matrix) -> _Weight:
    return _Weight(matrix.data.data_ptr(), matrix.data.dtype == torch.bfloat16, matrix.outputs, matrix.inputs)
