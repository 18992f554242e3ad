from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.kernels.compress import compress_c4, compress_c128
from engine.kernels.norm_rope import hadamard, rms_norm, rope_frequencies, rotate
from engine.kernels.rows import RowPool, read_rows

EPS = 1e-6
D, ROPE, PAGES, ITEMS = 32, 16, 4, 80
LENGTH = 600
Step = Callable[..., StepMeta]
Ratio = Literal[4, 128]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Compressor:
    """One compressor with its ring and its pool, fed with slices of one token stream."""

    def __init__(self, ratio: Ratio, tokens: int = LENGTH, seed: int = 0, rotate_keys: bool = False) -> None:
        width = 2 * D if ratio == 4 else D
        self.ratio, self.rotate_keys = ratio, rotate_keys
        self.u, self.g = draw(tokens, width, seed=seed + 1), draw(tokens, width, seed=seed + 2) * 2
        self.ape, self.norm = draw(ratio, width, seed=3), draw(D, seed=4)
        self.freqs = rope_frequencies(160000.0, ROPE)
        # Rubbish, so that a row read before it was written would show.
        shape = (ITEMS, 16, 4 * D) if ratio == 4 else (ITEMS, 256, 2 * D)
        self.ring = torch.full(shape, 1e6)
        rows = 256 // ratio
        item_bytes = RowPool.item_bytes_for(rows, "latent", "exact", D, ROPE)
        self.pool = RowPool(torch.zeros(ITEMS, item_bytes, dtype=torch.uint8), rows, "latent", "exact", D, ROPE)

    def feed(self, meta: StepMeta, u: Tensor, g: Tensor) -> None:
        if self.ratio == 4:
            compress_c4(
                u, g, self.ape, self.norm, self.ring, meta, self.freqs, EPS, self.pool, self.rotate_keys
            )  # fmt: skip
        else:
            compress_c128(u, g, self.ape, self.norm, self.ring, meta, self.freqs, EPS, self.pool)

    def run(self, step: Step, lengths: list[int], owner: int = 0) -> None:
        """The stream from its first token, in steps of these lengths."""
        start = 0
        for length in lengths:
            self.feed(step([(start, length)], PAGES, [owner]), *self.tokens(start, start + length))
            start += length

    def tokens(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self.u[start:end], self.g[start:end]

    def rows(self, meta: StepMeta, count: int, segment: int = 0) -> Tensor:
        blocks, per_page = torch.arange(count), 256 // self.ratio
        return read_rows(self.pool, meta.page_table[segment].long()[blocks // per_page] * per_page + blocks % per_page)

    def by_definition(self, blocks: int) -> Tensor:
        """Every row straight from the tokens, in float64 up to the norm."""
        u, g, rows = self.u.double(), self.g.double(), []
        gates = g + self.ape.double().repeat(len(g) // self.ratio + 1, 1)[: len(g)]
        for b in range(blocks):
            own = slice(b * self.ratio, (b + 1) * self.ratio)
            if self.ratio == 128:
                values, weights = u[own], gates[own]
            else:
                values, weights = u[own, D:], gates[own, D:]
                if b:
                    before = slice(4 * b - 4, 4 * b)
                    values = torch.cat([u[before, :D], values])
                    weights = torch.cat([gates[before, :D], weights])
            rows.append((values * weights.softmax(dim=0)).sum(dim=0))
        pooled = torch.stack(rows).float()
        out = rotate(rms_norm(pooled, self.norm, EPS), torch.arange(blocks) * self.ratio, self.freqs)
        return hadamard(out) if self.rotate_keys else out


def plan(seed: int, total: int, longest: int) -> list[int]:
    """Random chunk lengths that sum to `total`; the first few are single tokens."""
    rng, lengths = random.Random(seed), [1, 1, 1]
    while sum(lengths) < total:
        lengths.append(min(rng.choice([1, 2, 3, 5, rng.randint(1, longest)]), total - sum(lengths)))
    return lengths


@pytest.mark.parametrize("rotate_keys", [False, True])
def test_a_c4_row_pools_eight_tokens_every_four(engine: str, step: Step, rotate_keys: bool) -> None:
    compressor = Compressor(4, rotate_keys=rotate_keys)
    meta = step([(0, LENGTH)], PAGES)
    compressor.feed(meta, *compressor.tokens(0, LENGTH))
    got, exact = compressor.rows(meta, LENGTH // 4), compressor.by_definition(LENGTH // 4)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_a_c128_row_pools_its_own_128_tokens(engine: str, step: Step) -> None:
    compressor = Compressor(128)
    meta = step([(0, LENGTH)], PAGES)
    compressor.feed(meta, *compressor.tokens(0, LENGTH))
    got, exact = compressor.rows(meta, LENGTH // 128), compressor.by_definition(LENGTH // 128)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("seed", range(4))
def test_chunking_never_shows(engine: str, step: Step, ratio: Ratio, seed: int) -> None:
    whole, chunked = Compressor(ratio), Compressor(ratio)
    whole.run(step, [LENGTH])
    chunked.run(step, plan(seed, LENGTH, longest=[7, 40, 140, 300][seed]))
    meta, count = step([(0, LENGTH)], PAGES), LENGTH // ratio
    assert torch.equal(chunked.rows(meta, count), whole.rows(meta, count))


@pytest.mark.parametrize("ratio", [4, 128])
def test_token_by_token_equals_all_at_once(engine: str, step: Step, ratio: Ratio) -> None:
    whole, single = Compressor(ratio), Compressor(ratio)
    whole.run(step, [LENGTH])
    single.run(step, [1] * 300)
    meta, count = step([(0, 300)], PAGES), 300 // ratio
    assert torch.equal(single.rows(meta, count), whole.rows(meta, count))


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_segments_of_one_step_do_not_meet(
    engine: str, step: Step, with_threads: Callable[[int], None], ratio: Ratio, threads: int
) -> None:
    together = [Compressor(ratio, seed=s) for s in (0, 100, 200)]
    alone = [Compressor(ratio, seed=s) for s in (0, 100, 200)]
    for owner, compressor in enumerate(alone):
        compressor.run(step, [LENGTH], owner)
    with_threads(threads)
    shared, starts = together[0], [0, 0, 0]
    for lengths in ([5, 300, 131], [1, 1, 1], [250, 7, 130], [344, 292, 338]):
        parts = [c.tokens(s, s + n) for c, s, n in zip(together, starts, lengths, strict=True)]
        meta = step(list(zip(starts, lengths, strict=True)), PAGES)
        shared.feed(meta, torch.cat([u for u, _ in parts]), torch.cat([g for _, g in parts]))
        starts = [s + n for s, n in zip(starts, lengths, strict=True)]
    assert starts == [LENGTH] * 3
    for owner, compressor in enumerate(alone):
        count = LENGTH // ratio
        assert torch.equal(shared.rows(meta, count, owner), compressor.rows(step([(0, 1)], PAGES, [owner]), count))


@pytest.mark.parametrize("page", [1, 2])
def test_another_request_resumes_at_a_page_boundary(engine: str, step: Step, page: int) -> None:
    """It maps the first one's pages for the prefix and its own after; the first has long gone on."""
    first = Compressor(4)
    first.run(step, [LENGTH])
    owner, other = step([(0, 1)], PAGES, [0]), step([(256 * page, LENGTH - 256 * page)], PAGES, [1])
    page_table, swa_table = other.page_table.clone(), other.swa_table.clone()
    page_table[0, :page] = owner.page_table[0, :page]
    swa_table[0, page - 1] = owner.swa_table[0, page - 1]  # the window's page; older ones are gone
    swa_table[0, : page - 1] = 0
    other = replace(other, page_table=page_table, swa_table=swa_table)
    count = LENGTH // 4
    want = first.rows(owner, count)
    first.feed(other, *first.tokens(256 * page, LENGTH))
    assert torch.equal(first.rows(other, count), want)
    assert torch.equal(first.rows(owner, count), want)


@pytest.mark.parametrize(("ratio", "drafts"), [(4, 10), (128, 130)])
@pytest.mark.parametrize("accepted", [1, 2, 5])
def test_rejected_drafts_leave_no_trace(engine: str, step: Step, ratio: Ratio, drafts: int, accepted: int) -> None:
    plain, drafted, wrong = Compressor(ratio), Compressor(ratio), Compressor(ratio, seed=500)
    plain.run(step, [LENGTH])
    drafted.run(step, [250])
    at = 250
    while at + drafts <= LENGTH:
        good, bad = drafted.tokens(at, at + accepted), wrong.tokens(at + accepted, at + drafts)
        meta = step([(at, drafts)], PAGES)
        drafted.feed(meta, torch.cat([good[0], bad[0]]), torch.cat([good[1], bad[1]]))
        at += accepted
    drafted.feed(step([(at, LENGTH - at)], PAGES), *drafted.tokens(at, LENGTH))
    meta, count = step([(0, LENGTH)], PAGES), LENGTH // ratio
    assert torch.equal(drafted.rows(meta, count), plain.rows(meta, count))


@pytest.mark.parametrize("ratio", [4, 128])
def test_both_engines_make_the_same_rows_and_rings(native_only: None, step: Step, ratio: Ratio) -> None:
    from engine.kernels import native

    twin, reference = Compressor(ratio), Compressor(ratio)
    twin.run(step, plan(9, LENGTH, 200))
    native.use_reference(True)
    try:
        reference.run(step, plan(9, LENGTH, 200))
    finally:
        native.use_reference(False)
    meta, count = step([(0, LENGTH)], PAGES), LENGTH // ratio
    torch.testing.assert_close(twin.rows(meta, count), reference.rows(meta, count), rtol=1e-5, atol=1e-5)
    assert torch.equal(twin.ring[1:], reference.ring[1:])


def test_values_and_gates_may_be_halves_of_one_product(engine: str, step: Step) -> None:
    apart, joined = Compressor(4), Compressor(4)
    meta = step([(0, 100)], PAGES)
    apart.feed(meta, *apart.tokens(0, 100))
    both = torch.cat(joined.tokens(0, 100), dim=1)
    joined.feed(meta, *both.chunk(2, dim=1))
    assert torch.equal(joined.rows(meta, 25), apart.rows(meta, 25))
    assert torch.equal(joined.ring, apart.ring)


def test_a_ring_of_another_shape_is_refused(engine: str, step: Step) -> None:
    compressor = Compressor(4)
    compressor.ring = compressor.ring[:, :8]
    with pytest.raises(ValueError, match=r"do not belong\s+together"):
        compressor.feed(step([(0, 4)], PAGES), *compressor.tokens(0, 4))
