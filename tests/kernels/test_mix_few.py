"""The hyper-connections of a few tokens: the source of the CUDA kernels run on the CPU, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from engine.kernels.hyper_connections import HyperSite, collapse, mix_in, mix_out
from engine.kernels.norm_rope import rms_norm
from tests.kernels.cuda_on_cpu import compiled

EPS = 1e-6
ROUNDS = 20
_TENSORS = (
    "made", "beside", "before", "before_post", "before_comb", "streams", "fn", "base", "scale", "norm", "parts", "x",
    "post", "comb",
)  # fmt: skip


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int) for name in ("count", "tokens", "size", "rounds")),
        *((name, ctypes.c_float) for name in ("rms_eps", "hc_eps")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("mix_few", tmp_path_factory.mktemp("mix"))


def run(library: ctypes.CDLL, streams: Tensor, count: int = 1, **tensors: Tensor | None) -> None:
    tokens, _, size = streams.shape
    given = {"streams": streams, "parts": torch.full((tokens, 34, size // 32), torch.nan), **tensors}
    at = {name: t.data_ptr() for name, t in given.items() if t is not None}
    library.run_mix(
        ctypes.byref(Call(**at, count=count, tokens=tokens, size=size, rounds=ROUNDS, rms_eps=EPS, hc_eps=EPS))
    )


def nothing(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def opposite(tokens: int, size: int, g: torch.Generator) -> Tensor:
    """Two of the streams are nearly one another's opposite: their mixture is much shorter than they are."""
    streams = torch.randn(tokens, 4, size, generator=g)
    streams[:, 1] = -streams[:, 0] + 0.05 * streams[:, 1]
    return streams


def site_of(size: int, g: torch.Generator) -> HyperSite:
    return HyperSite(
        torch.randn(24, 4 * size, generator=g) * size**-0.5, torch.randn(24, generator=g), torch.rand(3, generator=g)
    )


def check(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, wanted, tolerance in zip(got, expected, (2e-5, 1e-6, 1e-5), strict=True):
        assert torch.allclose(one, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tokens", "size"), [(1, 128), (3, 640), (8, 1024)])
@pytest.mark.parametrize("normed", [False, True])
def test_what_goes_in_and_how_streams_mix_is_that_of_the_reference(
    library, tokens: int, size: int, normed: bool
) -> None:
    g = torch.Generator().manual_seed(size)
    streams, site = opposite(tokens, size, g), site_of(size, g)
    norm = 1 + 0.1 * torch.randn(size, generator=g)
    expected, *mixing = mix_in(streams, site, EPS, EPS, ROUNDS)
    if normed:
        expected = rms_norm(expected, norm, EPS)
    x, post, comb = nothing(tokens, size), nothing(tokens, 4), nothing(tokens, 4, 4)
    run(
        library, streams, fn=site.fn.contiguous(), base=site.base, scale=site.scale, norm=norm if normed else None,
        x=x, post=post, comb=comb,
    )  # fmt: skip
    check((x, post, comb), (expected, *mixing))
    ones = torch.ones(tokens, 4)
    assert torch.allclose(comb.sum(1), ones, atol=1e-5)
    assert torch.allclose(comb.sum(2), ones, atol=1e-4)


@pytest.mark.parametrize(("tokens", "size", "count"), [(1, 128, 1), (3, 640, 6), (5, 256, 8), (9, 128, 11)])
@pytest.mark.parametrize("with_beside", [False, True])
def test_what_a_sublayer_made_is_spread_before_the_streams_are_mixed(
    library, tokens: int, size: int, count: int, with_beside: bool
) -> None:
    g = torch.Generator().manual_seed(size + count)
    before, site = opposite(tokens, size, g), site_of(size, g)
    before_post, before_comb = torch.rand(tokens, 4, generator=g), torch.rand(tokens, 4, 4, generator=g)
    made = torch.randn(tokens, count, size, generator=g)
    beside = torch.randn(tokens, size, generator=g) if with_beside else None
    total = made[:, 0].clone()
    for part in (*made.unbind(1)[1:], *([beside] if beside is not None else [])):
        total += part  # in this order
    expected = mix_out(total, before, before_post, before_comb)
    norm = 1 + 0.1 * torch.randn(size, generator=g)
    streams, x, post, comb = (nothing(tokens, *shape) for shape in ((4, size), (size,), (4,), (4, 4)))
    common = {"fn": site.fn.contiguous(), "base": site.base, "scale": site.scale, "norm": norm}
    run(
        library, streams, count, made=made, beside=beside, before=before, before_post=before_post,
        before_comb=before_comb, **common, x=x, post=post, comb=comb,
    )  # fmt: skip
    assert torch.allclose(streams, expected, rtol=1e-6, atol=1e-6)
    again = [torch.full_like(t, torch.nan) for t in (x, post, comb)]
    run(library, streams, **common, x=again[0], post=again[1], comb=again[2])
    for got, alone in zip((x, post, comb), again, strict=True):
        assert torch.equal(got, alone), "the streams it made are those it went on with"
    check((x, post, comb), mix_in(streams, site, EPS, EPS, ROUNDS, norm))


@pytest.mark.parametrize(("tokens", "size"), [(1, 128), (5, 640)])
@pytest.mark.parametrize("normed", [False, True])
def test_the_streams_become_one(library, tokens: int, size: int, normed: bool) -> None:
    g = torch.Generator().manual_seed(size)
    streams = opposite(tokens, size, g)
    fn, base = torch.randn(4, 4 * size, generator=g) * size**-0.5, torch.randn(4, generator=g)
    scale, norm = torch.rand(1, generator=g), 1 + 0.1 * torch.randn(size, generator=g)
    expected = collapse(streams, fn, base, scale, EPS, EPS, norm if normed else None)
    x = nothing(tokens, size)
    run(library, streams, fn=fn, base=base, scale=scale, norm=norm if normed else None, x=x)
    assert torch.allclose(x, expected, rtol=2e-5, atol=2e-5)
