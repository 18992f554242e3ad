"""The indexer's scores: the source of the CUDA kernel run on the CPU, against fp64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from engine.kernels.device import index_scores
from engine.kernels.device.index_scores import Plan
from engine.kernels.rows import RowPool
from tests.kernels.cuda_on_cpu import compiled

UNWRITTEN = 12345.0
WIDTH = 9
"""Pages in a row of the table."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("index_scores", tmp_path_factory.mktemp("scores"))


def finite_codes(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    codes = torch.randint(256, shape, generator=g).to(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0, codes)


@dataclass
class Step:
    """Tokens at positions[i] of requests segment[i]. Pages that no request has seen hold nothing but NaN."""

    positions: list[int]
    segment: list[int]
    seed: int = 0
    k: int = 0
    codes: Tensor = field(init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        count, requests = len(self.positions), max(self.segment) + 1
        self.codes = finite_codes((count, 64, 128), g)
        self.weights = torch.randn(count, 64, generator=g)
        self.table = torch.full((requests, WIDTH), 2**31 - 1, dtype=torch.int32)
        # A gap behind each item: their stride is not their size.
        size = RowPool.item_bytes_for(64, "index", "v4", 128, 64)
        data = torch.full((requests * WIDTH + 1, size + 64), 0xFF, dtype=torch.uint8)[:, :size]
        self.pool = RowPool(data, 64, "index", "v4", 128, 64)
        order = (torch.randperm(requests * WIDTH, generator=g) + 1).int().view(requests, WIDTH)
        for request in range(requests):
            mine = [p for p, s in zip(self.positions, self.segment, strict=True) if s == request]
            seen = (max(mine, default=-1) + 1) // 4
            for page in range(-(-seen // 64)):
                item = self.table[request, page] = order[request, page]
                rows = min(64, seen - 64 * page)
                data[item, : 128 * rows] = finite_codes((128 * rows,), g)
                scales = torch.randn(rows, generator=g).exp() * 1e-3
                data[item, 64 * 128 : 64 * 128 + 4 * rows] = scales.view(torch.uint8)

    def only(self, tokens: list[int]) -> Step:
        step = replace(self, positions=[self.positions[t] for t in tokens], segment=[self.segment[t] for t in tokens])
        step.codes, step.weights = self.codes[tokens].contiguous(), self.weights[tokens].contiguous()
        step.table, step.pool = self.table, self.pool
        return step

    def keys(self, request: int) -> tuple[Tensor, Tensor]:
        """Codes and scales, of all pages in its table."""
        items = self.pool.data[self.table[request][self.table[request] < 2**31 - 1].long()]
        codes = items[:, : 64 * 128].reshape(-1, 128).contiguous().view(torch.float8_e4m3fn).double()
        return codes, items[:, 64 * 128 :].contiguous().view(torch.float32).flatten().double()


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "weights", "positions", "segment", "page_table", "pool")),
        ("item_stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("scores", "maxima")),
        *((name, ctypes.c_int) for name in ("pages", "tokens", "k", "together", "stages")),
    )


def scored(library: ctypes.CDLL, step: Step, plan: Plan, slow_warp: int = -1) -> tuple[Tensor, Tensor]:
    count = len(step.positions)
    scores, maxima = torch.full((count, WIDTH * 64), UNWRITTEN), torch.full((count, WIDTH), UNWRITTEN)
    positions, segment = torch.tensor(step.positions), torch.tensor(step.segment).int()
    call = Call(
        step.codes.data_ptr(), step.weights.data_ptr(), positions.data_ptr(), segment.data_ptr(),
        step.table.data_ptr(), step.pool.data.data_ptr(), step.pool.data.stride(0), scores.data_ptr(),
        maxima.data_ptr(), WIDTH, count, step.k, plan.together, plan.stages,
    )  # fmt: skip
    faults = library.run_scores(ctypes.byref(call), plan.warpgroups, plan.blocks, slow_warp)
    assert faults == 0
    return scores, maxima


def check(step: Step, scores: Tensor, maxima: Tensor) -> None:
    """Against the definition, and that nothing else was written."""
    for token, (position, request) in enumerate(zip(step.positions, step.segment, strict=True)):
        seen = (position + 1) // 4
        if seen <= step.k:
            seen = 0
        pages = -(-seen // 64)
        assert (scores[token, 64 * pages :] == UNWRITTEN).all()
        assert (maxima[token, pages:] == UNWRITTEN).all()
        if not seen:
            continue
        codes, scales = (part[:seen] for part in step.keys(request))
        queries, weights = step.codes[token].view(torch.float8_e4m3fn).double(), step.weights[token].double()
        products = codes @ queries.T
        terms = torch.where(products < 0, 0, products) * weights * scales[:, None]
        expected, size = terms.sum(1), terms.abs().sum(1)
        got = scores[token, :seen].double()
        broken = expected.isnan()
        assert (got[broken] == torch.inf).all()
        assert ((got - expected).abs()[~broken] <= 1e-6 * size[~broken]).all()
        written = scores[token, : 64 * pages]
        assert (written[seen:] == -torch.inf).all()
        assert torch.equal(maxima[token, :pages], written.unflatten(0, (-1, 64)).amax(1))


def plan(together: int, blocks: int = 2, warpgroups: int = 4, stages: int = 4) -> Plan:
    return Plan(blocks, together, warpgroups, stages)


@pytest.mark.parametrize("warpgroups", [2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_scores_are_weighted_sums_of_relus_for_one_to_four_tokens(library, count: int, warpgroups: int) -> None:
    step = Step([1700 + i for i in range(count)], [0] * count, seed=count)
    check(step, *scored(library, step, plan(4 if count > 2 else count, warpgroups=warpgroups)))


@pytest.mark.parametrize("position", [2, 3, 6, 7, 254, 255, 256, 258, 259, 511, 512, 515])
def test_positions_at_the_borders_of_keys_and_of_pages(library, position: int) -> None:
    """Of four neighbouring tokens some see a key, or a page, more than others."""
    step = Step([position + i for i in range(4)], [0] * 4, seed=position)
    check(step, *scored(library, step, plan(4, blocks=3)))


@pytest.mark.parametrize("together", [1, 2, 4])
def test_requests_of_any_lengths_share_a_step(library, together: int) -> None:
    """More of them than a block has room for at once, one longer than a group, some with nothing to see."""
    spans = [(1000, 1), (5, 2), (300, 3), (700, 6), (0, 2), (2295, 4), (64 * 4, 1)]
    positions = [start + i for start, count in spans for i in range(count)]
    segment = [s for s, (_, count) in enumerate(spans) for _ in range(count)]
    step = Step(positions, segment, seed=together)
    for blocks, stages, warpgroups in ((1, 4, 4), (5, 12, 2), (13, 8, 4)):
        check(step, *scored(library, step, plan(together, blocks, warpgroups, stages)))


@pytest.mark.parametrize("slow_warp", [0, 3, 5, 9, 14, 16, 17, 19])
def test_no_warp_relies_on_another_to_keep_up(library, slow_warp: int) -> None:
    """Many short requests, whose queries take turns in two places, and pages that take turns in four."""
    step = Step([*range(400, 404), 900, 901, 902, 30, 300, 301, 260, 261, 262], [0] * 4 + [1] * 3 + [2, 3, 3] + [4] * 3)
    check(step, *scored(library, step, plan(4, blocks=1), slow_warp))
    check(step, *scored(library, step, plan(1, blocks=1), slow_warp))


def test_as_many_tokens_as_fit(library) -> None:
    positions = [(t * 397) % 700 for t in range(64)]
    check(step := Step(positions, list(range(64))), *scored(library, step, plan(4, blocks=3)))
    check(step := Step(list(range(300, 364)), [0] * 64), *scored(library, step, plan(4, blocks=2, stages=8)))


def test_more_tokens_than_a_block_looks_at_have_blocks_of_their_own(library) -> None:
    """150 of five requests, so that one goes on behind the 64th; and bits that do not depend on where that is."""
    spans = [(100, 30), (400, 60), (0, 20), (700, 39), (255, 1)]
    positions = [start + i for start, count in spans for i in range(count)]
    step = Step(positions, [s for s, (_, count) in enumerate(spans) for _ in range(count)], seed=9)
    scores, maxima = scored(library, step, plan(4, blocks=3))
    check(step, scores, maxima)
    alone, _ = scored(library, step.only(list(range(60, 70))), plan(4))
    assert torch.equal(alone, scores[60:70])


def test_a_token_that_sees_k_keys_or_fewer_needs_no_scores(library) -> None:
    step = Step([397, 398, 399, 400, 403, 404, 90], [0, 0, 0, 0, 0, 0, 1], k=100)
    scores, maxima = scored(library, step, plan(4))
    written = [bool((row != UNWRITTEN).any()) for row in scores]
    assert written == [False] * 4 + [True] * 2 + [False]  # the first to see 101 is the one at 403
    check(step, scores, maxima)
    step.k = 1000
    scores, maxima = scored(library, step, plan(4))
    assert (scores == UNWRITTEN).all()
    assert (maxima == UNWRITTEN).all()


def test_neighbours_of_different_requests_do_not_mix(library) -> None:
    """The same request twice, with another between, is two groups."""
    step = Step([900, 901, 500, 902, 903], [0, 0, 1, 0, 0], seed=3)
    check(step, *scored(library, step, plan(4)))


def test_what_is_broken_shows(library) -> None:
    step = Step([1023, 1024], [0, 0], seed=5)
    data, table = step.pool.data, step.table[0]
    data[table[0], 5 * 128 + 17] = 0x7F  # one value of key 5
    data[table[1], 9 * 128 : 10 * 128] = 0xFF  # all of key 73
    data[table[2], 64 * 128 + 4 * 3 :][:4] = torch.tensor([torch.nan]).view(torch.uint8)  # the scale of key 131
    data[table[3], 64 * 128 + 4 * 7 :][:4] = torch.tensor([torch.inf]).view(torch.uint8)
    scores, maxima = scored(library, step, plan(2))
    for key in (5, 73, 131):
        assert (scores[:, key] == torch.inf).all()
    assert scores[:, 199].isinf().all()
    assert (maxima[:, :3] == torch.inf).all()
    finite = scores[:, :256].isfinite()
    assert finite.sum() == 2 * (256 - 4)
    data[table[3], 64 * 128 + 4 * 7 :][:4] = torch.tensor([1.0]).view(torch.uint8)
    check(step, *scored(library, step, plan(2)))


def test_a_broken_query_breaks_its_own_token_alone(library) -> None:
    step = Step([1023, 1024, 1025], [0] * 3, seed=6)
    whole, _ = scored(library, step, plan(4))
    step.codes[1, 40] = 0x7F
    scores, maxima = scored(library, step, plan(4))
    assert (scores[1, :256] == torch.inf).all()
    assert (maxima[1, :4] == torch.inf).all()
    assert torch.equal(scores[::2], whole[::2])


def test_a_tokens_bits_are_the_same_in_any_company(library) -> None:
    """Alone, among others, in other blocks, and behind or before another in its unit."""
    step = Step([1000, 1001, 1002, 1003, 700, 701, 2000], [0, 0, 0, 0, 1, 1, 2], seed=7)
    together, tops = scored(library, step, plan(4, blocks=1))
    for tokens in ([0], [1], [3], [0, 1], [1, 2, 3], [2, 3, 4], [4, 5, 6], [6]):
        for chosen in (plan(4, blocks=3, stages=8), plan(2, blocks=2, warpgroups=2), plan(1)):
            scores, maxima = scored(library, step.only(tokens), chosen)
            assert torch.equal(scores, together[tokens])
            assert torch.equal(maxima, tops[tokens])


def test_many_blocks_share_few_pages(library) -> None:
    step = Step([300, 301, 2303], [0, 0, 1], seed=8)
    check(step, *scored(library, step, plan(4, blocks=23)))


def test_plans_fit_a_multiprocessor_and_have_a_stage_for_every_sender() -> None:
    for tokens in (1, 2, 3, 4, 5, 8, 64):
        for pages in (1, 4, 16, 512, 3520):
            found = index_scores.plan(tokens, pages)
            assert found.shared_bytes <= 232_448
            assert found.stages in (4, 8, 12, 16)
            assert 1 <= found.blocks <= min(132, tokens * pages)
            assert found.together == {1: 1, 2: 2}.get(tokens, 4)
            assert found.threads == 640
    assert index_scores.plan(4, 3520).stages == 8
    assert index_scores.plan(1, 3520).stages == 12
    assert index_scores.plan(1, 1).stages == 4
    assert index_scores.plan(64, 3520).blocks == 132
    assert index_scores.plan(65, 3520).blocks == 66  # of each of two times 64 tokens
    assert index_scores.plan(2048, 16).blocks == 4
    assert index_scores.plan(65_536, 16).blocks == 4


def test_shared_memory_is_as_the_binding_says(library) -> None:
    for chosen in (plan(1), plan(2, stages=16), plan(4, stages=20)):
        assert library.shared_bytes(chosen.together, chosen.stages) == chosen.shared_bytes


def test_it_takes_v4_keys_and_64_heads(monkeypatch) -> None:
    pool = Step([3], [0]).pool
    assert not index_scores.takes(1, 64, 3000, pool)  # but where products of few tokens are in CUDA C++
    monkeypatch.setattr(index_scores, "cuda_products", lambda: True)
    assert index_scores.takes(1, 64, 3000, pool)
    assert not index_scores.takes(4, 64, 255, pool)  # Triton is sooner done with so few
    assert index_scores.takes(4, 64, 256, pool)
    assert index_scores.takes(64, 64, 3520, pool)
    assert index_scores.takes(2048, 64, 3520, pool)
    assert not index_scores.takes(0, 64, 300, pool)
    assert not index_scores.takes(1, 32, 3000, pool)
    exact = RowPool(torch.zeros(2, 64 * 512, dtype=torch.uint8), 64, "index", "exact", 128, 64)
    assert not index_scores.takes(1, 64, 3000, exact)
    askew = torch.zeros(2, pool.data.shape[1] + 8, dtype=torch.uint8)[:, 8:]
    assert not index_scores.takes(1, 64, 3000, RowPool(askew, 64, "index", "v4", 128, 64))
