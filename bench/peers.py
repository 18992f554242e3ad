"""Libraries of the field beside our kernels, on the same data: one call of each, ready to be timed.

They come with the `peers` extra. A library that is missing, or refuses, yields None and says why, once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO
from engine.kernels.device import libraries
from engine.kernels.rows import RowPool
from wire.types import PAGE_TOKENS

P = ParamSpec("P")
T = TypeVar("T")
_refused: set[str] = set()


def _of(distribution: str) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """The decorated makes a peer out of that distribution, or None."""

    def decorate(make: Callable[P, T]) -> Callable[P, T | None]:
        @functools.wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> T | None:
            try:
                return make(*args, **kwargs)
            except Exception as error:  # whatever a foreign library raises, our figures are still worth having
                if make.__name__ not in _refused:
                    _refused.add(make.__name__)
                    print(f"{distribution} not run for {make.__name__}: {type(error).__name__}: {str(error)[:300]}")
                return None

        return made

    return decorate


def version(distribution: str) -> str:
    """Name and version, for a row of results."""
    return f"{distribution} {importlib.metadata.version(distribution)}"


@_of("humming-kernels")
def humming_experts(
    gate_up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], tokens: int, picks: list[Tensor]
) -> list[Callable[[], object]]:
    """Both products of the experts each of `picks` [T, k] names, bf16 activations; the activation is not in it.

    gate_up, down: codes [E, N, K / 2] and scales [E, N, K / 32], as in `engine.kernels.experts.Fp4Stack`.
    """
    layer_of = importlib.import_module("humming.layer").HummingLayer
    heuristics = importlib.import_module("humming.tune").get_heuristics_config
    sort = importlib.import_module("humming.testing.data").generate_moe_tensors

    def layer(codes: Tensor, scales: Tensor) -> Any:
        count, outputs, half = codes.shape
        made = layer_of(
            shape_n=outputs, shape_k=2 * half, weight_config={"quant_method": "mxfp4"}, num_experts=count,
            torch_dtype=torch.bfloat16,
        ).cuda()  # fmt: skip
        made.load_from_tensors({"weight": codes, "weight_scale": scales})
        made.transform()
        return made

    first, second = layer(*gate_up), layer(*down)
    count, k = gate_up[0].shape[0], picks[0].shape[1]
    x = torch.randn(tokens, 2 * gate_up[0].shape[2], device="cuda", dtype=torch.bfloat16)
    h = torch.randn(tokens * k, 2 * down[0].shape[2], device="cuda", dtype=torch.bfloat16)
    indexed = {"gemm_type": "indexed"}
    calls: list[Callable[[], object]] = []
    for pick in picks:
        steps: list[Callable[[], object]] = []
        for one, inputs, top_k in ((first, x, k), (second, h, 1)):
            config = heuristics(one.humming_config, shape_m=tokens * k, gemm_type="indexed")
            ids = pick if top_k > 1 else pick.reshape(-1, 1)
            _, _, sorted_ids, expert_ids, padded = sort(ids, count, "indexed", config["block_shape"][0])
            steps.append(
                functools.partial(
                    one,
                    inputs,
                    sorted_ids=sorted_ids,
                    expert_ids=expert_ids,
                    num_tokens_padded=padded,
                    top_k=top_k,
                    compute_config=indexed,
                    tuning_config=config,
                )
            )
        calls.append(functools.partial(_each, steps))
    for call in calls:
        call()
    torch.cuda.synchronize()
    return calls


def _each(steps: list[Callable[[], object]]) -> None:
    for step in steps:
        step()


@_of("sgl-deep-gemm")
def deep_gemm_linear(codes: list[Tensor], tokens: int) -> Callable[[Tensor], object]:
    """x [T, K] e4m3 times each of codes [N, K] e4m3, which are the argument; block scales of 1."""
    gemm = importlib.import_module("deep_gemm").fp8_gemm_nt
    outputs, inputs = codes[0].shape
    x = torch.randn(tokens, inputs, device="cuda").to(torch.float8_e4m3fn)
    x_scales = torch.ones(tokens, inputs // 128, device="cuda")
    scales = torch.ones(-(-outputs // 128), inputs // 128, device="cuda")
    y = torch.empty(tokens, outputs, device="cuda", dtype=torch.bfloat16)

    def call(weight: Tensor) -> object:
        return gemm((x, x_scales), (weight.view(torch.float8_e4m3fn), scales), y)

    call(codes[0])
    torch.cuda.synchronize()
    return call


@_of("sgl-deep-gemm")
def deep_gemm_logits(keys: Tensor, page_table: Tensor, rows: int, tokens: int) -> Callable[[Tensor], object]:
    """Indexer logits of `tokens` tokens of one request over `rows` keys [pages, 64 * 132] uint8, the argument."""
    library = importlib.import_module("deep_gemm")
    together = min(tokens, 2)  # it takes no more of a request: four are two requests over the same pages
    q = torch.randn(tokens // together, together, 64, 128, device="cuda").to(torch.float8_e4m3fn)
    weights = torch.rand(tokens, 64, device="cuda")
    lengths = torch.full((tokens // together, together), rows, dtype=torch.int32, device="cuda")
    page_table = page_table.repeat(tokens // together, 1)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    plan = library.get_paged_mqa_logits_metadata(lengths, 64, processors)

    def call(keys: Tensor) -> object:
        cache = keys.view(len(keys), 64, 1, 132)
        return library.fp8_paged_mqa_logits(q, cache, weights, lengths, page_table, plan, rows, clean_logits=False)

    call(keys)
    torch.cuda.synchronize()
    return call


@_of("sgl-flash-mla")
def flash_mla(tokens: int, heads: int, keys: int) -> Callable[[], object]:
    """Sparse decode of `tokens` queries of one request over 128 rows and `keys` others, in pages of its own of 64."""
    library = importlib.import_module("flash_mla")
    q = torch.randn(1, tokens, heads, 512, device="cuda", dtype=torch.bfloat16)
    meta, _ = library.get_mla_metadata()

    def paged(rows: int) -> tuple[Tensor, Tensor]:
        pages = -(-rows // 64) + 1
        cache = torch.randint(0x30, 0x40, (pages, 64 * 584), dtype=torch.uint8, device="cuda")
        cache[:, 64 * 576 :] = 127
        indices = torch.arange(64, 64 + -(-rows // 64) * 64, dtype=torch.int32, device="cuda")
        return cache.view(pages, 64, 1, 584), indices.expand(1, tokens, -1).contiguous()

    window, indices = paged(128)
    more = dict(zip(("extra_k_cache", "extra_indices_in_kvcache"), paged(keys), strict=True)) if keys else {}

    def call() -> object:
        return library.flash_mla_with_kvcache(
            q, window, None, None, 512, meta, softmax_scale=512**-0.5, is_fp8_kvcache=True, indices=indices,
            use_legacy=True, kv_format="V4", **more,
        )  # fmt: skip

    call()
    torch.cuda.synchronize()
    return call


@_of("sgl-flash-mla")
def flash_mla_attention(how: tuple[Any, ...]) -> Callable[[], object]:
    """Attention as a prefill worker has it done: with what `engine.kernels.device.libraries.attention` takes."""
    libraries.attention(*how)
    torch.cuda.synchronize()
    return lambda: libraries.attention(*how)


@_of("sgl-deep-gemm")
def deep_gemm_scores(codes: Tensor, weights: Tensor, pool: RowPool, meta: StepMeta) -> Callable[[], object]:
    """Indexer logits as a prefill worker has them done, and their maxima."""
    libraries.index_scores(codes, weights, pool, meta, 0, len(codes))
    torch.cuda.synchronize()
    return lambda: libraries.index_scores(codes, weights, pool, meta, 0, len(codes))


def torch_compressor(
    u: Tensor, g: Tensor, ape: Tensor, norm: Tensor, ring: Tensor, meta: StepMeta, freqs: Tensor, out: RowPool
) -> None:
    """All that a compressor does to a prompt of one sequence, which begins with it, an operation of torch at a time."""
    ratio, dim, tokens = ape.shape[0], norm.shape[0], len(u)
    gates = g.unflatten(0, (-1, ratio)) + ape
    values = u.unflatten(0, (-1, ratio))
    if ratio == C4_RATIO:
        first_values, first_gates = values[:, :, :dim].roll(1, 0), gates[:, :, :dim].roll(1, 0)
        first_values[0], first_gates[0] = 0, -torch.inf
        values, gates = (
            torch.cat([first, own[:, :, dim:]], 1) for first, own in ((first_values, values), (first_gates, gates))
        )
    pooled = (torch.softmax(gates, 1) * values).sum(1)
    pooled = pooled * torch.rsqrt(pooled.square().mean(1, keepdim=True) + 1e-6) * norm
    pairs = pooled[:, -2 * len(freqs) :].unflatten(1, (-1, 2))
    turn = torch.polar(torch.ones_like(pairs[..., 0]), meta.positions[::ratio, None].float() * freqs)
    pooled[:, -2 * len(freqs) :] = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(1)
    if out.kind == "index":
        for d in range(dim.bit_length() - 1):
            halves = pooled.view(-1, dim >> d + 1, 2, 1 << d)
            pooled = torch.stack([halves[:, :, 0] + halves[:, :, 1], halves[:, :, 0] - halves[:, :, 1]], 2).flatten(1)
        pooled = pooled * dim**-0.5
    group = dim if out.kind == "index" else 64
    groups = pooled.unflatten(1, (-1, group))
    exponents = (groups.abs().amax(2).clamp_min(1e-4) / 448).log2().ceil()
    codes = (groups * torch.exp2(-exponents)[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    per_item = out.rows_per_item
    made = torch.arange(tokens // ratio, device=u.device)
    item, place = meta.page_table[0].long()[made // per_item], made % per_item
    if out.kind == "index":
        data, scales = codes, torch.exp2(exponents).view(torch.uint8)
    else:
        data = torch.cat([codes[:, :448], pooled[:, 448:].bfloat16().view(torch.uint8)], 1)
        scales = torch.nn.functional.pad((exponents[:, :7] + 127).to(torch.uint8), (0, 1))
    width = data.shape[1]
    out.data[:, : per_item * width].unflatten(1, (per_item, width))[item, place] = data
    behind = out.data[:, per_item * width : per_item * (width + scales.shape[1])]
    behind.unflatten(1, (per_item, scales.shape[1]))[item, place] = scales
    kept = torch.cat([u, gates.flatten(0, 1) if ratio != C4_RATIO else g + ape.repeat(tokens // ratio, 1)], 1)
    if ratio == C4_RATIO:
        ring[meta.swa_table[0].long()] = kept.unflatten(0, (-1, PAGE_TOKENS))[:, -ring.shape[1] :]
    else:
        ring[meta.slots.long()] = kept[None, -ring.shape[1] :]
