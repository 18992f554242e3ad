"""A random checkpoint in the official DeepSeek-V4 layout: FP8 and MXFP4 tensors, shards, index, config, tokenizer.

What comes out is read by the same loader as the real thing, and behaves like a model: activations keep their size
through the layers, attention looks at few keys, experts compete, logits are far from uniform. It only knows nothing.

The same arguments give the same bytes on every machine: each tensor has its own numpy stream, seeded by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model.publish import LEADING_TOKENS, PUBLISHED, TRAILING_TOKENS, publish, quantise_fp8, quantise_mxfp4
from engine.model.survey import TensorSpec
from wire.errors import ConfigError

_LIKE: dict[str | None, dict[str, Any]] = {
    None: {"layers": (0, 0, 4, 128, 4, 128), "hash_layers": 1, "index_topk": 512, "scaling": 1.5},
    "flash": {"layers": (0, 0, 4, 128, 4, 128, 4), "hash_layers": 3, "index_topk": 512, "scaling": 1.5},
    "pro": {"layers": (128, 128, 4, 128, 4, 128, 4), "hash_layers": 3, "index_topk": 1024, "scaling": 2.5},
}


def write_tiny(
    out: Path,
    *,
    seed: int,
    layers: Sequence[int] | None = None,
    hidden: int = 256,
    heads: int = 4,
    index_heads: int = 4,
    experts: int = 16,
    experts_per_token: int = 2,
    hash_layers: int | None = None,
    vocab: int | None = None,
    head_dim: int = 512,
    rope_dim: int = 64,
    q_lora_rank: int = 128,
    o_groups: int = 2,
    o_lora_rank: int = 64,
    moe_intermediate: int = 128,
    index_head_dim: int = 128,
    index_topk: int | None = None,
    like: Literal["flash", "pro"] | None = None,
    mtp: bool = False,
    max_positions: int = 1_048_576,
    swiglu_limit: float = 10.0,
    routed_scaling_factor: float | None = None,
) -> Path:
    """Write a checkpoint to the new directory `out` and return it; it appears complete or not at all.

    layers   the compress ratio of each layer (0, 4 or 128)
    vocab    at least the tokenizer's size, which is also the default, rounded up to a multiple of 64
    like     Flash or Pro: sets layers, hash_layers, index_topk and routed_scaling_factor where they are None
    mtp      also writes the tensors of one draft layer

    Raises ConfigError for a geometry that cannot be stored or run, and when `out` exists.
    """
    if like not in _LIKE:
        raise ConfigError(f"like={like!r} is not a known model. Use flash or pro.")
    defaults = _LIKE[like]
    ratios = list(defaults["layers"] if layers is None else layers)
    if hash_layers is None:
        hash_layers = min(defaults["hash_layers"], len(ratios))
    tokenizer = tokenizer_json()
    num_tokens = len(tokenizer["added_tokens"]) + 256
    vocab = -(-num_tokens // 64) * 64 if vocab is None else vocab
    if vocab < num_tokens:
        raise ConfigError(
            f"vocab={vocab} is smaller than the tokenizer's {num_tokens} tokens. Use {num_tokens} or more."
        )
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        compress_ratios=tuple(ratios),
        num_heads=heads,
        head_dim=head_dim,
        rope_dim=rope_dim,
        q_lora_rank=q_lora_rank,
        o_groups=o_groups,
        o_lora_rank=o_lora_rank,
        num_hash_layers=hash_layers,
        index_heads=index_heads,
        index_head_dim=index_head_dim,
        index_topk=defaults["index_topk"] if index_topk is None else index_topk,
        num_experts=experts,
        experts_per_token=experts_per_token,
        moe_intermediate_size=moe_intermediate,
        routed_scaling_factor=defaults["scaling"] if routed_scaling_factor is None else routed_scaling_factor,
        swiglu_limit=swiglu_limit,
        max_positions=max_positions,
        draft_layer=mtp,
        **PUBLISHED,
    )
    publish(out, config, tokenizer, _Weights(config, seed).make)
    return out


def tokenizer_json() -> dict[str, Any]:
    """A byte-level tokenizer.json: BOS, EOS, pad, the 256 bytes in order, then the other special tokens. No merges."""
    # GPT-2's alphabet: printable bytes stand for themselves, the other 68 for the letters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    first_byte = len(LEADING_TOKENS)
    specials = dict(enumerate(LEADING_TOKENS)) | dict(enumerate(TRAILING_TOKENS, start=first_byte + 256))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token_id < first_byte,  # as in DeepSeek's own: <think> and the like are visible text
            }
            for token_id, content in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # The leading tokens stand here too: an added token the vocabulary lacks is numbered behind its end.
            "vocab": {content: n for n, content in enumerate(LEADING_TOKENS)}
            | {letters[byte]: first_byte + byte for byte in range(256)},
            "merges": [],
        },
    }


class _Weights:
    """Random values for each tensor of the table, in proportions that keep a signal alive."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
        words = np.frombuffer(hashlib.sha256(f"{self.seed} {name}".encode()).digest(), dtype="<u4")
        stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(word) for word in words])))
        return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32)) * std + mean

    def linear(self, name: str, shape: tuple[int, int], gain: float = 1.0) -> Tensor:
        """[O, I]: an input of size 1 gives outputs of size `gain`, some rows louder than others."""
        loudness = self.normal(f"{name} rows", (shape[0], 1), 0.3).clamp(-1, 1) + 1.05
        return self.normal(name, shape, gain * shape[1] ** -0.5) * loudness

    def make(self, name: str, table: dict[str, TensorSpec]) -> dict[str, Tensor]:
        """The tensor, and its scale with it where it has one."""
        spec, shape = table[name], table[name].shape
        base = name.removesuffix(".weight")
        if spec.dtype in ("I8", "F8_E4M3"):
            weight = self.linear(name, (shape[0], spec.num_weights // shape[0]), _gain(base))
            codes, scale = quantise_mxfp4(weight) if spec.dtype == "I8" else quantise_fp8(weight)
            return {name: codes, f"{base}.scale": scale}
        if spec.dtype == "I64":
            # A different set of distinct experts for each token id.
            order = self.normal(name, (shape[0], self.config.num_experts), 1.0).argsort(dim=1)
            return {name: order[:, : shape[1]].contiguous()}
        value = self.bfloat16(name, shape) if spec.dtype == "BF16" else self.float32(name, shape)
        return {name: value.to(torch.bfloat16) if spec.dtype == "BF16" else value}

    def bfloat16(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "embed.weight":
            return self.normal(name, shape, 1.0)
        if name.endswith(("attn.kv_norm.weight", "attn.compressor.norm.weight")):
            # Keys and values at once. Longer than 1 so that attention prefers some keys clearly.
            return self.normal(name, shape, 0.2, 1.5)
        if name.endswith("norm.weight"):
            return self.normal(name, shape, 0.2, 1.0)
        return self.linear(name, (shape[0], shape[1]), _gain(name.removesuffix(".weight")))

    def float32(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("_fn"):
            return self.normal(name, shape, shape[1] ** -0.5)
        if name.endswith("_base"):
            return self.normal(name, shape, 0.5)
        if name.endswith("_scale"):
            return self.normal(name, shape, 0.2, 1.0)
        if name.endswith("attn_sink"):
            return self.normal(name, shape, 1.5, 1.0)
        if name.endswith("gate.bias"):
            return self.normal(name, shape, 0.1)
        return self.normal(name, shape, 1.0)  # ape


def _gain(matrix: str) -> float:
    """Output size of a linear for inputs of size 1, so that attention and experts move the streams alike."""
    if matrix == "head":
        return 2.5  # the softmax over these is a choice, not a coin toss
    if matrix.endswith(".wo_b"):
        return 2.0  # attention averages its values, which shrinks them
    if ".ffn." in matrix:
        return 0.5 if matrix.endswith(".w2") else 1.5  # the two factors of silu(w1 x) * w3 x; their product; the gate
    return 1.5 if matrix.endswith(".wgate") else 1.0
