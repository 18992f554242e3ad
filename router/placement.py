"""Which prefill and which decode worker a request goes to. Pure: the same fleet and request, the same pair."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from router.fleet import FleetSnapshot, WorkerView
from wire.errors import InvalidRequest, LayoutMismatch, NoWorkers, PenumbraError
from wire.types import PAGE_TOKENS, WorkerInfo

MOVED_TOKEN_COST = 1 / 32
"""What moving a token's pages costs, where computing the token costs 1. Even far off, it tells a decode worker that
holds a long prefix from one that does not."""

ROOM_COST = 64
"""What a token costs that a full pool has no room for: others have to finish first, one decode step at a time."""

SEQUENCE_COST = 256
"""What each sequence costs that shares decode steps with this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A pair, and how many of the prompt's tokens each of the two was believed to hold."""

    prefill: WorkerInfo
    decode: WorkerInfo
    prefill_resident: int = 0
    decode_resident: int = 0


def choose(
    fleet: FleetSnapshot,
    prompt_tokens: int,
    max_tokens: int,
    exclude: Collection[str] = (),
    resident: Mapping[str, int] = MappingProxyType({}),
) -> Placement | None:
    """The compatible pair with the least expected cost, or None when there is none.

    resident  prompt tokens that a worker already holds, by worker id; a worker not named holds none

    A worker that could never hold the request is passed over; one that is merely full is not, its tokens that
    have to leave first count as cost. Ties go to the lower worker ids.
    """
    pairs = [
        (prefill, decode)
        for prefill, decode in _pairs(fleet, exclude)
        if _holds(prefill, prompt_tokens) and _holds(decode, prompt_tokens + max_tokens)
    ]
    if not pairs:
        return None

    def held(worker: WorkerView) -> int:
        # The last token is always computed: it is what the first answer token is drawn from.
        return min(resident.get(worker.info.worker_id, 0), prompt_tokens - 1)

    def cost(pair: tuple[WorkerView, WorkerView]) -> tuple[float, str, str]:
        """In prompt tokens to compute, and then by ids."""
        prefill, decode = pair
        compute, move = prompt_tokens - held(prefill), prompt_tokens - held(decode)
        return (
            prefill.pending_tokens
            + compute
            + ROOM_COST * max(0, compute - prefill.free_tokens)
            + MOVED_TOKEN_COST * move
            + ROOM_COST * max(0, move + max_tokens - decode.free_tokens)
            + SEQUENCE_COST * decode.num_requests,
            prefill.info.worker_id,
            decode.info.worker_id,
        )

    prefill, decode = min(pairs, key=cost)
    return Placement(
        prefill=prefill.info, decode=decode.info, prefill_resident=held(prefill), decode_resident=held(decode)
    )


def why_not(fleet: FleetSnapshot, prompt_tokens: int, max_tokens: int) -> PenumbraError:
    """What to tell the client when `choose` found nothing, even with nobody excluded."""
    for role, workers in (("prefill", fleet.prefill), ("decode", fleet.decode)):
        if not any(view.usable for view in workers):
            known = f"{len(workers)} known, none of them serving" if workers else "none is known"
            return NoWorkers(f"No {role} worker can take this request: {known}. Retry in a moment.")
    if not any(_pairs(fleet, ())):
        return LayoutMismatch(
            "No prefill and decode worker hold the same model in the same page layout, so no pair can serve this "
            "request. Start both pools from one checkpoint with one kv-layout."
        )
    prompt_room = max(_size(prefill) for prefill, _ in _pairs(fleet, ()))
    return InvalidRequest(
        f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
        f"{prompt_tokens + max_tokens}; the workers hold prompts of at most {prompt_room} tokens and requests of at "
        f"most {capacity(fleet)} tokens in all. Shorten the prompt or lower max_tokens.",
        code="context_length_exceeded",
    )


def capacity(fleet: FleetSnapshot) -> int | None:
    """Tokens, prompt and answer together, of the largest request a usable pair could hold; None without a pair.

    A prefill worker holds the prompt only, so it does not count here; `choose` looks at it.
    """
    return max((_size(decode) for _, decode in _pairs(fleet, ())), default=None)


def _pairs(fleet: FleetSnapshot, exclude: Collection[str]) -> Iterator[tuple[WorkerView, WorkerView]]:
    for prefill in fleet.prefill:
        for decode in fleet.decode:
            if (
                prefill.usable
                and decode.usable
                and prefill.info.worker_id not in exclude
                and decode.info.worker_id not in exclude
                and compatible(prefill.info, decode.info)
            ):
                yield prefill, decode


def compatible(prefill: WorkerInfo, decode: WorkerInfo) -> bool:
    """Whether pages of one mean the same on the other: one model, one layout, one protocol."""
    return (prefill.model, prefill.signature, prefill.protocol) == (decode.model, decode.signature, decode.protocol)


def _size(worker: WorkerView) -> int:
    """Tokens of the longest request that fits an empty worker; a pool hands out whole pages."""
    whole_pages = worker.info.total_tokens // PAGE_TOKENS * PAGE_TOKENS
    return min(worker.info.max_context, whole_pages) if worker.info.max_context else whole_pages


def _holds(worker: WorkerView, tokens: int) -> bool:
    return tokens <= _size(worker)
