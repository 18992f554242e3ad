from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels.experts import Experts, mlp, route_hashed, route_scored, routed_experts
from engine.kernels.linear import Matrix

E, D, INNER, K, LIMIT = 8, 64, 40, 3, 0.5


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def weights(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((E, INNER, D), (E, INNER, D), (E, D, INNER))
    return tuple(draw(*s, seed=i, scale=0.2).to(dtype) for i, s in enumerate(shapes))  # type: ignore[return-value]


def swiglu_mlp(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The formula, in float64."""
    gate, up = (x.double() @ w.double().T for w in (w1, w3))
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (gate * torch.sigmoid(gate) * up) @ w2.double().T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_is_the_weighted_sum_of_its_experts(engine: str, dtype: torch.dtype) -> None:
    w1, w3, w2 = weights(dtype)
    x = draw(33, D, seed=5)
    picks = torch.randint(0, E, (33, K), generator=torch.Generator().manual_seed(6)).int()
    picks[4] = 7  # one expert three times counts three times
    share = draw(33, K, seed=7).abs()
    got = routed_experts(x, picks, share, Experts.prepare(w1, w3, w2), LIMIT)
    exact = torch.stack(
        [
            sum(share[t, j].double() * swiglu_mlp(x[t], w1[e], w3[e], w2[e]) for j, e in enumerate(picks[t].tolist()))
            for t in range(33)
        ]
    )
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_has_the_same_bits_in_every_batch(
    engine: str, with_threads: Callable[[int], None], threads: int
) -> None:
    experts, gate, bias = Experts.prepare(*weights(torch.bfloat16)), Matrix.prepare(draw(E, D)), draw(E)
    x = draw(256, D, seed=9)

    def run(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        picks, share = route_scored(rows, gate, bias, K, 1.5)
        return picks, share, routed_experts(rows, picks, share, experts, LIMIT)

    with_threads(1)
    alone = [run(x[i : i + 1]) for i in range(0, 256, 16)]
    with_threads(threads)
    for t in (*range(1, 18), 64, 256):
        batch = run(x[:t])
        for i in range(0, t, 16):
            for got, want in zip(batch, alone[i // 16], strict=True):
                assert torch.equal(got[i], want[0]), f"token {i} of {t}"


def test_the_shared_expert_follows_the_same_formula(engine: str) -> None:
    w1, w3, w2 = (w[0] for w in weights(torch.bfloat16))
    matrices = [Matrix.prepare(w) for w in (w1, w3, w2)]
    x = draw(13, D, seed=3)
    got = mlp(x, *matrices, LIMIT)
    torch.testing.assert_close(got.double(), swiglu_mlp(x, w1, w3, w2), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([mlp(x[i : i + 1], *matrices, LIMIT) for i in range(13)]), got)


def test_scores_steer_the_choice_and_unbiased_scores_weigh_it(engine: str) -> None:
    gate, x = draw(E, D, scale=0.3), draw(21, D, seed=2)
    bias = torch.zeros(E)
    bias[3] = 100.0  # always first, whatever it is worth
    picks, share = route_scored(x, Matrix.prepare(gate), bias, K, 2.5)
    scores = torch.nn.functional.softplus(x.double() @ gate.double().T).sqrt()
    assert (picks[:, 0] == 3).all()
    others = scores.clone()
    others[:, 3] = -1
    assert torch.equal(picks[:, 1:], others.topk(K - 1).indices.int())
    chosen = scores.gather(1, picks.long())
    torch.testing.assert_close(share.double(), chosen / chosen.sum(1, keepdim=True) * 2.5, rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_lower_expert_is_picked(engine: str) -> None:
    gate = draw(E, D)
    gate[5] = gate[1]
    gate[6] = gate[1]
    bias = torch.full((E,), -50.0)
    bias[[1, 5, 6]] = 0.0
    picks, share = route_scored(draw(4, D, seed=1), Matrix.prepare(gate), bias, 2, 1.0)
    assert picks.tolist() == [[1, 5]] * 4
    assert torch.equal(share, torch.full((4, 2), 0.5))


def test_hashed_tokens_go_where_the_table_says(engine: str) -> None:
    gate, x = draw(E, D, scale=0.3), draw(5, D, seed=8)
    table = torch.randint(0, E, (100, K), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([3, 99, 0, 3, 42])
    picks, share = route_hashed(x, Matrix.prepare(gate), table, ids, 1.5)
    assert torch.equal(picks, table[ids].int())
    chosen = torch.nn.functional.softplus(x.double() @ gate.double().T).sqrt().gather(1, table[ids])
    torch.testing.assert_close(share.double(), chosen / chosen.sum(1, keepdim=True) * 1.5, rtol=1e-5, atol=1e-6)


def test_a_broken_token_is_routed_somewhere_and_stays_broken(engine: str) -> None:
    x = draw(3, D)
    x[1] = torch.nan
    picks, share = route_scored(x, Matrix.prepare(draw(E, D)), draw(E), K, 1.0)
    assert ((picks >= 0) & (picks < E)).all()
    assert share[1].isnan().all()
    y = routed_experts(x, picks, share, Experts.prepare(*weights(torch.bfloat16)), LIMIT)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, E])
def test_an_expert_that_does_not_exist_is_named(engine: str, wrong: int) -> None:
    picks = torch.tensor([[0, wrong]], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"expert {wrong} was picked, but there are {E}"):
        routed_experts(draw(1, D), picks, torch.ones(1, 2), Experts.prepare(*weights(torch.bfloat16)), LIMIT)
