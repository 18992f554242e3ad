from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.linear import Matrix, linear
from engine.kernels.norm_rope import (
    hadamard,
    head_norm,
    latent,
    linears_of_normed,
    query,
    rms_norm,
    rope_frequencies,
    rotate,
)

EPS = 1e-6
YARN = (16.0, 65536, 32.0, 1.0)
POSITIONS = [0, 1, 127, 4096, 900_000, 1_048_575]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("size", [512, 48, 20])
def test_a_norm_scales_a_row_to_unit_mean_square(engine: str, size: int) -> None:
    x, weight = draw(9, size, scale=5.0), draw(size, seed=1)
    unit = x.double() / (x.double().square().mean(1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, EPS).double(), unit * weight, rtol=1e-5, atol=1e-6)
    heads = x.view(3, 3, size)
    torch.testing.assert_close(head_norm(heads, EPS).double(), unit.view(3, 3, size), rtol=1e-5, atol=1e-6)


def test_products_of_normed_rows_are_those_of_rows_that_were_normed_before(engine: str) -> None:
    x, weight = draw(9, 48, scale=5.0), draw(48, seed=1)
    matrices = [Matrix.prepare(draw(n, 48, seed=n)) for n in (20, 32)]
    normed = rms_norm(x, weight, EPS)
    for got, matrix in zip(linears_of_normed(x, weight, EPS, matrices), matrices, strict=True):
        assert torch.equal(got, linear(normed, matrix))


def test_a_row_of_zeros_stays_zero(engine: str) -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 64), torch.ones(64), EPS), torch.zeros(1, 64))


def test_plain_frequencies_fall_geometrically() -> None:
    freqs = rope_frequencies(10000.0, 64)
    exact = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(freqs.numpy(), exact, rtol=3e-7)
    assert freqs[0] == 1.0


def test_yarn_slows_only_the_pairs_that_turn_less_than_once() -> None:
    plain, slowed = rope_frequencies(160000.0, 64), rope_frequencies(160000.0, 64, YARN)
    assert torch.equal(slowed[:16], plain[:16])
    assert torch.equal(slowed[25:], plain[25:] / 16)
    ratios = (slowed / plain)[16:25].double()
    torch.testing.assert_close(ratios, 1 - torch.arange(1, 10).double() * 0.09375, rtol=1e-6, atol=0)


def test_a_pair_turns_by_the_rounded_product_of_position_and_frequency(engine: str) -> None:
    freqs, x = rope_frequencies(160000.0, 64, YARN), draw(len(POSITIONS), 2, 128)
    got = rotate(x, torch.tensor(POSITIONS), freqs)
    assert torch.equal(got[..., :64], x[..., :64])
    for t, position in enumerate(POSITIONS):
        angle = (np.float32(position) * freqs.numpy()).astype(np.float64)  # one fp32 rounding, then exact
        a, b = x[t, :, 64::2].double().numpy(), x[t, :, 65::2].double().numpy()
        np.testing.assert_allclose(got[t, :, 64::2], a * np.cos(angle) - b * np.sin(angle), rtol=0, atol=2e-6)
        np.testing.assert_allclose(got[t, :, 65::2], a * np.sin(angle) + b * np.cos(angle), rtol=0, atol=2e-6)


def test_turning_back_undoes_the_turn(engine: str) -> None:
    freqs, positions, x = rope_frequencies(10000.0, 64), torch.tensor(POSITIONS), draw(6, 3, 512)
    back = rotate(rotate(x, positions, freqs), positions, freqs, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 8, 32, 128])
def test_hadamard_is_the_sylvester_matrix(engine: str, size: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = draw(5, 2, size)
    torch.testing.assert_close(hadamard(x).double(), x.double() @ matrix * size**-0.5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-6)


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.ones(1, 96))


def test_the_fused_doors_are_the_norm_then_the_turn(engine: str) -> None:
    freqs, positions = rope_frequencies(160000.0, 64, YARN), torch.tensor(POSITIONS)
    q, kv, weight = draw(6, 4, 512), draw(6, 512, seed=1), draw(512, seed=2)
    assert torch.equal(query(q, positions, freqs, EPS), rotate(head_norm(q, EPS), positions, freqs))
    assert torch.equal(latent(kv, weight, positions, freqs, EPS), rotate(rms_norm(kv, weight, EPS), positions, freqs))


def test_rows_of_a_wider_tensor_are_read_where_they_lie(engine: str) -> None:
    freqs, positions = rope_frequencies(10000.0, 64), torch.tensor(POSITIONS)
    wide, weight = draw(6, 1024), draw(512, seed=2)
    part = wide[:, 256:768]
    assert torch.equal(
        latent(part, weight, positions, freqs, EPS), latent(part.contiguous(), weight, positions, freqs, EPS)
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_has_the_same_bits_in_every_batch(
    engine: str, with_threads: Callable[[int], None], threads: int
) -> None:
    freqs, weight = rope_frequencies(160000.0, 64, YARN), draw(512)
    q, kv, positions = draw(256, 2, 512), draw(256, 512, seed=1), torch.arange(256) * 4099

    def run(t: slice) -> tuple[Tensor, ...]:
        turned = query(q[t], positions[t], freqs, EPS)
        return turned, latent(kv[t], weight, positions[t], freqs, EPS), hadamard(turned)

    with_threads(1)
    alone = [run(slice(i, i + 1)) for i in range(18)]
    with_threads(threads)
    for t in (*range(1, 18), 64, 256):
        batch = run(slice(0, t))
        for i in range(min(t, 18)):
            for got, want in zip(batch, alone[i], strict=True):
                assert torch.equal(got[i], want[0]), f"token {i} of {t}"
