"""Sparse attention against the definition in float64, and its promise that company never changes a bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.kernels.rows import Layout, RowPool, read_rows, write_rows
from engine.kernels.sparse_attention import sparse_attention

PAGES = 6
SCALE = 512**-0.5


def filled_pool(rows_per_item: int, layout: Layout, dim: int, items: int = 16 * PAGES + 1) -> RowPool:
    item_bytes = RowPool.item_bytes_for(rows_per_item, "latent", layout, dim, 64)
    pool = RowPool(torch.zeros(items, item_bytes, dtype=torch.uint8), rows_per_item, "latent", layout, dim, 64)
    generator = torch.Generator().manual_seed(rows_per_item)
    write_rows(pool, torch.arange(pool.num_rows), torch.randn(pool.num_rows, dim, generator=generator))
    return pool


@pytest.fixture(scope="module", params=["v4", "exact"])
def pools(request):
    """Window, C4 and C128 rows of every page any step of this file may name."""
    return {n: filled_pool(n, request.param, 512) for n in (256, 64, 2)}


def pick_blocks(meta, k: int) -> torch.Tensor:
    """A different list for each token, by its position alone, so that a replay in other chunks has the same ones."""
    selected = torch.full((len(meta.positions), k), -1, dtype=torch.int32)
    for token, p in enumerate(meta.positions.tolist()):
        visible = (p + 1) // 4
        order = torch.randperm(visible, generator=torch.Generator().manual_seed(p))
        chosen = order[:k].sort().values
        selected[token, : len(chosen)] = chosen.int()
    return selected


def attend(q, sink, meta, pools, ratio, selected=None):
    compressed = {0: None, 4: pools[64], 128: pools[2]}[ratio]
    return sparse_attention(q, sink, meta, pools[256], compressed, ratio, selected, SCALE)


def by_definition(q, sink, meta, pools, ratio, selected=None) -> torch.Tensor:
    """The formula, one token and one head at a time, in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for token, (p, segment) in enumerate(zip(meta.positions.tolist(), meta.segment.tolist(), strict=True)):
        swa, pages = meta.swa_table[segment].tolist(), meta.page_table[segment].tolist()
        rows = [swa[s // 256] * 256 + s % 256 for s in range(max(0, p - 127), p + 1)]
        keys = [read_rows(pools[256], torch.tensor(rows))]
        if ratio == 4:
            blocks = [b for b in selected[token].tolist() if b >= 0]
            rows = torch.tensor([pages[b // 64] * 64 + b % 64 for b in blocks], dtype=torch.int64)
            keys.append(read_rows(pools[64], rows))
        elif ratio == 128:
            rows = [pages[b // 2] * 2 + b % 2 for b in range((p + 1) // 128)]
            keys.append(read_rows(pools[2], torch.tensor(rows, dtype=torch.int64)))
        table = torch.cat(keys).double()
        for head in range(q.shape[1]):
            logits = table @ q[token, head].double() * SCALE
            top = max(logits.max().item(), sink[head].item())
            weights = (logits - top).exp()
            out[token, head] = weights @ table / (weights.sum() + math.exp(sink[head] - top))
    return out


def random_queries(num_tokens: int, num_heads: int, dim: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_tokens, num_heads, dim, generator=generator), torch.randn(num_heads, generator=generator)


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("num_heads", [1, 3, 4, 6, 8])
def test_it_is_the_softmax_over_window_blocks_and_sink(engine, step, pools, ratio, num_heads):
    meta = step([(0, 9), (120, 14), (700, 1), (1190, 20)], pages=PAGES)
    q, sink = random_queries(44, num_heads)
    selected = pick_blocks(meta, 37) if ratio == 4 else None
    got = attend(q, sink, meta, pools, ratio, selected)
    expected = by_definition(q, sink, meta, pools, ratio, selected)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_window_may_begin_later_than_its_128_tokens(engine, step, pools):
    """Rows before `oldest` are as if they were not there: a draft layer's first ones were never written."""
    meta = step([(1, 6), (130, 9), (700, 2)], pages=PAGES)
    q, sink = random_queries(17, 4)
    oldest = [1, 100, 0]
    got = attend(q, sink, replace(meta, oldest=torch.tensor(oldest)), pools, 0)
    for token, (p, segment) in enumerate(zip(meta.positions.tolist(), meta.segment.tolist(), strict=True)):
        rows = torch.arange(max(oldest[segment], p - 127), p + 1)
        keys = read_rows(pools[256], meta.swa_table[segment].long()[rows // 256] * 256 + rows % 256).double()
        logits = torch.cat([q[token].double() @ keys.T * SCALE, sink[:, None].double()], dim=1)
        assert torch.allclose(got[token].double(), logits.softmax(1)[:, :-1] @ keys, rtol=0, atol=2e-5)


def test_the_first_token_of_a_prompt_sees_itself_and_the_sink(engine, step, pools):
    meta = step([(0, 1)], pages=PAGES)
    q, sink = random_queries(1, 4)
    key = read_rows(pools[256], meta.swa_table[0, :1].long() * 256)[0]
    for ratio in (0, 128):
        got = attend(q, sink, meta, pools, ratio)
        share = torch.sigmoid(q[0] @ key * SCALE - sink)
        assert torch.allclose(got[0], share[:, None] * key, atol=1e-6)


def test_a_sink_of_minus_infinity_takes_nothing(engine, step, pools):
    meta = step([(300, 3)], pages=PAGES)
    q, _ = random_queries(3, 4)
    got = attend(q, torch.full((4,), -torch.inf), meta, pools, 0)
    expected = by_definition(q, torch.full((4,), -1e30), meta, pools, 0)
    assert torch.allclose(got.double(), expected, atol=1e-5)


def test_large_logits_neither_overflow_nor_lose_the_best_key(engine, step, pools):
    """Logits of some thousands carry rounding of 1e-3, hence the tolerance; exp of them would be infinite."""
    meta = step([(500, 2)], pages=PAGES)
    q, sink = random_queries(2, 4)
    got = attend(q * 1_000, sink, meta, pools, 128)
    expected = by_definition(q * 1_000, sink, meta, pools, 128)
    assert torch.allclose(got.double(), expected, atol=1e-2)


def test_rows_outside_the_view_of_a_token_are_never_touched(engine, step, pools):
    """NaN in the sink item, after the last token, before the window and in unfinished blocks changes no bit."""
    meta = step([(400, 5)], pages=PAGES)
    q, sink = random_queries(5, 4)
    selected = pick_blocks(meta, 20)
    before = [attend(q, sink, meta, pools, ratio, selected if ratio == 4 else None) for ratio in (0, 4, 128)]
    spoiled = {n: RowPool(p.data.clone(), n, "latent", p.layout, p.dim, p.rope_dim) for n, p in pools.items()}
    swa, pages = meta.swa_table[0].long(), meta.page_table[0].long()
    seen = set((swa[torch.arange(273, 405) // 256] * 256 + torch.arange(273, 405) % 256).tolist())
    unseen = torch.tensor([r for r in range(spoiled[256].num_rows) if r not in seen])
    write_rows(spoiled[256], unseen, torch.full((len(unseen), 512), torch.nan))
    chosen = selected[selected >= 0].long().unique()
    seen = set((pages[chosen // 64] * 64 + chosen % 64).tolist())
    unseen = torch.tensor([r for r in range(spoiled[64].num_rows) if r not in seen])
    write_rows(spoiled[64], unseen, torch.full((len(unseen), 512), torch.nan))
    seen = set((pages[torch.arange(3) // 2] * 2 + torch.arange(3) % 2).tolist())
    unseen = torch.tensor([r for r in range(spoiled[2].num_rows) if r not in seen])
    write_rows(spoiled[2], unseen, torch.full((len(unseen), 512), torch.nan))
    after = [attend(q, sink, meta, spoiled, ratio, selected if ratio == 4 else None) for ratio in (0, 4, 128)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_broken_key_shows_only_in_tokens_that_see_it(engine, step, pools):
    meta = step([(300, 140)], pages=PAGES)
    q, sink = random_queries(140, 2)
    data = pools[256].data.clone()
    spoiled = RowPool(data, 256, "latent", pools[256].layout, 512, 64)
    write_rows(spoiled, meta.swa_table[0, 1:2].long() * 256 + 300 - 256, torch.full((1, 512), torch.nan))
    got = attend(q, sink, meta, {**pools, 256: spoiled}, 0)
    assert got[:128].isnan().all()  # positions 300 to 427 have position 300 in their window
    assert torch.equal(got[128:], attend(q, sink, meta, pools, 0)[128:])


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("num_heads", [4, 6])
def test_a_token_has_the_same_bits_alone_in_company_and_in_any_chunks(
    native_only, step, pools, with_threads, ratio, num_heads
):
    start, end = 350, 610
    q, sink = random_queries(end - start, num_heads)

    def run(begin: int, chunk: int, threads: int, company: bool) -> torch.Tensor:
        with_threads(threads)
        parts = []
        for first in range(begin, end, chunk):
            here = min(chunk, end - first)
            spans, owners, queries = [(first, here)], [0], q[first - start : first - start + here]
            if company:
                spans, owners = [(5, 3), (first, here), (900, 2)], [1, 0, 2]
                queries = torch.cat([torch.ones(3, num_heads, 512), queries, torch.ones(2, num_heads, 512)])
            meta = step(spans, pages=PAGES, only=owners)
            selected = pick_blocks(meta, 45) if ratio == 4 else None
            out = attend(queries, sink, meta, pools, ratio, selected)
            parts.append(out[3 : 3 + here] if company else out)
        return torch.cat(parts)

    whole = run(start, end - start, 1, company=False)
    plans = [
        (580, 1, 1, False),
        (500, 3, 2, True),
        (start, 100, 2, False),
        (start, 256, 1, True),
        (start, 999, 2, False),
    ]
    for begin, chunk, threads, company in plans:
        assert torch.equal(run(begin, chunk, threads, company), whole[begin - start :])


def test_widths_that_fill_no_vector_work_in_the_exact_layout(engine, step):
    pools = {n: filled_pool(n, "exact", 24) for n in (256, 64, 2)}
    meta = step([(250, 12)], pages=PAGES)
    q, sink = random_queries(12, 5, dim=24)
    selected = pick_blocks(meta, 10)
    got = attend(q, sink, meta, pools, 4, selected)
    expected = by_definition(q, sink, meta, pools, 4, selected)
    assert torch.allclose(got.double(), expected, atol=1e-5)


def test_a_ratio_and_its_inputs_must_fit_together(step, pools):
    meta = step([(8, 1)], pages=PAGES)
    q, sink = random_queries(1, 4)
    with pytest.raises(ValueError, match=r"ratio 128 .* selection given"):
        sparse_attention(q, sink, meta, pools[256], pools[2], 128, pick_blocks(meta, 2), SCALE)
    with pytest.raises(ValueError, match="compressed rows missing"):
        sparse_attention(q, sink, meta, pools[256], None, 4, pick_blocks(meta, 2), SCALE)


def test_queries_of_another_width_than_the_rows_are_refused(step, pools):
    meta = step([(8, 1)], pages=PAGES)
    with pytest.raises(ValueError, match=r"q is torch.float32 \[1, 4, 128\]; the kernel reads"):
        attend(torch.zeros(1, 4, 128), torch.zeros(4), meta, pools, 0)
