"""config.json: two dialects of one shape, and every contradiction refused by field."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from wire.errors import CheckpointError

SOURCE = Path("somewhere/config.json")


@pytest.fixture(scope="module")
def original(pristine: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((pristine / "config.json").read_text())
    return data


def changed(original: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A copy with fields replaced; None removes one."""
    data = copy.deepcopy(original) | fields
    return {name: value for name, value in data.items() if value is not None}


def test_the_original_dialect_gives_every_field(original: dict[str, Any]) -> None:
    assert ModelConfig.from_json(original, source=SOURCE) == ModelConfig(
        vocab_size=320,
        hidden_size=160,
        compress_ratios=(0, 4, 128),
        num_heads=2,
        head_dim=72,
        rope_dim=16,
        q_lora_rank=40,
        o_groups=2,
        o_lora_rank=24,
        num_hash_layers=1,
        index_heads=2,
        index_head_dim=32,
        index_topk=512,
        num_experts=4,
        experts_per_token=2,
        moe_intermediate_size=32,
        routed_scaling_factor=1.5,
        swiglu_limit=10.0,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        hc_eps=1e-6,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_factor=16.0,
        rope_original_positions=65536,
        rope_beta_fast=32.0,
        rope_beta_slow=1.0,
        max_positions=1048576,
        bos_token_id=0,
        eos_token_id=1,
    )


def test_what_transformers_saves_again_reads_the_same(original: dict[str, Any]) -> None:
    from transformers import DeepseekV4Config

    saved = json.loads(DeepseekV4Config(**original).to_json_string(use_diff=False))
    assert {"layer_types", "mlp_layer_types", "rope_parameters"} <= saved.keys()
    assert not {"compress_ratios", "num_hash_layers", "rope_scaling"} & saved.keys()
    assert ModelConfig.from_json(saved, source=SOURCE) == ModelConfig.from_json(original, source=SOURCE)


def test_ratios_past_the_last_layer_belong_to_draft_layers(original: dict[str, Any]) -> None:
    drafted = changed(original, compress_ratios=[0, 4, 128, 0, 0, 0])
    assert ModelConfig.from_json(drafted, source=SOURCE).compress_ratios == (0, 4, 128)


YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}


def test_yarn_without_betas_takes_32_and_1(original: dict[str, Any]) -> None:
    config = ModelConfig.from_json(changed(original, rope_scaling=YARN), source=SOURCE)
    assert (config.rope_beta_fast, config.rope_beta_slow) == (32.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "deepseek_v41"}, "model_type is 'deepseek_v41'; this engine serves DeepSeek-V4"),
        ({"model_type": None}, "model_type is None"),
        ({"auto_map": {}}, "auto_map names Python code"),
        ({"hidden_size": None}, "hidden_size is missing; expected an integer"),
        ({"hidden_size": "256"}, "hidden_size is '256'; expected an integer"),
        ({"hidden_size": True}, "hidden_size is True; expected an integer"),
        ({"hidden_size": 160.0}, "hidden_size is 160.0; expected an integer"),
        ({"num_attention_heads": 3}, "o_groups is 2, which does not divide num_attention_heads=3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4; this engine serves DeepSeek-V4, where it is 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer from 1"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": 4}, "compress_ratios has 3 entries; num_hidden_layers=4 needs one for each layer"),
        ({"compress_ratios": [0, 4, 64]}, "compress_ratios[2] is 64; expected one of 0, 4, 128"),
        ({"compress_ratios": [False, 4, 128]}, "compress_ratios[0] is False"),
        ({"compress_ratios": [0, 4, 128, 4]}, "compress_ratios has an entry other than 0 past num_hidden_layers=3"),
        ({"compress_ratios": "0,4"}, "compress_ratios is '0,4'; expected a list"),
        ({"compress_ratios": None}, "compress_ratios is missing, and so is layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types contradicts compress_ratios"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types[0] is 'full_attention'"),
        ({"num_hash_layers": 4}, "num_hash_layers is 4; expected an integer from 0 to 3"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "mlp_layer_types has a hash_moe layer behind a moe layer"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15; expected an even number"),
        ({"qk_rope_head_dim": 80}, "qk_rope_head_dim is 80"),
        ({"index_head_dim": 8}, "index_head_dim is 8; it must hold the 16 rope channels"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; expected an integer from 1 to 4"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"hc_mult": 2}, "hc_mult is 2"),
        ({"sliding_window": 256}, "sliding_window is 256"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0; expected a finite number above 0"),
        ({"swiglu_limit": float("inf")}, "swiglu_limit is inf"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
        ({"rope_scaling": None}, "rope_scaling is None; expected an object"),
        ({"rope_scaling": YARN | {"type": "dynamic"}}, "rope_scaling.type is 'dynamic'"),
        ({"rope_scaling": YARN | {"factor": float("nan")}}, "rope_scaling.factor is nan"),
        ({"rope_scaling": YARN | {"attention_factor": 1.277}}, "rope_scaling.attention_factor is 1.277"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_parameters": {"main": {"rope_theta": 1e4}}}, "rope_parameters.compress is None; expected an object"),
        ({"bos_token_id": 320}, "bos_token_id is 320; expected an integer from 0 to 319"),
        ({"eos_token_id": [1, 2]}, "eos_token_id is [1, 2]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_cannot_be_served_is_refused_by_field(
    original: dict[str, Any], fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        ModelConfig.from_json(changed(original, **fields), source=SOURCE)
    assert str(refused.value).startswith("somewhere/config.json: " + says)
    assert "\n" not in str(refused.value)
