"""One request's fetch: the owner's offers checked, paired with our own places, and counted until all have
landed.

Nobody sends us addresses to write to. An offer names positions and the owner's items; each position is looked
up in our own sequence, so the worst a wrong offer can do is to be refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from decode_worker.admission import Place, places_of
from engine.batch import Sequence
from kvtransfer.reader import ReadJob
from wire.errors import LayoutMismatch, TransferFailed, WorkerLost
from wire.types import (
    AttemptId,
    OwnerCard,
    PageClass,
    PageGroup,
    PageOffer,
    RegionClass,
    StartRequest,
    Tail,
)


class Fetch:
    """What one attempt still needs from its owner."""

    def __init__(
        self,
        request: StartRequest,
        sequence: Sequence,
        resident_pages: int = 0,
        *,
        classes: Iterable[RegionClass],
        signature: str,
        vocab_size: int,
    ) -> None:
        assert request.source is not None, "there is nothing to fetch"
        self._request = request
        self.source = request.source
        self._run = AttemptId(request.request_id, request.attempt)
        self._signature = signature
        self._vocab_size = vocab_size
        moving = {cls.name for cls in classes if cls.regions}
        wanted = places_of(sequence, len(request.prompt))
        for position in range(resident_pages):
            del wanted[PageClass.FULL][position]
        # class -> position -> our own item, for what has not been offered yet
        self._wanted = {cls: places for cls, places in wanted.items() if cls in moving}
        self.total_pages = sum(len(places) for places in self._wanted.values())
        self._next_seq = 0
        self._card: OwnerCard | None = None
        self.claim_id: str | None = None
        self.tail: Tail | None = None
        self.reading: dict[str, tuple[Place, ...]] = {}  # job id -> places it writes
        self._full_positions: dict[str, tuple[int, ...]] = {}  # of those jobs
        self._landed = set(range(resident_pages))  # positions of full pages

    @property
    def complete(self) -> bool:
        """The last offer has come and every read has landed verified."""
        return self.tail is not None and not self.reading

    def places_being_read(self) -> list[Place]:
        return [place for places in self.reading.values() for place in places]

    def landed(self, job_id: str) -> None:
        """Everything this job reads is here and verified."""
        del self.reading[job_id]
        self._landed.update(self._full_positions.pop(job_id))

    @property
    def landed_pages(self) -> int:
        """Full pages from the prompt's first on that are here and verified, without a gap."""
        n = 0
        while n in self._landed:
            n += 1
        return n

    def accept(self, offer: PageOffer) -> ReadJob | None:
        """Check one offer and start counting its read; None when it brings no pages.

        Raises WorkerLost when another life of the owner answers, LayoutMismatch for foreign pages,
        TransferFailed for an offer that does not follow from the ones before. The attempt is then over.
        """
        if offer.seq != self._next_seq:
            raise self._wrong(f"offer {offer.seq} came where {self._next_seq} was due")
        self._next_seq += 1
        if offer.seq == 0:
            self._meet(offer)
            return None
        if offer.owner is not None or offer.claim_id != self.claim_id:
            raise self._wrong(f"offer {offer.seq} belongs to another claim")
        if self.tail is not None:
            raise self._wrong(f"offer {offer.seq} came after the last one")
        assert self._card is not None, "seq 0 set the card"
        local: dict[PageClass, dict[int, int]] = {}
        for group in offer.groups:
            local.setdefault(group.page_class, {}).update(self._pair(group))
        if offer.tail is not None:
            self._close(offer.tail)
        if not local:
            return None
        job_id = f"{self._run}/{offer.seq}"
        self.reading[job_id] = tuple((cls, item) for cls, items in local.items() for item in items.values())
        self._full_positions[job_id] = tuple(local.get(PageClass.FULL, ()))
        return ReadJob(job_id=job_id, card=self._card, groups=offer.groups, local=local)

    def _meet(self, offer: PageOffer) -> None:
        """Offer 0: the owner is the worker the router named, in the life the router knew, with pages like
        ours.
        """
        card, source = offer.owner, self.source
        if card is None or offer.groups or offer.tail is not None:
            raise self._wrong("offer 0 does not carry the owner's card alone")
        if (card.worker_id, card.epoch) != (source.worker_id, source.epoch):
            raise WorkerLost(
                f"worker {source.worker_id} is no longer the one that was asked: it answers as {card.worker_id} with "
                f"another epoch, so the pages of {self._run} are gone"
            )
        if card.signature != self._signature:
            raise LayoutMismatch(
                f"worker {card.worker_id} has page layout {card.signature[:12]}, this worker "
                f"{self._signature[:12]}. Serve both with the same checkpoint, --kv-layout and version."
            )
        self._card, self.claim_id = card, offer.claim_id

    def _pair(self, group: PageGroup) -> dict[int, int]:
        """Position -> our own item for each page of the group, all wanted and none seen before."""
        assert self._card is not None, "seq 0 set the card"
        page_class, n = group.page_class, len(group.positions)
        if not n == len(group.items) == len(group.generations) == len(group.checksums):
            raise self._wrong(f"a group of {page_class} pages has lists of different lengths")
        num_items = min(
            (region.num_items for cls in self._card.classes if cls.name == page_class for region in cls.regions),
            default=0,
        )
        wanted = self._wanted.get(page_class, {})
        paired = {}
        for position, item in zip(group.positions, group.items, strict=True):
            if position not in wanted:
                raise self._wrong(f"{page_class} page {position} is offered twice or is none of this prompt's")
            if not 0 < item < num_items:
                raise self._wrong(f"{page_class} item {item} is outside the owner's pool of {num_items}")
            paired[position] = wanted.pop(position)
        return paired

    def _close(self, tail: Tail) -> None:
        n = len(self._request.prompt)
        missing = sum(len(places) for places in self._wanted.values())
        if missing or tail.total_pages != self.total_pages:
            raise self._wrong(
                f"the last offer counts {tail.total_pages} pages of {self.total_pages} wanted, {missing} never came"
            )
        if tail.prompt_tokens != n or not 0 <= tail.cached_tokens <= n:
            raise self._wrong(
                f"the tail is for {tail.prompt_tokens} tokens, {tail.cached_tokens} cached; the prompt has {n}"
            )
        if tail.first.index != 0 or not 0 <= tail.first.token_id < self._vocab_size:
            raise self._wrong(f"first token {tail.first.token_id} at index {tail.first.index} is not one of this model")
        self.tail = tail

    def _wrong(self, problem: str) -> TransferFailed:
        return TransferFailed(f"worker {self.source.worker_id} sent a bad offer for {self._run}: {problem}")
