"""Allocators, tree and leases against a model that keeps one dictionary and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from engine.cache.pools import PageAllocator
from engine.cache.shadow_radix import Lease, Match, ShadowRadix
from wire.types import PageClass, Removed

FULL, SWA = PageClass.FULL, PageClass.SWA
NUM_FULL, NUM_SWA = 14, 6

Prefix = tuple[bytes, ...]
words = st.text(alphabet="ab", min_size=1, max_size=8)


def prefix_of(word: str) -> Prefix:
    """Digests as the real ones: each names everything up to its page."""
    return tuple(word[: i + 1].encode() for i in range(len(word)))


@dataclass
class Naive:
    """What a prefix cache is: the pages there are, by the prefix they end. Everything else is counted when asked."""

    full: dict[bytes, int] = field(default_factory=dict)
    windows: dict[bytes, int] = field(default_factory=dict)
    leases: list[tuple[Prefix, bool]] = field(default_factory=list)  # prefix held, and whether its window is

    def match(self, prefix: Prefix) -> Match:
        full = next((i for i, digest in enumerate(prefix) if digest not in self.full), len(prefix))
        legal = [i + 1 for i in range(full) if prefix[i] in self.windows]
        return Match(pages=max(legal, default=0), full_pages=full)

    def insert(self, prefix: Prefix, pages: list[int], windows: dict[int, int], held: int) -> tuple[list[int], ...]:
        """Returns the FULL and SWA items that are to be free now."""
        spare: tuple[list[int], list[int]] = ([], [])
        for i, digest in enumerate(prefix):
            if i >= held and self.full.setdefault(digest, pages[i]) != pages[i]:
                spare[0].append(pages[i])
        for page, item in windows.items():
            if self.windows.setdefault(prefix[page], item) != item:
                spare[1].append(item)
        return spare

    def locked(self, component: PageClass) -> set[bytes]:
        if component is FULL:
            return {digest for prefix, _ in self.leases for digest in prefix}
        return {prefix[-1] for prefix, window in self.leases if window}


class TreeAgainstModel(RuleBasedStateMachine):
    steps = 0  # of all examples

    def __init__(self) -> None:
        super().__init__()
        TreeAgainstModel.steps -= 1  # the first look comes before any step
        self.full, self.swa = PageAllocator(NUM_FULL + 1), PageAllocator(NUM_SWA + 1)
        self.tree = ShadowRadix(self.full, self.swa, retained_windows=3)
        self.model = Naive()
        self.leases: list[Lease] = []

    @rule(word=words)
    def match(self, word: str) -> None:
        assert self.tree.match(prefix_of(word)) == self.model.match(prefix_of(word))

    @rule(word=words, window=st.booleans())
    def lease(self, word: str, window: bool) -> None:
        prefix = prefix_of(word)
        found = self.model.match(prefix)
        held = prefix[: found.pages if window else found.full_pages]
        lease = self.tree.lease(prefix, window=window)
        assert lease.items() == [self.model.full[digest] for digest in held]
        assert lease.window == (self.model.windows[held[-1]] if window and held else 0)
        self.leases.append(lease)
        self.model.leases.append((held, window and bool(held)))

    @rule(word=words, data=st.data(), move=st.booleans())
    def insert(self, word: str, data: st.DataObject, move: bool) -> None:
        """As a request does it: with what it leased before, and windows for some of its pages."""
        prefix, n = prefix_of(word), None
        if move and self.leases:
            n = data.draw(st.integers(0, len(self.leases) - 1))
            start = self.model.leases[n][0]
            if prefix[: len(start)] != start:
                prefix = start + tuple((start[-1].decode() + word[: i + 1]).encode() for i in range(len(word)))
        lease = None if n is None else self.leases[n]
        held = lease.pages if lease is not None else 0
        chosen = data.draw(st.sets(st.integers(0, len(prefix) - 1), max_size=2))
        if len(prefix) - held > self.full.free or len(chosen) > self.swa.free:
            return
        pages = [0] * held + self.full.allocate(len(prefix) - held)
        windows = dict(zip(sorted(chosen), self.swa.allocate(len(chosen)), strict=True))
        spare_full, spare_swa = self.model.insert(prefix, pages, windows, held)
        moved = self.tree.insert(prefix, pages, windows, lease)
        assert moved.items() == [self.model.full[digest] for digest in prefix]
        assert moved.window == self.model.windows.get(prefix[-1], 0)
        assert not any(self.full.in_use(item) for item in spare_full)
        assert not any(self.swa.in_use(item) for item in spare_swa)
        if n is None:
            self.leases.append(moved)
            self.model.leases.append((prefix, moved.window != 0))
        else:
            assert moved is lease
            self.model.leases[n] = (prefix, moved.window != 0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.leases) - 1))
        self.leases.pop(n).release()
        self.model.leases.pop(n)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_window(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.leases) - 1))
        self.leases[n].release_window()
        self.model.leases[n] = (self.model.leases[n][0], False)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.leases) - 1))
        prefix, _ = self.model.leases.pop(n)
        self.tree.discard(self.leases.pop(n))
        locked = self.model.locked(FULL)
        for digest in reversed(prefix):
            built_on = any(other != digest and other.startswith(digest) for other in self.model.full)
            if digest in locked or built_on:
                break
            self._forget(digest)

    @rule(component=st.sampled_from([FULL, SWA]), n=st.integers(1, 6))
    def evict(self, component: PageClass, n: int) -> None:
        """Which ones go is told by stories; here it must be so many, none that is held, and no page under another."""
        counts = self.tree.counts(component)
        self.tree.drain_events()
        before = dict(self.model.windows)
        assert self.tree.evict(component, n) == min(n, counts.evictable)
        assert self.tree.counts(component).protected == counts.protected
        gone = [d for event in self.tree.drain_events() if isinstance(event, Removed) for d in event.digests]
        assert len(gone) == (min(n, counts.evictable) if component is FULL else 0)
        assert not self.model.locked(FULL).intersection(gone)
        for digest in gone:
            self._forget(digest)
        assert not any(other.startswith(digest) for digest in gone for other in self.model.full)
        if component is SWA:
            self.model.windows = {d: item for d, item in before.items() if self.swa.in_use(item)}
            assert self.model.locked(SWA) <= self.model.windows.keys()

    def _forget(self, digest: bytes) -> None:
        del self.model.full[digest]
        self.model.windows.pop(digest, None)

    @invariant()
    def books_agree(self) -> None:
        TreeAgainstModel.steps += 1
        self.tree.check({})
        for component, kept, allocator in (
            (FULL, self.model.full, self.full),
            (SWA, self.model.windows, self.swa),
        ):
            counts, locked = self.tree.counts(component), self.model.locked(component)
            assert (counts.evictable, counts.protected) == (len(kept) - len(locked), len(locked))
            assert counts.free + counts.evictable + counts.protected == allocator.capacity
            assert all(allocator.in_use(item) for item in kept.values())
        assert {digest for _, digest in self.tree.digests()} == self.model.full.keys()

    def teardown(self) -> None:
        while self.leases:
            self.leases.pop().release()
        self.tree.evict(SWA, NUM_SWA)
        self.tree.evict(FULL, NUM_FULL)
        assert (self.full.free, self.swa.free) == (NUM_FULL, NUM_SWA)


def run_steps(wanted: int) -> int:
    """At least so many steps, each followed by a look at everything; returns how many there were."""
    TreeAgainstModel.steps = 0
    while TreeAgainstModel.steps < wanted:
        # In portions: Hypothesis remembers every example of a run.
        run_state_machine_as_test(
            TreeAgainstModel,
            settings=settings(
                max_examples=200,
                stateful_step_count=50,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    return TreeAgainstModel.steps


def test_ten_thousand_steps_leave_the_tree_as_the_model_has_it() -> None:
    run_steps(10_000)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_million_steps_leave_the_tree_as_the_model_has_it(record_property: pytest.RecordProperty) -> None:
    record_property("steps", run_steps(1_000_000))
