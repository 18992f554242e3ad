"""Kernels on a GPU: microseconds beside the bytes they must move, and beside torch or a library in the same run.

A figure is the median over replays of a CUDA graph of many calls, whose inputs take turns so that weights and rows are
as cold as in a decode step. Floors take the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import peers
from bench.record import append_rows, commit
from engine.batch import StepMeta
from engine.kernels.device import (
    compress,
    experts,
    experts_few,
    few_tokens,
    hyper_connections,
    index_topk,
    linear,
    linears_some,
    mix_few,
    require,
    route_few,
    sparse_attention,
    use_cuda_products,
)
from engine.kernels.device.norm_rope import norm_rotate
from engine.kernels.device.topk_rows import choose, topk_rows
from engine.kernels.hyper_connections import Unbalanced
from engine.kernels.rows import RowPool
from engine.kernels.sample import How, Row, draw
from wire.types import PAGE_TOKENS, SamplingParams

CALLS, REPLAYS = 20, 30
LONG_MS, LONG_CALLS, LONG_REPLAYS = 1.0, 3, 10
"""Of a call that takes so long a few say as much."""
BF16_FLOPS = 989e12
"""A second, of a Hopper GPU by its datasheet: what a prompt's floors go by. e4m3 is twice that."""
COLD_BYTES = 160 << 20
"""Inputs that take turns add up to this much at least: over twice the L2."""


def microseconds(call: Callable[[Any], object], inputs: Sequence[Any]) -> float:
    """One call's time; `inputs` take turns."""
    for one in inputs:
        call(one)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(inputs[0])
    end.record()
    end.synchronize()
    long = begin.elapsed_time(end) > LONG_MS
    graph = torch.cuda.CUDAGraph()
    count = max(LONG_CALLS if long else CALLS, len(inputs))
    with torch.cuda.graph(graph):
        for i in range(count):
            call(inputs[i % len(inputs)])
    return statistics.median(replayed(graph, LONG_REPLAYS if long else REPLAYS)) * 1e3 / count


def replayed(graph: torch.cuda.CUDAGraph, replays: int = REPLAYS) -> list[float]:
    """Milliseconds of each replay."""
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def in_cuda(call: Callable[[Any], object], inputs: Sequence[Any]) -> float:
    """One call's time where CUDA C++ computes what it takes."""
    use_cuda_products(True)
    try:
        return microseconds(call, inputs)
    finally:
        use_cuda_products(False)


def copy_bandwidth() -> float:
    """Bytes read plus written a second by a large copy."""
    a, b = (torch.ones(1 << 29, dtype=torch.float32, device="cuda") for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a.copy_(b)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e-3)
    return 2 * a.nbytes / best


def turns(num_bytes: int) -> range:
    """As many inputs as keep a call from finding its own in the L2."""
    return range(max(1, min(32, -(-COLD_BYTES // max(num_bytes, 1)))))


def step(lengths: list[int], tokens: int, pages: int | None = None) -> StepMeta:
    """A step of `tokens` tokens for each sequence of these lengths, over pages that lie scattered."""
    width = pages or -(-max(lengths) // PAGE_TOKENS)
    order = torch.randperm(len(lengths) * width).view(len(lengths), width) + 1
    starts = torch.tensor(lengths) - tokens
    return StepMeta(
        positions=(starts[:, None] + torch.arange(tokens)).flatten().cuda(),
        segment=torch.arange(len(lengths)).repeat_interleave(tokens).int().cuda(),
        offsets=(torch.arange(len(lengths) + 1) * tokens).int().cuda(),
        starts=starts.cuda(),
        page_table=order.int().cuda(),
        swa_table=order.int().cuda(),
        slots=torch.arange(1, len(lengths) + 1).int().cuda(),
    )


def random_pool(items: int, rows: int, kind: str) -> RowPool:
    """v4 rows whose codes are any finite numbers and whose scales lie around 1."""
    dim = 512 if kind == "latent" else 128
    size = RowPool.item_bytes_for(rows, kind, "v4", dim, 64)  # type: ignore[arg-type]
    data = torch.randint(0x30, 0x40, (items, size), dtype=torch.uint8, device="cuda")
    data ^= (torch.rand(items, size, device="cuda") < 0.5).to(torch.uint8) << 7
    pool = RowPool(data, rows, kind, "v4", dim, 64)  # type: ignore[arg-type]
    if kind == "latent":
        data[:, rows * 576 : rows * 584] = 127
    else:
        data[:, rows * 128 :] = torch.ones(items, rows, device="cuda").view(torch.uint8)
    return pool


@dataclass(frozen=True)
class Figure:
    op: str
    shape: str
    us: float
    floor_us: float
    peer: str = ""
    peer_us: float = float("nan")


Cases = Iterator[Figure]


def beside(figure: Figure, library: str, call: Callable[[], object] | None) -> Figure:
    """The figure with what a library takes for the same, if it is here."""
    if call is None:
        return figure
    return replace(figure, peer=peers.version(library), peer_us=microseconds(lambda _: call(), [None]))


def topk_cases(bandwidth: float) -> Cases:
    for rows, n, k in ((1, 1_024, 512), (1, 4_096, 512), (1, 32_768, 512), (1, 225_280, 512), (1, 262_144, 512),
                       (4, 262_144, 512), (8, 262_144, 512), (64, 262_144, 512), (256, 65_536, 512),
                       (1, 262_144, 1024), (64, 262_144, 1024)):  # fmt: skip
        inputs = [torch.randn(rows, n, device="cuda") for _ in turns(4 * rows * n)[:4]]
        lengths = torch.full((rows,), n, device="cuda")
        positions = lengths - 1
        maxima = [scores.unflatten(1, (-1, 64)).amax(dim=-1) for scores in inputs]
        ours = microseconds(lambda s: topk_rows(s, lengths, k), inputs)
        pairs = list(zip(inputs, maxima, strict=True))
        known = microseconds(lambda pair: choose(pair[0], pair[1], positions, 1, k), pairs)
        peer = microseconds(lambda s: torch.topk(s, k, sorted=False), inputs)
        floor = 4 * rows * n / bandwidth * 1e6
        yield Figure("top-k of scores", f"{k} of {n:,} x {rows}", ours, floor, "torch.topk", peer)
        yield Figure("top-k, maxima known", f"{k} of {n:,} x {rows}", known, floor, "torch.topk", peer)


def indexer_cases(bandwidth: float) -> Cases:
    for tokens in (1, 2, 4):
        for length in (4_096, 131_072, 901_120):
            meta = step([length], tokens)
            pools = [random_pool(meta.page_table.shape[1] + 1, 64, "index") for _ in turns(length * 33)[:6]]
            q, w = torch.randn(tokens, 64, 128, device="cuda"), torch.rand(tokens, 64, device="cuda")
            codes, weights = index_topk.quantise(q, w)
            shape, floor = f"{length // 4:,} keys, {tokens} tokens", length // 4 * (132 + 4 * tokens) / bandwidth * 1e6

            def scores(p: RowPool) -> object:
                return index_topk.scores_and_maxima(codes, weights, p, meta, 512, True)

            def chosen(p: RowPool) -> object:
                return index_topk.index_topk(q, w, p, meta, 512, True)

            figure = Figure("indexer logits", shape, microseconds(scores, pools), floor)
            library = peers.deep_gemm_logits(pools[0].data, meta.page_table, length // 4, tokens)
            if library is not None:
                peer = microseconds(library, [p.data for p in pools])
                figure = replace(figure, peer=peers.version("sgl-deep-gemm"), peer_us=peer)
            yield figure
            # Few pages are left to Triton there too.
            yield replace(figure, op="indexer logits in CUDA C++", us=in_cuda(scores, pools))
            yield Figure("indexer logits and top-k in CUDA C++", shape, in_cuda(chosen, pools), floor)


def attention_cases(bandwidth: float) -> Cases:
    for heads in (64, 128):
        for ratio, length in ((0, 4_096), (4, 901_120), (128, 4_096), (128, 131_072), (128, 901_120)):
            for tokens in (1, 4):
                meta = step([length], tokens)
                window = random_pool(meta.page_table.shape[1] + 1, 256, "latent")
                pools = [random_pool(meta.page_table.shape[1] + 1, {0: 2, 4: 64, 128: 2}[ratio], "latent")
                         for _ in range(4)]  # fmt: skip
                q, sink = torch.randn(tokens, heads, 512, device="cuda"), torch.randn(heads, device="cuda")
                selected = None
                if ratio == 4:
                    selected = torch.stack([torch.randperm(length // 4)[:512].sort().values for _ in range(tokens)])
                    selected = selected.int().cuda()

                def ours(p: RowPool) -> Tensor:
                    rows = p if ratio else None
                    return sparse_attention.sparse_attention(
                        q, sink, meta, window, rows, ratio, selected, 512**-0.5, True
                    )

                us, cuda = microseconds(ours, pools), in_cuda(ours, pools)
                keys = 128 + {0: 0, 4: 512, 128: length // 128}[ratio]
                name = {0: "window", 4: "C4", 128: "C128"}[ratio]
                shape = f"{keys:,} keys, {tokens} tokens, {heads} heads"
                floor = keys * 584 * (tokens if ratio == 4 else 1) / bandwidth * 1e6
                library = peers.flash_mla(tokens, heads, keys - 128)
                yield Figure(f"attention {name}", shape, us, floor)
                yield beside(Figure(f"attention {name} in CUDA C++", shape, cuda, floor), "sgl-flash-mla", library)


def compressor_cases(bandwidth: float) -> Cases:
    freqs = torch.rand(32, device="cuda")
    for tokens in (1, 4, 8_192, 65_536):
        start = 1_027 if tokens < 8 else 0
        length = start + tokens
        meta = step([length], tokens)
        pages = meta.page_table.shape[1] + 1
        for ratio, dim, width in ((4, 512, 1024), (4, 128, 256), (128, 512, 512)):
            if ratio == 128 and tokens < 8:
                meta = step([1_152], tokens)
                pages = meta.page_table.shape[1] + 1
            kind = "index" if dim == 128 else "latent"
            out = random_pool(pages, 256 // ratio, kind)
            inputs = [torch.randn(tokens, 2 * width, device="cuda") for _ in turns(8 * tokens * width)[:3]]
            ape, norm = torch.randn(ratio, width, device="cuda"), torch.randn(dim, device="cuda")
            items = pages if ratio == 4 else 4
            ring = torch.randn(items, 16 if ratio == 4 else 256, 2 * width, device="cuda")

            def ours(x: Tensor) -> None:
                u, g = x[:, :width], x[:, width:]
                if ratio == 4:
                    compress.compress_c4(u, g, ape, norm, ring, meta, freqs, 1e-6, out, dim == 128)
                else:
                    compress.compress_c128(u, g, ape, norm, ring, meta, freqs, 1e-6, out)

            def naive(x: Tensor) -> None:
                peers.torch_compressor(x[:, :width], x[:, width:], ape, norm, ring, meta, freqs, out)

            us = in_cuda(lambda x: ours(x), inputs)
            peer = float("nan")
            if tokens >= 8_192:
                peer = microseconds(lambda x: naive(x), inputs)
            floor = tokens * (8 * width + (132 if dim == 128 else 584) / ratio) / bandwidth * 1e6
            name = f"compressor C{ratio}" + (" index" if dim == 128 else "")
            yield Figure(name, f"{tokens:,} tokens", us, floor, "torch", peer)


def linear_cases(bandwidth: float) -> Cases:
    for outputs, inputs, groups in ((1536, 4096, 1), (32768, 1024, 1), (8192, 4096, 8), (4096, 8192, 1),
                                    (4096, 4096, 1), (1024, 4096, 1), (2048, 4096, 1)):  # fmt: skip
        weights = [torch.randint(0x20, 0x40, (outputs, inputs), dtype=torch.uint8, device="cuda")
                   for _ in turns(outputs * inputs)]  # fmt: skip
        wide = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in turns(2 * outputs * inputs)]
        scales = torch.rand(-(-outputs // 128), -(-inputs // 128), device="cuda")
        for tokens in (1, 4, 32, 128, 4096):
            x = torch.randn(tokens, groups * inputs, device="cuda")
            half = x[:, :inputs].bfloat16()
            us = microseconds(lambda w: linear.product(x, w, scales, groups), weights)
            peer = microseconds(lambda w: half @ w.T, wide)
            floor = outputs * inputs / bandwidth * 1e6
            figure = Figure("fp8 linear", f"{outputs} x {inputs}, {tokens} tokens", us, floor)
            if tokens <= linears_some.TOKENS:
                cuda = in_cuda(lambda w: linear.product(x, w, scales, groups), weights)
                yield replace(figure, peer="bf16 cuBLAS, twice the bytes", peer_us=peer)
                figure = replace(figure, op="fp8 linear in CUDA C++", us=cuda)
            library = peers.deep_gemm_linear(weights, tokens) if groups == 1 else None
            if library is not None:
                peer = microseconds(library, weights)
                yield replace(figure, peer=peers.version("sgl-deep-gemm"), peer_us=peer)
            else:
                yield replace(figure, peer="bf16 cuBLAS, twice the bytes", peer_us=peer)


def expert_cases(bandwidth: float) -> Cases:
    """Out of panels, or of the checkpoint's rows, Triton's."""
    count, hidden, inner, k = 64, 4096, 2048, 6
    shapes = ((count, inner, hidden), (count, inner, hidden), (count, hidden, inner))
    w1, w3, w2 = (torch.randint(256, (*s[:2], s[2] // 2), dtype=torch.uint8, device="cuda") for s in shapes)
    s1, s3, s2 = (torch.randint(115, 122, (*s[:2], s[2] // 32), dtype=torch.uint8, device="cuda") for s in shapes)
    panels = experts_few.gate_up_panels(w1, w3, (s1, s3)), experts_few.down_panels(w2, s2)
    for tokens in (1, 2, 4, 8, 32, 64, 256, 2048):
        x = torch.randn(tokens, hidden, device="cuda")
        picks = [torch.rand(tokens, count, device="cuda").topk(k).indices.int() for _ in range(8)]
        weights = torch.rand(tokens, k, device="cuda")

        def ours(p: Tensor) -> Tensor:
            return experts.routed_experts(x, p, weights, (w1, w3, w2), (s1, s3, s2), (121, 121), 10.0)

        def ours_in_panels(p: Tensor) -> Tensor:
            return experts.routed_experts(x, p, weights, panels, (None, None, None), (0, 0), 10.0)

        hit = statistics.mean(len(p.unique()) for p in picks)
        floor = hit * 3 * hidden * inner * 17 / 32 / bandwidth * 1e6
        figure = Figure("fp4 experts", f"{tokens} tokens, {hit:.1f} experts", microseconds(ours, picks), floor)
        calls = peers.humming_experts((torch.cat([w1, w3], 1), torch.cat([s1, s3], 1)), (w2, s2), tokens, picks)
        if calls is not None:
            peer = microseconds(lambda call: call(), calls)
            figure = replace(figure, peer=f"{peers.version('humming-kernels')}, products alone", peer_us=peer)
        yield figure
        yield replace(figure, op="fp4 experts in CUDA C++", us=in_cuda(ours_in_panels, picks))


def mixing_cases(bandwidth: float) -> Cases:
    size = 4096
    fns = [torch.randn(24, 4 * size, device="cuda") for _ in range(32)]
    base, scale, norm = (torch.randn(n, device="cuda") for n in (24, 3, size))
    for tokens in (1, 4, 64):
        streams = torch.randn(tokens, 4, size, device="cuda")
        y = torch.randn(tokens, size, device="cuda")
        _, post, comb = hyper_connections.mix_in(streams, fns[0], base, scale, norm, 1e-6, 1e-6, 20)

        def ours(fn: Tensor) -> object:
            return hyper_connections.mix_in(streams, fn, base, scale, norm, 1e-6, 1e-6, 20)

        us = microseconds(ours, fns)
        out = microseconds(lambda y: hyper_connections.mix_out(y, streams, post, comb), [y])
        floor = 4 * 24 * 4 * size / bandwidth * 1e6
        yield Figure("mHC in, normed", f"{tokens} tokens", us, floor)
        if tokens <= mix_few.TOKENS:
            yield Figure("mHC in, normed, in CUDA C++", f"{tokens} tokens", in_cuda(ours, fns), floor, "Triton", us)
        yield Figure("mHC out", f"{tokens} tokens", out, tokens * size * 36 / bandwidth * 1e6)
        if tokens <= mix_few.BETWEEN_TOKENS:
            made, beside = torch.randn(tokens, 6, size, device="cuda"), torch.randn(tokens, size, device="cuda")
            unbalanced = Unbalanced(torch.randn(tokens, 4, 4, device="cuda"), 20, 1e-6)

            def one_by_one(fn: Tensor) -> object:
                after = hyper_connections.mix_out(experts.sum_picks(made, beside), streams, post, comb)
                return hyper_connections.mix_in(after, fn, base, scale, norm, 1e-6, 1e-6, 20)

            def between(fn: Tensor) -> object:
                return hyper_connections.mix_between(
                    made, beside, streams, post, unbalanced, fn, base, scale, norm, 1e-6, 1e-6, 20
                )

            us, peer = in_cuda(between, fns), in_cuda(one_by_one, fns)
            yield Figure("mHC from experts to attention", f"{tokens} tokens", us, floor, "one by one", peer)


def routing_cases(bandwidth: float) -> Cases:
    """The gate's product, the choice of experts and the list of work."""
    count, hidden, k = 256, 4096, 6
    gates = [torch.randn(count, hidden, device="cuda") * hidden**-0.5 for _ in turns(4 * count * hidden)]
    bias = torch.randn(count, device="cuda") * 0.1
    for tokens in (1, 4, 8, 32):
        x, ids = torch.randn(tokens, hidden, device="cuda"), torch.zeros(tokens, dtype=torch.int64, device="cuda")

        def single(gate: Tensor) -> object:
            z = linear.product(x, gate, None, 1)
            picks, _ = experts.route(z, bias, None, None, k, 1.5)
            return experts.work_list(picks, count, few_tokens.TOKENS)

        us = microseconds(single, gates)
        cuda = in_cuda(lambda gate: route_few.route(x, gate, bias, None, ids, k, 1.5), gates)
        floor = 4 * count * hidden / bandwidth * 1e6
        yield Figure("routing in CUDA C++", f"{tokens} tokens, {count} experts", cuda, floor, "Triton", us)


def folded_cases(bandwidth: float) -> Cases:
    """Products with what comes before or behind them folded in, beside kernels that do one after the other."""
    inputs, rows, hidden, inner = 1024, (32_768, 8192), 4096, 2048
    norm = torch.randn(inputs, device="cuda")

    def fp8(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0x20, 0x40, (outputs, inputs), dtype=torch.uint8, device="cuda")
        return codes, torch.rand(outputs // 128, inputs // 128, device="cuda")

    queries = [[fp8(n, inputs) for n in rows] for _ in turns(inputs * sum(rows))]
    shared = [[fp8(inner, hidden) for _ in range(2)] for _ in turns(2 * hidden * inner)]
    for tokens in (1, 4, 8):
        low, x = torch.randn(tokens, inputs, device="cuda"), torch.randn(tokens, hidden, device="cuda")

        def normed_before(matrices: Any) -> object:
            return few_tokens.products(norm_rotate(low, norm, 1e-6, None, None, False), matrices)

        def gated_behind(both: Any) -> object:
            gate, up = few_tokens.products(x, both)
            return experts.swiglu(gate, up, 10.0)

        us = in_cuda(lambda m: few_tokens.products(low, m, norm=norm, eps=1e-6), queries)
        peer, floor = in_cuda(normed_before, queries), inputs * sum(rows) / bandwidth * 1e6
        yield Figure("products of normed tokens", f"{tokens} tokens", us, floor, "one by one", peer)
        us = in_cuda(lambda both: few_tokens.gated(x, both[0], both[1], 10.0), shared)
        peer, floor = in_cuda(gated_behind, shared), 2 * hidden * inner / bandwidth * 1e6
        yield Figure("gated products", f"{tokens} tokens", us, floor, "one by one", peer)


def prompt_cases(bandwidth: float) -> Cases:
    """What attends and scores in a prompt's chunk, beside what `--backends auto` has do it where that is installed."""
    tokens = 2_048
    for ratio, length in ((0, 8_192), (4, 65_536), (128, 65_536), (128, 901_120)):
        meta = step([length], tokens)
        window = random_pool(meta.page_table.shape[1] + 1, 256, "latent")
        rows = random_pool(meta.page_table.shape[1] + 1, 64 if ratio == 4 else 2, "latent") if ratio else None
        q, sink = torch.randn(tokens, 64, 512, device="cuda"), torch.randn(64, device="cuda")
        selected = None
        if ratio == 4:
            seen = (length - tokens) // 4
            selected = torch.stack([torch.randperm(seen)[:512].sort().values for _ in range(tokens)]).int().cuda()

        def ours(p: RowPool | None) -> Tensor:
            return sparse_attention.sparse_attention(q, sink, meta, window, p, ratio, selected, 512**-0.5, True)

        us, cuda = microseconds(ours, [rows]), in_cuda(ours, [rows])
        keys = 128 + {0: 0, 4: 512, 128: length // 128}[ratio]
        floor = 4 * tokens * 64 * keys * 512 / BF16_FLOPS * 1e6
        name = {0: "window", 4: "C4", 128: "C128"}[ratio]
        shape = f"{keys:,} keys, {tokens} tokens, 64 heads"
        yield Figure(f"attention {name}", shape, us, floor)
        yield beside(
            Figure(f"attention {name} in CUDA C++", shape, cuda, floor),
            "sgl-flash-mla",
            peers.flash_mla_attention((q, sink, meta, window, rows, ratio, selected, 512**-0.5)),
        )
    tokens = 256
    for length in (65_536, 901_120):
        meta, pool = step([length], tokens), random_pool(length // 256 + 1, 64, "index")
        q, w = torch.randn(tokens, 64, 128, device="cuda"), torch.rand(tokens, 64, device="cuda")
        codes, weights = index_topk.quantise(q, w)

        def scores(p: RowPool) -> object:
            return index_topk.scores_and_maxima(codes, weights, p, meta, 512, True)

        us, cuda = microseconds(scores, [pool]), in_cuda(scores, [pool])
        floor = 2 * tokens * 64 * 128 * length // 4 / (2 * BF16_FLOPS) * 1e6
        shape = f"{length // 4:,} keys, {tokens} tokens"
        yield Figure("indexer logits", shape, us, floor)
        figure = Figure("indexer logits in CUDA C++", shape, cuda, floor)
        yield beside(figure, "sgl-deep-gemm", peers.deep_gemm_scores(codes, weights, pool, meta))


def sampling_cases(bandwidth: float) -> Cases:
    """A token of each row of V4's vocabulary, beside torch's: of filters a sort."""
    vocabulary = 129_280
    for name, temperature, top_p in (("greedy", 0.0, 1.0), ("temperature", 1.0, 1.0), ("top_p 0.95", 1.0, 0.95)):
        params = SamplingParams(max_tokens=1, seed=1, temperature=temperature, top_p=top_p)
        for rows in (1, 4, 32):
            logits = [torch.randn(rows, vocabulary, device="cuda") * 4 for _ in turns(4 * rows * vocabulary)]
            how = How.of_rows([Row(params=params, position=n) for n in range(rows)])
            there, filtered = torch.from_numpy(how.bits.view(np.int64)).cuda(), params.top_p < 1

            def theirs(x: Tensor) -> Tensor:
                if params.temperature == 0:
                    return x.argmax(-1)
                likely = x.softmax(-1)
                if filtered:
                    likely, _ = likely.sort(-1, descending=True)
                    likely = likely * (likely.cumsum(-1) - likely < params.top_p)
                return likely.multinomial(1)

            us = in_cuda(lambda x: draw(x, there, filtered), logits)
            floor = 4 * rows * vocabulary / bandwidth * 1e6
            peer = microseconds(theirs, logits)
            yield Figure(f"draw, {name}", f"{rows} rows of {vocabulary:,}", us, floor, "torch", peer)


GROUPS: dict[str, Callable[[float], Cases]] = {
    "topk": topk_cases,
    "indexer": indexer_cases,
    "attention": attention_cases,
    "compressor": compressor_cases,
    "linear": linear_cases,
    "experts": expert_cases,
    "mixing": mixing_cases,
    "routing": routing_cases,
    "folded": folded_cases,
    "prompts": prompt_cases,
    "sampling": sampling_cases,
}


def run(only: tuple[str, ...] = (), console: Console | None = None, save: bool = True) -> list[dict[str, object]]:
    """Measure, print a table and append rows to bench/results/kernels.csv: a group at a time, so that what was measured
    stays if the run ends early.
    """
    require("cuda")
    console = console or Console()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))
    measured: list[dict[str, object]] = []
    for name in only or tuple(GROUPS):
        table, rows = Table("kernel", "shape", "us", "floor us", "peer", "peer us", title=name), []
        for f in GROUPS[name](bandwidth):
            table.add_row(f.op, f.shape, f"{f.us:.2f}", f"{f.floor_us:.2f}", f.peer, f"{f.peer_us:.2f}")
            rows.append(
                {
                    "device": torch.cuda.get_device_name(),
                    "versions": versions,
                    "copy_tb_s": round(bandwidth / 1e12, 3),
                    "kernel": f.op,
                    "shape": f.shape,
                    "us": round(f.us, 2),
                    "floor_us": round(f.floor_us, 2),
                    "peer": f.peer,
                    "peer_us": "" if f.peer_us != f.peer_us else round(f.peer_us, 2),
                }
            )
            torch.cuda.empty_cache()
        console.print(table)
        if save:
            console.print(f"rows added to {append_rows('kernels', rows)}")
        measured += rows
    console.print(
        f"{torch.cuda.get_device_name()}; {versions}; copies at {bandwidth / 1e12:.2f} TB/s; commit {commit()}"
    )
    return measured
