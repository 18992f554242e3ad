from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cache.pools import KvPools, PoolSizes
from engine.config import EngineConfig, KvLayout
from engine.model.tiny import write_tiny
from engine.runner import Runner

MakeRunner = Callable[[KvLayout, PoolSizes], Runner]


@pytest.fixture(scope="session")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    """Runners of one small model with production rows and every kind of layer, each with pools of its own."""
    model = write_tiny(
        tmp_path_factory.mktemp("models") / "tiny-v4",
        seed=3,
        layers=(0, 4, 128, 4),
        hidden=64,
        heads=2,
        index_heads=4,
        experts=4,
        q_lora_rank=32,
        o_lora_rank=32,
        moe_intermediate=64,
        index_topk=512,
    )
    loaded: dict[KvLayout, Runner] = {}

    def make(layout: KvLayout, sizes: PoolSizes) -> Runner:
        if layout not in loaded:
            loaded[layout] = Runner.load(EngineConfig(model=Path(model), kv_layout=layout, max_requests=1))
        first = loaded[layout]
        pools = KvPools(first.model_config, layout, sizes, first.fingerprint, "cpu")
        return Runner(first.config, first.model, pools, first.fingerprint)

    return make
