"""Attention over many keys: the source of the CUDA kernel run on the CPU, against fp64."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kernels.device import attend_few, attend_long
from engine.kernels.norm_rope import rotate
from engine.kernels.rows import RowPool, read_rows, write_rows
from tests.kernels.cuda_on_cpu import compiled
from tests.kernels.latent_pools import ROWS, WINDOW, empty_pool

SCALE = 512**-0.5


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("attend_long", tmp_path_factory.mktemp("attend"))


@dataclass
class Step:
    """Tokens at these positions of these requests, with the rows they read and no others."""

    positions: list[int]
    requests: list[int]
    ratio: int
    picks: int = 0
    oldest: list[int] | None = None
    heads: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        count = len(self.positions)
        self.q = torch.randn(count, self.heads, 512, generator=g)
        self.selected = torch.full((count, max(1, self.picks)), -1, dtype=torch.int32)
        reads: tuple[list[Tensor], list[Tensor]] = ([], [])
        for token, position in enumerate(self.positions):
            oldest = 0 if self.oldest is None else self.oldest[self.requests[token]]
            reads[0].append(torch.arange(max(0, position - 127, oldest), position + 1))
            blocks = torch.arange((position + 1) // self.ratio if self.ratio else 0)
            if self.ratio == 4:
                blocks = blocks[torch.randperm(len(blocks), generator=g)[: self.picks]]
                self.selected[token, : len(blocks)] = blocks.int()
            reads[1].append(blocks)
        pages = max(self.positions) // 256 + 1
        self.window, self.tables, self.window_keys = self._filled(WINDOW, pages, reads[0], g)
        self.pool, self.pool_tables, self.pool_keys = self._filled(ROWS[self.ratio], pages, reads[1], g)

    def _filled(
        self, rows: int, pages: int, reads: list[Tensor], g: torch.Generator
    ) -> tuple[RowPool, Tensor, list[Tensor]]:
        """Pages that nobody reads are item 0, which nobody may."""
        tables = torch.zeros(max(self.requests) + 1, pages, dtype=torch.int32)
        touched: list[set[int]] = [set() for _ in tables]
        for request, read in zip(self.requests, reads, strict=True):
            touched[request].update((read // rows).tolist())
        total = sum(len(pages) for pages in touched)
        items = iter((torch.randperm(total, generator=g) + 1).tolist())
        for table, own in zip(tables, touched, strict=True):
            for page in sorted(own):
                table[page] = next(items)
        pool = empty_pool(rows, total + 1)
        places = [
            tables[request][read // rows].long() * rows + read % rows
            for request, read in zip(self.requests, reads, strict=True)
        ]
        unique = torch.cat(places).unique()
        write_rows(pool, unique, torch.randn(len(unique), 512, generator=g))
        return pool, tables, [read_rows(pool, place) for place in places]

    def keys(self, token: int) -> Tensor:
        return torch.cat([self.window_keys[token], self.pool_keys[token]]).double()


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "positions", "segment", "page_table", "swa_table", "oldest", "window", "pool", "selected",
            "parts", "stats", "sink", "freqs", "out")),
        *((name, ctypes.c_longlong) for name in ("window_stride", "pool_stride")),
        *((name, ctypes.c_int) for name in ("pages", "pool_bits", "picks", "heads", "splits", "pairs")),
        ("scale", ctypes.c_float),
    )  # fmt: skip


def partial(library: ctypes.CDLL, step: Step, splits: int, tile: int = 64, late: bool = False) -> tuple[Tensor, Tensor]:
    """The step's parts and stats; what was not written is NaN."""
    count, heads = len(step.positions), step.heads
    parts = torch.full((count, splits, heads, 512), torch.nan, dtype=torch.float16)
    stats = torch.full((count, splits, heads, 4), torch.nan)
    run(library, step, splits, tile, late, parts=parts, stats=stats)
    return parts, stats


def whole(
    library: ctypes.CDLL, step: Step, sink: Tensor, freqs: Tensor | None, tile: int = 64, late: bool = False
) -> Tensor:
    """The step's attention [T, H, D] by blocks that have all keys of a token."""
    out = torch.full_like(step.q, torch.nan)
    run(library, step, 1, tile, late, sink=sink, freqs=freqs, out=out)
    return out


def run(library: ctypes.CDLL, step: Step, splits: int, tile: int, late: bool, **more: Tensor | None) -> None:
    count, heads = len(step.positions), step.heads
    positions, segment = torch.tensor(step.positions), torch.tensor(step.requests).int()
    oldest, freqs = None if step.oldest is None else torch.tensor(step.oldest), more.get("freqs")
    at = [
        None if (t := more.get(name)) is None else t.data_ptr() for name in ("parts", "stats", "sink", "freqs", "out")
    ]
    call = Call(
        step.q.data_ptr(), positions.data_ptr(), segment.data_ptr(), step.pool_tables.data_ptr(),
        step.tables.data_ptr(), None if oldest is None else oldest.data_ptr(), step.window.data.data_ptr(),
        step.pool.data.data_ptr() if step.ratio else None, step.selected.data_ptr() if step.ratio == 4 else None,
        *at, step.window.data.stride(0), step.pool.data.stride(0), step.tables.shape[1],
        ROWS[step.ratio].bit_length() - 1, step.selected.shape[1], heads, splits, 0 if freqs is None else len(freqs),
        SCALE,
    )  # fmt: skip
    library.run_attend(ctypes.byref(call), ctypes.c_uint(count), ctypes.c_uint(tile), ctypes.c_bool(late))


def sums(parts: Tensor, stats: Tensor) -> Tensor:
    """Parts in the order of channels, in fp64: value 2 j + c of lane q is channel 8 j + 2 q + c of 32."""
    order = parts.double().unflatten(-1, (16, 4, 4, 2)).transpose(-3, -2).flatten(-4)
    return order * stats[..., 2:].double().repeat_interleave(256, -1)


def merged(parts: Tensor, stats: Tensor) -> Tensor:
    """[T, H, D] in fp64, without a sink."""
    tops, totals = stats[..., 0].double(), stats[..., 1].double()
    shrink = (tops - tops.amax(1, keepdim=True)).exp2()
    values = torch.where(totals[..., None] == 0, 0, sums(parts, stats))
    return (values * shrink[..., None]).sum(1) / (totals * shrink).sum(1)[..., None]


def meant(step: Step, q: Tensor | None = None) -> Tensor:
    """The softmax of bf16 queries in fp64."""
    q = step.q if q is None else q
    out = torch.empty(q.shape, dtype=torch.float64)
    for token in range(len(step.positions)):
        keys = step.keys(token)
        out[token] = (q[token].bfloat16().double() @ keys.T * SCALE).softmax(-1) @ keys
    return out


def check(got: Tensor, expected: Tensor) -> None:
    """Weights are rounded to bf16, each by half of 2^-8 at most."""
    size = expected.square().mean(-1, keepdim=True).sqrt()
    assert ((got - expected).abs() / size).max() < 1e-2
    assert (got - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize(
    ("ratio", "positions", "requests", "picks", "splits"),
    [(0, [0, 300], [0, 1], 0, 1), (0, [5, 127, 128], [2, 0, 1], 0, 3), (4, [5, 300, 301], [1, 0, 0], 70, 3),
     (4, [1000], [0], 200, 1), (128, [300, 127], [0, 1], 0, 2), (128, [40_000, 40_001, 12_799], [0, 0, 1], 0, 2)],
)  # fmt: skip
def test_attention_is_the_softmax_over_window_and_compressed_rows(
    library, ratio, positions, requests, picks, splits, tile, late
) -> None:
    """No row but these holds anything but NaN; neither does memory that nobody has written."""
    step = Step(positions, requests, ratio, picks, seed=ratio)
    parts, stats = partial(library, step, splits, tile, late)
    check(merged(parts, stats), meant(step))
    assert ((stats[..., 1] == 0) == (stats[..., 0] == -torch.inf)).all()


@pytest.mark.parametrize(("tokens", "heads"), [(1, 128), (4, 64), (8, 64)])
def test_tokens_of_a_request_at_real_sizes(library, tokens: int, heads: int) -> None:
    """The last tokens of one step see a compressed row more."""
    length = {1: 901_119, 4: 901_118, 8: 262_140}[tokens]
    step = Step([length + n for n in range(tokens)], [0] * tokens, 128, heads=heads)
    tile, splits = attend_long.plan(tokens, heads, 128 + (length + tokens) // 128)
    check(merged(*partial(library, step, splits, tile)), meant(step))


def test_selected_rows_of_v4_pro(library) -> None:
    step = Step([9_000, 9_001], [0, 0], 4, 1024, heads=128)
    tile, splits = attend_long.plan(2, 128, 128 + 1024)
    check(merged(*partial(library, step, splits, tile)), meant(step))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("ratio", "positions", "requests", "picks", "heads"),
    [(0, [0, 300], [0, 1], 0, 64), (4, [5, 300], [1, 0], 70, 128), (128, [40_000, 12_799], [0, 1], 0, 64)],
)  # fmt: skip
def test_a_block_that_has_all_keys_of_a_token_writes_what_merging_would(
    library, ratio, positions, requests, picks, heads, tile, late, turned
) -> None:
    step = Step(positions, requests, ratio, picks, heads=heads, seed=ratio)
    sink = torch.randn(heads, generator=torch.Generator().manual_seed(1))
    sink[:3] = torch.tensor([-torch.inf, 40.0, 0.0])
    freqs = torch.rand(32) if turned else None
    got = whole(library, step, sink, freqs, tile, late)
    parts, stats = partial(library, step, 1, tile)
    expected = merge(library, parts, stats, sink, torch.tensor(positions), freqs)
    assert torch.allclose(got, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))
    share = (stats[:, 0, :, 1].log2() + stats[:, 0, :, 0]) * math.log(2)
    without = meant(step) * torch.sigmoid(share - sink).double()[..., None]
    if not turned:
        check(got[:, 2:], without[:, 2:])
        assert not got[:, 1].abs().max() > 1e-6, "the sink takes it all"


@pytest.mark.parametrize("tile", [32, 64])
def test_every_split_sums_its_own_keys(library, tile: int) -> None:
    """By the same roundings as the kernel's: weights to bf16 where they are multiplied, not where they are counted."""
    step = Step([1200], [0], 4, 200)
    tiles = -(-328 // tile)
    splits, share = 3, -(-tiles // 3)
    parts, stats = partial(library, step, splits, tile)
    values = sums(parts, stats)
    for split, keys in enumerate(step.keys(0).split(share * tile)):
        logits = step.q[0].bfloat16().double() @ keys.T * SCALE
        assert torch.allclose(stats[0, split, :, 0].double(), logits.amax(-1) / math.log(2), rtol=1e-5)
        # Tiles come one after another, each with the highest logit so far.
        total, summed, so_far = torch.zeros(64), torch.zeros(64, 512), torch.full((64,), -torch.inf)
        for part, rows in zip(logits.split(tile, -1), keys.split(tile), strict=True):
            higher = torch.maximum(so_far, part.amax(-1))
            weights, shrink = (part - higher[:, None]).exp(), (so_far - higher).exp()
            total = total * shrink + weights.sum(-1)
            summed = summed * shrink[:, None] + weights.float().bfloat16().double() @ rows
            so_far = higher
        assert torch.allclose(stats[0, split, :, 1].double(), total, rtol=1e-5)
        apart = (values[0, split] - summed).norm() / summed.norm()
        assert apart < 3e-4  # halves


def test_keys_before_the_oldest_are_not_read(library) -> None:
    step = Step([300, 301, 90], [0, 0, 1], 0, oldest=[280, 90])
    check(merged(*partial(library, step, 2)), meant(step))
    check(merged(*partial(library, step, 2, 32)), meant(step))


def test_a_pick_of_none_is_no_key_wherever_it_stands(library) -> None:
    step = Step([400], [0], 4, 90, seed=9)
    kept = torch.tensor([3, 4, 40, 77])
    step.pool_keys = [step.pool_keys[0][kept]]
    step.selected[0, [n for n in range(90) if n not in kept]] = -1
    for tile in (32, 64):
        check(merged(*partial(library, step, 3, tile)), meant(step))


def test_a_split_without_keys_says_so_and_leaves_its_part_alone(library) -> None:
    parts, stats = partial(library, Step([10], [0], 0), 7, 32)
    # Of the window's four tiles, three lie before the first token.
    assert [bool(split.any()) for split in stats[0, ..., 1]] == [False, False, False, True, False, False, False]
    assert torch.equal(stats[..., 1] == 0, stats[..., 0] == -torch.inf)
    assert parts[0, 4:].isnan().all()
    assert not stats.isnan().any()


@pytest.mark.parametrize("tile", [32, 64])
def test_a_tokens_bits_depend_on_no_other_token(library, tile: int) -> None:
    step = Step([20_000, 20_001, 77, 900], [1, 1, 0, 2], 128, heads=128)
    together = partial(library, step, 3, tile)
    for token in (1, 2):
        alone = Step([20_000, 20_001, 77, 900], [1, 1, 0, 2], 128, heads=128)
        alone.q, alone.positions, alone.requests = step.q[[token]], [step.positions[token]], [step.requests[token]]
        for one, all_ in zip(partial(library, alone, 3, tile), together, strict=True):
            assert torch.equal(one[0].nan_to_num(7), all_[token].nan_to_num(7))


@pytest.mark.parametrize("scale", [0, 3, 90, 127, 134, 135, 200, 245])
def test_every_code_is_decoded_exactly(library, scale: int) -> None:
    """One key, whose weight is one: what comes out is the key, but for what a half of its power of two leaves."""
    step = Step([0], [0], 0)
    pool = step.window
    item, place = int(step.tables[0, 0]), 0
    codes = torch.arange(448).remainder(256).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1
    pool.data[item, place * 576 : place * 576 + 448] = codes
    scales = torch.tensor([scale] * 7)
    pool.data[item, 256 * 576 + place * 8 :][:7] = scales
    rope = torch.exp2(torch.arange(64) / 8 + scale - 127).bfloat16()
    pool.data[item, place * 576 + 448 : place * 576 + 576] = rope.view(torch.uint8)
    nope = codes.view(torch.float8_e4m3fn).double() * 2.0 ** (scale - 127)
    expected = torch.cat([nope.bfloat16(), rope]).double()
    step.q = torch.zeros_like(step.q)
    for tile in (32, 64):
        parts, stats = partial(library, step, 1, tile)
        got = sums(parts, stats)
        apart = (got - expected).abs()
        for half in (slice(256), slice(256, 512)):
            # Codes have 4 bits, rope values 8, halves 11; what is below 2^-24 of a row's power is lost.
            assert (apart[..., half] <= expected[half].abs().max() * 2.0**-25).all()
        assert torch.equal(stats[..., :2], torch.tensor([0.0, 1.0]).expand(1, 1, 64, 2))


def test_a_broken_row_makes_its_channels_nan(library) -> None:
    step = Step([1], [0], 0)
    step.q = -torch.ones_like(step.q)  # infinite values would have no weight
    broken = torch.randn(1, 512)
    broken[0, 70] = torch.inf
    write_rows(step.window, step.tables[0, :1].long() * WINDOW + 1, broken)
    parts, stats = partial(library, step, 1)
    assert stats[..., 1].isnan().all()
    assert parts.isnan().all()


class Merge(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parts", "stats", "sink", "positions", "freqs", "out")),
        *((name, ctypes.c_int) for name in ("pairs", "heads", "splits")),
    )


def merge(library: ctypes.CDLL, parts: Tensor, stats: Tensor, sink: Tensor, at: Tensor, freqs: Tensor | None) -> Tensor:
    count, splits, heads, dim = parts.shape
    out = torch.full((count, heads, dim), torch.nan)
    freqs_at, pairs = (None, 0) if freqs is None else (freqs.data_ptr(), len(freqs))
    pointers = [t.data_ptr() for t in (parts, stats, sink, at)]
    call = Merge(*pointers, freqs_at, out.data_ptr(), pairs, heads, splits)
    library.run_merge(ctypes.byref(call), ctypes.c_uint(count), ctypes.c_uint(attend_long.merging(stats.shape[1])))
    return out


@pytest.mark.parametrize("splits", [1, 3, 4, 5, 8, 9, 32, 33, 64, 65, 132, 256])
@pytest.mark.parametrize("turned", [False, True])
def test_parts_merge_to_the_softmax_with_the_sink_in_it(library, splits: int, turned: bool) -> None:
    """Empty splits stand anywhere; their parts are NaN."""
    g = torch.Generator().manual_seed(splits)
    count, heads, keys = 2, 3, 4
    logits = 3 * torch.randn(count, splits, heads, keys, generator=g, dtype=torch.float64)
    values = torch.randn(count, splits, heads, keys, 512, generator=g, dtype=torch.float64)
    if splits > 1:
        logits[:, torch.rand(splits, generator=g) < 0.3] = -torch.inf
        logits[1, 0] = -torch.inf
    sink = torch.tensor([0.3, 9.0, -torch.inf])
    tops = logits.amax(-1)
    weights = (logits - tops.nan_to_num(neginf=0)[..., None]).exp()
    powers = torch.exp2(torch.randint(-3, 3, (count, splits, heads, 2), generator=g).double())
    exact = (weights[..., None] * values).sum(-2) / powers.repeat_interleave(256, -1)
    halves = torch.where(tops[..., None] == -torch.inf, torch.nan, exact).half()
    kept = torch.where(tops[..., None] == -torch.inf, 0, halves.double()) * powers.repeat_interleave(256, -1)
    order = halves.unflatten(-1, (16, 4, 4, 2)).transpose(-3, -2).flatten(-4).contiguous()
    stats = torch.cat([tops[..., None] / math.log(2), weights.sum(-1)[..., None], powers], -1).float()
    positions, freqs = torch.tensor([1_000, 7]), torch.rand(32, generator=g)
    got = merge(library, order, stats, sink, positions, freqs if turned else None)
    drain = sink.double().expand(count, heads)
    highest = torch.maximum(tops.amax(1), drain)
    shrink = (tops - highest[:, None]).exp()
    total = (weights.sum(-1) * shrink).sum(1) + (drain - highest).exp()
    expected = (kept * shrink[..., None]).sum(1) / total[..., None]
    if turned:
        expected = rotate(expected.float(), positions, freqs, inverse=True)
    assert torch.allclose(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_sum_of_any_size_keeps_its_bits_as_halves(library) -> None:
    step = Step([200], [0], 0)
    step.q *= 0
    expected = meant(step)
    apart = (merged(*partial(library, step, 1)) - expected).norm() / expected.norm()
    assert apart < 3e-4


def test_splits_are_chosen_by_shapes_and_leave_none_without_a_tile() -> None:
    for tokens in range(1, attend_few.TOKENS + 1):
        for heads in (64, 128):
            for keys in (128, 640, 1152, 128 + 2048, 128 + 7040, 128 + 8192):
                tile, splits = attend_long.plan(tokens, heads, keys)
                assert tile in attend_long.SHARED_BYTES
                assert tokens * heads // 64 * splits <= attend_long.BLOCKS
                tiles = -(-keys // tile)
                share = -(-tiles // splits)
                assert (splits - 1) * share < tiles <= splits * share


def test_it_is_asked_for_whole_blocks_of_heads_and_many_keys_or_tokens() -> None:
    assert attend_long.better(1, 64, 8192)
    assert attend_long.better(4, 128, 640)
    assert attend_long.better(2048, 64, 128)
    assert not attend_long.better(2048, 32, 8192)
    assert not attend_long.better(4, 64, 160)


def test_tokens_that_are_more_than_blocks_at_once_have_one_each() -> None:
    assert attend_long.plan(133, 64, 640) == (32, 1)
    assert attend_long.plan(67, 128, 7168) == (64, 1)
    assert attend_long.plan(66, 128, 7168)[1] == 1


def test_shared_memory_is_as_the_binding_says(library) -> None:
    for tile, size in attend_long.SHARED_BYTES.items():
        assert library.shared_bytes(ctypes.c_uint(tile)) == size <= 227 << 10
    assert library.shared_bytes(ctypes.c_uint(0)) == attend_long.MERGE_BYTES
