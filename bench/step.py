"""One step of full-size DeepSeek-V4-Flash on one GPU, as a CUDA graph: forward pass and head, no sampling. Steps of
decoding, and chunks of prompts.

Where a sequence has four tokens, the draft layer too: what it takes to remember them and to guess three more, each from
the likeliest token of the guess before. The step and that together are the cycle of a depth-3 decode. Served is the
same as a worker runs it, by the clock: its graphs, tokens drawn with noise and verified, and what the host does.

All of Flash does not fit one GPU, so a layer holds fewer experts than the 256 of the checkpoint, and the router chooses
among those: as many are read per token, from as much memory as the L2 can not hold. Weights are random, made where they
are used, in the checkpoint's formats. Contexts are not prefilled: their rows are random, which costs a step the same.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from bench.kernels import copy_bandwidth, replayed
from bench.record import append_rows, commit
from engine.batch import Segment, Sequence, StepMeta, Tables
from engine.cache.pools import KvPools, PoolSizes
from engine.config import C4_RATIO, C128_RATIO, FLASH, ModelConfig
from engine.kernels.device import require, use_cuda_products
from engine.kernels.experts import Fp4Stack
from engine.kernels.linear import Fp8Weight
from engine.kernels.rows import RowPool
from engine.kernels.sample import How
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.mtp import DraftLayer
from engine.steps import StepGraphs
from engine.window import most_window_pages
from wire.types import PAGE_TOKENS, SamplingParams

T = TypeVar("T")

DRAFTED = 4
"""Tokens of a step that verifies three drafts."""
SERVED = 30
"""Steps as a worker runs them; the first third compiles, captures and warms up."""
SHOWN = (
    "batch", "tokens", "context", "step_ms", "least_ms", "kernels_a_layer", "drafts_ms", "cycle_ms", "served_ms",
)  # fmt: skip
FLASH_EXPERTS = FLASH.num_experts
RESERVE_BYTES = 12 << 30
"""For pools, workspaces and the graph."""
CELLS = (
    (1, 1, 4_096), (1, 1, 65_536), (1, 1, 262_144), (1, 1, 900_000),
    (1, 4, 4_096), (1, 4, 65_536), (1, 4, 262_144), (1, 4, 900_000),
    (8, 1, 4_096), (8, 1, 65_536), (32, 1, 4_096),
    (1, 2_048, 2_048), (1, 2_048, 65_536), (1, 2_048, 262_144), (1, 2_048, 900_000),
)  # fmt: skip
"""(sequences, tokens of each, context); the last ones are chunks of a prompt"""


def flash(layers: int, experts: int) -> ModelConfig:
    """V4-Flash's shape with its first `layers` layers."""
    pattern = (0, 0, *((C4_RATIO, C128_RATIO) * layers))[:layers]
    return replace(
        FLASH, compress_ratios=pattern, num_hash_layers=min(3, layers), num_experts=experts, draft_layer=True
    )


def random_tensors(c: ModelConfig) -> dict[str, object]:
    """Weights by official name on the GPU, the draft layer's too: FP8, FP4, bf16 and fp32 as in the checkpoint."""

    def fp8(outputs: int, inputs: int) -> Fp8Weight:
        codes = torch.randint(256, (outputs, inputs), dtype=torch.uint8, device="cuda")
        codes &= 0xBF  # magnitudes below 2
        scales = torch.full((-(-outputs // 128), -(-inputs // 128)), 0.02 * inputs**-0.5, device="cuda")
        return Fp8Weight(codes, scales)

    def fp4(outputs: int, inputs: int) -> Fp4Stack:
        shape = (c.num_experts, outputs, inputs // 2)
        scale = 127 - 2 - (inputs.bit_length() - 1) // 2
        scales = torch.full((c.num_experts, outputs, inputs // 32), scale, dtype=torch.uint8, device="cuda")
        return Fp4Stack(torch.randint(256, shape, dtype=torch.uint8, device="cuda"), scales)

    def bf16(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") * inputs**-0.5

    def fp32(*shape: int, spread: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, device="cuda") * spread + mean

    def read_out(prefix: str) -> dict[str, object]:
        return {
            prefix + "norm.weight": fp32(d, mean=1, spread=0.1), prefix + "hc_head_fn": fp32(4, 4 * d, spread=0.01),
            prefix + "hc_head_base": fp32(4), prefix + "hc_head_scale": fp32(1, mean=1, spread=0),
        }  # fmt: skip

    d, i = c.hidden_size, c.moe_intermediate_size
    tensors: dict[str, object] = {
        "embed.weight": torch.randn(c.vocab_size, d, dtype=torch.bfloat16, device="cuda"),
        "head.weight": bf16(c.vocab_size, d), **read_out(""), **read_out("mtp.0."),
        "mtp.0.e_proj.weight": fp8(d, d), "mtp.0.h_proj.weight": fp8(d, d),
        "mtp.0.enorm.weight": fp32(d, mean=1, spread=0.1), "mtp.0.hnorm.weight": fp32(d, mean=1, spread=0.1),
    }  # fmt: skip
    for n, ratio in (*enumerate(c.compress_ratios), (None, 0)):
        p = "mtp.0." if n is None else f"layers.{n}."
        for site in ("attn", "ffn"):
            tensors |= {
                f"{p}hc_{site}_fn": fp32(24, 4 * d, spread=0.01), f"{p}hc_{site}_base": fp32(24),
                f"{p}hc_{site}_scale": fp32(3, mean=1, spread=0), f"{p}{site}_norm.weight": fp32(d, mean=1, spread=0.1),
            }  # fmt: skip
        a = p + "attn."
        tensors |= {
            a + "wq_a.weight": fp8(c.q_lora_rank, d), a + "q_norm.weight": fp32(c.q_lora_rank, mean=1, spread=0.1),
            a + "wq_b.weight": fp8(c.num_heads * c.head_dim, c.q_lora_rank), a + "wkv.weight": fp8(c.head_dim, d),
            a + "kv_norm.weight": fp32(c.head_dim, mean=1, spread=0.1), a + "attn_sink": fp32(c.num_heads),
            a + "wo_a.weight": fp8(c.o_groups * c.o_lora_rank, c.num_heads * c.head_dim // c.o_groups),
            a + "wo_b.weight": fp8(d, c.o_groups * c.o_lora_rank),
        }  # fmt: skip

        def compressor(prefix: str, dim: int, ratio: int) -> dict[str, Tensor]:
            width = dim * (2 if ratio == C4_RATIO else 1)
            return {
                prefix + "wkv.weight": bf16(width, d), prefix + "wgate.weight": bf16(width, d),
                prefix + "ape": fp32(ratio, width), prefix + "norm.weight": fp32(dim, mean=1, spread=0.1),
            }  # fmt: skip

        if ratio:
            tensors |= compressor(a + "compressor.", c.head_dim, ratio)
        if ratio == C4_RATIO:
            tensors |= compressor(a + "indexer.compressor.", c.index_head_dim, ratio)
            tensors[a + "indexer.wq_b.weight"] = fp8(c.index_heads * c.index_head_dim, c.q_lora_rank)
            tensors[a + "indexer.weights_proj.weight"] = bf16(c.index_heads, d)
        f = p + "ffn."
        tensors[f + "gate.weight"] = bf16(c.num_experts, d)
        if n is not None and n < c.num_hash_layers:
            table = torch.rand(c.vocab_size, c.num_experts, device="cuda").topk(c.experts_per_token).indices
            tensors[f + "gate.tid2eid"] = table
        else:
            tensors[f + "gate.bias"] = fp32(c.num_experts, spread=0.1)
        for name, outputs, inputs in (("w1", i, d), ("w3", i, d), ("w2", d, i)):
            tensors[f"{f}experts.{name}"] = fp4(outputs, inputs)
            tensors[f"{f}shared_experts.{name}.weight"] = fp8(outputs, inputs)
    return tensors


def fill(pool: RowPool) -> None:
    """Any finite codes, scales of 1."""
    n, data = pool.rows_per_item, pool.data
    codes = n * (576 if pool.kind == "latent" else 128)
    for items in data.split(256):
        items[:, :codes] = torch.randint(0x30, 0x40, (len(items), codes), dtype=torch.uint8, device="cuda")
        if pool.kind == "latent":
            items[:, codes : codes + 8 * n] = 127
        else:
            items[:, codes:] = torch.ones(len(items), n, device="cuda").view(torch.uint8)


def step(pools: KvPools, batch: int, tokens: int, context: int) -> StepMeta:
    """`tokens` tokens behind `context` ones of each of `batch` sequences, over pages of their own."""
    width = -(-(context + tokens) // PAGE_TOKENS)
    pages = torch.arange(1, batch * width + 1).view(batch, width).int()
    last = min(most_window_pages(tokens) + 1, width)
    swa_table = torch.zeros(batch, width, dtype=torch.int32)
    swa_table[:, width - last :] = torch.arange(1, last * batch + 1).view(batch, last)
    counts = torch.full((batch,), tokens)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return StepMeta(
        positions=(context + torch.arange(tokens)).repeat(batch).cuda(),
        segment=torch.arange(batch).repeat_interleave(tokens).int().cuda(),
        offsets=offsets.int().cuda(),
        starts=torch.full((batch,), context).cuda(),
        page_table=pages.cuda(),
        swa_table=swa_table.cuda(),
        slots=torch.arange(1, batch + 1).int().cuda(),
    )


def captured(call: Callable[..., T], *args: object) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of a call, and what it makes."""
    for _ in range(2):
        call(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call(*args)
    return graph, made


def drafts(draft: DraftLayer, streams: Tensor, ids: Tensor, meta: StepMeta, kept: Tensor, pools: KvPools) -> Tensor:
    """All tokens of a step remembered, and three guesses behind them, as `engine.steps` does after a step."""

    def likeliest_of(logits: Tensor) -> Tensor:
        """[B]: of each row, in two reductions, for one block reads all of a row in torch's."""
        tops, places = logits.unflatten(-1, (-1, 256)).max(dim=-1)
        first = tops.argmax(dim=-1, keepdim=True)
        return (256 * first + places.gather(-1, first)).squeeze(-1)

    before, oldest = draft.remember(streams, ids, meta, kept, pools)
    likeliest = ids[meta.offsets[1:].long() - 1]
    batch = len(kept)
    for depth in range(DRAFTED - 1):
        at = StepMeta(
            positions=meta.starts + kept + depth, segment=torch.arange(batch, device="cuda").int(),
            offsets=torch.arange(batch + 1, device="cuda").int(), starts=meta.starts + kept + depth,
            page_table=meta.page_table, swa_table=meta.swa_table, slots=meta.slots, oldest=oldest,
        )  # fmt: skip
        logits, before = draft.guess(likeliest, before, at, pools)
        likeliest = likeliest_of(logits)
    return likeliest


def served(model: DeepseekV4, draft: DraftLayer, pools: KvPools, context: int) -> float:
    """Milliseconds of a step of one sequence that verifies three drafts and guesses three more."""
    width = -(-(context + DRAFTED) // PAGE_TOKENS)
    mapped = min(3, width)
    sequence = Sequence(
        request_id="bench", sampling=SamplingParams(max_tokens=1, seed=0), slot=1, pages=[*range(1, width + 1)],
        swa_pages=[*[0] * (width - mapped), *range(1, mapped + 1)],
    )  # fmt: skip
    graphs, how, times = StepGraphs(model, draft, pools), How.of([sequence.sampling]), []
    for n in range(SERVED):
        batch = [
            Segment(
                sequence=sequence, start=context, tokens=[n, n + 1, n + 2, n + 3], sample=True, drafts=DRAFTED - 1,
                guesses=DRAFTED - 1,
            )
        ]  # fmt: skip
        tables = Tables.of(batch)
        begin = time.perf_counter()
        step = graphs.step(batch, tables)
        assert step is not None
        assert step.takes()
        step.drawn(how)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[SERVED // 3 :]) * 1e3


def run(
    *,
    layers: int = 43,
    alias_experts: int = 224,
    kernels: str = "cuda",
    console: Console | None = None,
    save: bool = True,
) -> list[dict[str, object]]:
    """Measure every cell, print it and append it to bench/results/step.csv; `kernels` as of a worker."""
    require("cuda")
    use_cuda_products(kernels == "cuda")
    console = console or Console()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    per_expert = 3 * 4096 * 2048 * 17 / 32
    free, _ = torch.cuda.mem_get_info()
    rest = 2 * 129_280 * 4096 * 2 + layers * 180e6
    experts = min(alias_experts, int((free - RESERVE_BYTES - rest) / per_expert / layers))
    if experts < 6:
        raise MemoryError(f"{layers} layers do not fit into {free / 1e9:.0f} GB with 6 experts each; give fewer layers")
    config = flash(layers, experts)
    tensors = random_tensors(config)
    model = DeepseekV4(config, tensors)  # type: ignore[arg-type]
    draft = DraftLayer(model, tensors)  # type: ignore[arg-type]
    most = max(batch * -(-(context + tokens) // PAGE_TOKENS) for batch, tokens, context in CELLS) + 1
    pools = KvPools(config, "v4", PoolSizes(full=most, swa=3 * 32 + 2, slots=34), "bench", "cuda")
    for kind in (pools.window, pools.c4, pools.index, pools.c128):
        for pool in kind.values():
            fill(pool)
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))
    rows: list[dict[str, object]] = []
    for batch, tokens, context in CELLS:
        meta = step(pools, batch, tokens, context)
        ids = torch.randint(config.vocab_size, (batch * tokens,), device="cuda")
        wanted = torch.arange(batch * tokens, device="cuda")[-batch * DRAFTED :]  # of a chunk hardly any are
        step_graph, logits = captured(model.forward, ids, meta, wanted, pools)
        times = replayed(step_graph)
        cycle: dict[str, object] = {"drafts_ms": "", "cycle_ms": "", "served_ms": ""}
        if tokens == DRAFTED:
            streams = torch.randn(batch * tokens, 4, config.hidden_size, device="cuda")
            kept = torch.full((batch,), tokens, device="cuda")
            graph, _ = captured(drafts, draft, streams, ids, meta, kept, pools)
            drafting = statistics.median(replayed(graph))
            cycle = {"drafts_ms": round(drafting, 3), "cycle_ms": round(drafting + statistics.median(times), 3)}
            del graph
            by_itself = kernels == "cuda"  # tokens are drawn where the logits are
            cycle["served_ms"] = round(served(model, draft, pools, context), 3) if by_itself else ""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step_graph.replay()
            torch.cuda.synchronize()
        launches = sum(1 for event in profile.events() or () if event.device_type.name == "CUDA")
        row: dict[str, object] = {
            "device": torch.cuda.get_device_name(),
            "versions": versions,
            "copy_tb_s": round(bandwidth / 1e12, 3),
            "layers": layers,
            "experts_of_256": experts,
            "batch": batch,
            "tokens": tokens,
            "context": context,
            "step_ms": round(statistics.median(times), 3),
            "least_ms": round(min(times), 3),
            "kernels_a_layer": round(launches / layers, 1),
            "finite": bool(torch.isfinite(logits).all()),
            "kernels": kernels,
            **cycle,
        }
        rows.append(row)
        shown = {name.replace("_", " "): row[name] for name in SHOWN}
        console.print(", ".join(f"{name} {value}" for name, value in shown.items() if value != ""), highlight=False)
        if save:
            append_rows("step", [row])
        del step_graph
    aliased = (
        f"{experts} of {FLASH_EXPERTS} experts a layer are there (aliased)"
        if experts < FLASH_EXPERTS
        else "all experts"
    )
    console.print(
        f"{torch.cuda.get_device_name()}; {versions}; {layers} layers; {aliased}; forward and head; "
        f"tokens are drawn where served; copies at {bandwidth / 1e12:.2f} TB/s; commit {commit()}"
    )
    return rows
