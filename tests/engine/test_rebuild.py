"""Resuming from cached pages, with the last window or without it, gives the bits of a cold run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.batch import Drawn, Segment, Sequence, StepMeta, rebuild_tokens
from engine.cache.pools import KvPools, PoolSizes
from engine.config import KvLayout
from engine.kernels.draft_state import HEADER
from engine.model.deepseek_v4 import DeepseekV4
from tests.engine.geometries import random_tensors, tiny_config
from tests.engine.speculation import drafting_model, runner_of
from wire.types import PAGE_TOKENS, PageClass, SamplingParams

GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0)


class Worker:
    """A model over pools in which every page of every prompt stays mapped, so that a test decides what is missing."""

    def __init__(self, layout: KvLayout, pattern: str = "c4") -> None:
        config = tiny_config(31, pattern, head_dim=512, rope_dim=64, index_head_dim=128, index_topk=32)
        self.model = DeepseekV4(config, random_tensors(config, 31))
        self.pools = KvPools(config, layout, PoolSizes(full=64, swa=64, slots=16), "test", "cpu")
        self.num_layers = config.num_layers
        generator = torch.Generator().manual_seed(31)
        self.prompt = torch.randint(config.vocab_size, (8 * PAGE_TOKENS,), generator=generator)

    def sequence(self, num_tokens: int, pages: list[int] | None = None) -> Sequence:
        """A sequence of fresh pages behind the given ones, with windows for the fresh ones only."""
        cached = pages or []
        fresh = -(-num_tokens // PAGE_TOKENS) - len(cached)
        return Sequence(
            request_id="",
            sampling=GREEDY,
            slot=self.pools.slots.allocate(1)[0],
            pages=[*cached, *self.pools.full.allocate(fresh)],
            swa_pages=[0] * len(cached) + self.pools.swa.allocate(fresh),
        )

    def run(self, sequence: Sequence, start: int, end: int, chunk: int = 300, rebuild: bool = False) -> Tensor:
        """[end - start, V] logits."""
        parts = []
        for at in range(start, end, chunk):
            tokens = self.prompt[at : min(at + chunk, end)]
            segment = Segment(sequence=sequence, start=at, tokens=tokens.tolist(), sample=False, rebuild=rebuild)
            parts.append(self.model.forward(tokens, StepMeta.of([segment]), torch.arange(len(tokens)), self.pools))
        return torch.cat(parts)

    def sums(self, page_class: PageClass, items: list[int]) -> list[int]:
        return self.pools.export_pages(page_class, items)


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_every_page_boundary_is_resumed_with_the_bits_of_a_cold_run(layout: KvLayout) -> None:
    worker, end = Worker(layout, "all"), 5 * PAGE_TOKENS + 70
    cold = worker.sequence(end)
    want = worker.run(cold, 0, end)
    for boundary in range(1, 6):
        warm = worker.sequence(end, cold.pages[:boundary])
        warm.swa_pages[boundary - 1] = cold.swa_pages[boundary - 1]
        got = worker.run(warm, boundary * PAGE_TOKENS, end, chunk=211)
        assert torch.equal(got, want[boundary * PAGE_TOKENS :]), f"resumed at page {boundary}"
        whole = slice(boundary, 5)
        for page_class, ours, theirs in (
            (PageClass.FULL, warm.pages, cold.pages),
            (PageClass.SWA, warm.swa_pages, cold.swa_pages),
        ):
            assert worker.sums(page_class, ours[whole]) == worker.sums(page_class, theirs[whole])
        worker.pools.full.release(warm.pages[boundary:])
        worker.pools.swa.release(warm.swa_pages[boundary:])


@pytest.mark.parametrize("layout", ["v4", "exact"])
@pytest.mark.parametrize("pattern", ["c4", "all"])
def test_a_rebuilt_window_has_the_bits_of_the_one_that_was_lost(layout: KvLayout, pattern: str) -> None:
    worker = Worker(layout, pattern)
    boundary, end = 7 * PAGE_TOKENS, 7 * PAGE_TOKENS + 133
    span = rebuild_tokens(worker.num_layers)
    assert 0 < span < boundary
    cold = worker.sequence(end)
    want = worker.run(cold, 0, end)
    before = worker.sums(PageClass.FULL, cold.pages)
    # Whatever lies where windows are missing must not matter.
    for window in worker.pools.window.values():
        window.data[0].copy_(window.data[cold.swa_pages[3]])

    warm = worker.sequence(end, cold.pages[:7])
    first = (boundary - span) // PAGE_TOKENS
    warm.swa_pages[first:7] = worker.pools.swa.allocate(7 - first)
    worker.run(warm, boundary - span, boundary, chunk=223, rebuild=True)
    assert worker.sums(PageClass.SWA, warm.swa_pages[6:7]) == worker.sums(PageClass.SWA, cold.swa_pages[6:7])
    assert worker.sums(PageClass.FULL, cold.pages) == before, "a page that others read was written"
    assert torch.equal(worker.run(warm, boundary, end), want[boundary:])


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_a_rebuilt_window_is_right_for_the_draft_layer_too(layout: KvLayout) -> None:
    config, tensors = drafting_model(31, "pro", head_dim=512, rope_dim=64, index_head_dim=128, index_topk=32)
    runner = runner_of(config, tensors, layout, sizes=PoolSizes(full=64, swa=64, slots=16))
    pools, boundary, end = runner.pools, 7 * PAGE_TOKENS, 7 * PAGE_TOKENS + 133
    span = rebuild_tokens(config.num_layers + 1)
    assert span == rebuild_tokens(config.num_layers) + PAGE_TOKENS, "one without the draft layer would be shorter"
    prompt = torch.randint(config.vocab_size, (end,), generator=torch.Generator().manual_seed(32)).tolist()

    def sequence(pages: list[int], first_window: int) -> Sequence:
        fresh = pools.full.allocate(8 - len(pages))
        windows = [0] * first_window + pools.swa.allocate(8 - first_window)
        (slot,) = pools.slots.allocate(1)
        return Sequence(request_id="", sampling=GREEDY, slot=slot, pages=[*pages, *fresh], swa_pages=windows)

    def run(of: Sequence, start: int, stop: int, rebuild: bool = False) -> Drawn:
        for at in range(start, stop, 223):
            part = prompt[at : min(at + 223, stop)]
            last = stop == end and at + 223 >= end
            guesses = 2 if last else 0
            segment = Segment(
                sequence=of, start=at, tokens=part, sample=last, index=0, guesses=guesses, rebuild=rebuild
            )
            (drawn,) = runner.step([segment])
        return drawn

    cold = sequence([], 0)
    run(cold, 0, boundary)
    warm = sequence(cold.pages[:7], (boundary - span) // PAGE_TOKENS)
    run(warm, boundary - span, boundary, rebuild=True)
    ours, theirs = warm.swa_pages[6], cold.swa_pages[6]
    for pool in pools.window.values():
        assert torch.equal(pool.data[ours], pool.data[theirs])
    for ring in (*pools.c4_ring.values(), *pools.index_ring.values()):
        assert torch.equal(ring[ours], ring[theirs])
    assert pools.draft_state is not None
    (n, oldest), streams = pools.draft_state[ours, :2].tolist(), pools.draft_state[ours, HEADER:]
    assert (n, oldest) == (boundary, boundary - span + 1)
    assert torch.equal(streams, pools.draft_state[theirs, HEADER:])
    drawn = run(warm, boundary, end)
    assert len(drawn.guesses) == 2
    assert drawn == run(cold, boundary, end)


def test_a_page_less_than_the_rebuilt_span_would_not_do() -> None:
    worker = Worker("exact", "all")
    boundary = 7 * PAGE_TOKENS
    cold = worker.sequence(boundary)
    worker.run(cold, 0, boundary)
    warm = worker.sequence(boundary, cold.pages[:7])
    span = rebuild_tokens(worker.num_layers) - PAGE_TOKENS
    first = (boundary - span) // PAGE_TOKENS
    warm.swa_pages[first:7] = worker.pools.swa.allocate(7 - first)
    worker.run(warm, boundary - span, boundary, rebuild=True)
    assert worker.sums(PageClass.SWA, warm.swa_pages[6:7]) != worker.sums(PageClass.SWA, cold.swa_pages[6:7])


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_a_hit_reads_nothing_of_the_request_that_had_its_slot_before(layout: KvLayout) -> None:
    worker, end = Worker(layout, "all"), 3 * PAGE_TOKENS + 140
    cold = worker.sequence(end)
    want = worker.run(cold, 0, end)
    warm = worker.sequence(end, cold.pages[:2])
    warm.swa_pages[1] = cold.swa_pages[1]
    for ring in worker.pools.c128_ring.values():
        ring[warm.slot] = torch.randn(ring[warm.slot].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(worker.run(warm, 2 * PAGE_TOKENS, end, chunk=77), want[2 * PAGE_TOKENS :])


@pytest.mark.parametrize(("num_layers", "tokens"), [(1, 256), (2, 512), (3, 512), (43, 5632), (44, 5888)])
def test_the_span_to_compute_again_grows_by_a_window_for_each_layer(num_layers: int, tokens: int) -> None:
    assert rebuild_tokens(num_layers) == tokens
