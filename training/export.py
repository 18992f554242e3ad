"""A trained model as a checkpoint in the official layout: FP4 experts, FP8 matrices, the draft layer included."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.model.publish import publish, quantise_fp8, quantise_mxfp4
from engine.model.survey import TensorSpec
from training.config import parse_config
from training.initial import initial_model
from training.model import Transformer
from training.state import load_state, states
from wire.errors import CheckpointError


def export(model: Transformer, tokenizer_json: str, out: Path) -> None:
    """Write the new directory `out`. Raises ConfigError when it exists."""

    def make(name: str, table: dict[str, TensorSpec]) -> dict[str, Tensor]:
        value, spec, base = _tensor(model, name), table[name], name.removesuffix(".weight")
        if spec.dtype in ("I8", "F8_E4M3"):
            codes, scale = quantise_mxfp4(value) if spec.dtype == "I8" else quantise_fp8(value)
            return {name: codes, f"{base}.scale": scale}
        return {name: value.to(torch.bfloat16) if spec.dtype == "BF16" else value}

    publish(out, model.config, tokenizer_json, make)


def load_run(run: Path, step: int | None = None) -> tuple[Transformer, str, int]:
    """(model, tokenizer.json, step) of a run directory's newest checkpoint, or of the one of `step`.

    Raises CheckpointError where there is none.
    """
    found = [path for path in states(run) if step is None or path.name == f"step-{step:08d}"]
    if not found:
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise CheckpointError(f"{run}: holds no training run with {which}. Give the --out of a penumbra train.")
    taken, tensors, told = load_state(found[-1])
    try:
        config = parse_config(told, str(found[-1]))
        tokenizer = (run / "tokenizer.json").read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{run}/tokenizer.json: cannot be read: {error.strerror}.") from None
    model = initial_model(config.model.config(), config.seed)
    with torch.no_grad():
        for kind, owner in (("parameter", model.parameters), ("kept", model.kept)):
            for name, tensor in owner.items():
                tensor.copy_(tensors[f"{kind}/{name}"])
    return model, tokenizer, taken


def _tensor(model: Transformer, name: str) -> Tensor:
    """A tensor of the official layout in float32, on the CPU: one expert out of its stack."""
    if ".experts." in name:
        at, _, rest = name.partition(".experts.")
        number, matrix, _ = rest.split(".")
        return model.parameters[f"{at}.experts.{matrix}"].detach()[int(number)].cpu()
    return (model.parameters.get(name) if name in model.parameters else model.kept[name]).detach().cpu()  # type: ignore[union-attr]
