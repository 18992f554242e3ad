"""Kernels of a decode step at the sizes of V4-Flash and V4-Pro: against fp64 on the same operands, and ten times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.kernels import random_pool, step
from engine.batch import StepMeta, Tables
from engine.kernels import compress, hyper_connections
from engine.kernels import experts as experts_door
from engine.kernels import sparse_attention as attention_door
from engine.kernels.device import (
    attend_few,
    attend_long,
    compress_long,
    experts,
    experts_few,
    experts_some,
    few_tokens,
    index_scores,
    index_topk,
    linear,
    linears_some,
    mix_few,
    route_few,
    sparse_attention,
    use_cuda_products,
    use_early_launches,
)
from engine.kernels.device import hyper_connections as device_hyper
from engine.kernels.linear import Matrix
from engine.kernels.norm_rope import rope_frequencies
from engine.kernels.rows import RowPool, read_rows
from tests.gpu.steps_of_a_slice import digest

pytestmark = pytest.mark.gpu
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def in_cuda() -> Iterator[None]:
    use_cuda_products(True)
    torch.manual_seed(0)
    yield
    use_cuda_products(False)
    torch.cuda.empty_cache()


def ten_times(call: Callable[[], Tensor]) -> Tensor:
    """What a call gives, which must be the same bits every time."""
    first = call().clone()
    for _ in range(9):
        assert torch.equal(call(), first), "two runs of the same inputs differ"
    return first


def apart(got: Tensor, expected: Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>), in fp64."""
    x, y = got.double().flatten(), expected.double().flatten()
    return float(1 - 2 * (x @ y) / (x @ x + y @ y))


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups"),
    [(1536, 4096, 1), (32_768, 1024, 1), (8192, 4096, 8), (4096, 8192, 1), (4096, 2048, 1),
     (2048, 7168, 1), (65_536, 1536, 1), (16_384, 4096, 16), (7168, 3072, 1), (129_280, 4096, 1)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_products_of_few_tokens(kind: str, outputs: int, inputs: int, groups: int) -> None:
    if kind == "fp8":
        weight = torch.randint(256, (outputs, inputs), dtype=torch.uint8, device="cuda")
        weight[weight & 0x7F == 0x7F] = 0
        scales = torch.exp2(torch.randint(-20, 20, (outputs // 128, inputs // 128), device="cuda").float())
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        meant = weight.view(torch.float8_e4m3fn).float().mul_(wide)
    else:
        weight, scales = torch.randn(outputs, inputs, device="cuda").bfloat16(), None
        meant = weight.float()
    x = torch.randn(8, groups * inputs, device="cuda")
    # Two e4m3 terms of an activation are within 2e-7 of it in this measure, where bf16 is within 1e-6.
    rounded, most = (x.double(), 5e-7) if kind == "fp8" else (x.bfloat16().double(), 1e-9)
    parts = zip(rounded.split(inputs, 1), meant.split(outputs // groups), strict=True)
    expected = torch.cat([part @ rows.double().T for part, rows in parts], dim=1)
    for tokens in (1, 4, 8):
        assert few_tokens.takes(tokens, weight, groups)
        got = ten_times(lambda count=tokens: linear.product(x[:count], weight, scales, groups))
        assert apart(got, expected[:tokens]) < most
    together = linear.product(x, weight, scales, groups)
    for token in (0, 5):
        assert torch.equal(linear.product(x[token : token + 1], weight, scales, groups)[0], together[token])


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups"),
    [(1536, 4096, 1), (32_768, 1024, 1), (8192, 4096, 8), (4096, 8192, 1), (65_536, 1536, 1), (7168, 16_384, 1),
     (16_384, 4096, 16)],
)  # fmt: skip
def test_products_of_some_tokens(outputs: int, inputs: int, groups: int) -> None:
    weight = torch.randint(256, (outputs, inputs), dtype=torch.uint8, device="cuda")
    weight[weight & 0x7F == 0x7F] = 0
    scales = torch.exp2(torch.randint(-20, 20, (outputs // 128, inputs // 128), device="cuda").float())
    meant = weight.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    x = torch.randn(255, groups * inputs, device="cuda")
    parts = zip(x.double().split(inputs, 1), meant.split(outputs // groups), strict=True)
    expected = torch.cat([part @ rows.double().T for part, rows in parts], dim=1)
    together = linear.product(x, weight, scales, groups)
    for tokens in (9, 16, 33, 64, 130, 255):
        assert linears_some.takes(tokens, [weight], groups)
        got = ten_times(lambda count=tokens: linear.product(x[:count], weight, scales, groups))
        assert apart(got, expected[:tokens]) < 5e-7
        assert torch.equal(got, together[:tokens]), "a token's bits depend on no other token"


@pytest.mark.parametrize(("outputs", "more", "inputs"), [(32_768, 8192, 1024), (65_536, 8192, 1536), (1536, 512, 7168)])
def test_products_of_some_normed_tokens(outputs: int, more: int, inputs: int) -> None:
    matrices = [fp8(outputs, inputs), fp8(more, inputs)]
    x, norm = torch.randn(255, inputs, device="cuda") * 30, 1 + 0.1 * torch.randn(inputs, device="cuda")
    normed = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-6) * norm
    expected = linear.products(normed.float(), matrices)
    together = linear.products(x, matrices, norm, 1e-6)
    for tokens in (9, 32, 100, 255):
        for n, wanted in enumerate(expected):
            got = ten_times(lambda n=n, t=tokens: linear.products(x[:t], matrices, norm, 1e-6)[n])
            assert torch.equal(got, together[n][:tokens])
            assert apart(got, wanted[:tokens]) < 1e-6, "both round to two terms, one before the norm's root"


def fp8(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(256, (outputs, inputs), dtype=torch.uint8, device="cuda") & 0xBF
    return codes, torch.full((outputs // 128, inputs // 128), inputs**-0.5, device="cuda")


@pytest.mark.parametrize(("outputs", "more", "inputs"), [(32_768, 8192, 1024), (65_536, 8192, 1536)])
def test_products_of_a_few_normed_tokens(outputs: int, more: int, inputs: int) -> None:
    matrices = [fp8(outputs, inputs), fp8(more, inputs)]
    x, norm = torch.randn(8, inputs, device="cuda") * 30, 1 + 0.1 * torch.randn(inputs, device="cuda")
    normed = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-6) * norm
    expected = [product.clone() for product in few_tokens.products(normed.float(), matrices)]
    together = few_tokens.products(x, matrices, norm=norm, eps=1e-6)
    for tokens in (1, 3, 8):
        for n, wanted in enumerate(expected):
            got = ten_times(lambda n=n, t=tokens: few_tokens.products(x[:t], matrices, norm=norm, eps=1e-6)[n])
            assert torch.equal(got, together[n][:tokens])
            assert apart(got, wanted[:tokens]) < 1e-6, "both round to two terms, one before the norm's root"


@pytest.mark.parametrize(("hidden", "inner"), [(4096, 2048), (7168, 3072)])
def test_a_shared_expert_of_few_tokens(hidden: int, inner: int) -> None:
    both = fp8(inner, hidden), fp8(inner, hidden)
    x = torch.randn(8, hidden, device="cuda") * 3
    for tokens in (1, 3, 8):
        gate, up = few_tokens.products(x[:tokens], both)
        got = ten_times(lambda t=tokens: few_tokens.gated(x[:t], *both, 10.0))
        assert apart(got, experts.swiglu(gate, up, 10.0)) < 1e-10


class Fp4Experts:
    """Experts of any codes, in panels, and what they mean."""

    def __init__(self, count: int, hidden: int, inner: int) -> None:
        def stack(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
            codes = torch.randint(256, (count, outputs, inputs // 2), dtype=torch.uint8, device="cuda")
            scales = torch.randint(112, 122, (count, outputs, inputs // 32), dtype=torch.uint8, device="cuda")
            nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2).int()
            table = E2M1.to("cuda", torch.float32)
            return codes, scales, table[nibbles] * torch.exp2(scales.float() - 127).repeat_interleave(32, 2)

        gate, up, down = stack(inner, hidden), stack(inner, hidden), stack(hidden, inner)
        both = experts_few.gate_up_panels(gate[0], up[0], (gate[1], up[1]))
        self.panels = both, experts_few.down_panels(down[0], down[1])
        self.dense = gate[2], up[2], down[2]

    def expected(self, x: Tensor, picks: Tensor, weights: Tensor, limit: float) -> Tensor:
        gate, up, down = self.dense
        made = torch.zeros(*picks.shape, x.shape[1], dtype=torch.float64, device="cuda")
        for expert in picks.unique().tolist():
            token, pick = (picks == expert).nonzero(as_tuple=True)
            rows = x[token].double()
            a = (rows @ gate[expert].double().T).clamp(max=limit)
            h = a * torch.sigmoid(a) * (rows @ up[expert].double().T).clamp(-limit, limit)
            made[token, pick] = h @ down[expert].double().T
        return (made * weights.double()[:, :, None]).sum(1)


@pytest.mark.parametrize(("hidden", "inner"), [(4096, 2048), (7168, 3072)])
def test_fp4_experts_of_few_tokens(hidden: int, inner: int) -> None:
    count, k, limit = 12, 6, 10.0
    stack = Fp4Experts(count, hidden, inner)
    for tokens in (1, 3, 8):
        x = torch.randn(tokens, hidden, device="cuda")
        picks = torch.rand(tokens, count, device="cuda").topk(k).indices.int()
        picks[0, 1] = picks[0, 0]  # as a row of a hash table may
        weights = torch.rand(tokens, k, device="cuda")

        def ours(x: Tensor = x, picks: Tensor = picks, weights: Tensor = weights) -> Tensor:
            return experts.routed_experts(x, picks, weights, stack.panels, (None, None, None), (0, 0), limit)

        # Rounding to two e4m3 terms, before either product, costs 5e-7.
        assert apart(ten_times(ours), stack.expected(x, picks, weights, limit)) < 1e-6
        # In two blocks of work or more an expert's tokens are what they are alone.
        assert torch.equal(ours(x[:1], picks[:1], weights[:1]), ours()[:1])


@pytest.mark.parametrize(("hidden", "inner"), [(4096, 2048), (7168, 3072)])
def test_fp4_experts_of_more_tokens(hidden: int, inner: int) -> None:
    """Parts of 16, 32 and 64 pairs, rings and grids of any size, and each token alone: the same bits."""
    count, k, limit = 12, 6, 10.0
    stack = Fp4Experts(count, hidden, inner)

    def products(
        x: Tensor, picks: Tensor, weights: Tensor, block: int = 64, ring: int | None = None, grid: int = 132
    ) -> Tensor:
        h, parts = (torch.full((picks.numel(), n), torch.nan, device="cuda") for n in (inner, hidden))
        work = experts.work_list(picks, count, block)
        experts_some.products(x, stack.panels, weights, *work, limit, h, parts, ring, grid)
        return parts

    for tokens in (16, 100, 700):
        x = torch.randn(tokens, hidden, device="cuda")
        picks = torch.rand(tokens, count, device="cuda").topk(k).indices.int()
        picks[:, 0] = torch.where((picks[:, 1:] == 3).any(1), picks[:, 0], 3)  # which so is in more demand than others
        weights = torch.rand(tokens, k, device="cuda")
        step = x, picks, weights
        made = ten_times(partial(products, *step))
        got = experts.sum_picks(made.view(tokens, k, hidden), None)
        # Rounding to two e4m3 terms, before either product, costs 5e-7.
        assert apart(got, stack.expected(*step, limit)) < 1e-6
        for block, ring, grid in ((16, None, 132), (32, 2, 7), (64, 1, 131)):
            assert torch.equal(products(*step, block, ring, grid), made)
        for token in (0, tokens - 1):
            alone = products(*(part[token : token + 1].contiguous() for part in step), 16)
            assert torch.equal(alone, made[token * k : token * k + k])
        routed = partial(experts.routed_experts, *step, stack.panels, (None, None, None), (0, 0), limit)
        assert torch.equal(routed(), got)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = routed()
        for _ in range(5):
            graph.replay()
            assert torch.equal(replayed, got)


def test_blocks_of_experts_meet_however_many_and_however_often() -> None:
    """Rings and grids of any size, then 60 launches one behind another, replayed: h not yet written is NaN."""
    count, hidden, inner, k, tokens = 16, 4096, 2048, 6, 5
    gate, up, down = (
        torch.randint(256, (count, outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        for outputs, inputs in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    scales = [torch.full((count, *t.shape[1:-1], t.shape[-1] // 16), 118, dtype=torch.uint8, device="cuda")
              for t in (gate, up, down)]  # fmt: skip
    panels = experts_few.gate_up_panels(gate, up, (scales[0], scales[1])), experts_few.down_panels(down, scales[2])
    x, weights = torch.randn(tokens, hidden, device="cuda"), torch.rand(tokens, k, device="cuda")
    picks = torch.rand(tokens, count, device="cuda").topk(k).indices.int()
    members, owners = experts.work_list(picks, count, few_tokens.TOKENS, tokens)
    h, parts = (torch.full((60, tokens * k, n), torch.nan, device="cuda") for n in (inner, hidden))

    def products(n: int, ring: int | None = None, grid: int | None = None) -> None:
        experts_few.products(x, panels, weights, members, owners, 10.0, h[n], parts[n], ring, grid)

    for n, (ring, grid) in enumerate([(2, 132), (3, 131), (4, 66), (1, 1), (2, 7)]):
        products(n, ring, grid)
        assert torch.equal(parts[n], parts[0])
    assert parts[0].isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(60):
            products(n)
    for _ in range(20):
        h.fill_(torch.nan)
        parts[1:].fill_(torch.nan)
        graph.replay()
        assert torch.equal(parts, parts[:1].expand_as(parts))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize(("ratio", "length"), [(0, 4096), (4, 65_536), (128, 4096), (128, 131_072), (128, 901_120)])
def test_attention(heads: int, ratio: int, length: int, turned: bool) -> None:
    """turned: back, by the positions of the tokens."""
    freqs = 10_000 ** -(torch.arange(32, device="cuda") / 32) if turned else None
    for tokens in (1, 4, 8, 33, 150) if length < 10_000 else (1, 4, 8, 33):
        meta = step([length], tokens)
        pages = meta.page_table.shape[1] + 1
        window = random_pool(pages, 256, "latent")
        pool = random_pool(pages, {0: 2, 4: 64, 128: 2}[ratio], "latent") if ratio else None
        window.data[0] = 0xFF  # nobody's page
        if pool is not None:
            pool.data[0] = 0xFF
        q, sink = torch.randn(tokens, heads, 512, device="cuda"), torch.randn(heads, device="cuda")
        selected = None
        if ratio == 4:
            found = [torch.randperm(length // 4)[:512].sort().values for _ in range(tokens)]
            selected = torch.stack(found).int().cuda()
            selected[0, -100:] = -1
        assert attend_few.takes(heads, 512, True, window, pool)
        scale = 512**-0.5
        got = ten_times(
            partial(sparse_attention.sparse_attention, q, sink, meta, window, pool, ratio, selected, scale, True, freqs)
        )
        there = meta.to(torch.device("cpu"))
        expected = attention_door.sparse_attention(
            q.cpu().bfloat16().float(), sink.cpu(), there, on_cpu(window), None if pool is None else on_cpu(pool),
            ratio, None if selected is None else selected.cpu(), scale, freqs=None if freqs is None else freqs.cpu(),
        )  # fmt: skip
        assert apart(got.cpu(), expected) < 1e-5


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("ratio", [4, 128])
def test_attention_of_any_plan(ratio: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of both sizes, splits that have one tile or many, and some without any."""
    meta = step([131_072], tokens)
    pages = meta.page_table.shape[1] + 1
    window, pool = random_pool(pages, 256, "latent"), random_pool(pages, {4: 64, 128: 2}[ratio], "latent")
    q, sink = torch.randn(tokens, 64, 512, device="cuda"), torch.randn(64, device="cuda")
    selected = None
    if ratio == 4:
        selected = torch.stack([torch.randperm(32_768)[:1024] for _ in range(tokens)]).int().cuda()
    call = partial(sparse_attention.sparse_attention, q, sink, meta, window, pool, ratio, selected, 512**-0.5, True)
    expected = None
    for tile in attend_long.SHARED_BYTES:
        for splits in (1, 2, 5, 18, 36, 100):
            monkeypatch.setattr(attend_long, "plan", lambda *_, chosen=(tile, splits): chosen)
            got = ten_times(call)
            expected = got if expected is None else expected
            assert apart(got, expected) < 1e-5


def on_cpu(pool: RowPool) -> RowPool:
    return replace(pool, data=pool.data.cpu())


@pytest.mark.parametrize("least_pages", [1, 1 << 20])
@pytest.mark.parametrize("length", [4096, 901_120])
def test_indexer_scores(length: int, least_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CUDA C++ and by Triton."""
    monkeypatch.setattr(index_scores, "LEAST_PAGES", least_pages)
    for tokens in (1, 2, 3, 4, 150 if length < 10_000 else 4):
        meta = step([length], tokens)
        pool = random_pool(meta.page_table.shape[1] + 1, 64, "index")
        q, w = torch.randn(tokens, 64, 128, device="cuda"), torch.rand(tokens, 64, device="cuda")
        codes, weights = index_topk.quantise(q, w)
        scored = partial(index_topk.scores_and_maxima, codes, weights, pool, meta, 16, True)
        got = ten_times(lambda scored=scored: scored()[0])
        check_scores(codes, weights, pool, meta, got, scored()[1])


@pytest.mark.parametrize("least_pages", [1, 1 << 20])
def test_indexer_scores_of_several_requests(least_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token, of several and of more than share a read; and alone, where the bits are the same."""
    monkeypatch.setattr(index_scores, "LEAST_PAGES", least_pages)
    lengths, counts = [9000, 40, 70_000, 257, 30_001], [1, 3, 6, 2, 4]
    one = step(lengths, 1)
    starts = torch.tensor(lengths) - torch.tensor(counts)
    meta = StepMeta.at(
        Tables(one.slots, one.page_table, one.swa_table), starts.cuda(), torch.tensor(counts).cuda(), sum(counts)
    )
    pool = random_pool(one.page_table.numel() + 1, 64, "index")
    q, w = torch.randn(sum(counts), 64, 128, device="cuda"), torch.rand(sum(counts), 64, device="cuda")
    codes, weights = index_topk.quantise(q, w)
    scored = partial(index_topk.scores_and_maxima, codes, weights, pool, meta, 16, True)
    got, maxima = scored()
    check_scores(codes, weights, pool, meta, got, maxima)
    for token in (0, 5, 9, 15):
        alone, _ = scored(token, token + 1)
        seen = (int(meta.positions[token]) + 1) // 4
        if seen > 16:
            assert torch.equal(alone[0, :seen], got[token, :seen])


def check_scores(codes: Tensor, weights: Tensor, pool: RowPool, meta: StepMeta, scores: Tensor, maxima: Tensor) -> None:
    for token, (position, request) in enumerate(zip(meta.positions.tolist(), meta.segment.tolist(), strict=True)):
        seen = (position + 1) // 4
        if seen <= 16:
            continue
        blocks = torch.arange(seen)
        places = meta.page_table[request].cpu().long()[blocks // 64] * 64 + blocks % 64
        keys = read_rows(on_cpu(pool), places).cuda().double()
        one = codes[token].view(torch.float8_e4m3fn).double()
        expected = (keys @ one.T).relu() @ weights[token].double()
        assert apart(scores[token, :seen], expected) < 1e-6
        pages = -(-seen // 64)
        written = scores[token, : 64 * pages]
        assert (written[seen:] == -torch.inf).all()
        assert torch.equal(maxima[token, :pages], written.unflatten(0, (-1, 64)).amax(1))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(("ratio", "dim"), [(4, 512), (4, 128), (128, 512)])
def test_compressors_of_prompts(ratio: int, dim: int, early: bool) -> None:
    """Prompts that begin, and that go on in the middle of a block, with tokens that decode between them; nothing lies
    around what is read but NaN, and in the pool and the rings nothing else is written.
    """
    starts, counts = [0, 515, 1000, 130, 7], [3000, 1, 2100, 600, 1]
    one, tokens = step([4096] * len(starts), 1), sum(counts)
    there = Tables(one.slots, one.page_table, one.swa_table)
    meta = StepMeta.at(there, torch.tensor(starts).cuda(), torch.tensor(counts).cuda(), tokens)
    items, wide = one.page_table.numel() + 1, 2 if ratio == 4 else 1
    kind = "latent" if dim == 512 else "index"
    size = RowPool.item_bytes_for(256 // ratio, kind, "v4", dim, 64)  # type: ignore[arg-type]
    empty = RowPool(torch.full((items, size), 0xFF, dtype=torch.uint8), 256 // ratio, kind, "v4", dim, 64)  # type: ignore[arg-type]
    around = torch.full((tokens, 2 * wide * dim + 64), torch.nan)
    around[:, : 2 * wide * dim] = torch.randn(tokens, 2 * wide * dim)
    ape, norm, freqs = torch.randn(ratio, wide * dim), torch.randn(dim), rope_frequencies(160_000.0, 64)
    ring = torch.randn(items if ratio == 4 else 6, 16 if ratio == 4 else 256, 2 * wide * dim)

    def compressed(device: str) -> tuple[Tensor, RowPool]:
        moved, out = ring.to(device, copy=True), replace(empty, data=empty.data.to(device, copy=True))
        parts = around.to(device)
        given = *parts[:, : 2 * wide * dim].split(wide * dim, 1), ape.to(device), norm.to(device)
        assert device == "cpu" or compress_long.takes(*given, moved, freqs.to(device), out, dim == 128)
        last = freqs.to(device), 1e-6, out
        if ratio == 4:
            compress.compress_c4(*given, moved, meta.to(torch.device(device)), *last, dim == 128)
        else:
            compress.compress_c128(*given, moved, meta.to(torch.device(device)), *last)
        return moved, out

    use_early_launches(early)
    try:
        ten_times(lambda: compressed("cuda")[1].data)
        ten_times(lambda: compressed("cuda")[0])
        got_ring, got = compressed("cuda")
    finally:
        use_early_launches(True)
    expected_ring, expected = compressed("cpu")
    assert torch.equal(got_ring.cpu(), expected_ring)
    different = got.data.cpu() != expected.data
    assert different.float().mean() < 0.002, "codes may differ by one where sums differ in their last bit"
    per_page, rows = 256 // ratio, []
    for pages, start, count in zip(one.page_table.cpu().long(), starts, counts, strict=True):
        made = torch.arange(start // ratio, (start + count) // ratio)
        rows.append(pages[made // per_page] * per_page + made % per_page)
    assert apart(read_rows(on_cpu(got), torch.cat(rows)), read_rows(expected, torch.cat(rows))) < 1e-5


@pytest.mark.parametrize("size", [4096, 7168])
def test_hyper_connections_of_few_tokens(size: int) -> None:
    for tokens in (1, 4, 16):
        assert mix_few.takes(tokens, size)
        streams = torch.randn(tokens, 4, size, device="cuda")
        fn = torch.randn(24, 4 * size, device="cuda") * size**-0.5
        base, scale = torch.randn(24, device="cuda"), torch.rand(3, device="cuda")
        site = hyper_connections.HyperSite(fn.cpu(), base.cpu(), scale.cpu())
        expected = hyper_connections.mix_in(streams.cpu(), site, 1e-6, 1e-6, 20)
        got = device_hyper.mix_in(streams, fn, base, scale, None, 1e-6, 1e-6, 20)
        for one, wanted, tolerance in zip((*got[:2], got[2].balanced()), expected, (2e-5, 2e-6, 1e-5), strict=True):
            assert torch.allclose(one.cpu(), wanted, rtol=tolerance, atol=tolerance)
        mixed = partial(device_hyper.mix_in, streams, fn, base, scale, None, 1e-6, 1e-6, 20)
        ten_times(lambda mixed=mixed: mixed()[0])
        made, beside = torch.randn(tokens, 6, size, device="cuda"), torch.randn(tokens, size, device="cuda")
        matrix = got[2].balanced()
        after = torch.einsum("tk,td->tkd", got[1], made.sum(1) + beside) + torch.einsum("tjk,tjd->tkd", matrix, streams)
        how = (fn, base, scale, None, 1e-6, 1e-6, 20)
        between = partial(device_hyper.mix_between, made, beside, streams, *got[1:], *how)
        assert torch.allclose(ten_times(lambda between=between: between()[1]), after, rtol=1e-5, atol=1e-5)
        x, streams_after, post, comb = between()
        assert torch.equal(device_hyper.mix_out(made, streams, *got[1:], beside), streams_after)
        wanted = device_hyper.mix_in(streams_after, *how)
        for one, other in zip((x, post, comb.logits), (*wanted[:2], wanted[2].logits), strict=True):
            assert torch.equal(one, other)
        last = [t[-1:].contiguous() for t in (made, beside, streams, got[1], got[2].logits)]
        alone = device_hyper.mix_between(*last[:4], replace(got[2], logits=last[4]), *how)
        for one, other in zip((*alone[:3], alone[3].logits), (x, streams_after, post, comb.logits), strict=True):
            assert torch.equal(one, other[-1:])


@pytest.mark.parametrize(("count", "hidden", "k"), [(256, 4096, 6), (384, 7168, 6)])
def test_routing_of_few_tokens(count: int, hidden: int, k: int) -> None:
    gate = torch.randn(count, hidden, device="cuda") * hidden**-0.5
    bias = torch.randn(count, device="cuda") * 0.1
    for tokens in (1, 4, 8, 32, 64):
        assert route_few.takes(tokens, gate, k)
        x = torch.randn(tokens, hidden, device="cuda")
        picks, weights, members, owners = route_few.route(
            x, gate, bias, None, torch.zeros(tokens).cuda().long(), k, 1.5
        )
        wanted, shares = experts_door.route_scored(x.cpu(), Matrix.prepare(gate.cpu()), bias.cpu(), k, 1.5)
        assert torch.equal(picks.cpu(), wanted)
        assert torch.allclose(weights.cpu(), shares, atol=1e-6)
        assert sorted(members[members < tokens * k].tolist()) == list(range(tokens * k))
        assert sorted(set(owners[owners >= 0].tolist())) == sorted(set(wanted.flatten().tolist()))


def test_experts_lie_in_panels_where_products_are_in_cuda() -> None:
    """Prepared of what a checkpoint holds: few pairs and many give what they give out of the checkpoint's rows."""
    count, hidden, inner, limit = 8, 1024, 512, 10.0

    def stack(outputs: int, inputs: int) -> experts_door.Fp4Stack:
        codes = torch.randint(256, (count, outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randint(118, 122, (count, outputs, inputs // 32), dtype=torch.uint8, device="cuda")
        return experts_door.Fp4Stack(codes, scales)

    stacks = stack(inner, hidden), stack(inner, hidden), stack(hidden, inner)
    arranged = experts_door.Experts.prepare(*stacks)
    use_cuda_products(False)
    plain = experts_door.Experts.prepare(*stacks)
    assert not plain.panels
    assert arranged.panels
    for tokens in (4, 300):
        x, weights = torch.randn(tokens, hidden, device="cuda"), torch.rand(tokens, 3, device="cuda")
        picks = torch.rand(tokens, count, device="cuda").topk(3).indices.int()
        use_cuda_products(True)
        got = experts_door.routed_experts(x, picks, weights, arranged, limit)
        assert apart(got, experts_door.routed_experts(x, picks, weights, plain, limit)) < 3e-5


def test_kernels_that_begin_early_give_the_same_bits_as_kernels_that_do_not() -> None:
    """Whole decode steps as graphs, each kernel begun while the one in front ends, or after it."""
    try:
        assert digest(early=True) == digest(early=False)
    finally:
        use_early_launches(True)
