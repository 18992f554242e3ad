"""A run's checkpoints: everything the next step depends on, as safetensors and JSON. The last two are kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.config import TrainConfig, config_dict
from wire.errors import CheckpointError

_KEPT = 2
_MAY_CHANGE = ("device", "threads", "capture", "save_steps", "log_steps")
"""Keys of a run that do not decide what is learned."""


def save_state(run: Path, step: int, tensors: dict[str, Tensor], config: TrainConfig) -> Path:
    """Write `run/step-<n>`; it appears whole or not at all."""
    final = run / f"step-{step:08d}"
    building = run / f".{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, building / "state.safetensors")
    (building / "state.json").write_text(json.dumps({"step": step, "config": config_dict(config)}, indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    os.rename(building, final)
    for old in states(run)[:-_KEPT]:
        shutil.rmtree(old)
    return final


def states(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(run.glob("step-*"))


def load_state(path: Path, config: TrainConfig | None = None) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, tensors, config as JSON). Raises CheckpointError when it cannot be read or belongs to another config."""
    try:
        told = json.loads((path / "state.json").read_text(encoding="utf-8"))
        step, written = int(told["step"]), dict(told["config"])
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: is not a training checkpoint ({error}). Remove it to go on before it."
        ) from None
    if config is not None:
        asked = json.loads(json.dumps(config_dict(config)))
        keys = [key for key in asked if key not in _MAY_CHANGE and asked[key] != written.get(key)]
        if keys:
            raise CheckpointError(
                f"{path}: belongs to a run with another {', '.join(keys)}. Use that run's file, or a new directory."
            )
    return step, tensors, written
