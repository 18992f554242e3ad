"""Writing a checkpoint in the official DeepSeek-V4 layout, and the rounding that stores FP8 and MXFP4 tensors.

The same tensors give the same bytes on every machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import WINDOW, ModelConfig
from engine.model.survey import FP4_BLOCK, FP8_BLOCK, TensorSpec, tensor_table
from wire.errors import ConfigError

MakeTensor = Callable[[str, dict[str, TensorSpec]], dict[str, Tensor]]
"""(name, table) -> the named tensor in its stored format, and its scale with it where it has one."""

LEADING_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
TRAILING_TOKENS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
"""DeepSeek's own special tokens. The first three have the ids 0, 1, 2; these come last."""

PUBLISHED: dict[str, Any] = {
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_factor": 16.0,
    "rope_original_positions": 65536,
    "rope_beta_fast": 32.0,
    "rope_beta_slow": 1.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""What Flash and Pro have alike: `ModelConfig`'s fields that a model of ours leaves as they are."""

_SHARD_BYTES = 1 << 30


def publish(out: Path, config: ModelConfig, tokenizer: dict[str, Any] | str, make: MakeTensor) -> None:
    """Write a checkpoint to the new directory `out`; it appears complete or not at all.

    `tokenizer` is tokenizer.json, parsed or as text. With `config.draft_layer`, the tensors of `mtp.0` too.
    Raises ConfigError for a geometry that cannot be stored or run, and when `out` exists.
    """
    raw_config = config_json(config)
    ModelConfig.from_json(raw_config, source=out / "config.json")
    table = tensor_table(config, mtp=config.draft_layer)
    if out.exists():
        raise ConfigError(f"{out} exists; choose a new directory, or remove this one first.")

    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    building.mkdir()
    try:
        _write_json(building / "config.json", raw_config)
        _write_json(building / "generation_config.json", _GENERATION | _ends(config))
        if isinstance(tokenizer, str):
            (building / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        else:
            _write_json(building / "tokenizer.json", tokenizer)
        _write_json(building / "tokenizer_config.json", _TOKENIZER_CONFIG | {"model_max_length": config.max_positions})
        _write_shards(building, make, table)
        try:
            os.rename(building, out)
        except OSError as error:
            raise ConfigError(f"{out} cannot be created: {error.strerror}. Choose another directory.") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json in the original dialect: `ModelConfig.from_json` reads the same config back."""
    c = config
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": 1,
        "head_dim": c.head_dim,
        "qk_rope_head_dim": c.rope_dim,
        "q_lora_rank": c.q_lora_rank,
        "o_groups": c.o_groups,
        "o_lora_rank": c.o_lora_rank,
        "sliding_window": WINDOW,
        "compress_ratios": [*c.compress_ratios, *[0] * c.draft_layer],
        "num_hash_layers": c.num_hash_layers,
        "rope_theta": c.rope_theta,
        "compress_rope_theta": c.compress_rope_theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": c.rope_factor,
            "original_max_position_embeddings": c.rope_original_positions,
            "beta_fast": c.rope_beta_fast,
            "beta_slow": c.rope_beta_slow,
        },
        "max_position_embeddings": c.max_positions,
        "index_n_heads": c.index_heads,
        "index_head_dim": c.index_head_dim,
        "index_topk": c.index_topk,
        "n_routed_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "n_shared_experts": 1,
        "moe_intermediate_size": c.moe_intermediate_size,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": c.routed_scaling_factor,
        "swiglu_limit": c.swiglu_limit,
        "hc_mult": c.hc_mult,
        "hc_sinkhorn_iters": c.hc_sinkhorn_iters,
        "hc_eps": c.hc_eps,
        "rms_norm_eps": c.rms_norm_eps,
        "num_nextn_predict_layers": int(c.draft_layer),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        **_ends(c),
        "torch_dtype": "bfloat16",
        "expert_dtype": "fp4",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
    }


def _ends(config: ModelConfig) -> dict[str, Any]:
    return {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}


_GENERATION = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
_TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": LEADING_TOKENS[0],
    "eos_token": LEADING_TOKENS[1],
    "pad_token": LEADING_TOKENS[2],
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] float32 -> float8_e4m3fn [O, I] and its scales, float8_e8m0fnu [ceil(O/128), ceil(I/128)].

    A block's scale is the smallest power of two that keeps its largest value within E4M3's 448. Along an axis that
    is no multiple of 128 all blocks have the scale of the largest: transformers takes the size over the number of
    scales for a block's, and would give some rows their neighbours' scale.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    largest = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-4)
    for axis, size in enumerate(weight.shape):
        if size % FP8_BLOCK:
            largest = largest.amax(dim=axis, keepdim=True).expand_as(largest)
    exponent = _scale_exponent(largest, 448.0)
    codes = torch.ldexp(blocks, -exponent[:, None, :, None]).view(padded.shape)[:rows, :columns]
    scale = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def quantise_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] float32 -> int8 [O, I/2], two E2M1 codes a byte, and float8_e8m0fnu [O, I/32]."""
    groups = weight.view(weight.shape[0], -1, FP4_BLOCK)
    exponent = _scale_exponent(groups.abs().amax(dim=2).clamp(min=6 * 2.0**-126), 6.0)
    value = torch.ldexp(groups, -exponent[:, :, None])
    # Between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    code = torch.bucketize(value.abs(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    code = (code | (value < 0).long() << 3).view(weight.shape)
    packed = (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    return packed, (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _scale_exponent(largest: Tensor, limit: float) -> Tensor:
    """The smallest integer e with largest <= limit * 2^e. frexp and ldexp, because log2 rounds differently by CPU."""
    mantissa, exponent = torch.frexp(largest / limit)
    return torch.where(mantissa == 0.5, exponent - 1, exponent)


def _write_shards(directory: Path, make: MakeTensor, table: dict[str, TensorSpec]) -> None:
    """At least two shards, so that the index is never idle; one at a time in memory."""
    total = sum(spec.num_bytes for spec in table.values())
    count = max(2, -(-total // _SHARD_BYTES))
    shards: list[list[str]] = [[] for _ in range(count)]
    shard, seen = shards[0], 0
    for name, spec in table.items():
        if not name.endswith(".scale"):  # a scale stays with its weight
            shard = shards[seen * count // total]
        shard.append(name)
        seen += spec.num_bytes
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            if not name.endswith(".scale"):
                tensors.update(make(name, table))
        placed.update(dict.fromkeys(names, file_name))
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        (directory / file_name).chmod(0o644)  # save_file leaves it to its owner alone
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
