"""Both engines of a kernel, and steps over scattered pages to run them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from engine.batch import StepMeta
from engine.kernels import native


@pytest.fixture(params=["reference", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the torch references and once on the C++ twins."""
    if request.param == "native" and native.library() is None:
        pytest.skip("the C++ kernels are not built here: python setup.py build_ext --inplace")
    native.use_reference(request.param == "reference")
    yield request.param
    native.use_reference(False)


@pytest.fixture
def native_only() -> None:
    """For what only the C++ twins promise."""
    if native.library() is None:
        pytest.skip("the C++ kernels are not built here: python setup.py build_ext --inplace")


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def step() -> Callable[..., StepMeta]:
    """step([(start, length), ...], pages=P): segments whose pages lie scattered, P a segment at least.

    Segment s owns its own full pages and its own SWA pages, the same ones in every step made with the same P,
    so that a prompt can be replayed in other chunks: give `only` to keep some segments' tables.
    """

    def make(spans: list[tuple[int, int]], pages: int, only: list[int] | None = None) -> StepMeta:
        owners = only if only is not None else list(range(len(spans)))
        order = torch.randperm(16 * pages, generator=torch.Generator().manual_seed(1)) + 1
        swa_order = torch.randperm(16 * pages, generator=torch.Generator().manual_seed(2)) + 1
        lengths = torch.tensor([length for _, length in spans])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return StepMeta(
            positions=torch.cat([torch.arange(start, start + length) for start, length in spans]),
            segment=torch.repeat_interleave(torch.arange(len(spans)), lengths).int(),
            offsets=offsets.int(),
            starts=torch.tensor([start for start, _ in spans]),
            page_table=torch.stack([order[o * pages : (o + 1) * pages] for o in owners]).int(),
            swa_table=torch.stack([swa_order[o * pages : (o + 1) * pages] for o in owners]).int(),
            slots=torch.tensor([o + 1 for o in owners]).int(),
        )

    return make
