"""The same tiny model in transformers: the outside judge of float32 logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from engine.config import ModelConfig

# Official name -> transformers name, most specific first.
RENAMES = (
    ("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"),
    ("attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.compressor.wkv", "self_attn.compressor.kv_proj"),
    ("attn.compressor.wgate", "self_attn.compressor.gate_proj"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.norm", "self_attn.compressor.kv_norm"),
    ("attn.wq_a", "self_attn.q_a_proj"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.wq_b", "self_attn.q_b_proj"),
    ("attn.wkv", "self_attn.kv_proj"),
    ("attn.kv_norm", "self_attn.kv_norm"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.wo_a", "self_attn.o_a_proj"),
    ("attn.wo_b", "self_attn.o_b_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.", "mlp.gate."),
    ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
    ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
)


def transformers_config(c: ModelConfig) -> DeepseekV4Config:
    partial = c.rope_dim / c.head_dim
    main = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": partial}
    compress = {
        "rope_type": "yarn",
        "rope_theta": c.compress_rope_theta,
        "partial_rotary_factor": partial,
        "factor": c.rope_factor,
        "original_max_position_embeddings": c.rope_original_positions,
        "beta_fast": c.rope_beta_fast,
        "beta_slow": c.rope_beta_slow,
        "attention_factor": 1.0,
    }
    return DeepseekV4Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        moe_intermediate_size=c.moe_intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        head_dim=c.head_dim,
        partial_rotary_factor=partial,
        q_lora_rank=c.q_lora_rank,
        o_groups=c.o_groups,
        o_lora_rank=c.o_lora_rank,
        num_experts_per_tok=c.experts_per_token,
        n_routed_experts=c.num_experts,
        routed_scaling_factor=c.routed_scaling_factor,
        swiglu_limit=c.swiglu_limit,
        compress_ratios=list(c.compress_ratios),
        num_hash_layers=c.num_hash_layers,
        index_n_heads=c.index_heads,
        index_head_dim=c.index_head_dim,
        index_topk=c.index_topk,
        max_position_embeddings=c.max_positions,
        rope_parameters={"main": main, "compress": compress},
        # The grouped expert kernels and SDPA differ from their own eager forms; the eager ones are the reference.
        attn_implementation="eager",
        experts_implementation="eager",
    )


def transformers_model(c: ModelConfig, tensors: dict[str, Tensor]) -> DeepseekV4ForCausalLM:
    """`tensors` by official name, experts stacked. Every parameter must be covered, none left over."""
    model = DeepseekV4ForCausalLM(transformers_config(c)).eval()
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "head.weight":
            state["lm_head.weight"] = value
        elif ".ffn.experts." in name:
            layer, part = name.split(".ffn.experts.")
            target = f"model.{layer}.mlp.experts."
            if part == "w2":
                state[target + "down_proj"] = value
            elif part == "w1":
                state[target + "gate_up_proj"] = torch.cat([value, tensors[f"{layer}.ffn.experts.w3"]], 1)
        else:
            renamed = name.replace("hc_head_", "hc_head.hc_").replace("embed.", "embed_tokens.")
            for ours, theirs in RENAMES:
                if ours in renamed:
                    renamed = renamed.replace(ours, theirs)
                    break
            state["model." + renamed] = value
    missing, unexpected = model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False
    )
    assert not missing, missing
    assert not unexpected, unexpected
    return model


class Picks:
    """Records what the oracle chose in its last forward: layer -> what was read or who was asked.

    rows     [T, k] block numbers of the C4 rows its indexers picked, -1 for none
    experts  [T, k] experts its scored routers picked
    """

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.rows: dict[int, Tensor] = {}
        self.experts: dict[int, Tensor] = {}
        for n, layer in enumerate(model.model.layers):
            indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
            if indexer is not None:
                indexer.register_forward_hook(lambda _m, _i, out, n=n: self.rows.__setitem__(n, out[0]))
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out, n=n: self.experts.__setitem__(n, out[2]))
