"""What libraries are handed, and what becomes of what they give: against the CPU's kernels.

On a GPU with the `peers` extra the libraries themselves compute. Elsewhere twins of theirs in torch do, which read what
they are handed as the libraries' documentation says.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton comes with the gpu extra")

from engine.config import C4_RATIO, C128_RATIO
from engine.kernels import experts
from engine.kernels.device import backends, libraries
from engine.kernels.device import experts as device_experts
from engine.kernels.device import index_topk as device_index
from engine.kernels.device import linear as device_linear
from engine.kernels.device import sparse_attention as device_attention
from engine.kernels.norm_rope import rope_frequencies
from engine.kernels.sparse_attention import sparse_attention
from tests.kernels.test_device import PAGES, SPANS, apart, filled_pool, randn, there
from wire.errors import ConfigError

pytestmark = [pytest.mark.gpu] if ON_GPU else []


def rows_of(cache: Tensor, indices: Tensor, index: bool = False) -> Tensor:
    """cache [items, rows, 1, bytes], as a library names pages -> rows [N, D] fp32 by slot."""
    items, rows, _, row = cache.shape
    pages = cache.as_strided((items, rows * row), (cache.stride(0), 1)).cpu()
    slot = indices.cpu().long()
    item, place = pages[slot // rows], (slot % rows)[:, None]
    if index:
        codes = item.gather(1, place * 128 + torch.arange(128)).contiguous().view(torch.float8_e4m3fn).float()
        scale = item.gather(1, rows * 128 + place * 4 + torch.arange(4)).contiguous().view(torch.float32)
        return codes * scale
    data = item.gather(1, place * 576 + torch.arange(576)).contiguous()
    scales = item.gather(1, rows * 576 + place * 8 + torch.arange(7)).float() - 127
    near = data[:, :448].contiguous().view(torch.float8_e4m3fn).float() * torch.exp2(scales).repeat_interleave(64, 1)
    return torch.cat([near, data[:, 448:].contiguous().view(torch.bfloat16).float()], 1)


def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, plan, softmax_scale, is_fp8_kvcache, indices, attn_sink,
    use_legacy, kv_format, extra_k_cache=None, extra_indices_in_kvcache=None, extra_topk_length=None,
):  # fmt: skip
    assert (kv_format, use_legacy, is_fp8_kvcache, head_dim_v) == ("V4", True, True, 512)
    assert q.dtype == torch.bfloat16
    out = torch.empty_like(q)
    for t in range(len(q)):
        assert indices.shape[2] % 64 == 0
        keys = [rows_of(k_cache, indices[t, 0][indices[t, 0] != -1])]
        if extra_k_cache is not None:
            far = extra_indices_in_kvcache[t, 0]
            assert len(far) % 64 == 0
            far = far[: extra_topk_length[t]] if extra_topk_length is not None else far
            keys.append(rows_of(extra_k_cache, far[far != -1]))
        every = torch.cat(keys)
        logits = torch.cat([q[t, 0].cpu().float() @ every.T * softmax_scale, attn_sink.cpu()[:, None]], 1)
        out[t, 0] = (logits.softmax(1)[:, :-1] @ every).to(q)
    return out, None


def fp8_paged_mqa_logits(q, cache, weights, lengths, table, plan, most, clean_logits):
    assert clean_logits is False
    assert q.dtype == torch.float8_e4m3fn
    scores = torch.full((len(q), most), torch.nan, device=q.device)
    for t in range(len(q)):
        n = int(lengths[t, 0])
        place = torch.arange(n)
        keys = rows_of(cache, table[t].cpu()[place // 64].long() * 64 + place % 64, index=True)
        products = (q[t, 0].cpu().float() @ keys.T).relu()
        scores[t, :n] = (weights[t].cpu()[:, None] * products).sum(0)
    return scores


def fp8_gemm_nt(a, b, y):
    (x, x_scales), (weight, scales) = a, b
    x = x.float() * x_scales.repeat_interleave(128, 1)[:, : x.shape[1]]
    wide = (
        weight.float()
        * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    )
    y.copy_(x @ wide.T)


class HummingLayer:
    def __init__(self, shape_n, shape_k, weight_config, num_experts, torch_dtype):
        assert (weight_config, torch_dtype) == ({"quant_method": "mxfp4"}, torch.bfloat16)
        self.shape, self.humming_config = (num_experts, shape_n, shape_k), {"shape_k": shape_k}

    def to(self, device):
        return self

    def load_from_tensors(self, tensors):
        self.dense = fp4_values(tensors["weight"], tensors["weight_scale"])

    def transform(self):
        assert tuple(self.dense.shape) == self.shape

    def __call__(self, x, sorted_ids, expert_ids, num_tokens_padded, top_k, compute_config, tuning_config):
        assert compute_config == {"gemm_type": "indexed"}
        assert num_tokens_padded.dtype == sorted_ids.dtype == expert_ids.dtype == torch.int32
        pairs, block = len(x) * top_k, tuning_config["block_shape"][0]
        y = torch.full((pairs, self.shape[1]), torch.nan, dtype=torch.bfloat16)
        for number, ids in enumerate(sorted_ids[: int(num_tokens_padded)].split(block)):
            ids = ids[ids < pairs].long()
            y[ids] = (x[ids // top_k].float() @ self.dense[expert_ids[number]].T).bfloat16()
        return y


def fp4_values(codes, scales):
    """codes [E, N, K / 2] and scales [E, N, K / 32] -> [E, N, K] fp32."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    code = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    values = magnitudes[code & 7] * torch.where(code > 7, -1.0, 1.0)
    return values * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)


TWINS = {
    "humming.layer": SimpleNamespace(HummingLayer=HummingLayer),
    "humming.tune": SimpleNamespace(
        # Products with fewer inputs take more pairs at once.
        get_heuristics_config=lambda config, shape_m, gemm_type: {
            "block_shape": [16 if config["shape_k"] > 128 else 32]
        }
    ),
    "flash_mla": SimpleNamespace(get_mla_metadata=lambda: (None, None), flash_mla_with_kvcache=flash_mla_with_kvcache),
    "deep_gemm": SimpleNamespace(
        get_paged_mqa_logits_metadata=lambda lengths, rows, processors: None,
        fp8_paged_mqa_logits=fp8_paged_mqa_logits,
        fp8_gemm_nt=fp8_gemm_nt,
    ),
}


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """choose("op=library"): that one computes, or its twin."""

    def chosen(text: str, module: str) -> None:
        if ON_GPU:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} comes with the peers extra")
            backends.choose(text, torch.cuda.get_device_capability())
            return
        (backend,) = backends.parse(text)
        monkeypatch.setattr(backends, "_chosen", {backend.op: backend})
        monkeypatch.setattr(backends, "_named", True)
        monkeypatch.setattr(libraries, "_library", TWINS.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))

    yield chosen
    if ON_GPU:
        backends.choose("", torch.cuda.get_device_capability())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ratio", [0, C4_RATIO, C128_RATIO])
def test_flash_mla_attends_to_what_our_kernel_does(step, choose, ratio, turned):
    choose("attention=flash-mla", "flash_mla")
    meta = step(SPANS, pages=PAGES)
    tokens, heads = len(meta.positions), 64
    q, sink = randn(tokens, heads, 512) * 0.3, randn(heads, seed=1)
    window = filled_pool(256, "latent", "v4", 512)
    compressed = filled_pool(256 // ratio, "latent", "v4", 512) if ratio else None
    selected = None
    if ratio == C4_RATIO:
        # Every third block, the last columns unused.
        blocks = torch.arange(0, 96, 3)[None].expand(tokens, -1)
        selected = torch.where(blocks < ((meta.positions + 1) // 4)[:, None], blocks, -1).int().contiguous()
        selected = selected.sort(dim=1, descending=True).values
    meta = replace(meta, oldest=torch.tensor([0, 200, 0, 1000]))
    freqs = rope_frequencies(10_000.0, 64) if turned else None
    args = (ratio, selected, 512**-0.5)
    expected = sparse_attention(q, sink, meta, window, compressed, *args, freqs=freqs)
    got = device_attention.sparse_attention(
        there(q), there(sink), there(meta), there(window), None if compressed is None else there(compressed), ratio,
        None if selected is None else there(selected), 512**-0.5, True, None if freqs is None else there(freqs),
    )  # fmt: skip
    assert got.dtype == torch.float32
    assert apart(got, expected) < 2e-5


def test_deep_gemm_scores_the_keys_as_our_kernel_does(step, choose):
    meta, k = step(SPANS, pages=PAGES), 32
    tokens, heads = len(meta.positions), 64
    pool = there(filled_pool(64, "index", "v4", 128))
    q, w = device_index.quantise(there(randn(tokens, heads, 128)), there(randn(tokens, heads, seed=1)))
    expected, expected_maxima = device_index.scores_and_maxima(q, w, pool, there(meta), k, True)
    choose("index-scores=deep-gemm", "deep_gemm")
    for first, last in ((0, tokens), (7, 25)):
        scores, maxima = device_index.scores_and_maxima(q, w, pool, there(meta), k, True, first, last)
        for t in range(first, last):
            seen = (int(meta.positions[t]) + 1) // 4
            if seen > k:  # else all of them are chosen, and nobody asks for scores
                assert apart(scores[t - first, :seen], expected[t, :seen]) < 1e-6
                pages = -(-seen // 64)
                assert apart(maxima[t - first, :pages], expected_maxima[t, :pages]) < 1e-6


@pytest.mark.parametrize(
    ("text", "module", "why"),
    [
        ("attention=flash-mla", "flash_mla", "64 or 128 heads .*, not with 4 of 512"),
        ("index-scores=deep-gemm", "deep_gemm", "16, 32 or 64 index heads .*, not with 4 of 128"),
    ],
)
def test_heads_that_a_library_has_no_kernel_for_are_ours_unless_it_was_asked_for_by_name(
    step, choose, monkeypatch, text, module, why
):
    meta, heads = step(SPANS, pages=PAGES), 4
    tokens = len(meta.positions)
    window, rows = there(filled_pool(256, "latent", "v4", 512)), there(filled_pool(2, "latent", "v4", 512))
    q, sink = there(randn(tokens, heads, 512)), there(randn(heads, seed=1))
    keys = there(filled_pool(64, "index", "v4", 128))
    codes, w = device_index.quantise(there(randn(tokens, heads, 128)), there(randn(tokens, heads, seed=1)))
    places = torch.arange(64 * PAGES)
    seen = there(places < ((meta.positions + 1) // C4_RATIO)[:, None])

    def computed() -> Tensor:
        if module == "flash_mla":
            scale = 512**-0.5
            return device_attention.sparse_attention(q, sink, there(meta), window, rows, C128_RATIO, None, scale, True)
        return device_index.scores_and_maxima(codes, w, keys, there(meta), 0, True)[0][seen]

    ours = computed()
    choose(text, module)
    with pytest.raises(ConfigError, match=why):
        computed()
    monkeypatch.setattr(backends, "_named", False)
    assert torch.equal(computed(), ours)


@pytest.mark.parametrize("tokens", [1, 9])
def test_humming_computes_the_experts_that_were_picked(choose, tokens):
    choose("experts=humming", "humming")
    count, hidden, inner, k, limit = 6, 256, 128, 3, 10.0
    g = torch.Generator().manual_seed(0)

    def stack(outputs, inputs):
        codes = torch.randint(256, (count, outputs, inputs // 2), dtype=torch.uint8, generator=g)
        return codes, torch.randint(117, 122, (count, outputs, inputs // 32), dtype=torch.uint8, generator=g)

    stacks = stack(inner, hidden), stack(inner, hidden), stack(hidden, inner)
    w1, w3, w2 = (fp4_values(*one) for one in stacks)
    held = libraries.HummingExperts(tuple(there(c) for c, _ in stacks), tuple(there(s) for _, s in stacks))
    x, weights = randn(tokens, hidden).bfloat16().float(), torch.rand(tokens, k, generator=g)
    picks = torch.rand(tokens, count, generator=g).topk(k).indices.int()
    expected = experts.routed_experts(x, picks, weights, experts.Experts.prepare(w1, w3, w2), limit)
    parts = device_experts.library_parts(there(x), there(picks), there(weights), held, limit)
    assert apart(parts.cpu().view(tokens, k, hidden).sum(1), expected) < 1e-4


def test_deep_gemm_multiplies_by_the_matrix_and_scales_that_we_hold(choose):
    choose("linears=deep-gemm", "deep_gemm")
    x = randn(3, 512)[:, :384]
    codes = (randn(192, 384, seed=1) * 16).to(torch.float8_e4m3fn)
    scales = torch.exp2(torch.randint(-6, 4, (2, 3), generator=torch.Generator().manual_seed(2)).float())
    dense = codes.float() * scales.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    got = device_linear.product(there(x), there(codes.view(torch.uint8)), there(scales), 1)
    assert got.dtype == torch.float32
    assert apart(got, x @ dense.T) < 1e-3
    both = device_linear.products(there(x), [(there(codes.view(torch.uint8)), there(scales))] * 2)
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[0], got)
