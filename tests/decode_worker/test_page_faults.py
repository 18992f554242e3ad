"""Pages that arrive wrong in every way: an engine whose tokens are a hash of its pages never says a wrong one."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from tests.decode_worker.oracle import OraclePair, OraclePools, answer, pair, until
from tests.decode_worker.test_service import prompt_of, request
from wire.types import Failed, PageClass

names = (f"faulty-{n}" for n in itertools.count())

SECOND = 0.01
"""Share of pages that are wrong again when they are read again; the attempt is then over."""


class FaultyPools(OraclePools):
    """Spoils pages between their landing and their check, as a bad link or bad memory would."""

    def __init__(self, seed: int) -> None:
        super().__init__(full=60, swa=40, slots=12)
        self._random = random.Random(seed)
        self._hit: set[tuple[PageClass, int]] = set()
        self.injected = dict.fromkeys(("flipped", "torn", "zeroed", "stale", "swapped", "shifted"), 0)

    def import_pages(self, page_class: PageClass, items: Sequence[int], checksums: Sequence[int]) -> list[int]:
        for item in items:
            again = (page_class, item) in self._hit
            self._hit.discard((page_class, item))
            if self._random.random() < (SECOND if again else 0.4):
                self._spoil(page_class, item, items)
                self._hit.add((page_class, item))
        return super().import_pages(page_class, items, checksums)

    def _spoil(self, page_class: PageClass, item: int, items: Sequence[int]) -> None:
        memory, rng = self.memory[page_class], self._random
        page, before = memory[item], memory[item].tobytes()
        kind = rng.choice(list(self.injected))
        if kind == "flipped":
            page[rng.randrange(len(page))] ^= 1 << rng.randrange(32)
        elif kind == "torn":
            cut = rng.randrange(1, len(page))
            page[cut:] = [rng.randrange(1000) for _ in range(len(page) - cut)]
        elif kind == "zeroed":
            page[:] = 0
        elif kind == "stale":
            page[:] = memory[rng.randrange(1, len(memory))]
        elif kind == "swapped":
            page[:] = memory[rng.choice(list(items))]
        else:
            page[1:] = page[:-1].copy()
        # A page that still has its bytes is not a faulty one.
        self.injected[kind] += page.tobytes() != before


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("faults", [300, pytest.param(10_000, marks=pytest.mark.long)])
async def test_no_wrong_token_comes_of_wrong_pages(faults: int, record_property: Callable[[str, object], None]) -> None:
    pools = FaultyPools(seed=faults)
    numbers = itertools.count()
    asked = retried = 0

    async def client(workers: OraclePair) -> None:
        nonlocal asked, retried
        while sum(pools.injected.values()) < faults:
            n = next(numbers)
            prompt = prompt_of(random.Random(n).choice([130, 300, 700, 1500]), seed=n)
            for attempt in range(1, 30):
                ids, events = await request(workers, f"r{n}", prompt, 3, attempt=attempt)
                expected = answer(prompt, 3)
                assert ids == expected[: len(ids)], f"wrong tokens for {len(prompt)} after attempt {attempt}"
                if ids == expected:
                    break
                assert isinstance(events[-1], Failed)
                assert events[-1].code == "transfer_failed"
                retried += 1
            assert ids == expected, f"29 attempts in vain: {events[-1]}"
            asked += 1

    async with pair(next(names), decode_pools=pools) as workers:
        await asyncio.gather(*(client(workers) for _ in range(6)))
        await workers.settle()
        await until(lambda: not workers.held())
    assert all(pools.injected.values()), pools.injected
    record_property("faults", sum(pools.injected.values()))
    record_property("answers", asked)
    record_property("attempts_failed", retried)
    record_property("wrong_tokens", 0)
