"""The optimisers against torch's own, and what they are given."""

from __future__ import annotations

import pytest
import torch

from tests.training.toy import SHAPE
from training.config import Optimiser
from training.initial import initial_model
from training.optim import Muon, Optimisers, orthogonal, rate_factor, uses_muon


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 40), (40, 24)])
def test_muon_does_to_each_of_a_stack_what_torch_does_to_one_matrix(outputs: int, inputs: int) -> None:
    g = torch.Generator().manual_seed(1)
    stack = torch.randn(3, outputs, inputs, generator=g).requires_grad_()
    single = [matrix.detach().clone().requires_grad_() for matrix in stack]
    ours = Muon([stack], lr=0.02, momentum=0.95, weight_decay=0.1)
    theirs = torch.optim.Muon(single, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(3, outputs, inputs, generator=g)
        for matrix, gradient in zip(single, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    # bfloat16 products of a batch may be summed in another order.
    assert (stack - torch.stack(single)).abs().max() < 2e-3
    assert (stack - torch.stack(single)).abs().mean() < 2e-4


def test_an_orthogonal_update_moves_every_direction_about_alike() -> None:
    x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 64)
    values = torch.linalg.svdvals(orthogonal(x).float())
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_gets_the_matrices_of_layers_and_adamw_the_rest() -> None:
    model = initial_model(SHAPE.config(), 0)
    muon = {name for name, p in model.parameters.items() if uses_muon(name, p)}
    assert {"layers.0.attn.wq_a.weight", "layers.1.ffn.experts.w2", "mtp.0.e_proj.weight"} <= muon
    others = {name.rpartition("layers.0.")[2] for name in model.parameters.keys() - muon if "layers.1." not in name}
    assert {n for n in others if not n.startswith("mtp.")} == {
        "embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale",
        *(f"hc_{site}_{part}" for site in ("attn", "ffn") for part in ("fn", "base", "scale")),
        "attn_norm.weight", "ffn_norm.weight", "attn.q_norm.weight", "attn.kv_norm.weight", "attn.attn_sink",
        "attn.compressor.ape", "attn.compressor.norm.weight",
        "attn.indexer.compressor.ape", "attn.indexer.compressor.norm.weight",
    }  # fmt: skip


def test_the_rate_rises_then_falls_along_a_cosine() -> None:
    settings = Optimiser(warmup_steps=10, final_rate=0.1)
    assert rate_factor(0, 110, settings) == pytest.approx(0.1)
    assert rate_factor(9, 110, settings) == 1.0
    assert rate_factor(60, 110, settings) == pytest.approx(0.55)
    assert rate_factor(110, 110, settings) == pytest.approx(0.1)


def test_gradients_are_cut_to_the_norm_asked_for() -> None:
    model = initial_model(SHAPE.config(), 0)
    optimisers = Optimisers(model.parameters, Optimiser(clip_norm=1.0))
    for p in model.parameters.values():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in model.parameters.values())
    assert optimisers.step(0.1) == pytest.approx(count**0.5, rel=1e-4)
    assert all(p.grad is None for p in model.parameters.values())
