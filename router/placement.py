"""Which prefill and which decode worker a request goes to. Pure: the same fleet and request, the same pair.

What counts is the expected time to the first token, from rates that the workers measure on themselves and report with
their load:

    tokens nobody holds x seconds a token + what is in front of them + bytes not there x seconds a byte

Not every request needs two workers. Where computing the few tokens that a decode worker does not hold takes it less
time than prefill and a transfer would, it computes them itself, and where no prefill worker is left it may have to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from router.fleet import FleetSnapshot, WorkerView
from wire.errors import InvalidRequest, LayoutMismatch, NoWorkers, PenumbraError
from wire.types import PAGE_TOKENS, WorkerInfo

Policy = Literal["expected_ttft", "round_robin", "power_of_two", "least_tokens"]

TOKEN_S = 1e-3
"""Computing a prompt token, while no worker has measured it. Only ratios matter then."""

MOVED_TOKEN_COST = 1 / 32
"""What moving a token's pages costs while nobody has measured it, where computing the token costs 1. Even far off, it
tells a decode worker that holds a long prefix from one that does not."""

ROOM_COST = 64
"""What a token costs that a full pool has no room for: others have to finish first, one decode step at a time."""

SEQUENCE_COST = 256
"""What each sequence costs that shares decode steps with this one. Not a part of the first token's time, but of all
later ones'."""

GROWTH_TOKENS = 512
"""Of an answer whose length nobody knows, what counts as its room from the start: as on decode workers themselves."""

DEPTH_TOKENS = 1024
"""Workers report how much more a token takes for each so many tokens in front of it."""


class Reason(StrEnum):
    """Why a request was placed as it was; the values label a metric, so there are few."""

    POLICY = "policy"  # two workers, as the policy chose them
    LONG = "long"  # two workers: more tokens to compute than a decode worker takes on
    FASTER = "faster"  # two workers, measured faster than one
    UNMEASURED = "unmeasured"  # two workers: no decode worker knows how fast it computes prompts
    SHORT = "short"  # the decode worker alone, measured faster
    CACHED = "cached"  # the same, and most of the prompt was there
    NO_PREFILL = "no_prefill"  # the decode worker alone, for want of any other


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    """What an operator decides about placement."""

    policy: Policy = "expected_ttft"
    local_prefill_tokens: int = 0  # a decode worker computes at most so many of a prompt itself; 0: none
    on_no_prefill: Literal["local", "reject"] = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request goes, and how many of the prompt's tokens each worker was believed to hold.

    Without `prefill` the decode worker computes the prompt itself.
    """

    prefill: WorkerInfo | None
    decode: WorkerInfo
    prefill_resident: int = 0
    decode_resident: int = 0
    reason: Reason = Reason.POLICY
    expected_s: float = 0.0  # to the first token

    @property
    def decision(self) -> Literal["disaggregated", "local"]:
        return "local" if self.prefill is None else "disaggregated"


def choose(
    fleet: FleetSnapshot,
    prompt_tokens: int,
    max_tokens: int,
    exclude: Collection[str] = (),
    resident: Mapping[str, int] = MappingProxyType({}),
    *,
    rules: PlacementRules = PlacementRules(),
    turn: int = 0,
) -> Placement | None:
    """The best placement the rules allow, or None when there is none.

    resident  prompt tokens that a worker already holds, by worker id; a worker not named holds none
    turn      counts placements; what round robin goes by, and the chance in the power of two choices

    A worker that could never hold the request is passed over; one that is merely full is not, its tokens that
    have to leave first count as cost. Ties go to the lower worker ids.
    """
    request = _Request(fleet, prompt_tokens, max_tokens, resident)
    groups = [
        group
        for prefills, decodes in _groups(fleet, exclude)
        if all(
            group := (
                [worker for worker in prefills if _holds(worker, prompt_tokens)],
                [worker for worker in decodes if _holds(worker, prompt_tokens + max_tokens)],
            )
        )
    ]
    alone = [
        decode
        for decode in fleet.decode
        if decode.usable
        and decode.info.worker_id not in exclude
        and decode.info.local_prefill
        and _holds(decode, prompt_tokens + max_tokens)
    ]
    if not groups:
        if rules.on_no_prefill == "reject" or not alone or any(view.usable for view in fleet.prefill):
            return None
        return request.local(min(alone, key=request.local_cost), Reason.NO_PREFILL)
    pair = _POLICIES[rules.policy](request, groups, turn)
    if not rules.local_prefill_tokens or not alone:
        return request.pair(pair, Reason.POLICY)
    decode = min(alone, key=request.local_cost)
    if prompt_tokens - request.held(decode) > rules.local_prefill_tokens:
        return request.pair(pair, Reason.LONG)
    if not decode.info.prefill_token_ns:
        return request.pair(pair, Reason.UNMEASURED)
    if request.local_cost(decode) >= request.pair_cost(pair):
        return request.pair(pair, Reason.FASTER)
    return request.local(decode, Reason.CACHED if 2 * request.held(decode) >= prompt_tokens else Reason.SHORT)


Group = tuple[list[WorkerView], list[WorkerView]]
"""Prefill and decode workers any two of which can serve a request together."""

Pair = tuple[WorkerView, WorkerView]
Cost = tuple[float, str, str]  # in seconds, and then by ids


class _Request:
    """One request's costs on a fleet, in seconds and then by worker ids."""

    def __init__(self, fleet: FleetSnapshot, prompt_tokens: int, max_tokens: int, resident: Mapping[str, int]) -> None:
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._resident = resident
        measured = [view.info.prefill_token_ns for view in fleet.prefill if view.info.prefill_token_ns]
        # Who has measured nothing yet is taken to be like the others.
        self._token_s = sum(measured) / len(measured) / 1e9 if measured else TOKEN_S

    def held(self, worker: WorkerView) -> int:
        # The last token is always computed: it is what the first answer token is drawn from.
        return min(self._resident.get(worker.info.worker_id, 0), self._prompt_tokens - 1)

    def pair_cost(self, pair: Pair) -> Cost:
        prefill, decode = pair
        return self.prefill_cost(prefill)[0] + self.decode_cost(decode)[0], *_ids(pair)

    def prefill_cost(self, prefill: WorkerView) -> tuple[float, str]:
        return self._prefill_s(prefill), prefill.info.worker_id

    def decode_cost(self, decode: WorkerView) -> tuple[float, str]:
        return self._transfer_s(decode) + self._shared_s(decode), decode.info.worker_id

    def local_cost(self, decode: WorkerView) -> Cost:
        """Everybody in the batch waits while the chunks of this prompt are computed, so their time counts as well."""
        missing = self._prompt_tokens - self.held(decode)
        compute_s = self._compute_s(decode, missing + decode.info.computing_tokens, self.held(decode))
        seconds = compute_s * (1 + decode.num_requests) + self._shared_s(decode)
        return seconds, "", decode.info.worker_id

    def pair(self, pair: Pair, reason: Reason) -> Placement:
        prefill, decode = pair
        return Placement(
            prefill=prefill.info,
            decode=decode.info,
            prefill_resident=self.held(prefill),
            decode_resident=self.held(decode),
            reason=reason,
            expected_s=self._prefill_s(prefill) + self._transfer_s(decode),
        )

    def local(self, decode: WorkerView, reason: Reason) -> Placement:
        missing, held = self._prompt_tokens - self.held(decode), self.held(decode)
        return Placement(
            prefill=None,
            decode=decode.info,
            decode_resident=held,
            reason=reason,
            expected_s=self._compute_s(decode, missing + decode.info.computing_tokens, held),
        )

    def _prefill_s(self, prefill: WorkerView) -> float:
        missing = self._prompt_tokens - self.held(prefill)
        # Prompts take turns and the one with the least left goes first every other time: so a prompt waits for at
        # most as much of each other one as it has itself, and 2,000 tokens not for 900,000. But tokens of a long
        # prompt take longer the more there are in front of them.
        ahead = min(prefill.pending_tokens, max(1, prefill.num_requests) * missing)
        full = ROOM_COST * self._token_s * max(0, missing - prefill.free_tokens)
        return (
            self._compute_s(prefill, missing, self.held(prefill))
            + self._compute_s(prefill, ahead, prefill.info.queued_depth)
            + full
        )

    def _transfer_s(self, decode: WorkerView) -> float:
        info, missing = decode.info, self._prompt_tokens - self.held(decode)
        if info.transfer_bytes_per_s:
            return missing * info.kv_token_bytes / info.transfer_bytes_per_s + info.exposed_us / 1e6
        return missing * MOVED_TOKEN_COST * self._token_s

    def _shared_s(self, decode: WorkerView) -> float:
        missing = self._prompt_tokens - self.held(decode)
        full = ROOM_COST * max(0, missing + min(self._max_tokens, GROWTH_TOKENS) - decode.free_tokens)
        return (full + SEQUENCE_COST * decode.num_requests) * self._token_s

    def _compute_s(self, worker: WorkerView, tokens: int, depth: int) -> float:
        """Of so many tokens in a row behind `depth` others."""
        info = worker.info
        middle = (depth + tokens / 2) / DEPTH_TOKENS
        each = (info.prefill_token_ns + middle * info.prefill_depth_ns) / 1e9 or self._token_s
        return tokens * each


def _least_ttft(request: _Request, groups: list[Group], turn: int) -> Pair:
    # A pair costs what its two workers cost, so each side is looked through once and not with each of the other.
    best = [
        (min(prefills, key=request.prefill_cost), min(decodes, key=request.decode_cost)) for prefills, decodes in groups
    ]
    return min(best, key=request.pair_cost)


def _round_robin(request: _Request, groups: list[Group], turn: int) -> Pair:
    """Every worker in its turn, whatever it holds or has to do."""
    ordered = sorted(
        ((prefill, decodes) for prefills, decodes in groups for prefill in prefills),
        key=lambda one: one[0].info.worker_id,
    )
    prefill, decodes = ordered[turn % len(ordered)]
    return prefill, sorted(decodes, key=_id)[turn // len(ordered) % len(decodes)]


def _power_of_two(request: _Request, groups: list[Group], turn: int) -> Pair:
    """On each side the cheaper of two taken as if by chance: nearly as even as the best of all, without a herd."""
    # Knuth's multiplicative hash: turns that follow each other land far apart.
    draw = turn * 2_654_435_761 % (1 << 32)
    prefills, decodes = groups[draw % len(groups)]
    return (
        min(_two_of(prefills, draw // len(groups)), key=request.prefill_cost),
        min(_two_of(decodes, (draw >> 8) ^ draw), key=request.decode_cost),
    )


def _two_of(workers: list[WorkerView], draw: int) -> list[WorkerView]:
    """Two different ones, if there are two."""
    ordered, n = sorted(workers, key=_id), len(workers)
    first = draw % n
    return [ordered[first], ordered[(first + 1 + (draw >> 16) % max(1, n - 1)) % n]]


def _least_tokens(request: _Request, groups: list[Group], turn: int) -> Pair:
    """The fewest tokens in front of the prompt, and then in the answer's batch; what workers hold does not count."""

    def waiting(prefill: WorkerView) -> tuple[int, str]:
        return prefill.pending_tokens, _id(prefill)

    def used(decode: WorkerView) -> tuple[int, str]:
        return decode.info.total_tokens - decode.free_tokens, _id(decode)

    best = [(min(prefills, key=waiting), min(decodes, key=used)) for prefills, decodes in groups]
    return min(best, key=lambda pair: (waiting(pair[0])[0], used(pair[1])[0], *_ids(pair)))


_POLICIES: dict[Policy, Callable[[_Request, list[Group], int], Pair]] = {
    "expected_ttft": _least_ttft,
    "round_robin": _round_robin,
    "power_of_two": _power_of_two,
    "least_tokens": _least_tokens,
}


def _id(worker: WorkerView) -> str:
    return worker.info.worker_id


def _ids(pair: Pair) -> tuple[str, str]:
    return _id(pair[0]), _id(pair[1])


def why_not(fleet: FleetSnapshot, prompt_tokens: int, max_tokens: int) -> PenumbraError:
    """What to tell the client when `choose` found nothing, even with nobody excluded."""
    for role, workers in (("prefill", fleet.prefill), ("decode", fleet.decode)):
        if not any(view.usable for view in workers):
            known = f"{len(workers)} known, none of them serving" if workers else "none is known"
            return NoWorkers(f"No {role} worker can take this request: {known}. Retry in a moment.")
    groups = _groups(fleet, ())
    if not groups:
        return LayoutMismatch(
            "No prefill and decode worker hold the same model in the same page layout, so no pair can serve this "
            "request. Start both pools from one checkpoint with one kv-layout."
        )
    prompt_room = max(_size(prefill) for prefills, _ in groups for prefill in prefills)
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
    return max((_size(decode) for _, decodes in _groups(fleet, ()) for decode in decodes), default=None)


def _groups(fleet: FleetSnapshot, exclude: Collection[str]) -> list[Group]:
    """The usable workers by what they may be paired with, where there is somebody on both sides."""
    found: dict[tuple[str, str, int], Group] = {}
    for side, workers in enumerate((fleet.prefill, fleet.decode)):
        for worker in workers:
            if worker.usable and worker.info.worker_id not in exclude:
                found.setdefault(kind_of(worker.info), ([], []))[side].append(worker)
    return [group for _, group in sorted(found.items()) if all(group)]


def kind_of(worker: WorkerInfo) -> tuple[str, str, int]:
    """Workers of one kind may be paired: pages of one mean the same on the other, by model, layout and protocol."""
    return worker.model, worker.signature, worker.protocol


def pair_states(fleet: FleetSnapshot) -> dict[str, dict[str, str]]:
    """Prefill worker -> decode worker -> "usable", or why no request goes to the two of them."""

    def state(prefill: WorkerView, decode: WorkerView) -> str:
        if kind_of(prefill.info) != kind_of(decode.info):
            return "incompatible"
        for view in (prefill, decode):
            if not view.usable:
                return f"{view.info.worker_id} {'draining' if view.info.draining else 'down'}"
        return "usable"

    return {p.info.worker_id: {d.info.worker_id: state(p, d) for d in fleet.decode} for p in fleet.prefill}


def pair_counts(fleet: FleetSnapshot) -> dict[str, int]:
    """How many pairs are usable, how many are not for now, and how many can never be. In time linear in workers."""
    prefill, decode = (Counter(kind_of(view.info) for view in views) for views in (fleet.prefill, fleet.decode))
    alike = sum(count * decode[kind] for kind, count in prefill.items())
    usable = sum(len(prefills) * len(decodes) for prefills, decodes in _groups(fleet, ()))
    return {
        "usable": usable,
        "unusable": alike - usable,
        "incompatible": len(fleet.prefill) * len(fleet.decode) - alike,
    }


def _size(worker: WorkerView) -> int:
    """Tokens of the longest request that fits an empty worker; a pool hands out whole pages."""
    whole_pages = worker.info.total_tokens // PAGE_TOKENS * PAGE_TOKENS
    return min(worker.info.max_context, whole_pages) if worker.info.max_context else whole_pages


def _holds(worker: WorkerView, tokens: int) -> bool:
    return tokens <= _size(worker)
