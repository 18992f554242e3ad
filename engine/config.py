"""What the engine is told: the model's shape, the cache's geometry, and how to run."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from wire.errors import CheckpointError

KvLayout = Literal["v4", "exact"]

WINDOW = 128
"""Tokens of raw KV a query sees, itself included. A fact of DeepSeek-V4."""
C4_RATIO = 4
C128_RATIO = 128
C4_RING = 16
"""Raw rows a C4 compressor keeps per SWA page: 8 for one overlapped block, doubled to rewind drafts."""
C128_RING = 256
"""Raw rows a C128 compressor keeps per request slot: one block of 128, doubled for the same reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """DeepSeek-V4's shape as config.json states it.

    `compress_ratios` has one entry (0, 4 or 128) per layer, MTP left out.
    """

    vocab_size: int
    hidden_size: int
    compress_ratios: tuple[int, ...]
    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    num_hash_layers: int
    index_heads: int
    index_head_dim: int
    index_topk: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_factor: float
    rope_original_positions: int
    rope_beta_fast: float
    rope_beta_slow: float
    max_positions: int
    bos_token_id: int
    eos_token_id: int
    draft_layer: bool = False  # the checkpoint has a complete `mtp.0`; config.json does not tell, its tensors do

    @property
    def num_layers(self) -> int:
        return len(self.compress_ratios)

    def layers_of(self, ratio: int) -> tuple[int, ...]:
        return tuple(layer for layer, r in enumerate(self.compress_ratios) if r == ratio)

    @classmethod
    def from_json(cls, data: dict[str, Any], *, source: Path) -> ModelConfig:
        """Read a parsed config.json, in the original dialect or in the one transformers re-saves.

        original   compress_ratios, num_hash_layers, rope_theta, rope_scaling, qk_rope_head_dim
        re-saved   layer_types, mlp_layer_types, rope_parameters {main, compress}, partial_rotary_factor

        Raises CheckpointError naming `source` and the field: for a missing field, a wrong type, fields that
        contradict each other, another architecture, or code to run.
        """
        field = _Fields(data, source)
        if "auto_map" in data:
            field.refuse("auto_map", "names Python code to run, and no code from a checkpoint is run; remove it")
        field.only("model_type", "deepseek_v4", required=True)
        # The mathematics here takes these for granted. A checkpoint that says otherwise is another model.
        for name, value in _FACTS.items():
            field.only(name, value)

        ratios = _layer_ratios(field)
        hash_layers = _hash_layers(field, len(ratios))
        head_dim = field.integer("head_dim", 2, 1 << 16)
        rope_dim = _rope_dim(field, head_dim)
        theta, compress_theta, yarn = _rope(field)
        heads = field.integer("num_attention_heads", 1, 1 << 16)
        groups = field.integer("o_groups", 1, 1 << 16)
        if heads % groups:
            field.refuse("o_groups", f"is {groups}, which does not divide num_attention_heads={heads}")
        vocab = field.integer("vocab_size", 1, 1 << 24)
        experts = field.integer("n_routed_experts", 1, 1 << 16)
        index_dim = field.integer("index_head_dim", 2, 1 << 16)
        if index_dim < rope_dim:
            field.refuse("index_head_dim", f"is {index_dim}; it must hold the {rope_dim} rope channels")
        return cls(
            vocab_size=vocab,
            hidden_size=field.integer("hidden_size", 1, 1 << 20),
            compress_ratios=ratios,
            num_heads=heads,
            head_dim=head_dim,
            rope_dim=rope_dim,
            q_lora_rank=field.integer("q_lora_rank", 1, 1 << 20),
            o_groups=groups,
            o_lora_rank=field.integer("o_lora_rank", 1, 1 << 20),
            num_hash_layers=hash_layers,
            index_heads=field.integer("index_n_heads", 1, 1 << 16),
            index_head_dim=index_dim,
            index_topk=field.integer("index_topk", 1, 1 << 24),
            num_experts=experts,
            experts_per_token=field.integer("num_experts_per_tok", 1, experts),
            moe_intermediate_size=field.integer("moe_intermediate_size", 1, 1 << 20),
            routed_scaling_factor=field.number("routed_scaling_factor"),
            swiglu_limit=field.number("swiglu_limit"),
            hc_mult=field.integer("hc_mult", 1, 64),
            hc_sinkhorn_iters=field.integer("hc_sinkhorn_iters", 1, 1000),
            hc_eps=field.number("hc_eps"),
            rms_norm_eps=field.number("rms_norm_eps"),
            rope_theta=theta,
            compress_rope_theta=compress_theta,
            rope_factor=yarn.number("factor"),
            rope_original_positions=yarn.integer("original_max_position_embeddings", 1, MAX_POSITIONS),
            rope_beta_fast=yarn.number("beta_fast", default=32.0),
            rope_beta_slow=yarn.number("beta_slow", default=1.0),
            max_positions=field.integer("max_position_embeddings", 1, MAX_POSITIONS),
            bos_token_id=field.integer("bos_token_id", 0, vocab - 1, default=0),
            eos_token_id=field.integer("eos_token_id", 0, vocab - 1, default=1),
        )


FLASH = ModelConfig(
    vocab_size=129_280, hidden_size=4096, compress_ratios=(0, 0, *((C4_RATIO, C128_RATIO) * 20), C4_RATIO),
    num_heads=64, head_dim=512, rope_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, num_hash_layers=3,
    index_heads=64, index_head_dim=128, index_topk=512, num_experts=256, experts_per_token=6,
    moe_intermediate_size=2048, routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=4, hc_sinkhorn_iters=20,
    hc_eps=1e-6, rms_norm_eps=1e-6, rope_theta=10_000.0, compress_rope_theta=160_000.0, rope_factor=16.0,
    rope_original_positions=65_536, rope_beta_fast=32.0, rope_beta_slow=1.0, max_positions=1_048_576, bos_token_id=0,
    eos_token_id=1,
)  # fmt: skip
"""DeepSeek-V4-Flash, where its shape is wanted without its checkpoint."""
PRO = replace(
    FLASH, hidden_size=7168, compress_ratios=(C128_RATIO, C128_RATIO, *((C4_RATIO, C128_RATIO) * 29), C4_RATIO),
    num_heads=128, q_lora_rank=1536, o_groups=16, index_topk=1024, num_experts=384, moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
)  # fmt: skip
"""DeepSeek-V4-Pro."""

MAX_POSITIONS = 1 << 24
"""Positions become float32 in the rope, which holds integers exactly up to here."""
_MAX_LAYERS = 1024
_LAYER_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": C4_RATIO,
    "heavily_compressed_attention": C128_RATIO,
}
_FACTS: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "sliding_window": WINDOW,
    "hc_mult": 4,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


class _Fields:
    """Typed look-ups in one JSON object. Every refusal names the file, the field and what was expected."""

    def __init__(self, data: dict[str, Any], source: Path, prefix: str = "") -> None:
        self.data, self.source, self.prefix = data, source, prefix

    def refuse(self, name: str, why: str) -> NoReturn:
        raise CheckpointError(f"{self.source}: {self.prefix}{name} {why}.")

    def integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self.data.get(name, default)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # re-saved configs may wrap eos_token_id
        if value is None:
            self.refuse(name, f"is missing; expected an integer from {low} to {high}")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"is {reprlib.repr(value)}; expected an integer from {low} to {high}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.data.get(name, default)
        if value is None:
            self.refuse(name, "is missing; expected a number above 0")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            self.refuse(name, f"is {reprlib.repr(value)}; expected a finite number above 0")
        return float(value)

    def only(self, name: str, expected: Any, *, required: bool = False) -> None:
        value = self.data.get(name)
        if (value is None and required) or (value is not None and value != expected):
            self.refuse(name, f"is {reprlib.repr(value)}; this engine serves DeepSeek-V4, where it is {expected!r}")

    def names(self, name: str, allowed: Sequence[Any], at_least: int) -> list[Any]:
        value = self.data[name]
        if not isinstance(value, list):
            self.refuse(name, f"is {reprlib.repr(value)}; expected a list")
        if len(value) < at_least:
            self.refuse(name, f"has {len(value)} entries; num_hidden_layers={at_least} needs one for each layer")
        for index, entry in enumerate(value):
            if isinstance(entry, bool) or entry not in allowed:
                self.refuse(
                    f"{name}[{index}]",
                    f"is {reprlib.repr(entry)}; expected one of {', '.join(map(str, allowed))}",
                )
        return list(value)

    def object(self, name: str) -> _Fields:
        value = self.data.get(name)
        if not isinstance(value, dict):
            self.refuse(name, f"is {reprlib.repr(value)}; expected an object")
        return _Fields(value, self.source, f"{self.prefix}{name}.")


def _layer_ratios(field: _Fields) -> tuple[int, ...]:
    """One ratio per layer. Entries past the last layer belong to draft layers, which are plain."""
    layers = field.integer("num_hidden_layers", 1, _MAX_LAYERS)
    stated: list[tuple[int, ...]] = []
    if "compress_ratios" in field.data:
        ratios = field.names("compress_ratios", (0, C4_RATIO, C128_RATIO), layers)
        if any(ratios[layers:]):
            field.refuse("compress_ratios", f"has an entry other than 0 past num_hidden_layers={layers}")
        stated.append(tuple(int(ratio) for ratio in ratios[:layers]))
    if "layer_types" in field.data:
        kinds = field.names("layer_types", tuple(_LAYER_TYPES), layers)
        stated.append(tuple(_LAYER_TYPES[kind] for kind in kinds[:layers]))
        expected = {kind: ratio for kind, ratio in _LAYER_TYPES.items() if ratio}
        field.only("compress_rates", expected)
    if not stated:
        field.refuse("compress_ratios", "is missing, and so is layer_types; one must give every layer's kind")
    if stated[0] != stated[-1]:
        field.refuse("layer_types", "contradicts compress_ratios; remove the wrong one")
    return stated[0]


def _hash_layers(field: _Fields, layers: int) -> int:
    if "mlp_layer_types" not in field.data:
        return field.integer("num_hash_layers", 0, layers)
    kinds = field.names("mlp_layer_types", ("hash_moe", "moe"), layers)[:layers]
    hashed = kinds.count("hash_moe")
    if "hash_moe" in kinds[hashed:]:
        field.refuse("mlp_layer_types", "has a hash_moe layer behind a moe layer; hash layers come first")
    field.only("num_hash_layers", hashed)
    return hashed


def _rope_dim(field: _Fields, head_dim: int) -> int:
    if "qk_rope_head_dim" in field.data or field.data.get("partial_rotary_factor") is None:
        rope_dim = field.integer("qk_rope_head_dim", 2, head_dim)
    else:
        rope_dim = int(head_dim * field.number("partial_rotary_factor"))
    if rope_dim % 2 or not 2 <= rope_dim <= head_dim:
        field.refuse("qk_rope_head_dim", f"is {rope_dim}; expected an even number from 2 to head_dim={head_dim}")
    return rope_dim


def _rope(field: _Fields) -> tuple[float, float, _Fields]:
    """(theta of plain layers, theta of compressed layers, the YaRN fields of compressed layers)."""
    if "rope_parameters" in field.data and field.data["rope_parameters"] is not None:
        both = field.object("rope_parameters")
        main, yarn = both.object("main"), both.object("compress")
        main.only("rope_type", "default")
        theta, compress_theta = main.number("rope_theta"), yarn.number("rope_theta")
    else:
        theta, compress_theta = field.number("rope_theta"), field.number("compress_rope_theta")
        yarn = field.object("rope_scaling")
    kind = "rope_type" if "rope_type" in yarn.data else "type"
    yarn.only(kind, "yarn", required=True)
    yarn.only("attention_factor", 1.0)
    return theta, compress_theta, yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one worker runs the model.

    kv_memory_bytes covers every pool; max_requests bounds the sequences held at once (one request slot each).
    dtype is that of products' operands: on a CPU float32, on a GPU the checkpoint's own formats times bfloat16, or
    float32 to compare with a CPU.
    kernels and graphs mean something on a GPU only: what computes steps of few tokens, CUDA C++ where it can or Triton
    alone, and whether such steps are replayed as CUDA graphs. backends likewise: "op=library,..." for what a library
    computes in place of our own kernels, "auto" or "own", as `engine.kernels.device.backends` says.
    """

    model: Path
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    kv_layout: KvLayout = "v4"
    kv_memory_bytes: int = 1 << 30
    max_requests: int = 64
    max_context: int = 0  # 0: what the checkpoint allows
    threads: int = 1
    draft: bool = True  # run the draft layer of a checkpoint that has one
    kernels: Literal["cuda", "triton"] = "cuda"
    backends: str = "auto"
    graphs: bool = True

    @property
    def half(self) -> bool:
        """Whether products take operands of 16 bits or less."""
        return self.device == "cuda" and self.dtype != "float32"
