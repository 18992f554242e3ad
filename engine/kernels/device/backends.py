"""Which library computes an op on a GPU in place of our own kernels: what can be chosen, and what may stand in the way.

Choosing is for the whole process, before its first step. Nothing here imports a library, or torch.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Backend:
    """A library that computes `op`, in the one version it was run in and on the chips it has kernels for."""

    op: str
    name: str
    distribution: str
    version: str
    capability: tuple[int, int] = (9, 0)
    unfit: str = ""  # why it can not be chosen on any chip
    faster: bool = False  # than our own kernel where that is not at its best, and as exact: measured


HOPPER, BLACKWELL = (9, 0), (10, 0)
_CHIPS = {HOPPER: "Hopper", BLACKWELL: "Blackwell"}
_ELSEWHERE = "Penumbra's own kernels are Hopper's, so that no step of it runs on such a chip yet"

BACKENDS = (
    Backend("attention", "flash-mla", "sgl-flash-mla", "1.0.0", faster=True),
    Backend("index-scores", "deep-gemm", "sgl-deep-gemm", "0.1.3"),
    Backend("linears", "deep-gemm", "sgl-deep-gemm", "0.1.3"),
    Backend("experts", "humming", "humming-kernels", "0.1.19"),
    Backend("experts", "trtllm-gen", "flashinfer-python", "", BLACKWELL, _ELSEWHERE),
    Backend("experts", "mega-moe", "sgl-deep-gemm", "", BLACKWELL, _ELSEWHERE),
    Backend(
        "topk", "sglang", "sglang-kernel", "", HOPPER,
        "its wheels are tied to the C++ ABI of one release of torch, which is not ours",
    ),
)  # fmt: skip

AUTO, OWN = "auto", "own"

_chosen: dict[str, Backend] = {}
_named = False


def backend(op: str, *, rather_own: bool = False) -> Backend | None:
    """The library that computes `op`, or None: our own kernels do.

    rather_own: they are at their best here, so that a library computes only if it was asked for by its name.
    """
    return None if rather_own and not _named else _chosen.get(op)


def parse(text: str) -> list[Backend]:
    """ "op=library,..." -> those backends. Raises ConfigError for what there is not, and for an op named twice."""
    known = {f"{b.op}={b.name}": b for b in BACKENDS}
    chosen: dict[str, Backend] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part not in known:
            raise ConfigError(
                f"no backend {part!r}; there are {', '.join(known)}. {AUTO!r} takes those that are faster, as far as "
                f"they are installed, {OWN!r} none."
            )
        if known[part].op in chosen:
            raise ConfigError(f"two backends for {known[part].op} in {text!r}; choose one.")
        chosen[known[part].op] = known[part]
    return list(chosen.values())


def choose(text: str, capability: tuple[int, int]) -> None:
    """Have these backends compute from now on, and no others. capability: of the GPU.

    AUTO stands for those that are `faster`, as far as they can be had here; OWN, or nothing, for none.
    Raises ConfigError, and changes nothing, where a library that is named is not installed, is not the version that
    was run, or has no kernels for this GPU.
    """
    global _named
    named = text.strip() != AUTO
    asked = (
        parse("" if text.strip() == OWN else text)
        if named
        else [b for b in BACKENDS if b.faster and _here(b, capability)]
    )
    for each in asked:
        _require(each, capability)
    _named = named
    _chosen.clear()
    _chosen.update({each.op: each for each in asked})


def _here(wanted: Backend, capability: tuple[int, int]) -> bool:
    try:
        _require(wanted, capability)
    except ConfigError:
        return False
    return True


def _require(wanted: Backend, capability: tuple[int, int]) -> None:
    flag = f"--backends {wanted.op}={wanted.name}"
    if capability[0] != wanted.capability[0]:
        raise ConfigError(
            f"{flag} has kernels for compute capability {wanted.capability[0]}.x ({_CHIPS[wanted.capability]}); this "
            f"GPU has {capability[0]}.{capability[1]}. Leave it out: our own kernels compute then."
        )
    if wanted.unfit:
        raise ConfigError(f"{flag} can not be used: {wanted.unfit}. Leave it out: our own kernels compute then.")
    try:
        found = importlib.metadata.version(wanted.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"{flag} needs the package {wanted.distribution}, which is not installed. It comes with the `peers` extra: "
            'make install EXTRAS="gpu peers".'
        ) from None
    if found != wanted.version:
        raise ConfigError(
            f"{flag} was run with {wanted.distribution} {wanted.version} and no other; {found} is installed, whose "
            f'layouts and calls may differ. Install the `peers` extra: make install EXTRAS="gpu peers".'
        )
