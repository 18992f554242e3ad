"""Ops that a library of the field computes where it was asked for (`backends`): what it is handed, and what it gives.

Pools are read where they lie: their pages have the layout that these libraries read. What a library gives in bf16 is
made fp32 again. T tokens, H heads.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO, C128_RATIO, WINDOW
from engine.kernels.device.codec import power_of_two, quantised, scale_exponent
from engine.kernels.device.topk_rows import maxima_of
from engine.kernels.rows import INDEX_DIM, LATENT_BYTES, LATENT_DIM, LATENT_SCALE_BYTES, RowPool
from wire.errors import ConfigError

_WINDOW, _C4, _C128 = (tl.constexpr(n) for n in (WINDOW, C4_RATIO, C128_RATIO))
_PAGE = tl.constexpr(256)
_FP8_GROUP = 128
_KEYS = 64
"""Keys that FlashMLA takes at once: lists of keys are a multiple of it long."""


@lru_cache(maxsize=8)
def _library(module: str) -> Any:
    return importlib.import_module(module)


@triton.jit(do_not_specialize=["pages", "width"])
def _slots(
    positions, segment, page_table, swa_table, oldest, pages, selected, picks, window, slots, counts, width,
    RATIO: tl.constexpr, OLDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one token: window [128] and slots [width], the rows it sees in either pool, -1 where there is none; counts."""
    token = tl.program_id(0).to(tl.int64)
    position, seg = tl.load(positions + token), tl.load(segment + token).to(tl.int64)
    if tl.program_id(1) == 0:
        i = tl.arange(0, _WINDOW)
        at = position - (_WINDOW - 1) + i
        first = tl.load(oldest + seg) if OLDEST else 0
        seen = (at >= 0) & (at >= first)
        page = tl.load(swa_table + seg * pages + at // _PAGE, mask=seen, other=0)
        tl.store(window + token * _WINDOW + i, tl.where(seen, page * _PAGE + (at % _PAGE).to(tl.int32), -1))
    if RATIO > 0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        if RATIO == _C128:
            row, seen = i, i < (position + 1) // _C128
            if tl.program_id(1) == 0:
                tl.store(counts + token, ((position + 1) // _C128).to(tl.int32))
        else:
            row = tl.load(selected + token * picks + i, mask=i < picks, other=-1)
            seen = row >= 0
        page = tl.load(page_table + seg * pages + row // (_PAGE // RATIO), mask=seen, other=0)
        slot = tl.where(seen, page * (_PAGE // RATIO) + row % (_PAGE // RATIO), -1)
        tl.store(slots + token * width + i, slot, mask=i < width)


def attention(
    q: Tensor, sink: Tensor, meta: StepMeta, window: RowPool, compressed: RowPool | None, ratio: int,
    selected: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """FlashMLA's sparse decode: as `engine.kernels.sparse_attention.sparse_attention` without `freqs`, each token by
    itself.
    """
    library = _library("flash_mla")
    tokens, heads, dim = q.shape
    if not takes_attention(heads, dim, window):
        raise ConfigError(
            f"FlashMLA attends with 64 or 128 heads of {LATENT_DIM} values over pools of the v4 layout, not with "
            f"{heads} of {dim} over {window.layout}. Leave --backends attention=flash-mla out."
        )
    pages, picks = meta.page_table.shape[1], 0 if selected is None else selected.shape[1]
    width = -(-{0: 0, C4_RATIO: picks, C128_RATIO: pages * (256 // C128_RATIO)}[ratio] // _KEYS) * _KEYS
    near = torch.empty(tokens, 1, WINDOW, dtype=torch.int32, device=q.device)
    far = torch.empty(tokens, 1, width, dtype=torch.int32, device=q.device)
    counts = torch.empty(tokens, dtype=torch.int32, device=q.device)
    block = 1024
    _slots[(tokens, max(1, triton.cdiv(width, block)))](
        meta.positions, meta.segment, meta.page_table, meta.swa_table, meta.oldest, pages,
        None if selected is None else selected.contiguous(), picks, near, far, counts, width,
        RATIO=ratio, OLDEST=meta.oldest is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    more = {}
    if compressed is not None:
        more = {"extra_k_cache": _paged(compressed), "extra_indices_in_kvcache": far}
        if ratio == C128_RATIO:
            more["extra_topk_length"] = counts
    plan, _ = library.get_mla_metadata()
    out, _ = library.flash_mla_with_kvcache(
        q.to(torch.bfloat16)[:, None], _paged(window), None, None, dim, plan, softmax_scale=scale, is_fp8_kvcache=True,
        indices=near, attn_sink=sink.contiguous(), use_legacy=True, kv_format="V4", **more,
    )  # fmt: skip
    return out[:, 0].float()


def takes_attention(heads: int, dim: int, window: RowPool) -> bool:
    return dim == LATENT_DIM and heads in (64, 128) and window.layout == "v4"


def _paged(pool: RowPool) -> Tensor:
    """[items, rows, 1, bytes of a row], as FlashMLA names pages."""
    row = LATENT_BYTES + LATENT_SCALE_BYTES
    shape = len(pool.data), pool.rows_per_item, 1, row
    return pool.data.as_strided(shape, (pool.data.stride(0), row, row, 1))


def index_scores(q: Tensor, w: Tensor, pool: RowPool, meta: StepMeta, first: int, last: int) -> tuple[Tensor, Tensor]:
    """DeepGEMM's paged logits: as `index_topk.scores_and_maxima`, of q [T, H, D] e4m3 codes and w [T, H].

    A token is a request of its own here, for the library takes no more than two of one.
    """
    library = _library("deep_gemm")
    _, heads, dim = q.shape
    if not takes_index_scores(heads, dim, pool):
        raise ConfigError(
            f"DeepGEMM scores with 16, 32 or 64 index heads of {INDEX_DIM} values over pools of the v4 layout, not "
            f"with {heads} of {dim} over {pool.layout}. Leave --backends index-scores=deep-gemm out."
        )
    pages, rows = meta.page_table.shape[1], pool.rows_per_item
    lengths = ((meta.positions[first:last] + 1) // C4_RATIO).int()
    table = meta.page_table[meta.segment[first:last].long()]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    plan = library.get_paged_mqa_logits_metadata(lengths[:, None], rows, processors)
    cache = pool.data.as_strided(
        (len(pool.data), rows, 1, pool.dim + 4), (pool.data.stride(0), pool.dim + 4, pool.dim + 4, 1)
    )
    scores = library.fp8_paged_mqa_logits(
        q[first:last].view(torch.float8_e4m3fn)[:, None], cache, w[first:last].contiguous(), lengths[:, None], table,
        plan, pages * rows, clean_logits=False,
    )  # fmt: skip
    return scores, maxima_of(scores, lengths)


def takes_index_scores(heads: int, dim: int, pool: RowPool) -> bool:
    return dim == INDEX_DIM and heads in (16, 32, 64) and pool.layout == "v4"


@triton.jit
def _to_e4m3(x, x_row, codes, scales, inputs, GROUP: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = group * GROUP + tl.arange(0, GROUP)
    values = tl.load(x + row * x_row + at, mask=at < inputs, other=0.0)
    exponent = tl.minimum(scale_exponent(tl.max(tl.abs(values), axis=0)), 127)
    tl.store(codes + row * inputs + at, quantised(values, exponent), mask=at < inputs)
    tl.store(scales + row * tl.num_programs(1) + group, power_of_two(exponent))


def product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """DeepGEMM's FP8 product of x [T, K] fp32, rounded to e4m3 with a scale for 128 inputs, and weight [N, K] e4m3."""
    tokens, inputs = x.shape
    groups = -(-inputs // _FP8_GROUP)
    codes = torch.empty(tokens, inputs, dtype=torch.uint8, device=x.device)
    x_scales = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, len(weight), dtype=torch.bfloat16, device=x.device)
    if tokens:
        _to_e4m3[(tokens, groups)](x, x.stride(0), codes, x_scales, inputs, GROUP=_FP8_GROUP, num_warps=1)
        _library("deep_gemm").fp8_gemm_nt(
            (codes.view(torch.float8_e4m3fn), x_scales), (weight.view(torch.float8_e4m3fn), scales), y
        )
    return y.float()


def takes_product(weight: Tensor, groups: int) -> bool:
    """Whether `product` takes this matrix [G * N, K]."""
    outputs, inputs = weight.shape
    return groups == 1 and outputs % 64 == 0 and inputs % _FP8_GROUP == 0


class HummingExperts:
    """The FP4 experts of one layer in humming's arrangement, which takes the place of the checkpoint's."""

    def __init__(self, codes: tuple[Tensor, Tensor, Tensor], scales: tuple[Tensor, Tensor, Tensor]) -> None:
        """codes: gate, up [E, I, D / 2] and down [E, D, I / 2]; scales likewise, / 16."""
        (gate, up, down), (gate_scales, up_scales, down_scales) = codes, scales
        self.count, self.inner = gate.shape[:2]
        self._first = self._layer(torch.cat([gate, up], 1), torch.cat([gate_scales, up_scales], 1))
        self._second = self._layer(down, down_scales)

    @staticmethod
    def _layer(codes: Tensor, scales: Tensor) -> Any:
        experts, outputs, half = codes.shape
        made = _library("humming.layer").HummingLayer(
            shape_n=outputs, shape_k=2 * half, weight_config={"quant_method": "mxfp4"}, num_experts=experts,
            torch_dtype=torch.bfloat16,
        ).to(codes.device)  # fmt: skip
        made.load_from_tensors({"weight": codes, "weight_scale": scales})
        made.transform()
        return made

    def blocks(self, pairs: int) -> tuple[int, int]:
        """Pairs of one expert that `gate_up` and `down` take at once."""
        first, second = (self._config(layer, pairs)["block_shape"][0] for layer in (self._first, self._second))
        return first, second

    @staticmethod
    def _config(layer: Any, pairs: int) -> Any:
        heuristics = _library("humming.tune").get_heuristics_config
        return heuristics(layer.humming_config, shape_m=pairs, gemm_type="indexed")

    def gate_up(self, x: Tensor, members: Tensor, owners: Tensor, picks: int, pairs: int) -> tuple[Tensor, Tensor]:
        """x [T, D] -> gate and up [P, I] fp32; members and owners as `experts.work_list` makes them."""
        both = self._call(self._first, x, members, owners, picks, pairs).float()
        return both[:, : self.inner].contiguous(), both[:, self.inner :].contiguous()

    def down(self, h: Tensor, members: Tensor, owners: Tensor, pairs: int) -> Tensor:
        """h [P, I] -> [P, D] fp32."""
        return self._call(self._second, h, members, owners, 1, pairs).float()

    def _call(self, layer: Any, x: Tensor, members: Tensor, owners: Tensor, picks: int, pairs: int) -> Tensor:
        config = self._config(layer, pairs)
        experts = owners.clamp(min=0)
        padded = ((owners >= 0).sum() * config["block_shape"][0]).int()
        # Its kernel reads these lists before it waits for the one in front, which must be none that writes them.
        inputs = x.to(torch.bfloat16)
        made: Tensor = layer(
            inputs, sorted_ids=members, expert_ids=experts, num_tokens_padded=padded, top_k=picks,
            compute_config={"gemm_type": "indexed"}, tuning_config=config,
        )  # fmt: skip
        return made
