"""The mixture of experts: hash-routed in the first layers, scored in the rest, one shared expert beside."""

from __future__ import annotations

from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.beside import beside
from engine.kernels.experts import Experts, Parts, WorkList, mlp, route_few, route_hashed, route_scored, routed_parts
from engine.kernels.linear import Matrix
from engine.model.attention import LayerTensors


class MixtureOfExperts:
    def __init__(self, config: ModelConfig, layer: int, tensors: LayerTensors) -> None:
        self.k, self.scaling, self.limit = (
            config.experts_per_token,
            config.routed_scaling_factor,
            config.swiglu_limit,
        )
        gate = tensors("ffn.gate.weight")
        # In fp32 on a GPU too: rounding its input would send near-ties to other experts than on a CPU.
        self.gate = Matrix.prepare(gate.float() if gate.is_cuda else gate)
        hashed = layer < config.num_hash_layers
        self.table = tensors("ffn.gate.tid2eid").long() if hashed else None
        self.bias = None if hashed else tensors("ffn.gate.bias").float()
        self.experts = Experts.prepare(*(tensors(f"ffn.experts.{w}") for w in ("w1", "w3", "w2")))
        self.shared_gate, self.shared_up, self.shared_down = (
            Matrix.prepare(tensors(f"ffn.shared_experts.{w}.weight")) for w in ("w1", "w3", "w2")
        )

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor | Parts:
        """x [T, D], token_ids [T] int64 (the input tokens: hash layers route by them) -> [T, D], perhaps in parts."""
        with beside(x) as other:
            with other():
                picks, weights, work = self._route(x, token_ids)
            shared = mlp(x, self.shared_gate, self.shared_up, self.shared_down, self.limit)
        return routed_parts(x, picks, weights, self.experts, self.limit, shared, work)

    def _route(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, WorkList | None]:
        """picks and weights [T, k], and the list of work where it comes with them."""
        if (few := route_few(x, self.gate, self.bias, self.table, token_ids, self.k, self.scaling)) is not None:
            return few
        if self.table is not None:
            return *route_hashed(x, self.gate, self.table, token_ids, self.scaling), None
        assert self.bias is not None
        return *route_scored(x, self.gate, self.bias, self.k, self.scaling), None
