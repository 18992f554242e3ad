"""Which library computes an op: what can be chosen, and what is refused with its reason. No library is needed here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.kernels.device import backends
from engine.kernels.device.backends import Backend
from engine.runner import Runner
from wire.errors import ConfigError

HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library that is here, in the version that was run, beside those that there are."""
    here = Backend("attention", "numpy", "numpy", importlib.metadata.version("numpy"))
    missing = Backend("experts", "nobody", "a-package-of-nobody", "1.0")
    old = Backend("linears", "torch", "torch", "0.1")
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, here, missing, old))
    yield
    backends.choose("", HOPPER)


def test_a_library_that_is_there_computes_its_op_and_no_other_until_another_choice() -> None:
    assert backends.backend("attention") is None
    backends.choose(" attention=numpy, ", HOPPER)
    chosen = backends.backend("attention")
    assert chosen is not None
    assert chosen.name == "numpy"
    assert backends.backend("experts") is None
    backends.choose("", HOPPER)
    assert backends.backend("attention") is None


def test_auto_takes_what_is_faster_and_here_where_our_own_kernel_is_not_at_its_best(monkeypatch) -> None:
    version = importlib.metadata.version("numpy")
    known = (
        Backend("attention", "numpy", "numpy", version, faster=True),
        Backend("experts", "numpy", "numpy", version),
        Backend("index-scores", "nobody", "a-package-of-nobody", "1.0", faster=True),
    )
    monkeypatch.setattr(backends, "BACKENDS", known)
    backends.choose("auto", HOPPER)
    assert backends.backend("attention") is known[0]
    assert backends.backend("attention", rather_own=True) is None
    assert backends.backend("experts") is None
    assert backends.backend("index-scores") is None, "not installed, and nobody asked for it by name"
    backends.choose("auto", BLACKWELL)
    assert backends.backend("attention") is None
    backends.choose("attention=numpy", HOPPER)
    assert backends.backend("attention", rather_own=True) is known[0]
    backends.choose("own", HOPPER)
    assert backends.backend("attention") is None


@pytest.mark.parametrize(
    ("text", "capability", "why"),
    [
        ("attention=fastest", HOPPER, "no backend 'attention=fastest'; there are attention=flash-mla, index-scores="),
        ("experts", HOPPER, "no backend 'experts'"),
        ("attention=numpy,attention=flash-mla", HOPPER, "two backends for attention"),
        ("experts=nobody", HOPPER, 'needs the package a-package-of-nobody, .*make install EXTRAS="gpu peers"'),
        ("linears=torch", HOPPER, "was run with torch 0.1 and no other; 2.* is installed"),
        ("experts=trtllm-gen", HOPPER, r"kernels for compute capability 10.x \(Blackwell\); this GPU has 9.0"),
        ("experts=mega-moe", HOPPER, r"kernels for compute capability 10.x \(Blackwell\); this GPU has 9.0"),
        ("experts=trtllm-gen", BLACKWELL, "can not be used: Penumbra's own kernels are Hopper's"),
        ("attention=flash-mla", BLACKWELL, r"kernels for compute capability 9.x \(Hopper\); this GPU has 10.0"),
        ("topk=sglang", HOPPER, "can not be used: its wheels are tied to"),
    ],
)
def test_what_can_not_be_used_is_refused_with_its_reason_and_changes_nothing(
    text: str, capability: tuple[int, int], why: str
) -> None:
    backends.choose("attention=numpy", HOPPER)
    with pytest.raises(ConfigError, match=why):
        backends.choose(text, capability)
    chosen = backends.backend("attention")
    assert chosen is not None
    assert chosen.name == "numpy"


def test_every_library_of_the_peers_extra_is_pinned_to_the_version_that_is_asked_for() -> None:
    pinned = {
        requirement.split(";")[0].strip()
        for requirement in importlib.metadata.requires("penumbra") or ()
        if 'extra == "peers"' in requirement.replace("'", '"')
    }
    made_up = {"numpy", "torch", "a-package-of-nobody"}
    known = [b for b in backends.BACKENDS if b.version and b.distribution not in made_up]
    wanted = {f"{b.distribution}=={b.version}" for b in known}
    assert wanted
    assert wanted <= pinned


def test_on_a_cpu_a_library_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backends='attention=flash-mla' is for GPUs"):
        Runner.load(EngineConfig(model=tmp_path / "no such folder", backends="attention=flash-mla"))
