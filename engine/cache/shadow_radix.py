"""ShadowRadix: which pages hold which prefix, who holds on to them, and which may go.

A radix tree whose digits are page digests (`wire.prefix`): a digest stands for every token up to the end of its page
and for the namespace, so prefixes are the same exactly when their last digests are. A page has a FULL item and, while
its window is kept, an SWA item beside it. A page without one is a tombstone: its compressed rows are read by whoever
passes, but nobody can resume behind it before its window has been computed again.

    root -- [p0 p1 p2 . .] -- [p5*] -- [p6 p7 ..] -- [p9*]      * window kept; nodes without one are long
                                 \\---- [q6*]

The window (128 tokens) is shorter than a page (256), which makes two rules simple. A prefix can be resumed at a page
boundary exactly when the page before it has its window. And a page with a window is a node of its own, so that holding
a boundary holds one SWA item, however long the run of pages before it.

The tree owns its items: they are "used" in their allocators, neither private to a request nor quarantined. One thread
uses it. Nothing here waits or looks at a clock; recency is counted in operations.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

from engine.cache.pools import PageAllocator, PoolCounts
from wire.types import PAGE_TOKENS, PageClass, PrefixEvent, Removed, Stored


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a prompt the tree knows, in pages from its start."""

    pages: int  # can be resumed behind: the last of them has its window
    full_pages: int  # have compressed rows; more than `pages` when a window is missing

    @property
    def tokens(self) -> int:
        return self.pages * PAGE_TOKENS


@dataclass(slots=True, eq=False)
class _Node:
    """Neighbouring pages; one page exactly when `window` is set. A leaf loses pages from its end."""

    digests: list[bytes]
    pages: list[int]  # FULL items
    parent: _Node | None
    end: int  # pages from the root through this node
    window: int = 0  # SWA item; 0 for a tombstone
    children: dict[bytes, _Node] = field(default_factory=dict)  # by first digest
    full_lock: int = 0  # leases at or below this node
    window_lock: int = 0  # leases whose boundary is this node's end and that still need its window
    anchors: int = 0  # leases whose boundary is this node's end
    live_below: int = 0  # children with a window at or below them
    used_at: int = 0
    floor: int = 0  # the cache's `_floor` when last used
    queued: bool = False  # has an entry in the leaf queue

    @property
    def start(self) -> int:
        return self.end - len(self.pages)

    @property
    def is_live(self) -> bool:
        """There is a window here or below."""
        return self.window != 0 or self.live_below > 0


class Lease:
    """A hold on a prefix: none of its pages goes, and its last window stays until `release_window`.

    It ends with its `with` block, or by `release` when it outlives one. `ShadowRadix.insert` moves it further down.
    """

    __slots__ = ("_cache", "_held", "_holds_window", "_node")

    def __init__(self, cache: ShadowRadix, node: _Node) -> None:
        self._cache = cache
        self._node = node
        self._held = True
        self._holds_window = False

    @property
    def pages(self) -> int:
        return self._node.end

    @property
    def tokens(self) -> int:
        return self._node.end * PAGE_TOKENS

    @property
    def window(self) -> int:
        """The SWA item of the last page, 0 when this lease holds none."""
        return self._node.window if self._holds_window else 0

    def items(self, start: int = 0) -> list[int]:
        """FULL items of pages [start, pages)."""
        parts: list[list[int]] = []
        node = self._node
        while node.parent is not None and node.end > start:
            parts.append(node.pages[max(0, start - node.start) :])
            node = node.parent
        return [item for part in reversed(parts) for item in part]

    def release_window(self) -> None:
        """Let the window go, once the sequence has moved past it. Idempotent."""
        self._cache._unlock_window(self)

    def release(self) -> None:
        """Give everything back. Once."""
        self._cache._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            self.release()


class ShadowRadix:
    """The prefix tree of one worker.

    retained_windows  windows in the middle of a prefix that are kept longer than others, over the whole pool: page j
                      is such a place when `retains(j)`. 0 for none.
    """

    def __init__(self, full: PageAllocator, swa: PageAllocator, *, retained_windows: int = 0) -> None:
        self._full = full
        self._swa = swa
        # So spread that a pool full of prefixes has about as many such places as there are windows to spare.
        self._retain_every = -(-full.capacity // retained_windows) if retained_windows else 0
        self._root = _Node([], [], None, 0)
        # Nodes with a window, least recently used first. A plain dict is slow to iterate where its oldest have gone.
        self._windows: OrderedDict[_Node, None] = OrderedDict()
        self._leaves: list[tuple[int, int, _Node]] = []  # (used_at when queued, tie-break, node)
        self._num_queued = 0  # ever
        self._clock = 0
        self._floor = 0  # what the last tail to be evicted was worth: tails used later start from here
        self._num_pages = 0
        self._num_locked = 0
        self._num_locked_windows = 0
        self._events: list[PrefixEvent] = []

    # Looking up.

    def match(self, digests: Sequence[bytes], lease: Lease | None = None) -> Match:
        """What the tree knows of a prefix. Changes nothing, not even recency.

        With a `lease` on a part of this prefix the search starts there.
        """
        node = lease._node if lease is not None else self._root
        at = node.end
        pages = at if node.window else 0
        while (child := self._child(node, digests, at)) is not None:
            shared = _shared(child, digests, at)
            at += shared
            if shared < len(child.pages):
                break
            node = child
            if node.window:
                pages = at
        return Match(pages=pages, full_pages=at)

    def retains(self, page: int) -> bool:
        """Whether the window of this page of a prefix is one of those to keep beside the last one."""
        return bool(self._retain_every) and (page + 1) % self._retain_every == 0

    def lease(self, digests: Sequence[bytes], *, window: bool = True) -> Lease:
        """Hold the longest prefix that can be resumed behind, with its window.

        Without `window`: the longest that has compressed rows, whose window the caller brings itself.
        """
        found = self.match(digests)
        wanted = found.pages if window else found.full_pages
        node = self._root
        while node.end < wanted:
            child = self._child(node, digests, node.end)
            assert child is not None
            node = child if child.end <= wanted else self._split(child, wanted - node.end)
        lease = Lease(self, self._root)
        self._root.anchors += 1
        self._move(lease, node, window)
        return lease

    # Changing.

    def insert(
        self,
        digests: Sequence[bytes],
        pages: Sequence[int],
        windows: Mapping[int, int] | None = None,
        lease: Lease | None = None,
    ) -> Lease:
        """Take over a prefix's pages; returns a lease on its end, which is `lease` moved there if one is given.

        digests  of the prefix's pages from its start
        pages    their FULL items. Those under `lease` are the tree's already. The others become the tree's, or are
                 freed where the tree has that page: read `Lease.items` for what stands for them now.
        windows  page -> SWA item, handed over likewise: kept where the tree has none, else freed. A tombstone gets
                 its window back this way, and its FULL item stays, since others may be reading that.

        The lease holds the window of the last page if there is one.
        """
        assert len(digests) == len(pages), f"{len(digests)} digests for {len(pages)} pages"
        if lease is None:
            lease = Lease(self, self._root)
            self._root.anchors += 1
        assert lease._held, "a released lease can not be moved"
        node, end = lease._node, len(digests)
        assert node.end <= end, f"a lease on {node.end} pages can not be moved back to {end}"
        duplicates: list[int] = []
        while (child := self._child(node, digests, node.end)) is not None:
            at, shared = node.end, _shared(child, digests, node.end)
            node = child if shared == len(child.pages) else self._split(child, shared)
            assert not set(node.pages) & set(pages[at : at + shared]), "pages handed over are the tree's already"
            duplicates += pages[at : at + shared]
        if node.end < end:
            parent, at = node, node.end
            node = _Node(list(digests[at:]), list(pages[at:]), parent, end)
            assert all(node.pages), "page 0 is a sink and holds no prefix"
            parent.children[node.digests[0]] = node
            self._num_pages += len(node.pages)
            self._events.append(
                Stored(digests=tuple(node.digests), parent=parent.digests[-1] if parent.digests else b"")
            )
        self._full.release(duplicates)
        # Once moved, the lease keeps all of this path, and its node stays the one that ends there.
        self._move(lease, node, window=False)
        for page, item in sorted((windows or {}).items()):
            self._adopt_window(self._holder(lease._node, page), page, item)
        self._lock_window(lease)
        return lease

    def discard(self, lease: Lease) -> None:
        """Release a lease on pages that may be bad, and drop those of them that nobody else uses or has built on."""
        node: _Node | None = lease._node
        self._release(lease)
        while node is not None and node.parent is not None and not node.children and not node.full_lock:
            parent = node.parent
            self._cut_leaf(node, len(node.pages))
            node = parent

    def evict(self, component: PageClass, num_items: int) -> int:
        """Free up to so many items of a pool that nobody holds; returns how many were freed.

        SWA   windows within a prefix first, then those at retained places, each least recently used first; then last
              windows of their branch, those first that unlock the fewest pages and were used longest ago. What loses
              its window becomes a tombstone and keeps its compressed rows.
        FULL  from the ends of the least recently used branches, windows included.
        """
        if num_items <= 0:
            return 0
        return self._evict_windows(num_items) if component is PageClass.SWA else self._evict_pages(num_items)

    def drain_events(self) -> list[PrefixEvent]:
        """What was stored and removed since the last call, in order."""
        events, self._events = self._events, []
        return events

    # Looking at the books.

    def counts(self, component: PageClass) -> PoolCounts:
        """The whole pool's; what is evictable can be evicted at any time, to the last item."""
        if component is PageClass.SWA:
            allocator, ours, locked = self._swa, len(self._windows), self._num_locked_windows
        else:
            allocator, ours, locked = self._full, self._num_pages, self._num_locked
        return replace(allocator.counts(), evictable=ours - locked, protected=locked)

    def digests(self) -> list[tuple[bytes, bytes]]:
        """(parent, digest) of every page, parents first: what a late listener has missed. b"" is a first page's."""
        return [
            (parent, digest)
            for node in self._nodes()
            for parent, digest in zip([_last_digest(node.parent), *node.digests], node.digests, strict=False)
        ]

    def check(self, private: Mapping[PageClass, Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless every rule holds; `private` are the items requests hold for themselves.

        For tests: it walks everything.
        """
        full: list[int] = []
        windows: list[int] = []
        locked = locked_windows = 0
        seen: set[bytes] = set()
        for node in self._nodes():
            where = f"node of pages [{node.start}, {node.end})"
            parent = node.parent
            assert parent is not None
            assert node.pages, f"{where} is empty"
            assert len(node.pages) == len(node.digests), f"{where} pairs pages and digests badly"
            assert all(node.pages), f"{where} holds the sink"
            assert node.start == parent.end, f"{where} leaves a hole behind page {parent.end}"
            assert parent.children[node.digests[0]] is node, f"{where} can not be found"
            assert not node.window or len(node.pages) == 1, f"{where} has one window for many pages"
            assert 0 <= node.window_lock <= node.anchors <= node.full_lock, f"{where} is locked unevenly"
            below = sum(child.full_lock for child in node.children.values())
            assert node.full_lock == node.anchors + below, f"{where} has locks nobody holds"
            assert not node.window_lock or node.window, f"{where} lost a window that is held"
            live = sum(child.is_live for child in node.children.values())
            assert node.live_below == live, f"{where} counts {node.live_below} live children of {live}"
            assert (node.window != 0) == (node in self._windows), f"{where} is not in the order of windows"
            if not node.children and not node.full_lock:
                assert node.queued, f"{where} could go but is not in the queue"
            assert not seen.intersection(node.digests), f"{where} holds a page twice"
            seen.update(node.digests)
            full += node.pages
            windows += [node.window] if node.window else []
            locked += len(node.pages) if node.full_lock else 0
            locked_windows += 1 if node.window_lock else 0
        assert len(full) == self._num_pages
        assert len(windows) == len(self._windows)
        assert (locked, locked_windows) == (self._num_locked, self._num_locked_windows)
        queued = [node for _, _, node in self._leaves]
        assert len(queued) == len(set(queued)), "a leaf is queued twice"
        assert all(node.queued for node in queued)
        for component, allocator, ours in (
            (PageClass.FULL, self._full, full),
            (PageClass.SWA, self._swa, windows),
        ):
            theirs = list((private or {}).get(component, ()))
            owned = [*ours, *theirs]
            assert len(owned) == len(set(owned)), f"an item of {component} has two owners"
            assert all(allocator.in_use(item) for item in owned), f"an item of {component} is owned but not in use"
            counts = allocator.counts()
            if private is not None:
                assert counts.used == len(owned), f"{counts.used - len(owned)} items of {component} have no owner"
            assert counts.free + counts.used + counts.quarantined == allocator.capacity

    # Inside.

    def _child(self, node: _Node, digests: Sequence[bytes], at: int) -> _Node | None:
        return node.children.get(digests[at]) if at < len(digests) else None

    def _nodes(self) -> Iterator[_Node]:
        """Every node but the root, parents first."""
        todo = list(self._root.children.values())
        while todo:
            node = todo.pop()
            yield node
            todo += node.children.values()

    def _split(self, node: _Node, pages: int) -> _Node:
        """Cut a node; the new upper part holds its first `pages` pages and is returned.

        The lower part stays the same node, because leases are anchored at ends. A split is not a use.
        """
        parent = node.parent
        assert parent is not None
        assert 0 < pages < len(node.pages)
        upper = _Node(node.digests[:pages], node.pages[:pages], parent, node.start + pages)
        upper.full_lock, upper.used_at, upper.floor = node.full_lock, node.used_at, node.floor
        upper.live_below = int(node.is_live)
        upper.children = {node.digests[pages]: node}
        parent.children[upper.digests[0]] = upper
        node.digests, node.pages, node.parent = node.digests[pages:], node.pages[pages:], upper
        return upper

    def _join(self, node: _Node) -> None:
        """Undo a split that serves nobody: a tombstone whose only child is one, and where no lease is anchored."""
        while (
            len(node.children) == 1
            and node.parent is not None
            and not (node.window or node.anchors)
            and not (child := next(iter(node.children.values()))).window
        ):
            parent = node.parent
            child.digests, child.pages = node.digests + child.digests, node.pages + child.pages
            child.parent = parent
            parent.children[child.digests[0]] = child
            child.used_at, child.floor = max(node.used_at, child.used_at), max(node.floor, child.floor)
            node.parent, node.children = None, {}
            node = parent

    def _holder(self, node: _Node, page: int) -> _Node:
        """The node at or above `node` that holds this page."""
        while node.start > page:
            assert node.parent is not None
            node = node.parent
        assert node.start <= page < node.end, f"page {page} is not above page {node.end}"
        return node

    def _adopt_window(self, node: _Node, page: int, item: int) -> None:
        if node.window:
            self._swa.release([item])
            return
        assert item, "item 0 is a sink and holds no window"
        if page > node.start:
            self._split(node, page - node.start)
        if len(node.pages) > 1:
            node = self._split(node, 1)
        self._set_window(node, item)
        self._windows[node] = None
        node.floor = self._floor

    def _set_window(self, node: _Node, item: int) -> None:
        """Set or clear it, and tell the ancestors whether there still is one below them."""
        was_live = node.is_live
        node.window = item
        while node.parent is not None and node.is_live != was_live:
            parent, change = node.parent, 1 if node.is_live else -1
            was_live = parent.is_live
            parent.live_below += change
            node = parent

    # Locks.

    def _move(self, lease: Lease, node: _Node, window: bool) -> None:
        """Anchor a lease at a node at or below its present one."""
        old = lease._node
        step: _Node | None = node
        while step is not old:
            assert step is not None, "a lease only moves down"
            if step.full_lock == 0:
                self._num_locked += len(step.pages)
            step.full_lock += 1
            step = step.parent
        if node is not old:
            self._unlock_window(lease)
            old.anchors -= 1
            node.anchors += 1
            lease._node = node
        self._touch(node)
        if window:
            self._lock_window(lease)

    def _lock_window(self, lease: Lease) -> None:
        node = lease._node
        if node.window and not lease._holds_window:
            lease._holds_window = True
            node.window_lock += 1
            self._num_locked_windows += node.window_lock == 1

    def _unlock_window(self, lease: Lease) -> None:
        if lease._holds_window:
            lease._holds_window = False
            node = lease._node
            node.window_lock -= 1
            self._num_locked_windows -= node.window_lock == 0

    def _release(self, lease: Lease) -> None:
        assert lease._held, "a lease was released twice"
        lease._held = False
        self._unlock_window(lease)
        anchor = lease._node
        anchor.anchors -= 1
        self._touch(anchor)
        node = anchor
        while node.parent is not None:
            node.full_lock -= 1
            if node.full_lock == 0:
                self._num_locked -= len(node.pages)
            node = node.parent
        self._queue_leaf(anchor)

    def _touch(self, node: _Node) -> None:
        """A use: of the end of a prefix only. What lies before it is found through it, and takes its time over when
        it goes; windows before it were not read.
        """
        self._clock += 1
        node.used_at, node.floor = self._clock, self._floor
        if node.window:
            self._windows.move_to_end(node)

    # Eviction.

    def _queue_leaf(self, node: _Node) -> None:
        if node.parent is not None and not node.children and not node.full_lock and not node.queued:
            node.queued = True
            # The parts of a split have the same used_at; nodes themselves are not to be compared.
            self._num_queued += 1
            heapq.heappush(self._leaves, (node.used_at, self._num_queued, node))

    def _evict_pages(self, num_items: int) -> int:
        freed = 0
        while freed < num_items and self._leaves:
            used_at, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if node.parent is None or node.children or node.full_lock:
                continue  # no leaf any more; queued again when it is one
            if node.used_at > used_at:
                self._queue_leaf(node)
                continue
            freed += self._cut_leaf(node, num_items - freed)
        return freed

    def _cut_leaf(self, node: _Node, num_pages: int) -> int:
        """Free up to so many pages from a leaf's end."""
        parent = node.parent
        assert parent is not None
        if node.window:
            self._drop_window(node)
        keep = max(0, len(node.pages) - num_pages)
        first, pages, digests = node.digests[0], node.pages[keep:], node.digests[keep:]
        del node.pages[keep:], node.digests[keep:]
        node.end -= len(pages)
        self._num_pages -= len(pages)
        # From the end, so that the free list hands them out in order again.
        self._full.release(reversed(pages))
        self._events.append(Removed(digests=tuple(digests)))
        if keep:
            self._queue_leaf(node)
        else:
            del parent.children[first]
            node.parent = None
            parent.used_at, parent.floor = max(parent.used_at, node.used_at), max(parent.floor, node.floor)
            self._queue_leaf(parent)
        return len(pages)

    def _drop_window(self, node: _Node) -> None:
        assert not node.window_lock, "a window that is held can not go"
        self._swa.release([node.window])
        del self._windows[node]
        self._set_window(node, 0)

    def _evict_windows(self, num_items: int) -> int:
        inner: list[_Node] = []
        retained: list[_Node] = []
        tails: list[_Node] = []
        # There are few windows, each being as heavy as eight pages: looking at all of them costs less than queues do.
        for node in self._windows:
            if len(inner) == num_items:
                break
            if not node.window_lock:
                group = tails if not node.live_below else retained if self.retains(node.end - 1) else inner
                group.append(node)
        chosen = [*inner, *retained][:num_items]
        for node in chosen:
            self._tombstone(node)
        freed = len(chosen)
        if freed < num_items:
            # Only now is it certain how far each tail is from the window before it.
            worth = {node: node.floor + self._unlocks(node) for node in tails}
            for node in sorted(tails, key=worth.__getitem__)[: num_items - freed]:
                self._floor = max(self._floor, worth[node])
                self._tombstone(node)
                freed += 1
        return freed

    def _unlocks(self, node: _Node) -> int:
        """Pages that can be resumed behind only because of this window."""
        above = node.parent
        while above is not None and above.parent is not None and not above.window:
            above = above.parent
        return node.end - (above.end if above is not None else 0)

    def _tombstone(self, node: _Node) -> None:
        self._drop_window(node)
        self._join(node)
        if node.parent is not None:
            self._join(node.parent)


def _shared(node: _Node, digests: Sequence[bytes], at: int) -> int:
    """How many of a node's pages `digests` has from `at` on, the first being known to be one."""
    ours = node.digests
    most = min(len(ours), len(digests) - at)
    if ours[most - 1] == digests[at + most - 1]:
        return most
    # A digest stands for everything before it: from the first that differs on, all do.
    low, high = 1, most - 1
    while low < high:
        middle = (low + high + 1) // 2
        if ours[middle - 1] == digests[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _last_digest(node: _Node | None) -> bytes:
    return node.digests[-1] if node is not None and node.digests else b""
