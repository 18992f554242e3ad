from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels.hyper_connections import (
    Behind,
    HyperSite,
    Unbalanced,
    collapse,
    mix_in,
    mix_on,
    mix_out,
    streams_of,
)
from engine.kernels.norm_rope import rms_norm

EPS = 1e-6
SIZES = [256, 24]  # the second is no multiple of 16


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def parameters(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(24, 4 * size, seed=1, scale=0.1), draw(24, seed=2), draw(3, seed=3)


def formula(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """One token in float64, entry by entry."""
    flat = x.double().flatten()
    mix = (fn.double() @ flat) / (flat.square().mean() + EPS).sqrt()
    pre = torch.sigmoid(mix[:4] * scale[0].double() + base[:4]) + EPS
    post = 2 * torch.sigmoid(mix[4:8] * scale[1].double() + base[4:8])
    comb = torch.softmax(mix[8:].view(4, 4) * scale[2].double() + base[8:].view(4, 4), dim=1) + EPS
    comb = comb / (comb.sum(0) + EPS)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + EPS)
        comb = comb / (comb.sum(0) + EPS)
    return sum(pre[j] * x[j].double() for j in range(4)), post, comb  # type: ignore[return-value]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("iters", [1, 20])
def test_the_way_in_weighs_the_streams_and_balances_the_way_out(engine: str, size: int, iters: int) -> None:
    parts, streams = parameters(size), draw(7, 4, size, seed=4, scale=3.0)
    x, post, comb = mix_in(streams, HyperSite(*parts), EPS, EPS, iters)
    for t in range(7):
        want = formula(streams[t], *parts, iters)
        for got, exact in zip((x[t], post[t], comb[t]), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(comb.sum(1), torch.ones(7, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_way_out_sums_over_the_stream_a_value_comes_from(engine: str, size: int) -> None:
    y, streams, post, comb = draw(5, size), draw(5, 4, size, seed=1), draw(5, 4, seed=2), draw(5, 4, 4, seed=3)
    got = mix_out(y, streams, post, comb)
    exact = torch.empty(5, 4, size, dtype=torch.float64)
    for t in range(5):
        for k in range(4):
            exact[t, k] = post[t, k].double() * y[t] + sum(comb[t, j, k].double() * streams[t, j] for j in range(4))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_head_collapses_the_streams_to_one(engine: str, size: int) -> None:
    fn, base, scale, streams = draw(4, 4 * size, scale=0.1), draw(4), draw(1, seed=6), draw(5, 4, size, seed=7)
    got = collapse(streams, fn, base, scale, EPS, EPS)
    flat = streams.double().flatten(1)
    mix = (flat @ fn.double().T) / (flat.square().mean(1, keepdim=True) + EPS).sqrt()
    weights = torch.sigmoid(mix * scale.double() + base) + EPS
    exact = (weights[:, :, None] * streams.double()).sum(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_behind_a_sublayer_streams_are_spread_and_mixed_as_one_after_the_other(engine: str, size: int) -> None:
    y, streams, post, comb = draw(5, size), draw(5, 4, size, seed=1), draw(5, 4, seed=2), draw(5, 4, 4, seed=3)
    site, norm = HyperSite(*parameters(size)), draw(size, seed=4)
    behind = Behind(y, streams, post, comb)
    after = mix_out(y, streams, post, comb)
    assert torch.equal(streams_of(behind), after)
    assert streams_of(after) is after
    x, *mixing = mix_in(after, site, EPS, EPS, 20, norm)
    for before in (behind, after):
        for got, want in zip(mix_on(before, site, EPS, EPS, 20, norm), (x, after, *mixing), strict=True):
            assert torch.equal(got, want)


def test_whoever_takes_a_matrix_that_is_not_balanced_balances_it(engine: str) -> None:
    y, streams, post, logits = draw(5, 256), draw(5, 4, 256, seed=1), draw(5, 4, seed=2), draw(5, 4, 4, seed=3)
    comb = Unbalanced(logits, 20, EPS)
    for sums in (comb.balanced().sum(1), comb.balanced().sum(2)):
        torch.testing.assert_close(sums, torch.ones(5, 4), rtol=0, atol=1e-5)
    assert torch.equal(mix_out(y, streams, post, comb), mix_out(y, streams, post, comb.balanced()))
    with pytest.raises(ValueError, match="do not belong together"):
        mix_out(y, streams, post, Unbalanced(logits[:4], 20, EPS))


@pytest.mark.parametrize("size", SIZES)
def test_the_collapsed_stream_is_normed_where_a_norm_is_given(engine: str, size: int) -> None:
    head, streams = (draw(4, 4 * size, scale=0.1), draw(4), draw(1, seed=6)), draw(5, 4, size, seed=7)
    norm = draw(size, seed=8)
    alone = collapse(streams, *head, EPS, EPS)
    assert torch.equal(collapse(streams, *head, EPS, EPS, norm), rms_norm(alone, norm, EPS))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_has_the_same_bits_in_every_batch(
    engine: str, with_threads: Callable[[int], None], threads: int
) -> None:
    site, head = HyperSite(*parameters(256)), (draw(4, 1024), draw(4), draw(1))
    streams = draw(256, 4, 256, seed=5)

    def run(part: Tensor) -> tuple[Tensor, ...]:
        x, post, comb = mix_in(part, site, EPS, EPS, 20)
        after = mix_out(x, part, post, comb)
        return x, post, comb, after, collapse(after, *head, EPS, EPS)

    with_threads(1)
    alone = [run(streams[i : i + 1]) for i in range(18)]
    with_threads(threads)
    for t in (*range(1, 18), 64, 256):
        batch = run(streams[:t])
        for i in range(min(t, 18)):
            for got, want in zip(batch, alone[i], strict=True):
                assert torch.equal(got[i], want[0]), f"token {i} of {t}"


def test_a_site_gives_its_matrix_back(engine: str) -> None:
    fn, base, scale = parameters(64)
    assert torch.equal(HyperSite(fn, base, scale).fn, fn)


def test_shapes_that_do_not_belong_together_are_refused(engine: str) -> None:
    with pytest.raises(ValueError, match="hyper-connection site"):
        HyperSite(draw(23, 1024), draw(24), draw(3))
    with pytest.raises(ValueError, match="does not fit streams"):
        mix_in(draw(2, 4, 128), HyperSite(*parameters(256)), EPS, EPS, 20)
    with pytest.raises(ValueError, match="do not belong together"):
        mix_out(draw(3, 256), draw(2, 4, 256), draw(2, 4), draw(2, 4, 4))
