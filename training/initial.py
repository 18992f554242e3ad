"""Weights to start from: each tensor drawn from a stream of its own, seeded by its name."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from engine.config import ModelConfig
from training.model import Transformer, kept_shapes, parameter_shapes

_LEAVES = 0.5
"""Output size of what attention and experts add to the streams at first, shared among the layers."""


def initial_model(config: ModelConfig, seed: int, device: str = "cpu") -> Transformer:
    """A model that knows nothing: every layer nearly passes its streams on, and every token is about as likely."""
    parameters = {name: _parameter(config, name, shape, seed) for name, shape in parameter_shapes(config).items()}
    kept = {name: _kept(config, name, shape, seed) for name, shape in kept_shapes(config).items()}
    move = {name: tensor.to(device) for name, tensor in (parameters | kept).items()}
    return Transformer(config, {n: move[n] for n in parameters}, {n: move[n] for n in kept})


def _normal(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator) * std


def _parameter(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name == "embed.weight":
        return _normal(name, shape, seed, 0.5)
    if name == "head.weight":
        return _normal(name, shape, seed, 0.02)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("_fn", ".ape")):
        return _normal(name, shape, seed, shape[-1] ** -0.5 if name.endswith("_fn") else 0.02)
    if name.endswith("_scale"):
        return torch.full(shape, 0.1)
    if name.endswith("_base"):
        return _base(config, name, shape)
    if name.endswith("attn_sink"):
        return torch.zeros(shape)
    std = shape[-1] ** -0.5
    if name.endswith((".wo_b.weight", ".w2", ".w2.weight")):
        std *= _LEAVES * (config.num_layers + 1) ** -0.5
    return _normal(name, shape, seed, std)


def _base(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Tensor:
    """Of a site: read mostly one stream, another in each layer, write to all, and leave the streams where they are."""
    n = config.hc_mult
    base = torch.zeros(shape)
    if name.endswith("hc_head_base"):
        return base
    at = name.split(".")
    layer = int(at[1]) if at[0] == "layers" else config.num_layers
    base[:n] = -1.5
    base[(2 * layer + name.endswith("hc_ffn_base")) % n] = 1.5
    base[2 * n :].view(n, n).fill_diagonal_(4.0)
    return base


def _kept(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("gate.bias"):
        return torch.zeros(shape)
    # A different set of distinct experts for each token id.
    return _normal(name, (shape[0], config.num_experts), seed, 1.0).argsort(dim=1)[:, : shape[1]].contiguous()
