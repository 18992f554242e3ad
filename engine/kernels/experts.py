"""The mixture of experts: which experts a token goes to, and what they make of it.

T tokens, D hidden size, E experts, I an expert's inner size, k picks per token.
Rows are independent of their neighbours, bit for bit, as in `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.linear import Matrix, linear, safe_rows


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer, laid out for `routed_experts`."""

    count: int
    hidden: int
    inner: int
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def prepare(cls, w1: Tensor, w3: Tensor, w2: Tensor) -> Experts:
        """w1 (gate), w3 (up) [E, I, D] and w2 (down) [E, D, I], bf16 or fp32, all of one dtype."""
        count, inner, hidden = w1.shape
        if w3.shape != w1.shape or w2.shape != (count, hidden, inner) or not w1.dtype == w3.dtype == w2.dtype:
            raise ValueError(
                f"w1 {list(w1.shape)}, w3 {list(w3.shape)} and w2 {list(w2.shape)} are not one set of "
                f"experts: expected [E, I, D], [E, I, D] and [E, D, I] of one dtype"
            )
        gate, up, down = (w.detach().to(torch.float32, copy=True).contiguous() for w in (w1, w3, w2))
        return cls(count, hidden, inner, gate, up, down)


def routed_experts(x: Tensor, picks: Tensor, weights: Tensor, experts: Experts, limit: float) -> Tensor:
    """Every token through its picked experts, weighted and summed in pick order.

    x        [T, D] fp32
    picks    [T, k] int32   expert numbers; an expert picked twice counts twice
    weights  [T, k] fp32
    limit                   swiglu_limit: bounds the gate from above and the up projection on both sides
    ->       [T, D] fp32    sum over j of weights[j] * expert[picks[j]](x)
    """
    tokens, k = picks.shape
    if x.shape != (tokens, experts.hidden) or weights.shape != picks.shape:
        raise ValueError(
            f"x {list(x.shape)}, picks {list(picks.shape)} and weights {list(weights.shape)} do not belong "
            f"together for experts of hidden size {experts.hidden}"
        )
    outputs = x.new_empty(tokens * k, experts.hidden)
    flat = picks.reshape(-1)
    for expert in flat.unique().tolist():
        if not 0 <= expert < experts.count:
            raise ValueError(f"picked expert {expert} of {experts.count}")
        which = (flat == expert).nonzero().squeeze(1)
        rows = x[which // k]
        inner = swiglu(safe_rows(rows, experts.gate[expert]), safe_rows(rows, experts.up[expert]), limit)
        outputs[which] = safe_rows(inner, experts.down[expert])
    outputs = outputs.view(tokens, k, experts.hidden)
    total = weights[:, 0, None] * outputs[:, 0]
    for j in range(1, k):
        total = total + weights[:, j, None] * outputs[:, j]
    return total


def mlp(x: Tensor, w1: Matrix, w3: Matrix, w2: Matrix, limit: float) -> Tensor:
    """The shared expert: x [T, D] fp32 -> [T, D] fp32."""
    return linear(swiglu(linear(x, w1), linear(x, w3), limit), w2)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), element by element, fp32.

    Spelled out because torch's own fp32 silu rounds an element differently depending on where in the
    array it lies.
    """
    gate = gate.clamp(max=limit)
    return gate / (1 + torch.exp(-gate)) * up.clamp(-limit, limit)


def route_scored(x: Tensor, gate: Matrix, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The k experts of the highest biased score; of equal scores, the lower expert.

    x [T, D] fp32, gate [E, D], bias [E] fp32 (it steers the choice, never the weight)
    -> picks [T, k] int32, best first; weights [T, k] fp32, summing to `scaling`
    """
    scores = _scores(x, gate)
    picks = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return picks.int(), _weights(scores.gather(1, picks), scaling)


def route_hashed(
    x: Tensor, gate: Matrix, table: Tensor, token_ids: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The experts a fixed table names for each token id; the gate only weighs them.

    x [T, D] fp32, gate [E, D], table [V, k] int64, token_ids [T] int64
    -> picks [T, k] int32 in table order; weights [T, k] fp32, summing to `scaling`
    """
    picks = table[token_ids]
    return picks.int(), _weights(_scores(x, gate).gather(1, picks), scaling)


def _scores(x: Tensor, gate: Matrix) -> Tensor:
    """sqrt(softplus(x @ gate.T)), [T, E]."""
    z = linear(x, gate)
    return (z.relu() + torch.log1p(torch.exp(-z.abs()))).sqrt()


def _weights(scores: Tensor, scaling: float) -> Tensor:
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20) * scaling
