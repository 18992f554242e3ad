"""The GPU kernels against the CPU's: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton comes with the gpu extra")

from engine.batch import StepMeta, Tables
from engine.config import C4_RING, C128_RING
from engine.kernels import addresses, compress, draft_state, experts, hyper_connections, norm_rope, verify
from engine.kernels.checksum import item_checksums

# Triton decides on import, so this comes last.
from engine.kernels.device import addresses as device_addresses
from engine.kernels.device import checksum as device_checksum
from engine.kernels.device import compress as device_compress
from engine.kernels.device import draft_state as device_draft
from engine.kernels.device import experts as device_experts
from engine.kernels.device import experts_few, few_tokens, linears_some, use_cuda_products
from engine.kernels.device import hyper_connections as device_hyper
from engine.kernels.device import index_topk as device_index
from engine.kernels.device import linear as device_linear
from engine.kernels.device import norm_rope as device_norm
from engine.kernels.device import rows as device_rows
from engine.kernels.device import sparse_attention as device_attention
from engine.kernels.device import verify as device_verify
from engine.kernels.index_topk import index_topk
from engine.kernels.linear import Matrix, linear
from engine.kernels.rows import RowPool, read_rows, write_latents, write_rows
from engine.kernels.sparse_attention import sparse_attention

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(params=["triton", "cuda"] if ON_GPU else ["triton"], autouse=True)
def kernels(request):
    """On a GPU everything runs twice: products of few tokens in Triton, and in CUDA C++."""
    use_cuda_products(request.param == "cuda")
    yield request.param
    use_cuda_products(False)


PAGES = 5
SPANS = [(0, 9), (250, 14), (700, 1), (1019, 5)]


def there(value):
    """A tensor, a step or a pool of the CPU, on the device under test: a copy, even where that is the CPU."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, copy=True)
    if isinstance(value, StepMeta):
        return StepMeta(**{f.name: None if (v := getattr(value, f.name)) is None else there(v) for f in fields(value)})
    return replace(value, data=there(value.data))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>): 0 for equal tensors, about half the squared relative error near 0."""
    x, y = got.cpu().double().flatten(), expected.cpu().double().flatten()
    assert x.isfinite().all(), "an output is not finite, or was never written"
    return float(1 - 2 * (x @ y) / (x @ x + y @ y).clamp_min(1e-300))


def empty_pool(rows: int, kind: str, layout: str, dim: int) -> RowPool:
    size = RowPool.item_bytes_for(rows, kind, layout, dim, 64)
    return RowPool(torch.full((16 * PAGES + 1, size), 0xFF, dtype=torch.uint8), rows, kind, layout, dim, 64)


def filled_pool(rows: int, kind: str, layout: str, dim: int) -> RowPool:
    pool = empty_pool(rows, kind, layout, dim)
    write_rows(pool, torch.arange(pool.num_rows), randn(pool.num_rows, dim, seed=rows))
    return pool


def poisoned(meta: StepMeta, pool: RowPool, table: torch.Tensor) -> RowPool:
    """The pool with NaN in every item that no table entry of the step names."""
    data = pool.data.clone()
    unused = torch.ones(len(data), dtype=torch.bool)
    unused[table.unique().long()] = False
    data[unused] = 0xFF
    return replace(pool, data=data)


@pytest.mark.parametrize("size", [128, 256, 512, 1536])
def test_norms_and_rotations(size):
    x, weight, positions = randn(3, size), randn(size, seed=1), torch.tensor([0, 77_777, 1_048_575])
    freqs = norm_rope.rope_frequencies(160_000.0, 64)
    turns = (positions, freqs) if size & (size - 1) == 0 else (None, None)
    got = device_norm.norm_rotate(
        there(x), there(weight), 1e-6, *(None if t is None else there(t) for t in turns), False
    )
    expected = norm_rope.rms_norm(x, weight, 1e-6)
    expected = expected if turns[0] is None else norm_rope.rotate(expected, positions, freqs)
    assert torch.allclose(got.cpu(), expected, rtol=0, atol=2e-5)


def test_heads_are_normed_and_turned_one_by_one_and_back():
    q, positions = randn(3, 2, 128), torch.tensor([5, 900_000, 17])
    freqs = norm_rope.rope_frequencies(10_000.0, 64)
    got = device_norm.norm_rotate(there(q), None, 1e-6, there(positions), there(freqs), False)
    assert torch.allclose(got.cpu(), norm_rope.query(q, positions, freqs, 1e-6), rtol=0, atol=2e-5)
    back = device_norm.norm_rotate(got, None, None, there(positions), there(freqs), True)
    assert torch.allclose(back.cpu(), norm_rope.head_norm(q, 1e-6), rtol=0, atol=2e-5)


def test_the_hadamard_turn_adds_in_the_references_order():
    x = randn(5, 128)
    assert torch.equal(device_norm.hadamard(there(x)).cpu(), norm_rope.hadamard(x))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "groups"),
    [(1, 40, 96, 1), (3, 256, 2048, 1), (70, 256, 384, 2), (300, 160, 224, 1), (260, 256, 384, 2)],
)
def test_products(kind, tokens, outputs, inputs, groups):
    x, scales = randn(tokens, groups * inputs), None
    weight = randn(outputs, inputs, seed=1) * inputs**-0.5
    if kind == "fp32":
        dense = weight
    elif kind == "bf16":
        weight = weight.bfloat16()
        dense = weight.float()
    else:
        scales = torch.exp2(torch.randint(-6, 4, (-(-outputs // 128), -(-inputs // 128))).float())
        weight = (weight * 16).to(torch.float8_e4m3fn)
        dense = weight.float() * scales.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1)[:, :inputs]
        weight = weight.view(torch.uint8)
    # CUDA C++ splits e4m3's factors into two e4m3 terms, better than bf16.
    terms = kind == "fp8" and (
        few_tokens.takes(tokens, there(weight), groups) or linears_some.takes(tokens, [there(weight)], groups)
    )
    rounded = x if kind == "fp32" or terms else x.bfloat16().float()
    per_group = outputs // groups
    expected = torch.cat(
        [
            rounded[:, g * inputs : (g + 1) * inputs] @ dense[g * per_group : (g + 1) * per_group].T
            for g in range(groups)
        ],
        1,
    )
    got = device_linear.product(there(x), there(weight), None if scales is None else there(scales), groups)
    assert apart(got, expected) < (5e-7 if terms else 1e-10 if kind == "fp32" else 1e-9)


@pytest.mark.parametrize(("kind", "dim"), [("latent", 512), ("index", 128)])
@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_rows_are_stored_byte_for_byte_as_on_the_cpu(kind, dim, layout):
    rows = torch.tensor([3, 64, 65, 700, 701, 130, 131, 132])
    values = randn(8, dim) * torch.exp2(torch.arange(8).float() * 4 - 20)[:, None]
    values[4, :7] = torch.tensor([448.0, -448.0, 0.0, -0.0, 1e-30, 7.96, -7.97])
    values[5, 3], values[6, -1], values[7, 64] = torch.nan, torch.inf, -torch.inf
    pool = empty_pool(64, kind, layout, dim)
    ours = there(pool)
    write_rows(pool, rows, values)
    device_rows.write_rows(ours, there(rows), there(values))
    if layout == "v4":
        # A NaN has many codes; what matters is that the same values are NaN.
        assert torch.equal(read_rows(replace(ours, data=ours.data.cpu()), rows).isnan(), read_rows(pool, rows).isnan())
        rows = rows[:5]
        assert torch.equal(read_rows(replace(ours, data=ours.data.cpu()), rows), read_rows(pool, rows))
    else:
        assert torch.equal(ours.data.cpu(), pool.data)


def stale_ring(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_latents_are_normed_turned_and_stored_in_one_go(layout):
    pool, rows = empty_pool(256, "latent", layout, 512), torch.tensor([700, 3, 1025])
    kv, weight, positions = randn(3, 1000)[:, 300:812], randn(512, seed=1), torch.tensor([5, 900_000, 0])
    freqs = norm_rope.rope_frequencies(10_000.0, 64, None)
    ours = there(pool)
    device_rows.write_latents(
        ours, there(rows), there(kv.contiguous()), there(weight), there(positions), there(freqs), 1e-6
    )
    write_latents(pool, rows, kv, weight, positions, freqs, 1e-6)
    got, expected = (read_rows(p, rows) for p in (replace(ours, data=ours.data.cpu()), pool))
    assert torch.allclose(got, expected, rtol=0.13 if layout == "v4" else 1e-5, atol=1e-3)
    assert apart(got, expected) < (1e-5 if layout == "v4" else 1e-10)


@pytest.mark.parametrize("layout", ["v4", "exact"])
@pytest.mark.parametrize(("dim", "turned"), [(512, False), (128, True)])
def test_c4_rows_and_rings(step, layout, dim, turned):
    kind = "index" if turned else "latent"
    ape, norm = randn(4, 2 * dim, seed=3), randn(dim, seed=4)
    freqs = norm_rope.rope_frequencies(160_000.0, 64)
    pool, ring = empty_pool(64, kind, layout, dim), stale_ring(16 * PAGES + 1, C4_RING, 4 * dim)
    ours, our_ring = there(pool), there(ring)
    # A prompt in a long chunk, then in short steps, beside another.
    for n, spans in enumerate([[(0, 21), (0, 3)], [(21, 1), (3, 1)], [(22, 3), (4, 4)], [(25, 40), (8, 1)]]):
        meta = step(spans, pages=PAGES)
        tokens = len(meta.positions)
        u, g = randn(tokens, 2 * dim, seed=10 + n), randn(tokens, 2 * dim, seed=20 + n)
        arguments = (freqs, 1e-6)
        compress.compress_c4(u, g, ape, norm, ring, meta, *arguments, pool, turned)
        device_compress.compress_c4(
            there(u), there(g), there(ape), there(norm), our_ring, there(meta), there(freqs), 1e-6, ours, turned
        )
    assert torch.equal(our_ring.cpu().nan_to_num(7), ring.nan_to_num(7))
    rows = (step([(0, 1), (0, 1)], pages=PAGES).page_table[:, :1].long() * 64 + torch.arange(16))[0]
    got, expected = read_rows(replace(ours, data=ours.data.cpu()), rows), read_rows(pool, rows)
    # Codes may differ by one where sums differ in their last bit.
    assert (got != expected).float().mean() < (0.002 if layout == "v4" else 1)
    assert torch.allclose(got, expected, rtol=0.13 if layout == "v4" else 0, atol=1e-4)


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_c128_rows_and_rings(step, layout):
    dim = 512
    ape, norm = randn(128, dim, seed=3), randn(dim, seed=4)
    freqs = norm_rope.rope_frequencies(160_000.0, 64)
    pool, ring = empty_pool(2, "latent", layout, dim), stale_ring(16 * PAGES + 1, C128_RING, 2 * dim)
    ours, our_ring = there(pool), there(ring)
    for n, spans in enumerate([[(0, 100), (0, 3)], [(100, 27), (3, 1)], [(127, 1), (4, 2)], [(128, 130), (6, 1)]]):
        meta = step(spans, pages=PAGES)
        tokens = len(meta.positions)
        u, g = randn(tokens, dim, seed=10 + n), randn(tokens, dim, seed=20 + n)
        compress.compress_c128(u, g, ape, norm, ring, meta, freqs, 1e-6, pool)
        device_compress.compress_c128(
            there(u), there(g), there(ape), there(norm), our_ring, there(meta), there(freqs), 1e-6, ours
        )
    assert torch.equal(our_ring.cpu().nan_to_num(7), ring.nan_to_num(7))
    rows = (step([(0, 1), (0, 1)], pages=PAGES).page_table[:1, :1].long() * 2 + torch.arange(2))[0]
    got, expected = read_rows(replace(ours, data=ours.data.cpu()), rows), read_rows(pool, rows)
    assert torch.allclose(got, expected, rtol=0.13 if layout == "v4" else 0, atol=1e-4)


@pytest.mark.parametrize("layout", ["v4", "exact"])
@pytest.mark.parametrize("ratio", [4, 128])
def test_all_that_a_layer_keeps_of_a_short_step_is_written_as_one_after_the_other(step, ratio, layout):
    freqs, eps = there(norm_rope.rope_frequencies(160_000.0, 64)), 1e-6
    wide, ring_rows = (2, C4_RING) if ratio == 4 else (1, C128_RING)
    kinds = [("latent", 512)] + ([("index", 128)] if ratio == 4 else [])
    window = empty_pool(256, "latent", layout, 512)
    pools = [empty_pool(256 // ratio, kind, layout, dim) for kind, dim in kinds]
    rings = [randn(16 * PAGES + 1, ring_rows, 2 * wide * dim, seed=dim) for _, dim in kinds]
    single, together = ([there(t) for t in (window, *pools, *rings)] for _ in range(2))
    for n, spans in enumerate([[(0, 3), (121, 1)], [(3, 1), (122, 4)], [(4, 4), (126, 2)], [(8, 1), (128, 7)]]):
        meta = step(spans, pages=PAGES)
        tokens = len(meta.positions)
        rows = meta.swa_table[meta.segment.long(), meta.positions // 256].long() * 256 + meta.positions % 256
        # As a product of several matrices gives them: columns of their own, one behind the other.
        kv, kv_norm = there(randn(tokens, 512, seed=n)), there(randn(512, seed=n + 1))
        projected = [
            [there(randn(*shape, seed=50 + 10 * n + m)) for m, shape in enumerate(
                ((tokens, wide * dim), (tokens, wide * dim), (ratio, wide * dim), (dim,)))]
            for _, dim in kinds
        ]  # fmt: skip
        moved, at, turned = there(meta), there(rows), layout == "v4"
        device_rows.write_latents(single[0], at, kv, kv_norm, moved.positions, freqs, eps)
        for m, parts in enumerate(projected):
            out, ring = single[1 + m], single[1 + len(kinds) + m]
            if ratio == 4:
                device_compress.compress_c4(*parts, ring, moved, freqs, eps, out, turned and m == 1)
            else:
                device_compress.compress_c128(*parts, ring, moved, freqs, eps, out)
        latents = compress.Latents(together[0], at, kv, kv_norm)
        poolings = [
            compress.Pooling(*parts, together[1 + len(kinds) + m], together[1 + m]) for m, parts in enumerate(projected)
        ]
        if ratio == 4:
            device_compress.write_c4(latents, *poolings, moved, freqs, eps, rotate_keys=turned)
        else:
            device_compress.write_c128(latents, *poolings, moved, freqs, eps)
        for one, other in zip(single, together, strict=True):
            bytes_of = [(t if isinstance(t, torch.Tensor) else t.data).view(torch.uint8).cpu() for t in (one, other)]
            if not ON_GPU:
                assert torch.equal(*bytes_of)
            elif layout == "exact" or isinstance(one, torch.Tensor):  # where sums over other warps may round otherwise
                assert torch.allclose(*(b.view(torch.float32) for b in bytes_of), rtol=1e-5, atol=1e-5, equal_nan=True)
            else:
                assert (bytes_of[0] != bytes_of[1]).double().mean() < 1e-4
    assert all((pool.data.cpu() != 0xFF).any() for pool in together[: 1 + len(kinds)]), "rows were written"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", ["v4", "exact"])
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_attention(step, ratio, layout, half):
    meta = step(SPANS if ON_GPU else [(254, 3), (700, 1)], pages=PAGES)
    heads = 64 if ON_GPU else 3
    window = poisoned(meta, filled_pool(256, "latent", layout, 512), meta.swa_table)
    per = {0: 64, 4: 64, 128: 2}[ratio]
    pool = poisoned(meta, filled_pool(per, "latent", layout, 512), meta.page_table) if ratio else None
    q, sink = randn(len(meta.positions), heads, 512), randn(heads, seed=1)
    sink[0], sink[1] = 30.0, -torch.inf
    selected = None
    if ratio == 4:
        selected = torch.full((len(q), 70), -1, dtype=torch.int32)
        for row, p in zip(selected, meta.positions.tolist(), strict=True):
            best = torch.randperm((p + 1) // 4)[:70].sort().values
            row[: len(best)] = best.int()
    meta = replace(meta, oldest=torch.tensor([0, 200, 650, 0][: len(meta.starts)])) if ratio == 0 else meta
    expected = sparse_attention(q, sink, meta, window, pool, ratio, selected, 512**-0.5)
    got = device_attention.sparse_attention(
        there(q), there(sink), there(meta), there(window), None if pool is None else there(pool), ratio,
        None if selected is None else there(selected), 512**-0.5, half,
    )  # fmt: skip
    assert apart(got, expected) < (2e-5 if half else 1e-10)
    freqs = norm_rope.rope_frequencies(10_000.0, 64, None)
    back = device_attention.sparse_attention(
        there(q), there(sink), there(meta), there(window), None if pool is None else there(pool), ratio,
        None if selected is None else there(selected), 512**-0.5, half, there(freqs),
    )  # fmt: skip
    turned = norm_rope.rotate(expected, meta.positions, freqs, inverse=True)
    assert apart(back, turned) < (2e-5 if half else 1e-10)


@pytest.mark.parametrize("layout", ["v4", "exact"])
@pytest.mark.parametrize("heads", [4, 64])
def test_indexer_scores_in_fp32(step, layout, heads):
    meta = step([(300, 2), (1100, 3)], pages=PAGES)
    pool = poisoned(meta, filled_pool(64, "index", layout, 128), meta.page_table)
    q, w = randn(5, heads, 128), randn(5, heads, seed=1)
    scores, maxima = device_index.scores_and_maxima(there(q), there(w), there(pool), there(meta), 32, half=False)
    check_scores(meta, pool, q, w, scores, maxima, 1e-9)


def test_indexer_scores_in_fp8_read_their_own_queries(step):
    meta = step([(300, 2), (1100, 3), (1203, 1)], pages=PAGES)
    pool = poisoned(meta, filled_pool(64, "index", "v4", 128), meta.page_table)
    q, w = randn(6, 64, 128), randn(6, 64, seed=1)
    codes, weights = device_index.quantise(there(q), there(w))
    scores, maxima = device_index.scores_and_maxima(codes, weights, there(pool), there(meta), 32, half=True)
    dequantised = codes.cpu().view(torch.float8_e4m3fn).float()
    check_scores(meta, pool, dequantised, weights.cpu(), scores, maxima, 1e-7)


def test_queries_are_turned_and_quantised_as_one_after_the_other(step):
    meta = step([(300, 2), (1100, 3)], pages=PAGES)
    q, w, freqs = randn(5, 64, 128), randn(5, 64, seed=1), norm_rope.rope_frequencies(160_000.0, 64, None)
    turned = norm_rope.hadamard(norm_rope.rotate(q, meta.positions, freqs))
    expected, scaled = device_index.quantise(there(turned), there(w * 0.25))
    codes, weights = device_index.quantise(there(q), there(w), 0.25, there(meta.positions), there(freqs))
    assert torch.equal(weights, scaled)
    values = [c.cpu().view(torch.float8_e4m3fn).float() for c in (codes, expected)]
    assert torch.allclose(*values, rtol=0.13, atol=0.01), "a rounding apart at most"
    assert (codes != expected).double().mean() < 0.01


def check_scores(meta, pool, q, w, scores, maxima, tolerance):
    """Against the definition on the same operands; what lies behind a row's last page was not written."""
    for token, (p, segment) in enumerate(zip(meta.positions.tolist(), meta.segment.tolist(), strict=True)):
        seen = (p + 1) // 4
        blocks = torch.arange(seen)
        keys = read_rows(pool, meta.page_table[segment].long()[blocks // 64] * 64 + blocks % 64)
        expected = (keys @ q[token].T).relu() @ w[token]
        assert apart(scores[token, :seen], expected) < tolerance
        padded = scores[token, : -(-seen // 64) * 64].cpu()
        assert (padded[seen:] == -torch.inf).all()
        assert torch.equal(maxima[token, : len(padded) // 64].cpu(), padded.unflatten(0, (-1, 64)).amax(dim=1))


@pytest.mark.skipif(not ON_GPU, reason="the top-k is CUDA C++; test_topk_rows.py runs its source on the CPU")
@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_the_indexer_chooses_as_the_cpu_does(step, layout):
    meta = step(SPANS, pages=PAGES)
    pool = poisoned(meta, filled_pool(64, "index", layout, 128), meta.page_table)
    q, w = randn(len(meta.positions), 64, 128), randn(len(meta.positions), 64, seed=1)
    expected = index_topk(q, w, pool, meta, 50)
    for half, least in ((False, 0.999), (True, 0.96)):
        got = device_index.index_topk(there(q), there(w), there(pool), there(meta), 50, half).cpu()
        same = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(got, expected, strict=True))
        assert same >= least * sum(len(set(row.tolist())) for row in expected)
        assert (got.diff(dim=1)[got[:, 1:] >= 0] > 0).all()


@pytest.mark.parametrize("size", [256, 1536])
def test_hyper_connections(size):
    streams, y = randn(5, 4, size), randn(5, size, seed=1)
    fn, base, scale = randn(24, 4 * size, seed=2) * 0.1, randn(24, seed=3) * 0.5, randn(3, seed=4) * 0.2 + 1
    site = hyper_connections.HyperSite(fn, base, scale)
    x, post, comb = hyper_connections.mix_in(streams, site, 1e-6, 1e-6, 20)
    norm = randn(size, seed=5)
    found = device_hyper.mix_in(*map(there, (streams, fn, base, scale)), None, 1e-6, 1e-6, 20)
    for got, expected in zip(found, (x, post, comb), strict=True):
        ready = got.balanced() if isinstance(got, hyper_connections.Unbalanced) else got
        assert torch.allclose(ready.cpu(), expected, rtol=0, atol=1e-5)
    normed, _, _ = device_hyper.mix_in(*map(there, (streams, fn, base, scale, norm)), 1e-6, 1e-6, 20)
    assert torch.allclose(normed.cpu(), norm_rope.rms_norm(x, norm, 1e-6), rtol=0, atol=1e-4)
    out = device_hyper.mix_out(*map(there, (y, streams, post, comb)))
    assert torch.allclose(out.cpu(), hyper_connections.mix_out(y, streams, post, comb), rtol=0, atol=1e-5)
    parts, beside = randn(5, 6, size, seed=9), randn(5, size, seed=10)
    summed = device_experts.sum_picks(there(parts), there(beside))
    given = [there(t) for t in (streams, post, comb)]
    of_parts = device_hyper.mix_out(there(parts), *given, there(beside))
    assert torch.equal(of_parts, device_hyper.mix_out(summed, *given))
    head = randn(4, 4 * size, seed=6) * 0.1, randn(4, seed=7), randn(1, seed=8)
    got = device_hyper.collapse(there(streams), *map(there, head), 1e-6, 1e-6)
    collapsed = hyper_connections.collapse(streams, *head, 1e-6, 1e-6)
    assert torch.allclose(got.cpu(), collapsed, rtol=0, atol=1e-5)
    got = device_hyper.collapse(there(streams), *map(there, head), 1e-6, 1e-6, there(norm))
    assert torch.allclose(got.cpu(), norm_rope.rms_norm(collapsed, norm, 1e-6), rtol=0, atol=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="CUDA C++; test_mix_few.py runs its source on the CPU")
@pytest.mark.parametrize("size", [256, 1536])
@pytest.mark.parametrize("count", [1, 6])
def test_hyper_connections_between_sublayers(size, count):
    """In one go what is otherwise done by kernel after kernel; bit for bit where CUDA C++ does both."""
    made, beside, streams = randn(5, count, size), randn(5, size, seed=1), randn(5, 4, size, seed=2)
    post, comb = torch.rand(5, 4), hyper_connections.Unbalanced(there(randn(5, 4, 4, seed=6)), 20, 1e-6)
    fn, base, scale = randn(24, 4 * size, seed=2) * 0.1, randn(24, seed=3) * 0.5, randn(3, seed=4) * 0.2 + 1
    given = [there(t) for t in (streams, post)]
    how = (*map(there, (fn, base, scale, randn(size, seed=5))), 1e-6, 1e-6, 20)
    summed = device_experts.sum_picks(there(made), there(beside))
    after = device_hyper.mix_out(summed, *given, comb.balanced())
    use_cuda_products(True)  # these kernels there are in CUDA C++ alone
    x, streams, post, logits = device_hyper.mix_between(there(made), there(beside), *given, comb, *how)
    assert torch.allclose(streams, after, rtol=1e-5, atol=1e-5)
    assert torch.equal(device_hyper.mix_out(there(made), *given, comb, there(beside)), streams)
    ready = device_hyper.mix_between(there(made), there(beside), *given, comb.balanced(), *how)
    assert torch.allclose(ready[1], streams, rtol=1e-5, atol=1e-5)
    alone = device_hyper.mix_in(streams, *how)
    for got, expected in zip((x, post, logits.logits), (*alone[:2], alone[2].logits), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_streams_begin_with_a_tokens_row(dtype):
    table, ids = randn(50, 96).to(dtype), torch.tensor([3, 49, 0, 3])
    expected = hyper_connections.embedded(table, ids)
    assert expected.dtype == torch.float32
    assert torch.equal(device_hyper.embedded(there(table), there(ids)).cpu(), expected)


def test_the_draft_layer_resumes_from_states_and_keeps_them(step):
    """Steps behind each other: drafts that do not stay, a page that ends, a segment that begins, one without tokens,
    and one whose pages are nobody's.
    """
    width = 4 * 320
    states = torch.zeros(16 * PAGES + 1, 4 + width)
    ours = there(states)
    steps = [
        ([(0, 3), (253, 5), (700, 1), (5, 1)], [2, 4, 1, 1]),
        ([(2, 2), (257, 1), (702, 4), (6, 2)], [1, 1, 4, 2]),
        ([(3, 4), (258, 3), (706, 0), (8, 1)], [4, 1, 0, 1]),
    ]
    for n, (spans, kept) in enumerate(steps):
        meta = step(spans, pages=PAGES)
        meta.swa_table[3] = 0
        streams, kept = randn(len(meta.positions), 4, 320, seed=n), torch.tensor(kept)
        before, oldest = draft_state.resume(streams, states, meta)
        rows, behind = draft_state.keep(streams, states, meta, kept, oldest)
        moved = there(streams), ours, there(meta)
        got_before, got_oldest = device_draft.resume(*moved)
        got_rows, got_behind = device_draft.keep(*moved, there(kept), got_oldest)
        assert torch.equal(got_before.cpu(), before)
        assert torch.equal(got_oldest.cpu(), oldest)
        assert torch.equal(got_rows.cpu(), rows)
        assert torch.equal(got_behind.cpu()[kept > 0], behind[kept > 0])
        assert torch.equal(ours.cpu()[1:], states[1:])
        assert ours[0, 0] == states[0, 0] == 0, "the sink's is a state of no time"
    assert (oldest[:2] < torch.tensor([4, 259])).all(), "states were found"
    assert oldest[3] == 9, "nobody's page has no state"


@pytest.mark.parametrize("seed", range(4))
def test_drafts_stay_and_guesses_go_on_as_on_a_cpu(seed):
    """Segments with many drafts, few or none, and without tokens; guesses, some not drawn, at the edges of pages."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.tensor([4, 0, 1, 20, 64, 1, 0, 6, 2])
    b, tokens = len(counts), int(counts.sum())
    starts = torch.tensor([509, 0, 250, 0, 3, 767, 0, 100, 254])
    swa_table = torch.randint(0, 3, (b, 3), generator=g).int()
    meta = StepMeta.at(Tables(torch.zeros(b).int(), swa_table, swa_table), starts, counts, tokens)
    most = (counts - 1).clamp(min=0, max=verify.MOST_DRAFTS)
    asked = verify.Asked(
        torch.minimum(most, torch.tensor([3, 0, 0, 0, 63, 0, 0, 5, 1])).int(),
        torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 1]).int(),
        torch.tensor([3, 0, 1, 0, 8, 2, 0, 5, 0]).int(),
    )
    ids = torch.randint(5, (tokens,), generator=g)
    drawn = torch.stack([ids.roll(-1), (torch.rand(tokens, generator=g) < 0.03).long()], dim=1).int()
    drawn[:, 0] = torch.where(torch.rand(tokens, generator=g) < 0.1, 7, drawn[:, 0])

    def fresh():
        return torch.full((b,), 99).int(), verify.Guessing(*torch.full((3, b), 99).int()), torch.full((b, 8), 99).int()

    kept, guessing, guesses = fresh()
    verify.verify(drawn, ids, meta, asked, kept, guessing, guesses)
    got_kept, got_guessing, got_guesses = (there(kept), verify.Guessing(*map(there, guessing)), there(guesses))
    for part in (got_kept, *got_guessing, got_guesses):
        part.fill_(77)
    there_asked = verify.Asked(*map(there, asked))
    device_verify.verify(there(drawn), there(ids), there(meta), there_asked, got_kept, got_guessing, got_guesses)
    for turn in range(8):
        for one, wanted in zip((got_kept, *got_guessing, got_guesses), (kept, *guessing, guesses), strict=True):
            assert torch.equal(one.cpu(), wanted)
        guess = torch.stack(
            [torch.randint(9, (b,), generator=g), (torch.rand(b, generator=g) < 0.1).long()], dim=1
        ).int()
        verify.advance(guess, swa_table, asked, guessing, guesses)
        device_verify.advance(there(guess), there(swa_table), there_asked, got_guessing, got_guesses)
        assert turn or guesses.max() < 99


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [[1], [3, 0, 5], [0, 0, 7, 1, 0], [200, 1, 130, 0, 300], [1] * 65])
def test_addresses_of_a_step(counts, dtype):
    """Segments without tokens, more tokens than a program takes, contexts of a million."""
    starts = torch.arange(len(counts)) * 1_000_003 % 1_000_000
    given = starts.to(dtype), torch.tensor(counts, dtype=dtype), sum(counts)
    expected = addresses.token_addresses(*given)
    got = device_addresses.token_addresses(*(there(t) if isinstance(t, torch.Tensor) else t for t in given))
    for one, wanted in zip(got, expected, strict=True):
        assert one.dtype == wanted.dtype
        assert torch.equal(one.cpu(), wanted)
    positions, segment, *_ = expected
    table = torch.randint(9, (len(counts), 3910), dtype=torch.int32)
    rows = device_addresses.window_rows(*map(there, (positions, segment, table)))
    assert torch.equal(rows.cpu(), addresses.window_rows(positions, segment, table))


def test_routes_by_score_and_by_table():
    z = randn(40, 24) * 8
    z[3] = -60.0  # all scores vanish
    z[4, 5] = z[4, 9]  # equals: the lower expert
    bias = randn(24, seed=1) * 0.2
    bias[5] = bias[9]
    scores = (z.double().relu() + torch.log1p(torch.exp(-z.double().abs()))).sqrt().float()
    picks = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :6]
    got, weights = device_experts.route(there(z), there(bias), None, None, 6, 1.5)
    assert torch.equal(got.cpu(), picks.int())
    expected = scores.gather(1, picks)
    assert torch.allclose(weights.cpu(), expected / (expected.sum(1, keepdim=True) + 1e-20) * 1.5, rtol=2e-5, atol=0)
    table, ids = torch.randint(24, (100, 6)), torch.randint(100, (40,))
    got, weights = device_experts.route(there(z), None, there(table), there(ids), 6, 2.5)
    assert torch.equal(got.cpu(), table[ids].int())
    expected = scores.gather(1, table[ids])
    assert torch.allclose(weights.cpu(), expected / (expected.sum(1, keepdim=True) + 1e-20) * 2.5, rtol=2e-5, atol=0)


def work(members, owners, pairs, block):
    """The pairs of each expert, in the order of the list."""
    found: dict[int, list[int]] = {}
    for owner, places in zip(owners.tolist(), members.view(-1, block).tolist(), strict=True):
        assert owner >= 0 or all(p == pairs for p in places)
        if owner >= 0:
            found.setdefault(owner, []).extend(p for p in places if p != pairs)
    return found


@pytest.mark.parametrize("tokens", [1, 3, 20, 100])
def test_the_work_list_holds_every_pair_under_its_expert(tokens):
    picks = torch.randint(5, (tokens, 6), generator=torch.Generator().manual_seed(0)).int()
    expected = {e: (picks.flatten() == e).nonzero().flatten().tolist() for e in picks.unique().tolist()}
    members, owners = device_experts.work_list(there(picks), 5, 16)
    assert work(members, owners, picks.numel(), 16) == expected


@pytest.mark.parametrize(("tokens", "room"), [(1, 1), (3, 3), (7, 5), (30, 6)])
def test_a_block_of_the_work_list_holds_no_more_pairs_than_it_has_room_for(tokens, room):
    picks = torch.randint(5, (tokens, 6), generator=torch.Generator().manual_seed(1)).int()
    picks[0] = 2  # as a row of a hash table may: more pairs of one expert than there are tokens
    expected = {e: (picks.flatten() == e).nonzero().flatten().tolist() for e in picks.unique().tolist()}
    members, owners = device_experts.work_list(there(picks), 5, 8, room)
    assert work(members, owners, picks.numel(), 8) == expected
    sizes = [sum(p != picks.numel() for p in places) for places in members.view(-1, 8).tolist()]
    assert max(sizes) <= room
    needed = [-(-len(expected.get(e, [])) // room) for e in range(5)]
    assert owners[owners >= 0].tolist() == [e for e in range(5) for _ in range(needed[e])]


@pytest.mark.parametrize(
    ("kind", "hidden", "inner"),
    [("fp32", 192, 128), ("bf16", 256, 128), ("fp4", 192, 128), ("fp4", 256, 128), ("panels", 512, 256)],
)
@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_experts(kind, tokens, hidden, inner, kernels):
    """On a GPU few FP4 pairs of sizes in whole steps take the CUDA kernels, which round to fp16 or two e4m3 terms."""
    if kind == "panels" and kernels != "cuda":
        pytest.skip("only CUDA C++ reads panels")
    count, limit = 4, 2.0
    shapes = ((count, inner, hidden), (count, inner, hidden), (count, hidden, inner))
    scales = (None, None, None)
    if kind in ("fp4", "panels"):
        codes = [torch.randint(256, (*s[:2], s[2] // 2), dtype=torch.uint8) for s in shapes]
        scales = tuple(torch.randint(118, 125, (*s[:2], s[2] // 32), dtype=torch.uint8) for s in shapes)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([values, -values])
        dense = [
            torch.stack([values[(c & 15).long()], values[(c >> 4).long()]], dim=-1).flatten(2)
            * torch.exp2(s.float() - 127).repeat_interleave(32, dim=2)
            for c, s in zip(codes, scales, strict=True)
        ]
        stacks = codes
        if kind == "panels":
            stacks = [
                experts_few.gate_up_panels(codes[0], codes[1], scales[:2]), experts_few.down_panels(codes[2], scales[2])
            ]  # fmt: skip
            scales = (None, None, None)
    else:
        dense = [(randn(*s, seed=i) * s[2] ** -0.5).bfloat16().float() for i, s in enumerate(shapes)]
        stacks = [w.bfloat16() if kind == "bf16" else w for w in dense]
    x, weights = randn(tokens, hidden), torch.rand(tokens, 3)
    picks = torch.randint(count, (tokens, 3)).int()
    expected = experts.routed_experts(x, picks, weights, experts.Experts.prepare(*dense), limit)
    got = device_experts.routed_experts(
        there(x), there(picks), there(weights), tuple(map(there, stacks)),
        tuple(None if s is None else there(s) for s in scales), (124, 124), limit,
    )  # fmt: skip
    assert apart(got, expected) < (1e-10 if kind == "fp32" else 3e-5)
    beside = randn(tokens, hidden, seed=9)
    more = device_experts.routed_experts(
        there(x), there(picks), there(weights), tuple(map(there, stacks)),
        tuple(None if s is None else there(s) for s in scales), (124, 124), limit, there(beside),
    )  # fmt: skip
    assert torch.allclose(more.cpu(), got.cpu() + beside, rtol=1e-6, atol=1e-6)
    parts = device_experts.routed_parts(
        there(x), there(picks), there(weights), tuple(map(there, stacks)),
        tuple(None if s is None else there(s) for s in scales), (124, 124), limit,
    )  # fmt: skip
    assert torch.equal(device_experts.sum_picks(parts.view(tokens, 3, hidden), there(beside)), more)


def test_swiglu():
    gate, up = randn(3, 100) * 20, randn(3, 100, seed=1) * 20
    got = device_experts.swiglu(there(gate), there(up), 10.0)
    assert torch.allclose(got.cpu(), experts.swiglu(gate, up, 10.0), rtol=1e-5, atol=1e-6)


def test_checksums_are_those_of_the_cpu():
    regions = [torch.randint(256, (9, size), dtype=torch.uint8) for size in (64, 40_000, 8)]
    items = [8, 0, 3]
    expected = item_checksums(regions, items)
    sums = device_checksum.weighted_sums([there(r) for r in regions], items)
    assert [s * 0x9E3779B97F4A7C15 % (1 << 64) for s in sums] == expected


def test_a_matrix_on_the_device_gives_what_it_gives_on_the_cpu():
    weight, x = randn(64, 128).bfloat16(), randn(3, 128).bfloat16().float()
    got = device_linear.product(there(x), there(weight), None, 1)
    assert math.isclose(apart(got, linear(x, Matrix.prepare(weight))), 0, abs_tol=1e-10)


@pytest.mark.parametrize("tokens", [20, 300])
def test_bf16_matrices_that_lie_one_behind_the_other_are_multiplied_as_one(monkeypatch, tokens):
    parts = [randn(n, 256, seed=n).bfloat16() for n in (64, 16, 48)]
    e4m3 = torch.randint(0x78, (128, 256), dtype=torch.uint8), torch.ones(1, 2)
    quantised, x = tuple(there(part) for part in e4m3), there(randn(tokens, 256))
    alone = [(there(part), None) for part in parts]
    together = [(part, None) for part in there(torch.cat(parts)).split([len(part) for part in parts])]
    taken = []
    product = device_linear.product
    monkeypatch.setattr(device_linear, "product", lambda x, w, *more: taken.append(len(w)) or product(x, w, *more))
    expected = device_linear.products(x, [alone[0], quantised, *alone[1:]])
    assert taken == [128, 64, 16, 48]
    got = device_linear.products(x, [together[0], quantised, *together[1:]])
    assert taken[4:] == [128, 128], "the other one, and the three"
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert apart(one, other) < 1e-10
    device_linear.products(x, [together[1], together[0]])
    assert taken[6:] == [16, 64], "not in order"


@pytest.mark.parametrize("inputs", [256, 384])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_products_of_normed_tokens_are_those_of_tokens_that_were_normed_before(tokens, inputs):
    """On a GPU few tokens of 256 inputs are normed on their way, which may round an operand to its neighbour."""
    matrices = [(there(randn(n, inputs, seed=n).bfloat16()), None) for n in (64, 16)]
    x, norm = randn(tokens, inputs) * 30, randn(inputs, seed=1)
    normed = device_norm.norm_rotate(there(x), there(norm), 1e-6, None, None, False)
    got = device_linear.products(there(x), matrices, there(norm), 1e-6)
    for one, expected in zip(got, device_linear.products(normed, matrices), strict=True):
        assert apart(one, expected) < 1e-7


@pytest.mark.skipif(not ON_GPU, reason="CUDA C++; test_few_tokens.py runs its source on the CPU")
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_both_products_of_a_gate_give_what_each_gives_alone(tokens, kind):
    both = [(there(randn(48, 256, seed=n).bfloat16()), None) for n in range(2)]
    if kind == "fp8":
        both = [
            (there(torch.randint(0x70, (48, 256), dtype=torch.uint8)), there(torch.rand(1, 2) / 99)) for _ in range(2)
        ]
    x = there(randn(tokens, 256))
    use_cuda_products(True)  # this kernel there is in CUDA C++ alone
    assert few_tokens.takes_gated(tokens, both[0][0], both[1][0])
    expected = device_experts.swiglu(*device_linear.products(x, both), 10.0)
    assert torch.allclose(few_tokens.gated(x, *both, 10.0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_several_matrices_give_what_each_gives_alone(tokens):
    """On a GPU few tokens take one launch, in which a token's result is as ever; e4m3 alone is computed elsewhere."""
    matrices = [(randn(n, 256, seed=n).bfloat16(), None) for n in (64, 16, 48)]
    matrices.append((torch.randint(0x70, (32, 256), dtype=torch.uint8), torch.rand(1, 2)))
    x = randn(tokens, 256)
    ours = [(there(weight), None if scales is None else there(scales)) for weight, scales in matrices]
    together = device_linear.products(there(x), ours)
    for got, (weight, scales), (dense, blocks) in zip(together, ours, matrices, strict=True):
        alone = device_linear.product(there(x), weight, scales, 1)
        assert torch.equal(got, alone) if blocks is None else apart(got, alone) < 5e-7
        if blocks is not None:
            dense = dense.view(torch.float8_e4m3fn).float() * blocks.repeat_interleave(128, 1)
        assert apart(got, x @ dense.float().T) < 3e-5
