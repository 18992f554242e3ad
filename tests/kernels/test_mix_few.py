"""The hyper-connections of a few tokens: the source of the CUDA kernels run on the CPU, against the formulas in fp64.

What the kernel in front writes is NaN there until a block has waited for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels.hyper_connections import Unbalanced
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
        *((name, ctypes.c_int) for name in ("count", "tokens", "size", "rounds", "turns")),
        *((name, ctypes.c_float) for name in ("rms_eps", "hc_eps")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("mix_few", tmp_path_factory.mktemp("mix"))


def run(
    library: ctypes.CDLL, streams: Tensor, count: int = 1, rounds: int = 0, turns: int = 0, **tensors: Tensor | None
) -> None:
    tokens, _, size = streams.shape
    given = {"streams": streams, "parts": nothing(tokens, 34, size // 32), **tensors}
    at = {name: t.data_ptr() for name, t in given.items() if t is not None}
    numbers = {"count": count, "tokens": tokens, "size": size, "rounds": rounds, "turns": turns}
    library.run_mix(ctypes.byref(Call(**at, **numbers, rms_eps=EPS, hc_eps=EPS)))


def nothing(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def opposite(tokens: int, size: int, g: torch.Generator) -> Tensor:
    """Two of the streams are nearly one another's opposite: their mixture is much shorter than they are."""
    streams = torch.randn(tokens, 4, size, generator=g)
    streams[:, 1] = -streams[:, 0] + 0.05 * streams[:, 1]
    return streams


class Site:
    """Parameters of one site, and what they mean in fp64."""

    def __init__(self, size: int, g: torch.Generator, rows: int = 24) -> None:
        self.fn = torch.randn(rows, 4 * size, generator=g) * size**-0.5
        self.base, self.scale = torch.randn(rows, generator=g), torch.rand(3 if rows == 24 else 1, generator=g)
        self.norm = 1 + 0.1 * torch.randn(size, generator=g)

    def given(self, normed: bool = True) -> dict[str, Tensor | None]:
        return {"fn": self.fn, "base": self.base, "scale": self.scale, "norm": self.norm if normed else None}

    def expected(self, streams: Tensor, normed: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """x, post and the logits of comb; the last two are empty where there are four rows."""
        flat = streams.double().flatten(1)
        products = flat @ self.fn.double().T / (flat.square().mean(1, keepdim=True) + EPS).sqrt()
        scale = self.scale.double().repeat_interleave(torch.tensor([4, 4, 16][: len(self.scale)]))
        logits = products * scale + self.base.double()
        x = ((logits[:, :4].sigmoid() + EPS)[:, :, None] * streams.double()).sum(1)
        if normed:
            x = x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * self.norm.double()
        return x, 2 * logits[:, 4:8].sigmoid(), logits[:, 8:].unflatten(1, (-1, 4)) if len(self.scale) > 1 else x[:0]


def spread(made: Tensor, beside: Tensor | None, before: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams behind a sublayer, in fp64."""
    total = made.double().sum(1) if beside is None else made.double().sum(1) + beside.double()
    return post.double()[:, :, None] * total[:, None] + torch.einsum("tjk,tjd->tkd", comb.double(), before.double())


def check(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(got) == len(expected)
    for one, wanted, tolerance in zip(got, expected, (2e-5, 1e-6, 1e-5), strict=False):
        assert torch.allclose(one.double(), wanted, rtol=tolerance, atol=tolerance)


def outputs(tokens: int, size: int) -> dict[str, Tensor]:
    return {"x": nothing(tokens, size), "post": nothing(tokens, 4), "comb": nothing(tokens, 4, 4)}


@pytest.mark.parametrize(("tokens", "size", "turns"), [(1, 128, 1), (3, 640, 2), (8, 1024, 3), (1, 7168, 0)])
@pytest.mark.parametrize("normed", [False, True])
def test_what_goes_in_and_how_streams_mix_is_what_the_formulas_say(
    library, tokens: int, size: int, turns: int, normed: bool
) -> None:
    g = torch.Generator().manual_seed(size)
    streams, site, out = opposite(tokens, size, g), Site(size, g), outputs(tokens, size)
    run(library, streams, turns=turns, **site.given(normed), **out)
    check(tuple(out.values()), site.expected(streams, normed))


def test_streams_that_cancel_leave_numbers(library) -> None:
    """The mixture's length is what ten sums leave of one another: rounding may leave less than nothing."""
    g = torch.Generator().manual_seed(3)
    tokens, size = 8, 4096
    streams, site, out = 10 * torch.randn(tokens, 4, size, generator=g), Site(size, g), outputs(tokens, size)
    streams[:, 3] = -streams[:, :3].sum(1) + 1e-3 * torch.randn(tokens, size, generator=g)
    site.fn, site.base = torch.zeros_like(site.fn), torch.zeros_like(site.base)  # all streams go in alike
    run(library, streams, **site.given(), **out)
    assert all(made.isfinite().all() for made in out.values())


@pytest.mark.parametrize(
    ("tokens", "size", "count", "turns"), [(1, 128, 1, 0), (2, 640, 6, 1), (4, 256, 8, 2), (9, 128, 19, 3)]
)
@pytest.mark.parametrize("with_beside", [False, True])
@pytest.mark.parametrize("rounds", [0, ROUNDS])
def test_what_a_sublayer_made_is_spread_before_the_streams_are_mixed(
    library, tokens: int, size: int, count: int, turns: int, with_beside: bool, rounds: int
) -> None:
    g = torch.Generator().manual_seed(size + count)
    before, site, out = opposite(tokens, size, g), Site(size, g), outputs(tokens, size)
    before_post, before_comb = torch.rand(tokens, 4, generator=g), 3 * torch.randn(tokens, 4, 4, generator=g)
    matrix = Unbalanced(before_comb.double(), rounds, EPS).balanced() if rounds else before_comb
    if rounds:
        assert torch.allclose(matrix.sum(1), torch.ones(tokens, 4).double(), atol=1e-5)
    made = torch.randn(tokens, count, size, generator=g)
    beside = torch.randn(tokens, size, generator=g) if with_beside else None
    given = {
        "made": made, "beside": beside, "before": before, "before_post": before_post, "before_comb": before_comb,
    }  # fmt: skip
    streams, alone = nothing(tokens, 4, size), nothing(tokens, 4, size)
    run(library, streams, count, rounds, turns, **given, **site.given(), **out)
    expected = spread(made, beside, before, before_post, matrix)
    assert torch.allclose(streams.double(), expected, rtol=1e-6, atol=5e-6)
    run(library, alone, count, rounds, turns, **given)
    assert torch.equal(alone, streams), "whether or not they are mixed as well"
    again = outputs(tokens, size)
    run(library, streams, turns=turns, **site.given(), **again)
    for name, got in out.items():
        assert torch.equal(got, again[name]), "the streams it made are those it went on with"
    check(tuple(out.values()), site.expected(streams))


@pytest.mark.parametrize(("tokens", "size", "turns"), [(1, 128, 0), (5, 640, 3)])
@pytest.mark.parametrize("normed", [False, True])
def test_the_streams_become_one(library, tokens: int, size: int, turns: int, normed: bool) -> None:
    g = torch.Generator().manual_seed(size)
    streams, site, x = opposite(tokens, size, g), Site(size, g, 4), nothing(tokens, size)
    run(library, streams, turns=turns, **site.given(normed), x=x)
    check((x,), site.expected(streams, normed)[:1])


def test_a_token_has_the_same_bits_alone_and_in_any_company(library) -> None:
    g = torch.Generator().manual_seed(7)
    tokens, size, count = 7, 256, 3
    site = Site(size, g)
    given = {
        "made": torch.randn(tokens, count, size, generator=g), "beside": torch.randn(tokens, size, generator=g),
        "before": opposite(tokens, size, g), "before_post": torch.rand(tokens, 4, generator=g),
        "before_comb": torch.randn(tokens, 4, 4, generator=g),
    }  # fmt: skip

    def results(first: int, end: int) -> Iterator[Tensor]:
        streams, out = nothing(end - first, 4, size), outputs(end - first, size)
        some = {name: t[first:end].contiguous() for name, t in given.items()}
        run(library, streams, count, ROUNDS, **some, **site.given(), **out)
        return iter((streams, *out.values()))

    for first, end in ((0, 1), (3, 4), (2, 5), (1, 5), (6, 7)):
        for some, every in zip(results(first, end), results(0, tokens), strict=True):
            assert torch.equal(some, every[first:end])
