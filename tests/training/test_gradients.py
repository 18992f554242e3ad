"""The trainer's forward pass and gradients against transformers, parameter group by parameter group."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.transformers_v4 import RENAMES, transformers_model
from engine.config import ModelConfig
from tests.engine.geometries import random_tensors, tiny_config
from training.model import Numerics, Transformer

TOKENS = 300  # two closed C128 rows, 75 C4 rows of which 16 are read, and a block that is not whole


def tiny(seed: int, pattern: str, **changes: object) -> tuple[ModelConfig, dict[str, Tensor]]:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "index_topk": 16, "vocab_size": 97}
    config = tiny_config(seed, pattern, **(sizes | changes))
    return config, random_tensors(config, seed)


def of(config: ModelConfig, tensors: dict[str, Tensor]) -> Transformer:
    kept = {name: t for name, t in tensors.items() if name.endswith((".tid2eid", "gate.bias"))}
    return Transformer(config, {n: t.clone() for n, t in tensors.items() if n not in kept}, kept)


def losses(model: Transformer, ids: Tensor, numerics: Numerics) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the next token, and the indexers' summed divergence."""
    run = model.begin(numerics)
    hidden = run.hidden(run.streams(ids[:, :-1]))
    total, _ = run.cross_entropy(hidden, ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.float32))
    return total / ids[:, 1:].numel(), sum(run.observed.index_loss.values(), torch.zeros(()))


def group(name: str) -> str:
    """What kind of parameter it is: its name without layer and expert numbers."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def oracle_gradients(oracle: torch.nn.Module, names: list[str]) -> dict[str, Tensor | None]:
    """The oracle's gradients by official name."""
    theirs = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    found: dict[str, Tensor | None] = {}
    for name in names:
        if name == "head.weight":
            found[name] = theirs["lm_head.weight"]
        elif ".ffn.experts." in name:
            layer, part = name.split(".ffn.experts.")
            both = theirs[f"model.{layer}.mlp.experts.{'down_proj' if part == 'w2' else 'gate_up_proj'}"]
            assert both is not None
            found[name] = both if part == "w2" else both.chunk(2, dim=1)[part == "w3"]
        else:
            renamed = name.replace("hc_head_", "hc_head.hc_").replace("embed.", "embed_tokens.")
            for ours, other in RENAMES:
                if ours in renamed:
                    renamed = renamed.replace(ours, other)
                    break
            found[name] = theirs["model." + renamed]
    return found


@pytest.mark.parametrize(("seed", "pattern"), [(31, "all"), (33, "pro")])
def test_gradients_are_those_of_autograd_through_transformers(seed: int, pattern: str) -> None:
    config, tensors = tiny(seed, pattern, num_hash_layers=2)
    ids = torch.randint(config.vocab_size, (2, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    oracle = transformers_model(config, tensors)
    watched = Watched(oracle)
    logits = oracle(ids[:, :-1], use_cache=False).logits
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    want.backward(retain_graph=True)
    model = of(config, tensors)
    got, index_loss = losses(model, ids, Numerics())
    assert abs(got.item() - want.item()) < 1e-5
    got.backward(retain_graph=True)
    errors, sizes = defaultdict(float), defaultdict(float)
    indexers = [name for name in model.parameters if ".indexer." in name]
    for name, theirs in oracle_gradients(oracle, [n for n in model.parameters if n not in indexers]).items():
        ours = model.parameters[name].grad
        assert ours is not None, name
        assert theirs is not None, name
        errors[group(name)] += (ours - theirs).square().sum().item()
        sizes[group(name)] += theirs.square().sum().item()
    assert all(model.parameters[name].grad is None for name in indexers), "the choice of rows has no gradient"

    # The indexers learn by their own loss, which the oracle does not have: made here from what it computed.
    expected = watched.divergence()
    assert abs(index_loss.item() - expected.item()) < 1e-3 * expected.item()
    for parameter in oracle.parameters():
        parameter.grad = None
    expected.backward()
    index_loss.backward()
    for name, theirs in oracle_gradients(oracle, indexers).items():
        ours = model.parameters[name].grad
        assert ours is not None, name
        assert theirs is not None, name
        errors[group(name)] += (ours - theirs).square().sum().item()
        sizes[group(name)] += theirs.square().sum().item()
    relative = {name: (errors[name] / sizes[name]) ** 0.5 for name in errors}
    assert max(relative.values()) <= 1e-3, {name: e for name, e in relative.items() if e > 1e-3}
    kinds = {"embed.weight", "head.weight", "hc_head_fn", "layers.attn.attn_sink", "layers.attn.compressor.ape"}
    assert kinds <= relative.keys()
    assert ("layers.attn.indexer.weights_proj.weight" in relative) == bool(config.layers_of(4))


class Watched:
    """Scores and attention of the oracle's C4 layers."""

    def __init__(self, oracle: torch.nn.Module) -> None:
        self.scores: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}
        for n, layer in enumerate(oracle.model.layers):
            indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
            if indexer is not None:
                indexer.scorer.register_forward_hook(lambda _m, _i, out, n=n: self.scores.__setitem__(n, out))
                layer.self_attn.register_forward_hook(lambda _m, _i, out, n=n: self.attention.__setitem__(n, out[1]))

    def divergence(self) -> Tensor:
        """Sum over queries of KL(attention over the rows it read || softmax of the scores over them)."""
        total = torch.zeros(())
        for n, scores in self.scores.items():
            mass = self.attention[n][..., -scores.shape[-1] :].sum(1).detach()  # [B, T, R]
            mass, scores = mass[mass.sum(-1) > 0], scores[mass.sum(-1) > 0]
            p = mass / mass.sum(-1, keepdim=True)
            guess = scores.masked_fill(mass == 0, -torch.inf).log_softmax(-1)
            total = total + torch.where(p > 0, p * (p.clamp(min=1e-30).log() - guess), 0.0).sum()
        return total


@pytest.mark.parametrize(
    "other",
    [Numerics(recompute=True), Numerics(query_chunk=128), Numerics(recompute=True, query_chunk=256)],
    ids=["recomputed", "in chunks", "both"],
)
def test_saving_memory_changes_no_gradient(other: Numerics) -> None:
    config, tensors = tiny(34, "all", compress_ratios=(4, 128), num_hash_layers=0)
    ids = torch.randint(config.vocab_size, (1, TOKENS + 1), generator=torch.Generator().manual_seed(34))
    gradients: list[dict[str, Tensor]] = []
    for numerics in (Numerics(), other):
        model = of(config, tensors)
        sum(losses(model, ids, numerics)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.parameters.items()})
    for name, want in gradients[0].items():
        error = (gradients[1][name] - want).norm() / want.norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: {error:.2e}"


def test_dense_warm_up_teaches_the_indexer_from_every_visible_row() -> None:
    config, tensors = tiny(35, "c4")
    ids = torch.randint(config.vocab_size, (1, TOKENS + 1), generator=torch.Generator().manual_seed(35))
    model, all_rows = of(config, tensors), of(*tiny(35, "c4", index_topk=512))
    dense, sparse = (losses(model, ids, Numerics(sparse=s)) for s in (False, True))
    every = losses(all_rows, ids, Numerics(sparse=True))
    assert torch.equal(dense[0], every[0])
    assert torch.allclose(dense[1], every[1])
    assert not torch.allclose(dense[0], sparse[0])


def test_the_recall_of_an_indexer_is_the_attention_its_choice_holds() -> None:
    config, tensors = tiny(36, "c4")
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(36))
    run = of(config, tensors).begin(Numerics(sparse=False, observe=True))
    with torch.no_grad():
        run.streams(ids)
    for held, queries in run.observed.recall.values():
        # Positions from 67 on see more than 16 rows.
        assert queries.item() == TOKENS - 67
        assert 16 / 75 < held.item() / queries.item() < 1


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_that_is_watched_has_the_gradients_of_one_that_is_not(sparse: bool) -> None:
    config, tensors = tiny(37, "c4")
    ids = torch.randint(config.vocab_size, (1, TOKENS + 1), generator=torch.Generator().manual_seed(37))
    found = []
    for observe in (False, True):
        model = of(config, tensors)
        main, index = losses(model, ids, Numerics(sparse=sparse, observe=observe))
        (main + index).backward()
        found.append({name: parameter.grad for name, parameter in model.parameters.items()})
    assert any(".indexer." in name for name in found[0])
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:  # rows of the embedding are added up in no fixed order
            assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-6), name
