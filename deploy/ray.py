"""Ray as the machines of a cluster: it finds each worker a node, we keep the process there.

A worker has a placement group and, inside it, an actor (`Keeper`) that is the parent of one worker process. The group
outlives the actor: a worker that died comes back where its resources are still set aside and its checkpoint is still in
memory. Routers are children of ours, as their sockets and their files are this machine's. When an actor dies, or its
node, or this process, the kernel ends the worker process (deploy/tether.py), so none is left that nobody looks after.
Ray schedules nothing else: who is started again, when and how often is decided in deploy/cluster.py as on one machine.

Ray runs code that it is sent, to whoever reaches its ports. So its token authentication is always on: a Ray we start
listens on loopback and gets a token of its own, and one that takes calls without a token is refused. Its dashboard is
not started. What travels to actors (`Service`, a path) Ray serialises itself; nothing of it comes from a request.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from deploy.services import PACKAGES, Service
from deploy.supervisor import Child, Echo
from wire.errors import ConfigError

if TYPE_CHECKING:
    from deploy.cluster import ClusterConfig

OBJECT_STORE_BYTES = 80 << 20
"""Ray's least, about: nothing of ours goes through its object store."""
HELD_LINES = 1_000
"""What a process may write between two looks at it; its log file has all of it."""
PLACE_S = 10.0
"""A worker without a node for so long is told of."""
CALL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a keeper says of its process: `lines` are those written since it was last asked."""

    pid: int
    started: float
    exit_code: int | None
    lines: tuple[str, ...]
    tail: tuple[str, ...]
    node: str  # Ray's id of the machine
    address: str


class Keeper:
    """The Ray actor: parent of one process, on whatever machine Ray made it.

    Its methods run on the actor's main thread, one at a time, so the thread that starts the process lives as long as
    the actor, which is what the tether asks for.
    """

    def __init__(self, service: Service, log: Path) -> None:
        import ray

        context = ray.get_runtime_context()
        self._node, self._address = context.get_node_id(), ray.util.get_node_ip_address()
        self._lines: deque[str] = deque(maxlen=HELD_LINES)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._child = Child(service.on(self._address), log=log, echo=lambda name, line: self._lines.append(line))

    def look(self) -> Seen:
        code = self._child.exit_code
        tail = tuple(self._child.tail()) if code is not None else ()
        lines = tuple(self._lines.popleft() for _ in range(len(self._lines)))
        return Seen(
            pid=self._child.pid,
            started=self._child.started,
            exit_code=code,
            lines=lines,
            tail=tail,
            node=self._node,
            address=self._address,
        )

    def send(self, number: int) -> None:
        self._child.send(signal.Signals(number))


class Placed:
    """A process that a keeper looks after. Asking never waits: what is known is from a moment ago."""

    def __init__(self, spec: PlacedSpec, *, log: Path, echo: Echo, group: Any = None) -> None:
        self.name = spec.name
        self.log = log
        self.spec = spec
        self._echo = echo
        self._group = group or spec.machines.new_group()
        self._keeper = spec.machines.new_keeper(spec.service, self._group, log)
        self._asked: Any = self._keeper.look.remote()  # None: there is nothing more to hear
        self._since = time.monotonic()
        self._seen: Seen | None = None
        self._lost: str | None = None  # why there is no keeper any more
        self._told = False

    @property
    def node(self) -> str:
        seen = self._look()
        return "" if seen is None or seen.node == self.spec.machines.node else seen.address

    @property
    def pid(self) -> int:
        seen = self._look()
        return seen.pid if seen else 0

    @property
    def started(self) -> float:
        seen = self._look()
        return seen.started if seen else 0.0

    @property
    def exit_code(self) -> int | None:
        seen = self._look()
        if seen is not None and seen.exit_code is not None:
            return seen.exit_code
        return -signal.SIGKILL if self._lost is not None else None

    def tail(self) -> list[str]:
        seen = self._look()
        return [*(seen.tail if seen else ()), *([self._lost] if self._lost else [])]

    def send(self, number: signal.Signals) -> None:
        if self.exit_code is not None:
            return
        if number == signal.SIGKILL or self._seen is None:  # a keeper that froze, or has no node yet, hears nothing
            self._end()
        else:
            self._keeper.send.remote(int(number))

    def wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def again(self) -> Placed:
        self._end()
        return Placed(self.spec, log=self.log, echo=self._echo, group=self._group)

    def close(self) -> None:
        self._end()
        import ray

        ray.util.remove_placement_group(self._group)

    def _end(self) -> None:
        import ray

        ray.kill(self._keeper)

    def _look(self) -> Seen | None:
        import ray

        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            try:
                self._seen = seen = ray.get(asked)
                for line in seen.lines:
                    self._echo(self.name, line)
                if seen.exit_code is None:
                    self._asked = self._keeper.look.remote()
            except ray.exceptions.ActorUnavailableError:  # a broken connection; the actor may well live
                self._asked = self._keeper.look.remote()
            except ray.exceptions.RayError as error:
                self._lost = f"its Ray actor is gone, and with it the process: {' '.join(str(error).split())}"
        if self._seen is None and not self._told and time.monotonic() - self._since > PLACE_S:
            self._told = True
            if not self._group.wait(0):
                self._echo(self.name, f"waits: no node of the Ray cluster has {self._group.bundle_specs[0]} to spare")
        return self._seen


@dataclass(frozen=True, slots=True)
class PlacedSpec:
    service: Service
    machines: RayMachines

    @property
    def name(self) -> str:
        return self.service.name

    def start(self, *, log: Path, echo: Echo) -> Placed:
        return Placed(self, log=log, echo=echo)


class RayMachines:
    """A Ray cluster, joined or started, held by a `with`."""

    def __init__(self, config: ClusterConfig, folder: Path) -> None:
        assert config.ray is not None
        self._config = config
        self._ray = config.ray
        self._folder = folder
        self.node = ""  # Ray's id of this machine

    def __enter__(self) -> RayMachines:
        with contextlib.ExitStack() as stack:
            ray = self._start(stack) if self._ray.address is None else self._join(stack, self._ray.address)
            self.node = ray.get_runtime_context().get_node_id()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def place(self, service: Service) -> PlacedSpec:
        return PlacedSpec(service, self)

    def new_group(self) -> Any:
        """A worker's resources on one node, which Ray finds."""
        import ray

        return ray.util.placement_group([bundle(self._ray.worker_cpus, self._ray.worker_gpus)], strategy="STRICT_PACK")

    def new_keeper(self, service: Service, group: Any, log: Path) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = group.bundle_specs[0]
        # Not started again by Ray, which would do so at once, for ever, and beside our own back-off.
        options = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "max_restarts": 0}
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        return ray.remote(Keeper).options(**options, scheduling_strategy=where).remote(service, log)

    def _start(self, stack: contextlib.ExitStack) -> Any:
        """A Ray of this node alone, that ends with us."""
        token = self._folder / "ray.token"
        token.unlink(missing_ok=True)
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        stack.callback(token.unlink, missing_ok=True)
        # Short, as the paths of sockets must be, and ours alone.
        scratch = tempfile.mkdtemp(prefix="penumbra-ray-", dir="/tmp")
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        # A Ray that can not be joined from elsewhere: without this one Ray listens on every interface.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["PYTHONPATH"] = PACKAGES
        before = set(psutil.Process().children())
        stack.callback(_end_children, before)
        deadline = time.monotonic() + self._config.ready_timeout_s
        while True:
            try:
                return _initialised(
                    stack,
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=scratch,
                )
            except ConfigError as error:
                # Ray gives its agents 15 s to come up, which a busy machine may need, and leaves the rest behind.
                if "timed out" not in str(error) or time.monotonic() >= deadline:
                    raise
                _end_children(before)

    def _join(self, stack: contextlib.ExitStack, address: str) -> Any:
        ray = _initialised(stack, address=address)
        gcs = ray.get_runtime_context().gcs_address
        if takes_anybody(gcs):
            raise ConfigError(
                f"The Ray cluster at {gcs} takes calls without a token: whoever reaches its ports runs code on every "
                "node. Start all of its nodes with RAY_AUTH_MODE=token and one token, then come back."
            )
        if sum(node["Alive"] for node in ray.nodes()) > 1:
            for flag, value in (("--model", self._config.model), ("--redis", self._config.redis)):
                if value is None:
                    raise ConfigError(
                        f"On a Ray cluster of several nodes {flag} must be given: what is made here for want of it, "
                        "other nodes do not reach."
                    )
        return ray


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    """What Ray sets aside for one worker. Ray wants no zeros, and no empty bundle either."""
    found = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return found or {"CPU": 0.001}


def takes_anybody(gcs_address: str) -> bool:
    """Whether a Ray cluster's control service answers one who shows no token."""
    import grpc

    with grpc.insecure_channel(gcs_address) as channel:
        try:
            # Ray's own "are you there"; its request has no fields that must be set.
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive", None, None)
            call(b"", timeout=CALL_S)
        except grpc.RpcError:
            return False
    return True


def _end_children(before: Set[psutil.Process]) -> None:
    """End what Ray has left of what it started."""
    left = set(psutil.Process().children()) - before
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(left, timeout=CALL_S)


def _initialised(stack: contextlib.ExitStack, **words: Any) -> Any:
    """Ray, connected until the stack closes. Our signal handlers stay: Ray puts its own in their place."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to Ray's makers
    try:
        import ray
    except ImportError as error:
        raise ConfigError('A cluster on Ray needs Ray: make install EXTRAS="ray".') from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        ray.init(**words, namespace="penumbra", log_to_driver=False, configure_logging=False)
    except Exception as error:  # Ray raises all kinds, this one among them
        raise ConfigError(
            f"Ray did not start, or could not be joined: {' '.join(str(error).split())} An address is that of a Ray "
            "cluster of this very version which this machine is a node of, and whose token it has."
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stack.callback(ray.shutdown)
    return ray
