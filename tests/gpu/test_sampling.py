"""Tokens drawn on the GPU are those that the host draws of the same logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine.kernels.device import sample_rows as device
from engine.kernels.device import use_cuda_products
from engine.kernels.sample import Row, how_drawn, sample, sample_rows
from tests.kernels.test_sample_rows import MIXES, row

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def in_cuda() -> Iterator[None]:
    use_cuda_products(True)
    yield
    use_cuda_products(False)


def rows_of(count: int) -> list[Row]:
    return [row(31 * n, **MIXES[n % len(MIXES)]) for n in range(count)]


@pytest.mark.parametrize("count", [1, 4, 33, 200])
@pytest.mark.parametrize("vocabulary", [7_680, 129_280])
def test_every_mix_of_options_draws_what_the_host_draws(vocabulary: int, count: int) -> None:
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(count)) * 4
    rows = rows_of(count)
    expected = sample(logits.numpy(), rows)
    there = logits.cuda()
    assert device.takes(vocabulary)
    assert sample_rows(there, rows) == expected
    how = torch.from_numpy(how_drawn(rows).view(np.int64)).cuda()
    found = [device.draw(there, how, True) for _ in range(10)]
    assert all(torch.equal(again, found[0]) for again in found)
    assert (found[0][:, 1] == device.DRAWN).float().mean() > 0.9


def test_rows_that_the_host_has_to_look_at_are_drawn_among_the_others() -> None:
    logits = torch.randn(6, 7_680, generator=torch.Generator().manual_seed(1)) * 4
    logits[1, 5] = torch.nan
    logits[4] *= 0.001  # flat: its filter passes more than the candidates
    rows = [
        row(0, seed=1), row(1, seed=1), row(2, seed=1, logprobs=True, top_logprobs=3),
        row(3, seed=1, logit_bias=((7, 50.0),)), row(4, seed=1, top_p=0.9), row(5, temperature=0),
    ]  # fmt: skip
    expected = sample(logits.numpy(), rows)
    assert [s.ok for s in expected] == [True, False, True, True, True, True]
    assert sample_rows(logits.cuda(), rows) == expected
