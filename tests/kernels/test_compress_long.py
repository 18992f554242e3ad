"""The compressors over many tokens: the source of the CUDA kernel run on the CPU, against the twins."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RING, C128_RING
from engine.kernels.compress import compress_c4, compress_c128
from engine.kernels.device import compress_long, cuda_products, use_cuda_products
from engine.kernels.norm_rope import rope_frequencies
from engine.kernels.rows import RowPool, read_rows
from tests.kernels.cuda_on_cpu import compiled

EPS = 1e-6
PAGES, ITEMS = 5, 81
Step = Callable[..., StepMeta]
FREQS = rope_frequencies(160_000.0, 64)
KINDS = {"C4": (512, 4, False), "keys": (128, 4, False), "turned keys": (128, 4, True), "C128": (512, 128, False)}
ORDERS = {"in step": (0, 0), "first ahead": (1, 0), "last ahead": (1, 1)}
# From the beginning; from within blocks and from within a page's last tokens, across pages; tokens that close nothing;
# up to a few tokens before a page's end, or behind one; single tokens that close a row each.
SPANS = {
    4: [(0, 278), (257, 5), (250, 300), (5, 2), (512, 251), (3, 1), (7, 1), (255, 1), (515, 1), (130, 389), (1000, 30)],
    128: [(0, 300), (100, 28), (255, 1), (383, 1), (127, 1), (200, 57), (1, 126)],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("compress_long", tmp_path_factory.mktemp("compress"))


@pytest.fixture
def library(built: ctypes.CDLL) -> ctypes.CDLL:
    built.order(*ORDERS["in step"])
    return built


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "u", "g", "ape", "norm", "ring", "positions", "segment", "offsets", "starts", "page_table", "ring_table",
            "freqs", "pool")),
        *((name, ctypes.c_longlong) for name in ("u_row", "g_row", "item_stride")),
        *((name, ctypes.c_int) for name in ("pages", "tokens")),
        ("eps", ctypes.c_float),
    )  # fmt: skip


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Compressor:
    """One compressor with its ring and its pool."""

    kind: str
    ring: Tensor = field(init=False)
    pool: RowPool = field(init=False)

    def __post_init__(self) -> None:
        self.dim, self.ratio, self.turned = KINDS[self.kind]
        self.width = 2 * self.dim if self.ratio == 4 else self.dim
        self.ape, self.norm = draw(self.ratio, self.width, seed=3), draw(self.dim, seed=4)
        # Any finite values, so that those of a token which should not have been read, or written, would show.
        self.ring = draw(ITEMS, C4_RING if self.ratio == 4 else C128_RING, 2 * self.width, seed=5) * 8
        rows, kind = 256 // self.ratio, "index" if self.dim == 128 else "latent"
        size = RowPool.item_bytes_for(rows, kind, "v4", self.dim, 64)  # type: ignore[arg-type]
        # A gap behind each item: their stride is not their size.
        memory = torch.full((ITEMS, size + 64), 0xFF, dtype=torch.uint8)
        self.pool = RowPool(memory[:, :size], rows, kind, "v4", self.dim, 64)  # type: ignore[arg-type]

    def copy(self) -> Compressor:
        other = Compressor(self.kind)
        other.ring.copy_(self.ring)
        other.pool.data.copy_(self.pool.data)
        return other

    def tokens(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Values and gates as a product of several matrices gives them: columns of one, with others between."""
        both = draw(count, 2 * self.width + 96, seed=seed + 10) * 2
        return both[:, 32 : 32 + self.width], both[:, 64 + self.width : 64 + 2 * self.width]

    def twin(self, meta: StepMeta, u: Tensor, g: Tensor) -> None:
        if self.ratio == 4:
            compress_c4(u, g, self.ape, self.norm, self.ring, meta, FREQS, EPS, self.pool, self.turned)
        else:
            compress_c128(u, g, self.ape, self.norm, self.ring, meta, FREQS, EPS, self.pool)

    def run(self, library: ctypes.CDLL, meta: StepMeta, u: Tensor, g: Tensor, grid: int = 3) -> None:
        run(library, u, g, self.ape, self.norm, self.ring, meta, FREQS, EPS, self.pool, self.turned, grid)


def run(
    library: ctypes.CDLL, u: Tensor, g: Tensor, ape: Tensor, norm: Tensor, ring: Tensor, meta: StepMeta, freqs: Tensor,
    eps: float, out: RowPool, turned: bool = False, grid: int = 3,
) -> None:  # fmt: skip
    """As `compress_long.compress`."""
    ring_table = meta.swa_table if ape.shape[0] == 4 else meta.slots
    call = Call(
        *(t.data_ptr() for t in (
            u, g, ape, norm, ring, meta.positions, meta.segment, meta.offsets, meta.starts, meta.page_table, ring_table,
            freqs, out.data)),
        u.stride(0), g.stride(0), out.data.stride(0), meta.page_table.shape[1], len(meta.positions), eps,
    )  # fmt: skip
    library.run_compress(ctypes.byref(call), norm.shape[0], ape.shape[0], turned, grid)


def apart(got: RowPool, expected: RowPool) -> None:
    """Raises unless both have written the same rows, nothing else, and to nearly the same values."""
    rows = torch.arange(got.num_rows)
    values, wanted = read_rows(got, rows), read_rows(expected, rows)
    assert torch.equal(values.isnan(), wanted.isnan())
    values, wanted = values.nan_to_num(), wanted.nan_to_num()
    assert wanted.any(), "rows were written"
    # Codes may differ by one where sums differ in their last bits.
    assert (values != wanted).float().mean() < 0.002
    assert torch.allclose(values, wanted, rtol=0.13, atol=1e-3)


def remembered(meta: StepMeta, before: Tensor, after: Tensor) -> Tensor:
    """The C4 ring with just those entries new that are the kernel's to write, a token's values from `after`."""
    ring, ends = before.clone(), meta.starts + meta.offsets.diff()
    for position, b in zip(meta.positions.tolist(), meta.segment.tolist(), strict=True):
        page, start = position // 256, int(meta.starts[b])
        if position % 256 >= 240 and page > start // 256 and position < ends[b] - 16:
            ring[meta.swa_table[b, page], position % 16] = after[meta.swa_table[b, page], position % 16]
    return ring


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_many_requests_are_the_twins_and_rings_get_what_no_row_may_read(
    built: ctypes.CDLL, step: Step, kind: str, grid: int, order: str
) -> None:
    built.order(*ORDERS[order])
    ours = Compressor(kind)
    spans = SPANS[ours.ratio]
    meta = step(spans, pages=PAGES)
    theirs, before = ours.copy(), ours.ring.clone()
    tokens = ours.tokens(len(meta.positions))
    theirs.twin(meta, *tokens)
    ours.run(built, meta, *tokens, grid)
    apart(ours.pool, theirs.pool)
    if ours.ratio == 4:
        wanted = remembered(meta, before, theirs.ring)
        written = (wanted != before).any(dim=2).sum(dim=1)
        assert sorted(written[written > 0].tolist()) == [7, 16], "all of a page's end, and all but the step's last 16"
        assert torch.equal(ours.ring, wanted)
    else:
        assert torch.equal(ours.ring, before)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_neither_on_where_a_prompt_is_cut_nor_on_how_many_blocks_there_are(
    library: ctypes.CDLL, step: Step, kind: str
) -> None:
    length, owner = 560, [1]
    whole, cut = Compressor(kind), Compressor(kind)
    u, g = whole.tokens(length)
    whole.run(library, step([(0, length)], PAGES, owner), u, g, grid=1)
    cuts = [0, 3, 130, 261, 262, 519, length]
    for n, (start, end) in enumerate(pairwise(cuts)):
        other = (0, 9 + n)  # another request beside it
        meta = step([other, (start, end - start)], PAGES, [0, *owner])
        beside = cut.tokens(other[1], seed=n + 1)
        parts = torch.cat([beside[0], u[start:end]]), torch.cat([beside[1], g[start:end]])
        before = cut.copy()
        cut.run(library, meta, *parts, grid=1 + n % 3)
        before.twin(meta, *parts)
        cut.ring.copy_(before.ring)  # with what another launch writes
    table, per_page = step([(0, length)], PAGES, owner).page_table[0].long(), 256 // whole.ratio
    blocks = torch.arange(length // whole.ratio)
    rows = table[blocks // per_page] * per_page + blocks % per_page
    got, expected = (read_rows(x.pool, rows) for x in (cut, whole))
    assert expected.isfinite().all()
    assert torch.equal(got, expected)
    pages = table[: -(-length // 256)]
    assert torch.equal(whole.pool.data[pages[:-1]], cut.pool.data[pages[:-1]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_stays_so_and_goes_no_further(library: ctypes.CDLL, step: Step, kind: str) -> None:
    ours = Compressor(kind)
    meta = step([(0, 400)], pages=PAGES)
    u, g = ours.tokens(400)
    last = ours.width - 1
    u[20, 0], u[41, last], g[64, 5], g[97, last - 1] = torch.nan, torch.inf, torch.nan, torch.inf
    # Weighs nothing; a channel of which nothing weighs anything, or nothing of the first tokens; values at both ends of
    # what is stored.
    g[260, :], g[128:256, 7], g[256:272, 9] = -torch.inf, -torch.inf, -torch.inf
    u[312:330], u[340:360] = u[312:330] * 1e18, u[340:360] * 1e-18
    theirs = ours.copy()
    theirs.twin(meta, u, g)
    ours.run(library, meta, u, g)
    apart(ours.pool, theirs.pool)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_closes_no_row_writes_nothing(library: ctypes.CDLL, step: Step, kind: str) -> None:
    ours = Compressor(kind)
    meta = step([(0, 3), (256, 2), (4, 1)], pages=PAGES)
    before = ours.copy()
    ours.run(library, meta, *ours.tokens(6))
    assert torch.equal(ours.pool.data, before.pool.data)
    assert torch.equal(ours.ring, before.ring)


def test_the_binding_knows_the_sources_sizes_and_what_it_takes(built: ctypes.CDLL) -> None:
    for (dim, ratio), size in compress_long.SHARED_BYTES.items():
        assert size == built.shared_bytes(dim, ratio) <= 232_448
        assert compress_long.THREADS[dim] == built.threads(dim)
    ours = Compressor("C4")

    def takes(u: Tensor, g: Tensor, pool: RowPool = ours.pool, turned: bool = False) -> bool:
        return compress_long.takes(u, g, ours.ape, ours.norm, ours.ring, FREQS, pool, turned)

    u, g = ours.tokens(compress_long.LEAST_TOKENS)
    assert not takes(u, g)
    use_cuda_products(True)
    try:
        if not cuda_products():
            return  # under Triton's interpreter
        assert takes(u, g)
        assert not takes(u, g, turned=True)
        odd = torch.empty(256, 1025)[:, :1024], torch.empty(256 * 1024 + 1)[1:].view(256, 1024)
        assert not any(takes(x, g) for x in (u[1:], u.T.contiguous().T, *odd))
        size = RowPool.item_bytes_for(64, "latent", "exact", 512, 64)
        exact = RowPool(torch.empty(2, size, dtype=torch.uint8), 64, "latent", "exact", 512, 64)
        assert not takes(u, g, exact)
    finally:
        use_cuda_products(False)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="runs with Triton's interpreter alone",
)
@pytest.mark.parametrize("kind", ["keys", "C128"])
def test_the_launch_behind_it_writes_the_rest_of_the_rings(
    library: ctypes.CDLL, step: Step, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.kernels.device import compress as device

    monkeypatch.setattr(compress_long, "takes", lambda *_: True)
    monkeypatch.setattr(compress_long, "compress", lambda *arguments: run(library, *arguments))
    ours = Compressor(kind)
    meta = step(SPANS[4] if ours.ratio == 4 else [(0, 300), (100, 330)], pages=PAGES)
    theirs, tokens = ours.copy(), ours.tokens(len(meta.positions))
    theirs.twin(meta, *tokens)
    arguments = (*tokens, ours.ape, ours.norm, ours.ring, meta, FREQS, EPS, ours.pool)
    if ours.ratio == 4:
        device.compress_c4(*arguments, ours.turned)
    else:
        device.compress_c128(*arguments)
    assert torch.equal(ours.ring, theirs.ring)
    apart(ours.pool, theirs.pool)
