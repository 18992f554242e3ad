"""Whether a request is taken, when it goes to the workers, and how many run: the shell around the gate."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from router.attempts import RelayRequest
from router.config import RouterConfig
from router.fleet import FleetSnapshot
from router.gate import Admit, Arrived, Ask, Computed, GateAction, GateCore, GateEvent, Left, Looked, Placed, room_of
from router.mirror import PrefixMirror
from router.placement import GROWTH_TOKENS
from router.tenants import Tenant
from wire.errors import Draining, Overloaded
from wire.telemetry import RouterMetrics

LOOK_S = 0.05
"""Between two looks at the fleet while requests wait for room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How a client wants to wait."""

    priority: int = 0  # lower goes first
    may_wait: bool = True


class Turn:
    """A request behind the gate: what the gate wants to hear of it."""

    def __init__(self, admission: Admission, request_id: str) -> None:
        self._admission, self._request_id = admission, request_id
        self._computed = False

    def placed(self) -> None:
        self._admission.tell(Placed(self._request_id))

    def computed(self) -> None:
        """The first token is here. Idempotent."""
        if not self._computed:
            self._computed = True
            self._admission.tell(Computed(self._request_id))


class Admission:
    """The gate, the count of running requests and its limit. `draining` refuses new work."""

    def __init__(
        self, config: RouterConfig, metrics: RouterMetrics, look: Callable[[], FleetSnapshot], mirror: PrefixMirror
    ) -> None:
        """`look` takes a snapshot of the fleet."""
        self._most = config.max_concurrent_requests
        self._metrics = metrics
        self._look = look
        self._mirror = mirror
        self._gate = GateCore(config.gate)
        self._answers: dict[str, asyncio.Future[None]] = {}  # of those that wait
        self._wanted = asyncio.Event()  # a look at the fleet, since somebody waits
        self._running = 0
        self._coming = 0  # requests with short bodies that are being read
        self.draining = False

    def check(self) -> None:
        """Raises Draining or Overloaded when a request would not be taken now."""
        if self.draining:
            raise Draining("This router is shutting down. Retry with another one.")
        if self._running >= self._most:
            raise Overloaded(
                f"{self._running} requests are running, the most this router serves at once. Retry in a moment."
            ).after(self._gate.retry_after_s())

    def check_line(self, body_bytes: int, tenant: Tenant, wishes: Wishes) -> None:
        """Raises Overloaded or RateLimited for a request that would be shed whatever its body says."""
        priority = max(wishes.priority, tenant.priority)
        shed = self._gate.sheds(time.monotonic(), body_bytes, tenant.tenant_id, tenant.weight, priority, self._coming)
        if shed is not None:
            raise shed

    @contextlib.contextmanager
    def coming(self, body_bytes: int) -> Iterator[None]:
        """The request is being read for the length of the block, and then comes to the gate."""
        short = self._gate.is_short(body_bytes)
        self._coming += short
        try:
            yield
        finally:
            self._coming -= short

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The request runs for the length of the block."""
        self._running += 1
        self._metrics.running.inc()
        try:
            yield
        finally:
            self._running -= 1
            self._metrics.running.dec()

    @contextlib.asynccontextmanager
    async def turn(self, request: RelayRequest, tenant: Tenant, wishes: Wishes) -> AsyncIterator[Turn]:
        """Wait for room, then hold it for the length of the block.

        Raises Overloaded, RateLimited, QueueTimeout or WouldWait for a request that gets none; nothing was computed
        for it then.
        """
        request_id, began = request.request_id, time.monotonic()
        fleet = self._look()
        # Whoever waits may be let in by this look, and must hear of it: the gate says so only once.
        self.tell(Looked(room_of(fleet)))
        answer = self._answers[request_id] = asyncio.get_running_loop().create_future()
        try:
            self.tell(Arrived(self._ask(request, tenant, wishes, fleet)))
            await answer
            self._metrics.queue_time.observe(time.monotonic() - began)
            yield Turn(self, request_id)
        finally:
            self._answers.pop(request_id, None)
            self.tell(Left(request_id))

    def tell(self, event: GateEvent) -> None:
        self._carry_out(self._gate.step(time.monotonic(), event))

    async def run(self) -> None:
        """Look at the fleet for those that wait, until cancelled."""
        while True:
            await self._wanted.wait()
            while self._gate.num_waiting:
                await asyncio.sleep(LOOK_S)
                self.tell(Looked(room_of(self._look())))
            self._wanted.clear()

    def _ask(self, request: RelayRequest, tenant: Tenant, wishes: Wishes, fleet: FleetSnapshot) -> Ask:
        num_tokens = len(request.prompt)
        held = max(
            (
                self._mirror.resident_tokens(view.info.worker_id, request.digests.get(view.info.model, ()))
                for view in fleet.prefill
            ),
            default=0,
        )
        return Ask(
            request_id=request.request_id,
            prompt_tokens=num_tokens,
            # Of one prompt with several answers all but the first find it in the cache.
            compute_tokens=0 if request.sampling.choice else num_tokens - min(held, num_tokens - 1),
            kv_tokens=num_tokens + min(request.sampling.max_tokens, GROWTH_TOKENS),
            tenant=tenant.tenant_id,
            weight=tenant.weight,
            priority=max(wishes.priority, tenant.priority),
            may_wait=wishes.may_wait,
        )

    def _carry_out(self, actions: list[GateAction]) -> None:
        for action in actions:
            answer = self._answers.get(action.request_id)
            if answer is None or answer.done():
                continue
            if isinstance(action, Admit):
                answer.set_result(None)
            else:
                answer.set_exception(action.error)
        self._metrics.waiting.set(self._gate.num_waiting)
        if self._gate.num_waiting:
            self._wanted.set()
