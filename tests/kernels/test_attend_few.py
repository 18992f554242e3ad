"""Attention of a few tokens: the source of the CUDA kernel run on the CPU, against fp64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kernels.device import attend_few
from engine.kernels.norm_rope import rotate
from engine.kernels.rows import RowPool, read_rows, write_rows
from tests.kernels.cuda_on_cpu import compiled
from tests.kernels.latent_pools import ROWS, WINDOW, empty_pool

PAGES = 4
SCALE = 512**-0.5


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("attend_few", tmp_path_factory.mktemp("attend"))


@dataclass
class Step:
    """Tokens at these positions, each of a sequence of its own, with all the rows they read and no others."""

    positions: list[int]
    ratio: int
    picks: int = 0
    oldest: list[int] | None = None
    heads: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        count = len(self.positions)
        self.q = torch.randn(count, self.heads, 512, generator=g)
        self.tables = [torch.randperm(count * PAGES, generator=g).int().view(count, PAGES) + 1 for _ in range(2)]
        self.window = empty_pool(WINDOW, count * PAGES + 1)
        self.pool = empty_pool(ROWS[self.ratio], count * PAGES + 1)
        self.selected = torch.full((count, max(1, self.picks)), -1, dtype=torch.int32)
        self.keys = []
        for token, position in enumerate(self.positions):
            first = max(0, position - 127, 0 if self.oldest is None else self.oldest[token])
            rows = self._filled(self.window, self.tables[0][token], torch.arange(first, position + 1), g)
            blocks = torch.arange((position + 1) // self.ratio if self.ratio else 0)
            if self.ratio == 4:
                blocks = blocks[torch.randperm(len(blocks), generator=g)[: self.picks]]
                self.selected[token, : len(blocks)] = blocks.int()
            self.keys.append(torch.cat([rows, self._filled(self.pool, self.tables[1][token], blocks, g)]))

    def _filled(self, pool: RowPool, pages: Tensor, indices: Tensor, g: torch.Generator) -> Tensor:
        rows = pages[indices // pool.rows_per_item].long() * pool.rows_per_item + indices % pool.rows_per_item
        write_rows(pool, rows, torch.randn(len(rows), 512, generator=g))
        return read_rows(pool, rows)


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "positions", "segment", "page_table", "swa_table", "oldest", "window", "pool", "selected",
            "parts", "tops", "totals")),
        *((name, ctypes.c_longlong) for name in ("window_stride", "pool_stride")),
        *((name, ctypes.c_int) for name in ("pages", "pool_bits", "picks", "heads", "splits")),
        ("scale", ctypes.c_float),
    )  # fmt: skip


def partial(library: ctypes.CDLL, step: Step, splits: int, tiles: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The step's parts, tops and totals; what was not written is NaN."""
    count, heads = len(step.positions), step.heads
    parts, tops, totals = (torch.full((count, splits, heads, *more), torch.nan) for more in ((512,), (), ()))
    positions, segment = torch.tensor(step.positions), torch.arange(count).int()
    oldest = None if step.oldest is None else torch.tensor(step.oldest)
    call = Call(
        step.q.data_ptr(), positions.data_ptr(), segment.data_ptr(), step.tables[1].data_ptr(),
        step.tables[0].data_ptr(), None if oldest is None else oldest.data_ptr(), step.window.data.data_ptr(),
        step.pool.data.data_ptr() if step.ratio else None, step.selected.data_ptr() if step.ratio == 4 else None,
        parts.data_ptr(), tops.data_ptr(), totals.data_ptr(),
        step.window.data.stride(0), step.pool.data.stride(0), PAGES, ROWS[step.ratio].bit_length() - 1,
        step.selected.shape[1], heads, splits, SCALE,
    )  # fmt: skip
    library.run_attend(ctypes.byref(call), ctypes.c_uint(count), ctypes.c_uint(tiles))
    return parts, tops, totals


def merged(parts: Tensor, tops: Tensor, totals: Tensor) -> Tensor:
    """[T, H, D] in fp64, without a sink."""
    shrink = (tops.double() - tops.double().amax(1, keepdim=True)).exp()
    values = torch.where(totals[..., None] == 0, 0, parts.double())
    return (values * shrink[..., None]).sum(1) / (totals.double() * shrink).sum(1)[..., None]


def meant(step: Step) -> Tensor:
    """The softmax of bf16 queries in fp64."""
    q = step.q
    out = torch.empty(q.shape, dtype=torch.float64)
    for token, keys in enumerate(step.keys):
        logits = q[token].bfloat16().double() @ keys.double().T * SCALE
        out[token] = logits.softmax(-1) @ keys.double()
    return out


def check(got: Tensor, expected: Tensor) -> None:
    """Weights are rounded to bf16, each by half of 2^-8 at most."""
    size = expected.square().mean(-1, keepdim=True).sqrt()
    assert ((got - expected).abs() / size).max() < 1e-2


@pytest.mark.parametrize(
    ("ratio", "positions", "picks", "splits"),
    [(0, [0, 300], 0, 1), (0, [5, 127, 128], 0, 3), (4, [5, 300], 48, 4), (4, [0, 1000], 70, 3),
     (128, [300, 127], 0, 2), (128, [1000], 0, 9)],
)  # fmt: skip
def test_attention_is_the_softmax_over_window_and_compressed_rows(library, ratio, positions, picks, splits) -> None:
    """No row but these holds anything but NaN; neither does memory that nobody has written."""
    step = Step(positions, ratio, picks, seed=ratio)
    parts, tops, totals = partial(library, step, splits)
    check(merged(parts, tops, totals), meant(step))
    assert ((totals == 0) == (tops == -torch.inf)).all()


@pytest.mark.parametrize("tiles", [1, 2])
def test_every_split_sums_its_own_keys(library, tiles: int) -> None:
    """By the same roundings as the kernel's: weights to bf16 where they are multiplied, not where they are counted."""
    step = Step([200], 4, 40, heads=32)
    parts, tops, totals = partial(library, step, 3, tiles)
    for split, keys in enumerate(step.keys[0].double().split([64, 64, 40])):
        logits = step.q[0].bfloat16().double() @ keys.T * SCALE
        top = logits.amax(-1)
        assert torch.allclose(tops[0, split].double(), top, rtol=1e-6)
        # Tiles of 32 keys come one after another, each with the highest logit so far.
        total, sums, so_far = torch.zeros(32), torch.zeros(32, 512), torch.full((32,), -torch.inf)
        for part, rows in zip(logits.split(32, -1), keys.split(32), strict=True):
            higher = torch.maximum(so_far, part.amax(-1))
            weights, shrink = (part - higher[:, None]).exp(), (so_far - higher).exp()
            total = total * shrink + weights.sum(-1)
            sums = sums * shrink[:, None] + weights.float().bfloat16().double() @ rows
            so_far = higher
        assert torch.allclose(totals[0, split].double(), total, rtol=1e-5)
        apart = (parts[0, split] - sums).norm() / sums.norm()
        assert apart < 2e-5  # a weight within an fp32 rounding of half a bf16 step may fall to either side


def test_keys_before_the_oldest_are_not_read(library) -> None:
    step = Step([300, 300, 90], 0, oldest=[280, 0, 90])
    check(merged(*partial(library, step, 2)), meant(step))


def test_a_pick_of_none_is_no_key_wherever_it_stands(library) -> None:
    step = Step([400], 4, 48, seed=9)
    kept = torch.tensor([3, 4, 40])
    keys = step.keys[0]
    step.keys = [torch.cat([keys[:128], keys[128:][kept]])]
    step.selected[0, [n for n in range(48) if n not in kept]] = -1
    check(merged(*partial(library, step, 6)), meant(step))


def test_a_split_without_keys_says_so_and_leaves_its_part_alone(library) -> None:
    parts, tops, totals = partial(library, Step([10], 0), 7)
    # Of the window's four tiles, three lie before the first token.
    assert [bool(split.any()) for split in totals[0]] == [False, False, False, True, False, False, False]
    assert torch.equal(totals[0] == 0, tops[0] == -torch.inf)
    assert parts[0, 4:].isnan().all()


def test_a_tokens_bits_depend_on_no_other_token_and_on_no_company_of_heads(library) -> None:
    step = Step([300, 77], 128, heads=64)
    together = partial(library, step, 3, 2)
    alone = Step([300, 77], 128, heads=64)
    for name in ("q", "selected"):
        setattr(alone, name, getattr(step, name)[:1])
    alone.positions, alone.tables = step.positions[:1], [table[:1] for table in step.tables]
    for one, both in zip(partial(library, alone, 3, 1), together, strict=True):
        assert torch.equal(one[0].nan_to_num(7), both[0].nan_to_num(7))


def test_lists_of_rows_follow_one_another(library) -> None:
    """More keys for a block than are looked up at once."""
    step = Step([1020], 4, 250)
    more = 3 * 250 + 37
    step.selected = step.selected[:, torch.arange(more) % 250].contiguous()
    step.picks = more
    step.positions = [4 * more]
    window = empty_pool(WINDOW, 5)
    step.tables[0] = torch.zeros(1, 64).int()
    step.window = window
    rows = step._filled(window, torch.tensor([1]), torch.arange(0, 256), torch.Generator().manual_seed(1))
    step.tables[0][:] = 1
    place = torch.arange(4 * more - 127, 4 * more + 1) % 256
    compressed = step.keys[0][128:]
    step.keys = [torch.cat([rows[place], compressed[torch.arange(more) % 250]])]
    check(merged(*partial(library, step, 1)), meant(step))


@pytest.mark.parametrize("scale", [0, 3, 90, 127, 134, 135, 200, 245])
def test_every_code_is_decoded_exactly(library, scale: int) -> None:
    """One key, whose weight is one: what comes out is the key."""
    step = Step([0], 0)
    pool = step.window
    row = int(step.tables[0][0, 0]) * WINDOW
    item, place = divmod(row, WINDOW)
    codes = torch.arange(448).remainder(256).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1
    pool.data[item, place * 576 : place * 576 + 448] = codes
    scales = torch.tensor([scale, 127, 120, scale, scale, 100, scale])
    pool.data[item, 256 * 576 + place * 8 :][:7] = scales
    nope = codes.view(torch.float8_e4m3fn).double() * torch.exp2(scales.double() - 127).repeat_interleave(64)
    expected = torch.cat([nope.bfloat16().float(), step.keys[0][0, 448:]])
    assert expected.isfinite().all()
    step.q = torch.zeros_like(step.q)
    parts, tops, totals = partial(library, step, 1)
    assert torch.equal(parts[0, 0], expected.expand(16, 512))
    assert torch.equal(tops, torch.zeros(1, 1, 16))
    assert torch.equal(totals, torch.ones(1, 1, 16))


def test_a_broken_row_makes_its_channels_nan(library) -> None:
    step = Step([1], 0)
    step.q = -torch.ones_like(step.q)  # infinite values would have no weight
    broken = torch.randn(1, 512)
    broken[0, 70] = torch.inf
    write_rows(step.window, step.tables[0][0, :1].long() * WINDOW + 1, broken)
    parts, _, totals = partial(library, step, 1)
    assert totals.isnan().all()
    assert parts.isnan().all()


class Merge(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parts", "tops", "totals", "sink", "positions", "freqs", "out")),
        *((name, ctypes.c_int) for name in ("pairs", "heads", "splits")),
    )


def merge(library: ctypes.CDLL, parts: tuple[Tensor, Tensor, Tensor], sink: Tensor, at: Tensor, freqs: Tensor | None):
    count, splits, heads, dim = parts[0].shape
    out = torch.full((count, heads, dim), torch.nan)
    freqs_at, pairs = (None, 0) if freqs is None else (freqs.data_ptr(), len(freqs))
    pointers = [t.data_ptr() for t in (*parts, sink, at)]
    call = Merge(*pointers, freqs_at, out.data_ptr(), pairs, heads, splits)
    library.run_merge(ctypes.byref(call), ctypes.c_uint(count))
    return out


@pytest.mark.parametrize("splits", [1, 3, 8, 9, 32, 70])
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
    parts = torch.where(tops[..., None] == -torch.inf, torch.nan, (weights[..., None] * values).sum(-2))
    positions, freqs = torch.tensor([1_000, 7]), torch.rand(32, generator=g)
    got = merge(
        library, (parts.float(), tops.float(), weights.sum(-1).float()), sink, positions, freqs if turned else None
    )
    together = torch.cat([logits.transpose(1, 2).flatten(2), sink.double().expand(count, heads)[..., None]], -1)
    expected = (together.softmax(-1)[..., :-1, None] * values.transpose(1, 2).flatten(2, 3)).sum(-2)
    if turned:
        expected = rotate(expected.float(), positions, freqs, inverse=True)
    assert torch.allclose(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_splits_are_chosen_by_shapes_and_leave_none_without_a_tile() -> None:
    for tokens in range(1, attend_few.TOKENS + 1):
        for heads in (16, 64, 128):
            for keys in (128, 160, 640, 128 + 8192):
                tiles, splits = attend_few.plan(tokens, heads, keys)
                groups, at_once = tokens * heads // (16 * tiles), {1: 264, 2: 132}[tiles]
                assert heads % (16 * tiles) == 0
                assert groups * splits <= max(groups, at_once)
                share = -(keys // 32 // -splits)
                assert (splits - 1) * share * 32 < keys <= splits * share * 32
                # A shorter share is too many blocks.
                assert share == 1 or groups * -(keys // 32 // -(share - 1)) > at_once


def test_it_takes_v4_rows_bf16_products_and_whole_tiles_of_heads(monkeypatch) -> None:
    window, pool = empty_pool(WINDOW, 2), empty_pool(64, 2)
    assert not attend_few.takes(64, 512, True, window, pool)  # but where CUDA C++ is asked for
    monkeypatch.setattr(attend_few, "cuda_products", lambda: True)
    assert attend_few.takes(16, 512, True, window, None)
    assert attend_few.takes(128, 512, True, window, pool)
    assert attend_few.takes(64, 512, True, window, pool)
    assert not attend_few.takes(24, 512, True, window, pool)
    assert not attend_few.takes(64, 512, False, window, pool)
    assert not attend_few.takes(64, 512, True, window, empty_pool(32, 2))
    exact = RowPool(torch.zeros(2, 64 * 2048, dtype=torch.uint8), 64, "latent", "exact", 512, 64)
    assert not attend_few.takes(64, 512, True, window, exact)
    askew = torch.zeros(2, pool.data.shape[1] + 8, dtype=torch.uint8)[:, 8:]
    assert not attend_few.takes(64, 512, True, window, RowPool(askew, 64, "latent", "v4", 512, 64))


def test_shared_memory_is_as_the_binding_says(library) -> None:
    for tiles in (1, 2):
        assert library.shared_bytes(ctypes.c_uint(tiles)) == attend_few.SHARED_BYTES[tiles]
