"""Random tiny DeepSeek-V4 models: a shape drawn from a seed, and lively weights for it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from engine.config import ModelConfig

PATTERNS = {
    "flash": (0, 0, 4, 128, 4, 128, 4),
    "pro": (128, 128, 4, 128, 4),
    "all": (0, 4, 128, 4, 128, 0),
    "c4": (4, 4),
}


def tiny_config(seed: int, pattern: str, **changes: object) -> ModelConfig:
    """A shape of a few thousand parameters a layer; `changes` override what the seed drew."""
    rng = random.Random(seed)
    layers = PATTERNS[pattern]
    heads, groups = rng.choice([(2, 1), (4, 2), (8, 2)])
    head_dim, rope = rng.choice([(32, 8), (64, 16)])
    experts = rng.choice([4, 8])
    values: dict[str, object] = {
        "vocab_size": rng.choice([97, 128]),
        "hidden_size": rng.choice([48, 64]),
        "compress_ratios": layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "rope_dim": rope,
        "q_lora_rank": rng.choice([24, 32]),
        "o_groups": groups,
        "o_lora_rank": rng.choice([12, 16]),
        "num_hash_layers": rng.choice([0, 2, 3]) if len(layers) > 3 else 0,
        "index_heads": 32,
        "index_head_dim": head_dim // 2,
        "index_topk": rng.choice([512, 1024]),
        "num_experts": experts,
        "experts_per_token": rng.choice([2, 3]),
        "moe_intermediate_size": rng.choice([32, 48]),
        "routed_scaling_factor": rng.choice([1.5, 2.5]),
        "swiglu_limit": rng.choice([0.5, 10.0]),
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_factor": 16.0,
        "rope_original_positions": rng.choice([64, 65536]),
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    values["max_positions"] = int(16 * values["rope_original_positions"])  # type: ignore[call-overload]
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def random_tensors(c: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Weights by official name, experts stacked, matrices bfloat16-exact; every kind of parameter is random."""
    g = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * gain * shape[-1] ** -0.5).bfloat16()

    def vector(*shape: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        return mean + spread * torch.randn(*shape, generator=g)

    d, h, qd = c.hidden_size, c.num_heads * c.head_dim, c.q_lora_rank
    t: dict[str, Tensor] = {
        "embed.weight": (torch.randn(c.vocab_size, d, generator=g)).bfloat16(),
        "head.weight": matrix(c.vocab_size, d, gain=1.7),
        "norm.weight": vector(d, mean=1, spread=0.2).bfloat16(),
        "hc_head_fn": vector(4, 4 * d, spread=0.1),
        "hc_head_base": vector(4, spread=0.5),
        "hc_head_scale": vector(1, mean=1, spread=0.1),
    }

    def compressor(prefix: str, dim: int, ratio: int) -> None:
        width = 2 * dim if ratio == 4 else dim
        t[prefix + "wkv.weight"] = matrix(width, d)
        t[prefix + "wgate.weight"] = matrix(width, d)
        t[prefix + "ape"] = vector(ratio, width, spread=0.5)
        t[prefix + "norm.weight"] = vector(dim, mean=1, spread=0.2).bfloat16()

    for n, ratio in enumerate(c.compress_ratios):
        p = f"layers.{n}."
        for site in ("attn", "ffn"):
            t[f"{p}hc_{site}_fn"] = vector(24, 4 * d, spread=0.1)
            t[f"{p}hc_{site}_base"] = vector(24, spread=0.5)
            t[f"{p}hc_{site}_scale"] = vector(3, mean=1, spread=0.2)
            t[f"{p}{site}_norm.weight"] = vector(d, mean=1, spread=0.2).bfloat16()
        a = p + "attn."
        t[a + "wq_a.weight"] = matrix(qd, d)
        t[a + "q_norm.weight"] = vector(qd, mean=1, spread=0.2).bfloat16()
        t[a + "wq_b.weight"] = matrix(h, qd)
        t[a + "wkv.weight"] = matrix(c.head_dim, d)
        t[a + "kv_norm.weight"] = vector(c.head_dim, mean=1, spread=0.2).bfloat16()
        t[a + "attn_sink"] = vector(c.num_heads)
        t[a + "wo_a.weight"] = matrix(c.o_groups * c.o_lora_rank, h // c.o_groups)
        t[a + "wo_b.weight"] = matrix(d, c.o_groups * c.o_lora_rank)
        if ratio:
            compressor(a + "compressor.", c.head_dim, ratio)
        if ratio == 4:
            t[a + "indexer.wq_b.weight"] = matrix(c.index_heads * c.index_head_dim, qd)
            t[a + "indexer.weights_proj.weight"] = matrix(c.index_heads, d)
            compressor(a + "indexer.compressor.", c.index_head_dim, 4)
        f, e, i = p + "ffn.", c.num_experts, c.moe_intermediate_size
        t[f + "gate.weight"] = matrix(e, d)
        if n < c.num_hash_layers:
            t[f + "gate.tid2eid"] = torch.randint(e, (c.vocab_size, c.experts_per_token), generator=g)
        else:
            t[f + "gate.bias"] = vector(e, spread=0.2)
        for name, shape in (("w1", (i, d)), ("w3", (i, d)), ("w2", (d, i))):
            t[f"{f}experts.{name}"] = matrix(e, *shape)
            t[f"{f}shared_experts.{name}.weight"] = matrix(*shape)
    return t
