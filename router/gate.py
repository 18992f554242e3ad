"""Who may go to the workers now, who waits, and who is told to come again. Pure: events in, actions out.

Nothing is computed for a request that has no room yet. It is let in when a decode worker has pages for its prompt and
prefill is not too far behind; until then it waits here, where priorities count and a client that leaves costs nothing.

Prompts of similar length share a *lane*. Each lane has its own part of prefill's patience and its own first in line, so
one of 900,000 tokens that finds no room keeps none of 2,000 waiting; and when somebody has waited long for room that
others use up, those get no more than a small part of it until he is in.
Within a lane the lower priority number goes first, then the tenant that has been served least for its weight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass, field

from router.fleet import FleetSnapshot
from router.placement import kind_of
from wire.errors import Overloaded, PenumbraError, QueueTimeout, RateLimited, WouldWait

UNMEASURED_BACKLOG_TOKENS = 65_536
"""How far behind a prefill worker may be that has not measured how fast it is."""

LONG_RESERVE = 0.05
"""Of a decode worker's pages, kept for the shortest lane."""

AGED_SHARE = 0.125
"""Of all decode pages, what another lane may hold while somebody has waited too long for room."""

SHED_SHARE = 0.5
"""Who would wait for more than this share of the longest wait is told at once: he who is let into the line gets in."""

RETRY_AFTER_S = (1.0, 120.0)
"""The least and the most a client is told to wait, whatever was computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLimits:
    """Times in seconds, sizes in tokens."""

    lane_edges: tuple[int, ...] = (8_192, 131_072)  # a prompt of so many tokens is in the next lane
    max_waiting: int = 256
    max_waiting_tokens: int = 8_000_000
    timeout_s: float = 60.0
    backlog_s: float = 10.0  # of prefill's work that may be let in ahead, for each lane
    aged_s: float = 10.0  # after so long room is saved up for who is first in line
    tenant_share: float = 0.5  # of the places in line, for one tenant among several


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request at the gate. Sizes in tokens."""

    request_id: str
    prompt_tokens: int
    compute_tokens: int  # of those, what no worker is believed to hold
    kv_tokens: int  # room on a decode worker: the prompt, and some for each answer to grow into
    tenant: str = "default"
    weight: float = 1.0
    priority: int = 0  # lower goes first
    may_wait: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """A decode worker as the gate sees it."""

    free_tokens: int
    total_tokens: int
    idle: bool
    free_places: int | None = None  # requests that can run beside those there are; None: as many as there are pages for


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the fleet has to offer. Without a pair of workers there is nothing to wait for."""

    desks: tuple[Desk, ...] = ()
    num_prefill: int = 0
    prefill_tokens_per_s: float = 0.0  # of all prefill workers together; 0 while unmeasured


def room_of(fleet: FleetSnapshot) -> Room:
    """The room on workers that have a partner."""
    sides = [{kind_of(worker.info) for worker in workers if worker.usable} for workers in (fleet.prefill, fleet.decode)]
    both = sides[0] & sides[1]
    prefill, decode = (
        [worker for worker in workers if worker.usable and kind_of(worker.info) in both]
        for workers in (fleet.prefill, fleet.decode)
    )
    costs = [worker.info.prefill_token_ns for worker in prefill]
    return Room(
        desks=tuple(
            Desk(
                free_tokens=worker.free_tokens,
                total_tokens=worker.info.total_tokens,
                idle=worker.num_requests == 0,
                free_places=worker.free_places,
            )
            for worker in decode
        ),
        num_prefill=len(prefill),
        prefill_tokens_per_s=sum(1e9 / cost for cost in costs) if all(costs) else 0.0,
    )


# Events


@dataclass(frozen=True, slots=True)
class Arrived:
    ask: Ask


@dataclass(frozen=True, slots=True)
class Placed:
    """A request that was let in counts in the fleet's own numbers from now on."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Computed:
    """Its first token is here: prefill is done with it."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Left:
    """The request is over or its client is gone, wherever it was. Idempotent."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Looked:
    """This is the room there is now."""

    room: Room


GateEvent = Arrived | Placed | Computed | Left | Looked


# Actions


@dataclass(frozen=True, slots=True)
class Admit:
    request_id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    request_id: str
    error: PenumbraError


GateAction = Admit | Refuse


@dataclass(slots=True, eq=False)
class _Waiting:
    ask: Ask
    lane: int
    since_s: float
    rank: tuple[int, float, int]  # priority, the tenant's turn, order of arrival


@dataclass(slots=True, eq=False)
class _Inside:
    ask: Ask
    lane: int
    placed: bool = False
    computed: bool = False


@dataclass(slots=True)
class _Line:
    """That of a lane in which somebody waits, since when, and when requests of the lane left the workers since."""

    since_s: float
    left: deque[float] = field(default_factory=deque)


class GateCore:
    """Requests at and behind the gate. Times are monotonic seconds."""

    def __init__(self, limits: GateLimits) -> None:
        self._limits = limits
        self._room = Room()
        self._waiting: dict[str, _Waiting] = {}
        self._inside: dict[str, _Inside] = {}
        self._num_arrived = 0
        self._turn = 0.0  # how far the tenants' turns have come, in tokens for a weight of 1
        self._turns: dict[str, float] = {}  # where each waiting tenant's next request stands in them
        self._left_at: float | None = None
        self._between_s = 0.0  # two requests that leave, lately
        self._lines: dict[int, _Line] = {}  # by lane, where somebody waits

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def waiting_kv_tokens(self) -> int:
        return sum(waiting.ask.kv_tokens for waiting in self._waiting.values())

    def next_deadline(self) -> float | None:
        """When a `Looked` is due, whatever happens."""
        return min((waiting.since_s + self._limits.timeout_s for waiting in self._waiting.values()), default=None)

    def step(self, now: float, event: GateEvent) -> list[GateAction]:
        actions: list[GateAction] = []
        match event:
            case Arrived(ask):
                actions = self._arrive(now, ask)
            case Placed(request_id):
                if (inside := self._inside.get(request_id)) is not None:
                    inside.placed = True
                return []
            case Computed(request_id):
                if (inside := self._inside.get(request_id)) is None or inside.computed:
                    return []
                inside.computed = True
            case Left(request_id):
                self._leave(now, request_id)
            case Looked(room):
                self._room = room
                actions = self._expire(now)
        actions += self._let_in(now)
        waiting = {waiting.lane for waiting in self._waiting.values()}
        self._lines = {lane: self._lines.get(lane) or _Line(now) for lane in waiting}
        return actions

    def _arrive(self, now: float, ask: Ask) -> list[GateAction]:
        self._num_arrived += 1
        start = max(self._turn, self._turns.get(ask.tenant, 0.0))
        self._turns[ask.tenant] = start + ask.prompt_tokens / ask.weight
        lane = bisect_right(self._limits.lane_edges, ask.prompt_tokens)
        waiting = _Waiting(ask, lane, now, (ask.priority, start, self._num_arrived))
        actions: list[GateAction] = []
        if self._must_wait(now, waiting):
            if not ask.may_wait:
                return [
                    Refuse(ask.request_id, WouldWait("There is no room right now, and the request is not to wait."))
                ]
            refused = self._make_place(now, waiting)
            if refused is not None:
                actions.append(refused)
                if refused.request_id == ask.request_id:
                    return actions
        self._waiting[ask.request_id] = waiting
        return actions

    def is_short(self, body_bytes: int) -> bool:
        """Whether its prompt is surely of the shortest lane: a body has more bytes than its prompt has tokens."""
        return 2 * body_bytes < self._limits.lane_edges[0]

    def sheds(
        self, now: float, body_bytes: int, tenant: str, weight: float, priority: int, coming: int
    ) -> PenumbraError | None:
        """What a request would be told by how its lane's line is, where that is known before its body is read: a
        short body is of the shortest lane. So many others with short bodies are `coming`: they are being read.

        Under overload this is most of what a router does, and reading costs more than all of it. None: read it and ask.
        """
        if not self.is_short(body_bytes) or self._first(0) is None:
            return None
        ask = Ask(request_id="", prompt_tokens=1, compute_tokens=1, kv_tokens=1, tenant=tenant, weight=weight)
        rank = (priority, max(self._turn, self._turns.get(tenant, 0.0)), self._num_arrived + 1)
        newcomer = _Waiting(ask, 0, now, rank)
        return self._turned_away(now, newcomer, coming) if self._must_wait(now, newcomer) else None

    def _must_wait(self, now: float, newcomer: _Waiting) -> bool:
        before = self._first(newcomer.lane)
        return (before is not None and before.rank < newcomer.rank) or not self._fits(now, newcomer)

    def _turned_away(self, now: float, newcomer: _Waiting, coming: int = 0) -> PenumbraError | None:
        """Why the newcomer is not to wait, though there may be a place in line."""
        tenant = newcomer.ask.tenant
        tenants = {waiting.ask.tenant for waiting in self._waiting.values()} | {tenant}
        mine = sum(waiting.ask.tenant == tenant for waiting in self._waiting.values())
        if len(tenants) > 1 and mine >= max(1, int(self._limits.max_waiting * self._limits.tenant_share)):
            told: PenumbraError = RateLimited(f"{mine} requests of this API key wait for room already. Retry later.")
            return told.after(self.retry_after_s())
        if (wait_s := self._wait_s(now, newcomer, coming)) > SHED_SHARE * self._limits.timeout_s:
            told = Overloaded(f"There will be no room for about {wait_s:.1f} s. Retry later.")
            return told.after(self.retry_after_s())
        return None

    def _make_place(self, now: float, newcomer: _Waiting) -> Refuse | None:
        """A place in line for the newcomer: None if there is one, or who is told to come again so that there is."""
        limits, ask = self._limits, newcomer.ask
        if (error := self._turned_away(now, newcomer)) is not None:
            return Refuse(ask.request_id, error)
        tokens = sum(waiting.ask.prompt_tokens for waiting in self._waiting.values())
        if len(self._waiting) < limits.max_waiting and tokens + ask.prompt_tokens <= limits.max_waiting_tokens:
            return None
        last = max((*self._waiting.values(), newcomer), key=lambda waiting: waiting.rank)
        # Whoever makes place must make enough of it.
        enough = len(self._waiting) <= limits.max_waiting and (
            tokens - last.ask.prompt_tokens + ask.prompt_tokens <= limits.max_waiting_tokens
        )
        if last.ask.priority == ask.priority or not enough:
            last = newcomer
        self._waiting.pop(last.ask.request_id, None)
        full = Overloaded(
            f"{len(self._waiting)} requests with {tokens} prompt tokens wait for room already. Retry later."
        )
        return Refuse(last.ask.request_id, full.after(self.retry_after_s()))

    def _wait_s(self, now: float, newcomer: _Waiting, coming: int) -> float:
        """How long the newcomer would wait, behind so many more than are in line, at the pace others make room. While
        nobody has made any yet, that is slower with every moment.
        """
        line = self._lines.get(newcomer.lane)
        if line is None:
            return 0.0
        oldest = max(line.since_s, now - self._limits.timeout_s)
        while line.left and line.left[0] < oldest:
            line.left.popleft()
        before = sum(w.lane == newcomer.lane and w.rank < newcomer.rank for w in self._waiting.values())
        return (before + coming + 1) * (now - oldest) / (len(line.left) + 1)

    def _leave(self, now: float, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        if (inside := self._inside.pop(request_id, None)) is not None:
            if (line := self._lines.get(inside.lane)) is not None:
                line.left.append(now)
            if self._left_at is not None:
                self._between_s += 0.2 * (now - self._left_at - self._between_s)
            self._left_at = now
        if not self._waiting:
            self._turns.clear()
            self._turn = 0.0

    def _expire(self, now: float) -> list[GateAction]:
        late = [waiting for waiting in self._waiting.values() if now - waiting.since_s >= self._limits.timeout_s]
        for waiting in late:
            del self._waiting[waiting.ask.request_id]
        return [
            Refuse(
                waiting.ask.request_id,
                QueueTimeout(
                    f"There was no room for {waiting.ask.prompt_tokens} prompt tokens within "
                    f"{self._limits.timeout_s:g} s. Retry later."
                ).after(self.retry_after_s()),
            )
            for waiting in late
        ]

    def _let_in(self, now: float) -> list[GateAction]:
        """The first of each lane for as long as there is room, over all lanes in the order of their ranks."""
        actions: list[GateAction] = []
        stuck: set[int] = set()
        while True:
            firsts = [
                first
                for lane in range(len(self._limits.lane_edges) + 1)
                if lane not in stuck and (first := self._first(lane)) is not None
            ]
            if not firsts:
                return actions
            first = min(firsts, key=lambda waiting: waiting.rank)
            if not self._fits(now, first):
                stuck.add(first.lane)
                continue
            del self._waiting[first.ask.request_id]
            self._inside[first.ask.request_id] = _Inside(first.ask, first.lane)
            self._turn = max(self._turn, first.rank[1])
            actions.append(Admit(first.ask.request_id))

    def _first(self, lane: int) -> _Waiting | None:
        return min(
            (w for w in self._waiting.values() if w.lane == lane), key=lambda waiting: waiting.rank, default=None
        )

    def _fits(self, now: float, waiting: _Waiting) -> bool:
        room, ask = self._room, waiting.ask
        if not room.desks or ask.kv_tokens > max(desk.total_tokens for desk in room.desks):
            return True  # there is nothing to wait for; placement says what is wrong
        unplaced = [inside.ask.kv_tokens for inside in self._inside.values() if not inside.placed]
        desks = [desk for desk in room.desks if desk.free_places is None or desk.free_places > len(unplaced)]
        if not any(self._has_room(desk, ask.kv_tokens + sum(unplaced), waiting.lane) for desk in desks):
            return False
        if not self._is_fair(now, waiting):
            return False
        return self._is_prefill_near(waiting)

    def _has_room(self, desk: Desk, tokens: int, lane: int) -> bool:
        if desk.idle and tokens <= desk.total_tokens:
            return True
        return tokens <= desk.free_tokens - (LONG_RESERVE * desk.total_tokens if lane else 0)

    def _is_fair(self, now: float, waiting: _Waiting) -> bool:
        """Room that comes free is for who has waited too long; the other lanes get a small part meanwhile."""
        firsts = (self._first(lane) for lane in range(len(self._limits.lane_edges) + 1) if lane != waiting.lane)
        if not any(first is not None and now - first.since_s >= self._limits.aged_s for first in firsts):
            return True
        if now - waiting.since_s >= self._limits.aged_s:
            return True
        held = sum(inside.ask.kv_tokens for inside in self._inside.values() if inside.lane == waiting.lane)
        total = sum(desk.total_tokens for desk in self._room.desks)
        return not held or held + waiting.ask.kv_tokens <= AGED_SHARE * total

    def _is_prefill_near(self, waiting: _Waiting) -> bool:
        computing = [i.ask for i in self._inside.values() if i.lane == waiting.lane and not i.computed]
        if len(computing) < self._room.num_prefill:
            return True
        rate = self._room.prefill_tokens_per_s
        backlog = rate * self._limits.backlog_s if rate else UNMEASURED_BACKLOG_TOKENS * self._room.num_prefill
        return sum(ask.compute_tokens for ask in computing) + waiting.ask.compute_tokens <= backlog

    def retry_after_s(self) -> float:
        """Seconds until those who wait now are served: by what there is to compute, and by how fast requests leave."""
        rate = self._room.prefill_tokens_per_s
        computing = Counter(inside.computed for inside in self._inside.values())
        tokens = sum(waiting.ask.compute_tokens for waiting in self._waiting.values())
        tokens += sum(inside.ask.compute_tokens for inside in self._inside.values() if not inside.computed)
        compute_s = tokens / rate if rate else 0.0
        leave_s = len(self._waiting) * self._between_s if computing.total() else 0.0
        least, most = RETRY_AFTER_S
        return min(most, max(least, compute_s, leave_s))
