"""The mixture of experts: which experts a token goes to, and what they make of it.

T tokens, D hidden size, E experts, I an expert's inner size, k picks per token.
Rows are independent of their neighbours, bit for bit, as in `linear`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.linear import Matrix, fp32_rows, linear, linears, pack, safe_rows, unpack
from engine.kernels.native import FLOAT, INT, POINTER

if TYPE_CHECKING:
    from engine.kernels.device.libraries import HummingExperts

_EXPERTS = (
    POINTER, INT, INT, POINTER, POINTER, INT, INT, INT, INT, POINTER, POINTER, POINTER, INT, FLOAT, POINTER,
    POINTER, INT,
)  # fmt: skip
_MLP = (POINTER, INT, INT, POINTER, POINTER, POINTER, INT, INT, INT, FLOAT, POINTER, INT)
_ROUTE = (
    POINTER, INT, INT, POINTER, INT, INT, INT, POINTER, INT, FLOAT, POINTER, POINTER, POINTER, INT,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fp4Stack:
    """One matrix of every expert [E, N, K] as the checkpoint holds them: for a GPU, which multiplies by them so."""

    codes: Tensor  # [E, N, K / 2] uint8, two e2m1 codes a byte, the even input in the low half
    scales: Tensor  # [E, N, K / 32] uint8, UE8M0

    def to(self, device: str) -> Fp4Stack:
        return Fp4Stack(self.codes.to(device), self.scales.to(device))


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer, laid out for `routed_experts`."""

    count: int
    hidden: int
    inner: int
    gate: Tensor
    up: Tensor
    down: Tensor
    packed: bool
    scales: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None)
    most: tuple[int, int] = (0, 0)  # FP4: the largest scale code of gate and up, and of down
    panels: bool = False  # FP4: gate, with up in it, and down lie as engine/csrc/experts_few.cu reads them
    library: HummingExperts | None = None  # holds them instead

    @property
    def stacks(self) -> tuple[Tensor, ...]:
        """As `engine.kernels.device.experts` takes them."""
        return (self.gate, self.down) if self.panels else (self.gate, self.up, self.down)

    @classmethod
    def prepare(cls, w1: Tensor | Fp4Stack, w3: Tensor | Fp4Stack, w2: Tensor | Fp4Stack) -> Experts:
        """w1 (gate), w3 (up) [E, I, D] and w2 (down) [E, D, I], bf16 or fp32, all of one dtype; on a GPU also FP4."""
        if isinstance(w1, Fp4Stack) and isinstance(w3, Fp4Stack) and isinstance(w2, Fp4Stack):
            if not w1.codes.is_cuda:
                raise ValueError("FP4 experts are multiplied by on a GPU alone. Dequantise them first.")
            count, inner, hidden = *w1.codes.shape[:2], w2.codes.shape[1]
            from engine.kernels.device import backends, cuda_products, experts_few, libraries

            if backends.backend("experts") is not None:
                nothing = w1.codes.new_empty(0)
                codes, scales = zip(*((w.codes, w.scales) for w in (w1, w3, w2)), strict=True)
                held = libraries.HummingExperts(codes, scales)
                return cls(count, hidden, inner, nothing, nothing, nothing, False, library=held)
            if cuda_products() and experts_few.arranges(hidden, inner):
                gate = experts_few.gate_up_panels(w1.codes, w3.codes, (w1.scales, w3.scales))
                down = experts_few.down_panels(w2.codes, w2.scales)
                return cls(count, hidden, inner, gate, gate, down, False, panels=True)
            scales = (w1.scales, w3.scales, w2.scales)
            largest = [int(s.max()) for s in scales]
            most = max(largest[:2]), largest[2]
            return cls(count, hidden, inner, w1.codes, w3.codes, w2.codes, False, scales, most)
        assert isinstance(w1, Tensor)
        assert isinstance(w3, Tensor)
        assert isinstance(w2, Tensor)
        count, inner, hidden = w1.shape
        if w3.shape != w1.shape or w2.shape != (count, hidden, inner) or not w1.dtype == w3.dtype == w2.dtype:
            raise ValueError(
                f"w1 {list(w1.shape)}, w3 {list(w3.shape)} and w2 {list(w2.shape)} are not one set of "
                f"experts: expected [E, I, D], [E, I, D] and [E, D, I] of one dtype"
            )
        if w1.is_cuda:
            return cls(count, hidden, inner, w1.contiguous(), w3.contiguous(), w2.contiguous(), False)
        if native.library() is not None:
            gate, up, down = (pack(w.detach()) for w in (w1, w3, w2))
            return cls(count, hidden, inner, gate, up, down, True)
        gate, up, down = (w.detach().to(torch.float32, copy=True).contiguous() for w in (w1, w3, w2))
        return cls(count, hidden, inner, gate, up, down, False)

    def dense(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """One expert's w1, w3 and w2 in fp32, whatever the layout."""
        if not self.packed:
            return self.gate[expert], self.up[expert], self.down[expert]
        return (
            unpack(self.gate[expert], self.inner),
            unpack(self.up[expert], self.inner),
            unpack(self.down[expert], self.hidden),
        )


WorkList = tuple[Tensor, Tensor]
"""What routing a few tokens on a GPU also tells: members and owners, as engine/csrc/route_few.cu says."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What experts made of a few tokens on a GPU, to be added up by whoever takes it: parts [T, k, D] in order, then
    beside [T, D].
    """

    parts: Tensor
    beside: Tensor | None


def routed_parts(
    x: Tensor, picks: Tensor, weights: Tensor, experts: Experts, limit: float, beside: Tensor | None = None,
    work: WorkList | None = None,
) -> Tensor | Parts:  # fmt: skip
    """`routed_experts`, or for a few tokens on a GPU what is still to be added up for it."""
    if x.is_cuda:
        from engine.kernels.device import hyper_connections as taker

        if taker.takes_parts(*x.shape):
            _check(x, picks, weights, experts)
            return Parts(_parts(x, picks, weights, experts, limit, work), beside)
    return routed_experts(x, picks, weights, experts, limit, beside, work)


def routed_experts(
    x: Tensor, picks: Tensor, weights: Tensor, experts: Experts, limit: float, beside: Tensor | None = None,
    work: WorkList | None = None,
) -> Tensor:  # fmt: skip
    """Every token through its picked experts, weighted and summed in pick order, then added to `beside` [T, D].

    x        [T, D] fp32
    picks    [T, k] int32   expert numbers; an expert picked twice counts twice
    weights  [T, k] fp32
    limit                   swiglu_limit: bounds the gate from above and the up projection on both sides
    work                    the picks by expert, where `route_few` gave it
    ->       [T, D] fp32    sum over j of weights[j] * expert[picks[j]](x)
    """
    _check(x, picks, weights, experts)
    tokens, k = picks.shape
    if x.is_cuda:
        from engine.kernels.device import experts as device

        return device.sum_picks(_parts(x, picks, weights, experts, limit, work), beside)
    if experts.packed and (twin := native.function("penumbra_routed_experts", *_EXPERTS)) is not None:
        x, picks, weights = fp32_rows(x), picks.int().contiguous(), fp32_rows(weights).contiguous()
        y, bad = x.new_empty(tokens, experts.hidden), ctypes.c_int64()
        twin(
            x.data_ptr(), x.stride(0), tokens, picks.data_ptr(), weights.data_ptr(), k, experts.count,
            experts.hidden, experts.inner, experts.gate.data_ptr(), experts.up.data_ptr(),
            experts.down.data_ptr(), experts.gate.dtype == torch.bfloat16, limit, y.data_ptr(),
            ctypes.byref(bad), native.threads(),
        )  # fmt: skip
        if bad.value >= 0:
            raise _no_such_expert(int(picks.view(-1)[bad.value]), experts.count)
        return y if beside is None else y + beside
    outputs = x.new_empty(tokens * k, experts.hidden)
    flat = picks.reshape(-1)
    for expert in flat.unique().tolist():
        if not 0 <= expert < experts.count:
            raise _no_such_expert(expert, experts.count)
        gate, up, down = experts.dense(expert)
        which = (flat == expert).nonzero().squeeze(1)
        rows = x[which // k]
        outputs[which] = safe_rows(swiglu(safe_rows(rows, gate), safe_rows(rows, up), limit), down)
    outputs = outputs.view(tokens, k, experts.hidden)
    total = weights[:, 0, None] * outputs[:, 0]
    for j in range(1, k):
        total = total + weights[:, j, None] * outputs[:, j]
    return total if beside is None else total + beside


def _parts(x: Tensor, picks: Tensor, weights: Tensor, experts: Experts, limit: float, work: WorkList | None) -> Tensor:
    """[T, k, D] on a GPU."""
    from engine.kernels.device import experts as device

    if experts.library is not None:
        parts = device.library_parts(x, picks, weights, experts.library, limit)
    else:
        parts = device.routed_parts(x, picks, weights, experts.stacks, experts.scales, experts.most, limit, work)
    return parts.view(*picks.shape, -1)


def _check(x: Tensor, picks: Tensor, weights: Tensor, experts: Experts) -> None:
    if x.shape != (picks.shape[0], experts.hidden) or weights.shape != picks.shape:
        raise ValueError(
            f"x {list(x.shape)}, picks {list(picks.shape)} and weights {list(weights.shape)} do not belong "
            f"together for experts of hidden size {experts.hidden}"
        )


def mlp(x: Tensor, w1: Matrix, w3: Matrix, w2: Matrix, limit: float) -> Tensor:
    """The shared expert: x [T, D] fp32 -> [T, D] fp32; matrices as in `Experts`, of one dtype."""
    if not (w1.inputs == w3.inputs == w2.outputs == x.shape[1] and w1.outputs == w3.outputs == w2.inputs):
        raise ValueError(f"x {list(x.shape)} and the three matrices of this MLP do not belong together")
    one_dtype = w1.data.dtype == w3.data.dtype == w2.data.dtype
    if one_dtype and w1.packed and (twin := native.function("penumbra_mlp", *_MLP)) is not None:
        x = fp32_rows(x)
        y = x.new_empty(x.shape)
        twin(
            x.data_ptr(), x.stride(0), x.shape[0], w1.data.data_ptr(), w3.data.data_ptr(), w2.data.data_ptr(),
            w1.data.dtype == torch.bfloat16, w1.inputs, w1.outputs, limit, y.data_ptr(), native.threads(),
        )  # fmt: skip
        return y
    return linear(gated(x, w1, w3, limit), w2)


def gated(x: Tensor, w1: Matrix, w3: Matrix, limit: float) -> Tensor:
    """`swiglu` of x [T, D] times both matrices; for a few tokens on a GPU in one go."""
    if x.is_cuda:
        from engine.kernels.device import backends, few_tokens

        if backends.backend("linears") is None and few_tokens.takes_gated(len(x), w1.data, w3.data):
            return few_tokens.gated(x, (w1.data, w1.scales), (w3.data, w3.scales), limit)
    gate, up = linears(x, (w1, w3))
    return swiglu(gate, up, limit)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), element by element, fp32.

    Spelled out because torch's own fp32 silu rounds an element differently depending on where in the
    array it lies.
    """
    if gate.is_cuda:
        from engine.kernels.device import experts as device

        return device.swiglu(gate, up, limit)
    gate = gate.clamp(max=limit)
    return gate / (1 + torch.exp(-gate)) * up.clamp(-limit, limit)


def route_scored(x: Tensor, gate: Matrix, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The k experts of the highest biased score; of equal scores, the lower expert.

    x [T, D] fp32, gate [E, D], bias [E] fp32 (it steers the choice, never the weight)
    -> picks [T, k] int32, best first; weights [T, k] fp32, summing to `scaling`
    """
    if x.is_cuda:
        from engine.kernels.device import experts as device

        return device.route(linear(x, gate), bias, None, None, k, scaling)
    if gate.packed and (twin := native.function("penumbra_route", *_ROUTE)) is not None:
        picks = torch.empty(x.shape[0], k, dtype=torch.int32)
        return picks, _route(twin, x, gate, bias, picks, scaling)
    scores = _scores(x, gate)
    picks = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return picks.int(), _weights(scores.gather(1, picks), scaling)


def route_hashed(x: Tensor, gate: Matrix, table: Tensor, token_ids: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The experts a fixed table names for each token id; the gate only weighs them.

    x [T, D] fp32, gate [E, D], table [V, k] int64, token_ids [T] int64
    -> picks [T, k] int32 in table order; weights [T, k] fp32, summing to `scaling`
    """
    if x.is_cuda:
        from engine.kernels.device import experts as device

        return device.route(linear(x, gate), None, table, token_ids, table.shape[1], scaling)
    picks = table[token_ids]
    if gate.packed and (twin := native.function("penumbra_route", *_ROUTE)) is not None:
        picks = picks.int()
        return picks, _route(twin, x, gate, None, picks, scaling)
    return picks.int(), _weights(_scores(x, gate).gather(1, picks), scaling)


def route_few(
    x: Tensor, gate: Matrix, bias: Tensor | None, table: Tensor | None, token_ids: Tensor, k: int, scaling: float
) -> tuple[Tensor, Tensor, WorkList] | None:
    """What `route_scored` says with a bias and `route_hashed` with a table, and the list of work for `routed_experts`.

    None where no kernel does both at once: on a CPU, for more than a few tokens, or without CUDA C++.
    """
    if not x.is_cuda:
        return None
    from engine.kernels.device import route_few as device

    if x.dim() != 2 or x.shape[1] != gate.inputs or (table is not None and table.shape[1] != k):
        raise ValueError(
            f"x {list(x.shape)} does not fit {k} picks of {gate.outputs} experts, whose gate has {gate.inputs} inputs"
        )
    if not device.takes(x.shape[0], gate.data, k):
        return None
    picks, weights, members, owners = device.route(x, gate.data, bias, table, token_ids, k, scaling)
    return picks, weights, (members, owners)


def _route(
    twin: Callable[..., None], x: Tensor, gate: Matrix, bias: Tensor | None, picks: Tensor, scaling: float
) -> Tensor:
    """The weights of `picks`; with a bias, chooses them first."""
    if x.dim() != 2 or x.shape[1] != gate.inputs or not 0 < picks.shape[1] <= gate.outputs:
        raise ValueError(f"x {list(x.shape)} does not fit {picks.shape[1]} picks of {gate.outputs} experts")
    x, bias = fp32_rows(x), None if bias is None else fp32_rows(bias)
    weights, bad = x.new_empty(picks.shape), ctypes.c_int64()
    twin(
        x.data_ptr(), x.stride(0), x.shape[0], gate.data.data_ptr(), gate.data.dtype == torch.bfloat16,
        gate.outputs, gate.inputs, None if bias is None else bias.data_ptr(), picks.shape[1], scaling,
        picks.data_ptr(), weights.data_ptr(),
        ctypes.byref(bad), native.threads(),
    )  # fmt: skip
    if bad.value >= 0:
        raise _no_such_expert(int(picks.view(-1)[bad.value]), gate.outputs)
    return weights


def _no_such_expert(expert: int, count: int) -> ValueError:
    return ValueError(
        f"expert {expert} was picked, but there are {count}. The checkpoint's routing table is broken, or the "
        f"layer's experts are not all loaded."
    )


def _scores(x: Tensor, gate: Matrix) -> Tensor:
    """sqrt(softplus(x @ gate.T)), [T, E]."""
    z = linear(x, gate)
    return (z.relu() + torch.log1p(torch.exp(-z.abs()))).sqrt()


def _weights(scores: Tensor, scaling: float) -> Tensor:
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20) * scaling
