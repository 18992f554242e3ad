"""A cluster whose workers are hosts of their own, with a network between them that can be made a bad one.

Two ways to have that on one machine. `proxied`: every worker listens on an address of the loopback that nobody dials,
and is known by another where a proxy listens; to Redis each process has a proxy of its own. `apart`: every worker is in
a network namespace behind a cable, with a monotonic clock that began at another time; that needs root, and everything
in a namespace of its own (chaos/apart.py), so that nothing of it is left on the machine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chaos.cluster import ChaosFailed, Cluster, until
from chaos.proxy import Network, Proxy
from deploy.redis import EmbeddedRedis, free_port
from deploy.services import penumbra_command, threads_environment
from deploy.supervisor import ChildSpec, Supervisor, tethered

GRACE_S = 30.0
BRIDGE = "10.77.0.1"


@dataclass(slots=True)
class Host:
    """A worker and what is between it and everybody else."""

    name: str
    address: str  # that others dial
    redis: Proxy
    doors: tuple[Proxy, ...] = ()  # in front of its ports
    cable: str = ""  # our end of it
    holder: int = 0  # a process of its namespace
    clock_s: int = 0  # its monotonic clock is so far ahead of ours
    spec: ChildSpec | None = field(default=None, repr=False)


class Hosts(Cluster):
    """Held by `proxied` or `apart`. Workers that die are started again when somebody waits for the cluster."""

    def __init__(
        self,
        urls: tuple[str, ...],
        logs: Path,
        hosts: dict[str, Host],
        supervisor: Supervisor,
        network: Network,
        redis: Proxy,
    ) -> None:
        """`redis` is the routers' proxy to Redis."""
        super().__init__(urls[0], logs)
        self.urls, self.hosts, self.network, self.redis = urls, hosts, network, redis
        self._supervisor = supervisor

    def pids(self) -> dict[str, int]:
        return {child.name: child.pid for child in self._supervisor.children}

    def wanted(self) -> set[str]:
        return set(self.hosts)

    def mend(self) -> None:
        for child in self._supervisor.children:
            if child.exit_code is not None:
                self._supervisor.replace(child)

    def to_redis(self) -> list[Proxy]:
        """Everybody's way to Redis."""
        return [self.redis, *(host.redis for host in self.hosts.values())]


@contextlib.contextmanager
def proxied(
    folder: Path, model: Path, redis: EmbeddedRedis, *, prefill: int, decode: int, routers: int = 1
) -> Iterator[Hosts]:
    """A cluster behind proxies, ready."""
    with Network() as network:
        hosts = {}
        for number, name in enumerate(_names(prefill, decode)):
            ports, address = (free_port(), free_port()), f"127.0.1.{number + 1}"
            doors = tuple(network.proxy(("127.0.0.1", port), (address, port)) for port in ports)
            to_redis = network.proxy(("127.0.0.1", redis.port))
            host = hosts[name] = Host(name, address, to_redis, doors)
            host.spec = _worker(host, model, "127.0.0.1", ports, f"redis://127.0.0.1:{to_redis.address[1]}/0")
        with _started(folder, model, redis, network, hosts, routers) as cluster:
            yield cluster


@contextlib.contextmanager
def apart(folder: Path, model: Path, redis: EmbeddedRedis, *, prefill: int, decode: int) -> Iterator[Hosts]:
    """A cluster in network namespaces, ready. The caller is root, in a network namespace that it may change."""
    with Network() as network, contextlib.ExitStack() as held:
        _ip("link", "add", "hub", "type", "bridge")
        held.callback(_ip, "link", "del", "hub")
        _ip("addr", "add", f"{BRIDGE}/24", "dev", "hub")
        _ip("link", "set", "hub", "up")
        hosts = {}
        for number, name in enumerate(_names(prefill, decode)):
            to_redis = network.proxy(("127.0.0.1", redis.port), (BRIDGE, 0))
            host = hosts[name] = Host(name, f"10.77.0.{number + 10}", to_redis, cable=f"cable{number}")
            host.clock_s = 3_600 * 24**number  # an hour, a day, a month and a year and a half ahead
            host.holder = held.enter_context(_namespace(host))
            spec = _worker(host, model, host.address, (50051, 50052), f"redis://{BRIDGE}:{to_redis.address[1]}/0")
            clock = ("--monotonic", str(host.clock_s), "--boottime", str(host.clock_s))
            inside = ("nsenter", f"--net=/proc/{host.holder}/ns/net", "unshare", "--time", *clock, "--")
            # Pages are to travel over the cable, not through memory that both ends see.
            host.spec = ChildSpec(name=name, command=inside + spec.command, env={**spec.env, "UCX_TLS": "tcp"})
        with _started(folder, model, redis, network, hosts, 1) as cluster:
            yield cluster


def raise_loopback() -> None:
    """In a new network namespace nobody can talk to himself before."""
    _ip("link", "set", "lo", "up")


def plug(host: Host, *, connected: bool) -> None:
    """Connect or cut the host's cable. Nobody is told: packets are lost."""
    _ip("link", "set", host.cable, "up" if connected else "down")


def deafen(host: Host, to: Host, *, hears: bool) -> None:
    """Whether what `host` sends reaches `to`; the other way is left alone."""
    action = "del" if hears else "add"
    _ip("route", action, "blackhole", f"{to.address}/32", inside=host.holder)


def _names(prefill: int, decode: int) -> list[str]:
    return [*(f"prefill-{i}" for i in range(prefill)), *(f"decode-{i}" for i in range(decode))]


def _worker(host: Host, model: Path, listen: str, ports: tuple[int, ...], redis_url: str) -> ChildSpec:
    role = host.name.partition("-")[0]
    command = penumbra_command(
        role,
        *("--model", str(model), "--redis", redis_url, "--worker-id", host.name),
        *("--host", listen, "--advertise-host", host.address),
        *("--port", str(ports[0]), "--http-port", str(ports[1]), "--grace-s", str(GRACE_S)),
    )
    return ChildSpec(name=host.name, command=command, env=threads_environment(1))


@contextlib.contextmanager
def _started(
    folder: Path, model: Path, redis: EmbeddedRedis, network: Network, hosts: dict[str, Host], routers: int
) -> Iterator[Hosts]:
    to_redis = network.proxy(("127.0.0.1", redis.port))
    ports = [free_port() for _ in range(routers)]
    specs = [
        ChildSpec(
            name=f"router-{i}" if i else "router",
            command=penumbra_command(
                "router",
                *("--model", str(model), "--redis", f"redis://127.0.0.1:{to_redis.address[1]}/0"),
                *("--port", str(port), "--expected-routers", str(routers)),
            ),
            env=threads_environment(1),
        )
        for i, port in enumerate(ports)
    ]
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    folder.mkdir(parents=True, exist_ok=True)
    with Supervisor(log_dir=folder, echo=lambda name, line: None, grace_s=GRACE_S) as supervisor:
        cluster = Hosts(urls, folder, hosts, supervisor, network, to_redis)
        supervisor.start(specs)
        supervisor.start([host.spec for host in hosts.values() if host.spec is not None])
        cluster.wait_until_whole()
        yield cluster


@contextlib.contextmanager
def _namespace(host: Host) -> Iterator[int]:
    """A network namespace with one end of a cable, the other in ours; -> the pid of a process that keeps it."""
    holder = subprocess.Popen(tethered(("unshare", "--net", "sleep", "infinity")))
    try:
        ours = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != ours, 10.0, "no network namespace was made")
        _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        _ip("link", "set", host.cable, "master", "hub", "up")
        _ip("addr", "add", f"{host.address}/24", "dev", "eth0", inside=holder.pid)
        for device in ("lo", "eth0"):
            _ip("link", "set", device, "up", inside=holder.pid)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def _ip(*words: str, inside: int = 0) -> None:
    enter = ("nsenter", f"--net=/proc/{inside}/ns/net") if inside else ()
    done = subprocess.run((*enter, "ip", *words), capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise ChaosFailed(f"ip {' '.join(words)}: {done.stderr.strip()}")


def can_be_apart() -> str:
    """Why workers can not be in namespaces here, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root, for a network namespace for each worker"
    tried = subprocess.run(("unshare", "--net", "ip", "link", "set", "lo", "up"), capture_output=True, check=False)
    return "" if tried.returncode == 0 else "network namespaces can not be made here"
