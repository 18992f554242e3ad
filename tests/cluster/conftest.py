from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.model.tiny import write_tiny
from tests.cluster.local_cluster import LocalCluster, local_cluster
from tests.page.browser import browser as browser
from tests.wire.collector import Collector


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Production rows and every kind of layer; narrow elsewhere, so that 8,000 tokens take seconds."""
    return write_tiny(
        tmp_path_factory.mktemp("models") / "tiny-v4",
        seed=3,
        layers=(0, 4, 128, 4),
        hidden=128,
        heads=2,
        index_heads=4,
        experts=8,
        q_lora_rank=64,
        o_lora_rank=32,
        moe_intermediate=64,
        index_topk=512,
    )


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="session")
def cluster(model: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One prefill and one decode worker, packed layout: what `make up` starts. All of them trace to `collector`."""
    home = tmp_path_factory.mktemp("home")
    with local_cluster(home, model, "--otlp-traces-endpoint", collector.url) as running:
        yield running
