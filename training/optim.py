"""The optimisers: Muon for the matrices of layers, AdamW for the rest, and their rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.config import Optimiser

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. A parameter [..., O, I] is a stack of matrices, each orthogonal by itself.

    What torch.optim.Muon does to one matrix, done to all experts of a layer at once; it takes no stacks. Updates are
    scaled by 0.2 sqrt(max(O, I)), which gives them the size AdamW's have, so that one rate and decay serve both.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
            for (outputs, inputs), parameters in alike.items():
                updates = [self._momentum(p, group["momentum"]).reshape(-1, outputs, inputs) for p in parameters]
                whole = orthogonal(torch.cat(updates)).split([len(u) for u in updates])
                rate = group["lr"] * 0.2 * math.sqrt(max(outputs, inputs))
                for parameter, update in zip(parameters, whole, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape).to(parameter.dtype), alpha=-rate)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonal(stack: Tensor) -> Tensor:
    """[N, O, I] -> each matrix with its singular values brought near 1 by five Newton-Schulz rounds.

    Three digits are plenty, so in bfloat16, except on a CPU, whose float32 products are the faster ones.
    """
    a, b, c = _COEFFICIENTS
    x = stack if stack.is_cpu else stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def uses_muon(name: str, parameter: Tensor) -> bool:
    """Matrices of layers; not embedding, head, norms, sinks, position biases or hyper-connections."""
    matrix = parameter.dim() >= 2 and (name.endswith(".weight") or ".experts." in name)
    return matrix and name not in ("embed.weight", "head.weight")


class Optimisers:
    """Both, stepped together."""

    def __init__(self, parameters: dict[str, Tensor], settings: Optimiser) -> None:
        self.settings, self.parameters = settings, parameters
        matrices = [p for name, p in parameters.items() if uses_muon(name, p)]
        plain = [p for name, p in parameters.items() if not uses_muon(name, p) and p.dim() < 2]
        decayed = [p for name, p in parameters.items() if not uses_muon(name, p) and p.dim() >= 2]
        self.muon = Muon(matrices, settings.muon_rate, settings.momentum, settings.weight_decay)
        self.adam = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}],
            lr=settings.adam_rate,
            betas=settings.betas,
        )

    def step(self, factor: float, *, keep: bool = False) -> float:
        """One step at `factor` of the full rates, over gradients cut to `clip_norm`; returns their norm before.

        Gradients are dropped, or with `keep` zeroed where they are.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        for optimiser, rate in ((self.muon, self.settings.muon_rate), (self.adam, self.settings.adam_rate)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=not keep)
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Everything the optimisers remember: `<parameter>/<what>` -> tensor."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            state: dict[str, Any] = self.muon.state.get(parameter) or self.adam.state.get(parameter) or {}
            found |= {f"{name}/{what}": value for what, value in state.items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for key, value in tensors.items():
            name, _, what = key.rpartition("/")
            parameter = self.parameters[name]
            owner = self.muon if uses_muon(name, parameter) else self.adam
            # AdamW counts its steps on the CPU.
            owner.state[parameter][what] = value if what == "step" else value.to(parameter.device)


def rate_factor(step: int, steps: int, settings: Optimiser) -> float:
    """Share of the full rate at a step counted from 0: a rise, then half a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
