"""The indexer's choice against a full sort, ties included, and its promise that company changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import StepMeta
from engine.kernels import native
from engine.kernels.index_topk import index_topk
from engine.kernels.rows import Layout, RowPool, read_rows, write_rows

PAGES = 12


def filled_pool(layout: Layout, keys: torch.Tensor) -> RowPool:
    """Row r of the pool holds keys[r]; both item 0 and what follows the keys are NaN."""
    dim = keys.shape[1]
    items = -(-len(keys) // 64) + 1
    item_bytes = RowPool.item_bytes_for(64, "index", layout, dim, 64)
    pool = RowPool(torch.zeros(items, item_bytes, dtype=torch.uint8), 64, "index", layout, dim, 64)
    write_rows(pool, torch.arange(pool.num_rows), torch.full((pool.num_rows, dim), torch.nan))
    write_rows(pool, torch.arange(64, len(keys)), keys[64:].contiguous())
    return pool


@pytest.fixture(scope="module", params=["v4", "exact"])
def pool(request):
    keys = torch.randn(64 * (16 * PAGES + 1), 128, generator=torch.Generator().manual_seed(1))
    return filled_pool(request.param, keys)


def one_segment(start: int, length: int, pages: list[int]) -> StepMeta:
    return StepMeta(
        positions=torch.arange(start, start + length),
        segment=torch.zeros(length, dtype=torch.int32),
        offsets=torch.tensor([0, length], dtype=torch.int32),
        starts=torch.tensor([start]),
        page_table=torch.tensor([pages], dtype=torch.int32),
        swa_table=torch.zeros(1, len(pages), dtype=torch.int32),
        slots=torch.ones(1, dtype=torch.int32),
    )


def scores_of(q, w, pool, meta, token) -> torch.Tensor:
    """The definition in float64, for every visible block of one token."""
    b = torch.arange((int(meta.positions[token]) + 1) // 4)
    rows = meta.page_table[meta.segment[token]].long()[b // 64] * 64 + b % 64
    return ((read_rows(pool, rows).double() @ q[token].double().T).relu() @ w[token].double()).float()


def random_queries(num_tokens: int, num_heads: int, dim: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_heads)
    q = torch.randn(num_tokens, num_heads, dim, generator=generator)
    return q, torch.randn(num_tokens, num_heads, generator=generator)


@pytest.mark.parametrize("num_heads", [1, 3, 4, 7, 32, 64])
def test_the_best_blocks_by_definition_are_chosen(engine, step, pool, num_heads):
    """Blocks within rounding of the hundredth score may go either way; all others may not."""
    meta = step([(0, 5), (510, 9), (2_900, 1), (1_500, 12)], pages=PAGES)
    q, w = random_queries(27, num_heads)
    got = index_topk(q, w, pool, meta, 100)
    for token in range(27):
        scores = scores_of(q, w, pool, meta, token)
        best = scores.sort(descending=True, stable=True)
        chosen = got[token][got[token] >= 0]
        assert len(chosen) == min(100, len(scores))
        assert torch.equal(chosen, chosen.unique())  # ascending, no block twice
        assert torch.all(got[token, len(chosen) :] == -1)
        if len(scores) > 100:
            margin = 1e-5 * scores.abs().max()
            sure = best.indices[best.values > best.values[99] + margin]
            assert set(sure.tolist()) <= set(chosen.tolist())
            assert torch.all(scores[chosen.long()] >= best.values[99] - margin)


def test_everything_visible_is_chosen_until_it_exceeds_k(engine, step, pool):
    meta = step([(0, 10), (203, 5)], pages=PAGES)
    q, w = random_queries(15, 4)
    got = index_topk(q, w, pool, meta, 51)
    for token, p in enumerate(meta.positions.tolist()):
        visible = (p + 1) // 4
        if visible <= 51:
            assert got[token].tolist() == list(range(visible)) + [-1] * (51 - visible)
    assert meta.positions[-1] == 207
    assert len(got[-1].unique()) == 51  # 51 of 52


def test_a_block_is_visible_from_its_last_token_on(engine, step, pool):
    meta = step([(0, 9)], pages=PAGES)
    q, w = random_queries(9, 4)
    counts = (index_topk(q, w, pool, meta, 8) >= 0).sum(dim=1).tolist()
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_ties_go_to_the_lower_block_whatever_the_scores(data):
    """Keys on one axis make a score any small whole number, so that nearly all of them tie."""
    visible = data.draw(st.integers(2, 700))
    k = data.draw(st.integers(1, visible - 1))
    values = data.draw(st.sampled_from([[0], [1], [0, 1], [-2, 0, 1, 3], list(range(-8, 9))]))
    order = data.draw(st.sampled_from(["random", "ascending", "descending"]))
    levels = torch.tensor(values)[torch.randint(len(values), (visible,), generator=torch.Generator().manual_seed(k))]
    if order != "random":
        levels = levels.sort(descending=order == "descending").values
    keys = torch.zeros(64 * 12, 128)
    keys[64 : 64 + visible, 0] = levels.abs().float()
    keys[64 : 64 + visible, 1] = (levels < 0).float()
    pool = filled_pool("v4", keys)
    meta = one_segment(4 * visible - 1, 1, list(range(1, 12)))
    q = torch.zeros(1, 2, 128)
    q[0, 0, 0] = 1.0  # head 0 says |level|; head 1 takes 9 off where it was negative
    q[0, 1, 1] = 9.0
    got = []
    for reference in (True, False):
        native.use_reference(reference)
        try:
            got.append(index_topk(q, torch.tensor([[1.0, -1.0]]), pool, meta, k)[0])
        finally:
            native.use_reference(False)
    scores = levels.abs() - 9 * (levels < 0).long()
    expected = sorted(sorted(range(visible), key=lambda b: (-int(scores[b]), b))[:k])
    assert got[0].tolist() == expected
    assert got[1].tolist() == expected


@pytest.mark.parametrize(("num_heads", "threads"), [(4, 1), (4, 2), (7, 1), (32, 1)])
def test_a_long_context_is_searched_exactly(native_only, with_threads, num_heads, threads):
    """Whole numbers small enough that no sum is rounded, but queries that bf16 would round: scores are exact, many
    tie, and a choice made from rounded queries would differ."""
    with_threads(threads)
    generator = torch.Generator().manual_seed(num_heads)
    blocks = 12_000
    keys = torch.randint(-8, 9, (64 + blocks, 128), generator=generator).float()
    keys[64::3] = keys[64::3].clamp(-1, 2)  # other lengths, other scales
    keys[64 + 9_001, 7] = torch.nan
    pages = torch.randperm(-(-blocks // 64), generator=generator) + 1
    places = pages[torch.arange(blocks) // 64] * 64 + torch.arange(blocks) % 64
    pool = filled_pool("v4", keys)
    write_rows(pool, places, keys[64:].contiguous())
    largest = 1023 * 4 // max(4, num_heads)
    q = torch.randint(-largest, largest + 1, (9, num_heads, 128), generator=generator).float()
    w = torch.randint(-2, 4, (9, num_heads), generator=generator).float()
    got = index_topk(q, w, pool, one_segment(4 * blocks - 9, 9, pages.tolist()), 512)
    for token in range(9):
        visible = (4 * blocks - 9 + token + 1) // 4
        scores = ((keys[64 : 64 + visible].double() @ q[token].double().T).relu() @ w[token].double()).nan_to_num(1e30)
        best = scores.sort(descending=True, stable=True).indices[:512]
        assert torch.equal(got[token].long(), best.sort().values), f"token {token}"


def test_a_broken_key_is_chosen_so_that_it_shows(engine):
    keys = torch.randn(64 * 5, 128, generator=torch.Generator().manual_seed(2)).abs()
    keys[64 + 77, 5] = torch.nan
    q, w = torch.ones(1, 4, 128), torch.full((1, 4), -1.0)
    for layout in ("v4", "exact"):
        got = index_topk(q, w, filled_pool(layout, keys), one_segment(799, 1, [1, 2, 3, 4]), 3)
        assert 77 in got[0].tolist()


@pytest.mark.parametrize("num_heads", [4, 6])
def test_both_engines_choose_the_same_blocks(native_only, step, pool, num_heads):
    meta = step([(1_000, 20), (3_060, 5)], pages=PAGES)
    q, w = random_queries(25, num_heads)
    w = w.abs()  # signed weights and few heads leave many scores at exactly 0
    native.use_reference(True)
    expected = index_topk(q, w, pool, meta, 64)
    native.use_reference(False)
    assert torch.equal(index_topk(q, w, pool, meta, 64), expected)


@pytest.mark.parametrize("num_heads", [4, 5])
def test_a_token_gets_the_same_blocks_alone_in_company_and_in_any_chunks(native_only, step, with_threads, num_heads):
    """Neighbouring keys differ in the last bits of their scores only, so another order of sums would show."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(128, generator=generator) + torch.randn(64 * 97, 128, generator=generator) * 1e-7
    pool = filled_pool("exact", keys)
    start, end = 700, 960
    q, w = random_queries(end - start, num_heads)

    def run(begin: int, chunk: int, threads: int, company: bool) -> torch.Tensor:
        with_threads(threads)
        parts = []
        for first in range(begin, end, chunk):
            here = min(chunk, end - first)
            spans, owners = [(first, here)], [0]
            queries, weights = q[first - start :][:here], w[first - start :][:here]
            if company:
                spans, owners = [(333, 3), (first, here)], [1, 0]
                queries = torch.cat([torch.ones(3, num_heads, 128), queries])
                weights = torch.cat([torch.ones(3, num_heads), weights])
            meta = step(spans, pages=6, only=owners)
            parts.append(index_topk(queries, weights, pool, meta, 40)[3 * company :])
        return torch.cat(parts)

    whole = run(start, end - start, 1, company=False)
    for begin, chunk, threads, company in [
        (920, 1, 1, False),
        (850, 3, 2, True),
        (start, 100, 2, False),
        (start, 256, 1, True),
    ]:
        assert torch.equal(run(begin, chunk, threads, company), whole[begin - start :])


def test_keys_of_any_width_work_in_the_exact_layout(engine):
    keys = torch.randn(64 * 5, 20, generator=torch.Generator().manual_seed(4))
    pool = filled_pool("exact", keys)
    q, w = random_queries(3, 9, dim=20)
    meta = one_segment(990, 3, [1, 2, 3, 4])
    got = index_topk(q, w.abs(), pool, meta, 30)
    for token in range(3):
        best = scores_of(q, w.abs(), pool, meta, token).topk(30).indices.sort().values
        assert got[token].tolist() == best.tolist()


def test_weights_of_another_shape_are_refused(pool):
    meta = one_segment(100, 2, [1])
    with pytest.raises(ValueError, match=r"w is torch.float32 \[2, 3\]; the kernel reads torch.float32 \[2, 4\]"):
        index_topk(torch.zeros(2, 4, 128), torch.zeros(2, 3), pool, meta, 8)
