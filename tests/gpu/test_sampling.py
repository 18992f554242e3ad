"""Tokens drawn on the GPU are those that the host draws of the same logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine.kernels.device import sample_rows as device
from engine.kernels.device import use_cuda_products
from engine.kernels.sample import DRAWN, How, Row, draw, sample, sample_rows
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
    how = torch.from_numpy(How.of_rows(rows).bits.view(np.int64)).cuda()
    found = [draw(there, how, True) for _ in range(10)]
    assert all(torch.equal(again, found[0]) for again in found)
    assert (found[0][:, 1] == DRAWN).float().mean() > 0.9


def test_rows_are_drawn_by_their_segment_and_position() -> None:
    """As parts of a step do, which know positions only where they run."""
    logits = torch.randn(9, 7_680, generator=torch.Generator().manual_seed(2)) * 4
    params = [row(0, **MIXES[n]).params for n in (1, 4, 7)]
    segment, positions = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]).int(), torch.arange(9) * 100_000
    how = torch.from_numpy(How.of(params).bits.view(np.int64))
    rows = [Row(params=params[s], position=p + 1) for s, p in zip(segment.tolist(), positions.tolist(), strict=True)]
    expected = [[s.token_id, DRAWN] for s in sample(logits.numpy(), rows)]
    assert draw(logits, how, True, segment, positions).tolist() == expected
    assert draw(logits.cuda(), how.cuda(), True, segment.cuda(), positions.cuda()).tolist() == expected


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
