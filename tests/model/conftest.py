"""A small checkpoint of awkward sizes, written once, and fresh copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.model.tiny import write_tiny


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to. Hardly any size divides by 128, so blocks are ragged on both axes."""
    return write_tiny(
        tmp_path_factory.mktemp("models") / "small",
        seed=7,
        layers=(0, 4, 128),
        hidden=160,
        heads=2,
        index_heads=2,
        experts=4,
        head_dim=72,
        rope_dim=16,
        q_lora_rank=40,
        o_lora_rank=24,
        moe_intermediate=32,
        index_head_dim=32,
    )


@pytest.fixture
def fresh(pristine: Path, tmp_path: Path) -> Callable[[str], Path]:
    """fresh(name) is a new copy to change at will."""

    def copy(name: str = "copy") -> Path:
        return Path(shutil.copytree(pristine, tmp_path / name))

    return copy


@pytest.fixture
def model(fresh: Callable[[str], Path]) -> Path:
    return fresh("model")
