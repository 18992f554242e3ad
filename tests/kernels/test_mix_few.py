"""The hyper-connections of a few tokens: the source of the CUDA kernels run on the CPU, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch

from engine.kernels.hyper_connections import HyperSite, mix_in
from engine.kernels.norm_rope import rms_norm
from tests.kernels.cuda_on_cpu import compiled


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("mix_few", tmp_path_factory.mktemp("mix"))


@pytest.mark.parametrize(("tokens", "size"), [(1, 128), (3, 640), (8, 1024)])
@pytest.mark.parametrize("normed", [False, True])
def test_what_goes_in_and_how_streams_mix_is_that_of_the_reference(
    library, tokens: int, size: int, normed: bool
) -> None:
    g = torch.Generator().manual_seed(size)
    streams = torch.randn(tokens, 4, size, generator=g)
    # Streams that are nearly one another's opposite: their mixture is much shorter than they are.
    streams[:, 1] = -streams[:, 0] + 0.05 * streams[:, 1]
    site = HyperSite(
        torch.randn(24, 4 * size, generator=g) * size**-0.5, torch.randn(24, generator=g), torch.rand(3, generator=g)
    )
    norm = 1 + 0.1 * torch.randn(size, generator=g)
    expected, post, comb = mix_in(streams, site, 1e-6, 1e-6, 20)
    if normed:
        expected = rms_norm(expected, norm, 1e-6)
    parts = torch.full((tokens, 34, size // 32), torch.nan)
    out = [torch.full(shape, torch.nan) for shape in ((tokens, size), (tokens, 4), (tokens, 4, 4))]
    fields = [
        *((f"t{n}", ctypes.c_void_p) for n in range(9)),
        *((name, ctypes.c_int) for name in ("tokens", "size", "rounds")),
        *((name, ctypes.c_float) for name in ("rms_eps", "hc_eps")),
    ]
    call = type("Call", (ctypes.Structure,), {"_fields_": fields})
    tensors = (streams, site.fn.contiguous(), site.base, site.scale, norm if normed else None, parts, *out)
    at = (None if t is None else t.data_ptr() for t in tensors)
    library.run_mix(ctypes.byref(call(*at, tokens, size, 20, 1e-6, 1e-6)))
    for got, wanted, tolerance in zip(out, (expected, post, comb), (2e-5, 1e-6, 1e-5), strict=True):
        assert torch.allclose(got, wanted, rtol=tolerance, atol=tolerance)
    ones = torch.ones(tokens, 4)
    assert torch.allclose(out[2].sum(1), ones, atol=1e-5)
    assert torch.allclose(out[2].sum(2), ones, atol=1e-4)
