"""A whole cluster: Redis, a router, N prefill and M decode workers, on this machine or placed by Ray (deploy/ray.py).

`run` stays in front of them until Ctrl-C or SIGTERM and leaves none behind; even SIGKILL takes them along
(deploy/tether.py). Whoever dies or falls silent once the cluster is up is started again. A state file in the cluster's
folder says what runs, for those who look at it (deploy/state.py); what `scale` asks for comes through a file beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from rich.console import Console
from rich.status import Status
from rich.text import Text

from deploy.redis import EmbeddedRedis
from deploy.services import Service, penumbra_command, threads_environment
from deploy.state import POLL_S, ClusterState, Member, cluster_folder, fetch_json, loads, ready_line
from deploy.supervisor import RESTART_S, ChildSpec, Restarts, Running, Startable, Supervisor
from wire.door import listen
from wire.errors import ConfigError

BUNDLED_MODEL = "penumbra-nano"
"""What the bundled model is called in the API."""

COLOURS = {"router": "cyan", "prefill": "green", "decode": "magenta", "redis": "yellow", "penumbra": "bold"}
KILL_AFTER_S = 3.0
SILENCE_S = 20.0
"""A child that has answered before and then does not for so long, is ended and started again."""
REDIS_RESTART_S = 1.0
"""Between two tries to replace an embedded Redis that died; streams go on without it meanwhile."""


def bundled_model() -> Path:
    """The trained checkpoint that comes with the source. Raises ConfigError for a package installed without it."""
    folder = Path(__file__).parents[1] / "models" / "nano"
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "The bundled model comes with the source, in models/nano, and this package was installed without it. Give "
            "--model the folder of a DeepSeek-V4 checkpoint; `penumbra model tiny OUT` writes a small random one."
        )
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """How Ray places the workers. What a worker is given is what Ray counts, not a limit that anybody enforces."""

    address: str | None = None  # of a running Ray cluster; None: a Ray of one node, on loopback, for as long as we run
    worker_cpus: float = 1.0
    worker_gpus: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What `penumbra up` was asked for. Sizes in bytes, times in seconds."""

    cluster: str = "default"
    home: Path | None = None
    model: Path | None = None  # None: the bundled model
    served_model_name: str | None = None
    prefill: int = 1
    decode: int = 1
    routers: int = 1  # on `port` and the ports after it
    keys: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    redis: str | None = None  # None: an embedded server
    worker_flags: tuple[str, ...] = ()  # passed to every worker as they are
    router_flags: tuple[str, ...] = ()
    threads: int = 1
    ready_timeout_s: float = 300.0
    grace_s: float = 10.0
    restart_pause_s: float = RESTART_S[1]  # the longest before somebody who keeps dying is started again
    ray: RayConfig | None = None  # None: everything on this machine
    echo: bool = True  # what the members write is told here too, not in their logs alone

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode) < 1:
            raise ConfigError(
                f"A cluster needs at least one worker of each kind, not {self.prefill} prefill and {self.decode} "
                "decode: a prompt is read by one and answered by the other."
            )


class Machines(Protocol):
    """What gives workers a machine to run on. Entered before the first is placed, left when all have ended."""

    def __enter__(self) -> Machines: ...

    def __exit__(self, *_: object) -> None: ...

    def place(self, service: Service) -> Startable:
        """The service as something to start; where it then runs is not told beforehand."""


class ThisMachine:
    def __enter__(self) -> ThisMachine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def place(self, service: Service) -> ChildSpec:
        return service.on("127.0.0.1")


def run(config: ClusterConfig, console: Console) -> int:
    """Start the cluster and stay until it is told to stop. -> exit code.

    Raises ConfigError for what can be refused before anything starts.
    """
    folder = cluster_folder(config.home, config.cluster)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder, config.cluster), _Stop() as stop:
        return _Cluster(config, folder, console, stop).run()


def start_detached(config: ClusterConfig, arguments: tuple[str, ...], console: Console) -> int:
    """Run `penumbra *arguments`, which must be `up` in the foreground, in a session of its own; return when ready."""
    folder = cluster_folder(config.home, config.cluster)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder, config.cluster):
        (folder / "state.json").unlink(missing_ok=True)
    log = folder / "penumbra.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            penumbra_command(*arguments),
            env={**os.environ, **threads_environment(1)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + config.ready_timeout_s + 30
    ready = False
    try:
        with _Stop() as asked, console.status("starting"):
            while time.monotonic() < deadline and not asked.wait(POLL_S):
                if process.poll() is not None:
                    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                    console.print("\n".join(lines[-15:]), markup=False, highlight=False, soft_wrap=True)
                    return process.returncode or 1
                state = ClusterState.load(folder)
                if state is not None and state.ready and state.supervisor.pid == process.pid:
                    console.print(ready_line(state), markup=False, highlight=False, soft_wrap=True)
                    ready = True
                    return 0
            if asked.asked:
                return 130
    finally:
        if not ready and process.poll() is None:  # whoever does not get to hear of it must not be left with it
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(config.grace_s + KILL_AFTER_S)
    raise ConfigError(f"The cluster was not ready in {config.ready_timeout_s:g} s; see {log}.")


class _Stop:
    """SIGINT, SIGTERM and SIGHUP, as flags: the first asks for an orderly stop, one more for an immediate one."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._event = threading.Event()
        self.count = 0

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._on_signal) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        self.count += 1
        self._event.set()

    @property
    def asked(self) -> bool:
        return self.count > 0

    def wait(self, timeout_s: float) -> bool:
        return self._event.wait(timeout_s)


@contextlib.contextmanager
def _only_one(folder: Path, cluster: str) -> Iterator[None]:
    """Hold the cluster's name. The kernel lets go of the lock whichever way this process ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"The cluster '{cluster}' is already up. Stop it with `penumbra down --cluster {cluster}`, "
                "or give this one another name with --cluster."
            ) from error
        yield


class _Cluster:
    """One run of a cluster, in the thread that called `run`."""

    def __init__(self, config: ClusterConfig, folder: Path, console: Console, stop: _Stop) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._stop = stop
        # Held here, so that who connects while a router is replaced finds its successor.
        self._doors: list[socket.socket] = []
        # With keys, nobody but administrators sees the workers: this process looks at them on a port of their own.
        self._admin_doors: list[socket.socket] = []
        self._rolling: Iterator[None] | None = None
        self._redis: EmbeddedRedis | None = None
        self._stream_key_written = False
        self._redis_retry_at = 0.0
        self._unsaved = False
        self._model = Path()
        self._redis_url = ""
        self._counts = {"prefill": config.prefill, "decode": config.decode}
        self._leaving: dict[Running, float] = {}  # by scaling down -> when to end them for good
        self._restarts = Restarts(config.restart_pause_s)
        self._listener = _Listener()
        self._machines = self._choose_machines()
        self._saved: ClusterState | None = None
        self._served = config.served_model_name or (config.model.name if config.model else BUNDLED_MODEL)

    def _choose_machines(self) -> Machines:
        if self._config.ray is None:
            return ThisMachine()
        from deploy.ray import RayMachines

        return RayMachines(self._config, self._folder)

    @property
    def _url(self) -> str:
        return self._urls[0]

    @property
    def _urls(self) -> list[str]:
        host = "127.0.0.1" if self._config.host in ("0.0.0.0", "::") else self._config.host
        return [f"http://{host}:{door.getsockname()[1]}" for door in self._doors]

    @property
    def _admin_url(self) -> str:
        return f"http://127.0.0.1:{self._admin_doors[0].getsockname()[1]}" if self._admin_doors else self._url

    def run(self) -> int:
        began = time.monotonic()
        with contextlib.ExitStack() as doors:
            for index in range(self._config.routers):
                port = self._config.port and self._config.port + index
                self._doors.append(doors.enter_context(listen(self._config.host, port)))
                if self._config.keys is not None:
                    self._admin_doors.append(doors.enter_context(listen("127.0.0.1", 0)))
            return self._run(began)

    def _run(self, began: float) -> int:
        if self._config.model is not None and not (self._config.model / "config.json").is_file():
            raise ConfigError(
                f"{self._config.model} holds no config.json, so it is no checkpoint folder. Give --model the folder of "
                "a DeepSeek-V4 checkpoint, or leave it out to serve the bundled model."
            )
        with contextlib.ExitStack() as stack:
            stack.callback((self._folder / "state.json").unlink, missing_ok=True)
            logs = self._folder / "logs"
            logs.mkdir(exist_ok=True)
            status = stack.enter_context(self._console.status("starting"))
            model = self._config.model or bundled_model()
            redis_url = self._config.redis
            if redis_url is None:
                self._redis = stack.enter_context(EmbeddedRedis(log=logs / "redis.log"))
                redis_url = self._redis.url
            stack.enter_context(self._machines)
            if self._stop.asked:
                return 0
            # Each service ends its own grace first, and in an orderly way; the rest is for those that do not.
            echo = self._echo if self._config.echo else lambda name, line: None
            supervisor = Supervisor(log_dir=logs, echo=echo, grace_s=self._config.grace_s + KILL_AFTER_S)
            # Redis was entered first and leaves last: draining workers still take themselves off the registry.
            stack.callback(self._stop_children, supervisor)
            self._model, self._redis_url = model, redis_url
            for asked in ("scale.json", "restart.json"):
                (self._folder / asked).unlink(missing_ok=True)
            stack.callback(self._listener.stop)
            for role in ("prefill", "decode"):
                supervisor.start([self._worker(role, index) for index in range(self._counts[role])])
            supervisor.start([self._router(index) for index in range(self._config.routers)])
            code = self._until_ready(supervisor, status, began)
            if code is None:
                status.stop()
                state = self._save(supervisor, ready=True)
                self._say(f"up in {time.monotonic() - began:.1f} s; logs in {logs}; Ctrl-C stops everything")
                self._say(ready_line(state), style="bold green")
                routers = {"router" if i == 0 else f"router-{i}": url for i, url in enumerate(self._urls)}
                self._listener.start(routers, self._admin_url)
                self._until_stopped(supervisor)
                code = 0
            status.update("stopping")
            return code

    def _until_ready(self, supervisor: Supervisor, status: Status, began: float) -> int | None:
        """None once the router says ready, else the exit code."""
        shown = ""
        wanted = self._config.prefill + self._config.decode
        while not self._stop.wait(POLL_S):
            # What does not come up is not tried again: the reason would come up with it.
            if (child := supervisor.dead()) is not None:
                return self._report(child)
            self._watch_redis()
            self._save(supervisor, ready=False)
            if fetch_json(f"{self._url}/liveness") is None:
                text = "starting the router and the workers"
            else:
                known = len(loads(self._admin_url))
                if known >= wanted and all(fetch_json(f"{url}/readiness") is not None for url in self._urls):
                    return None
                text = f"the router is up; {known} of {wanted} workers have registered"
            status.update(f"{text} ({time.monotonic() - began:.0f} s)")
            if text != shown and not self._console.is_terminal:
                self._say(text)
            shown = text
            if time.monotonic() - began > self._config.ready_timeout_s:
                self._say(
                    f"not ready after {self._config.ready_timeout_s:g} s: {text}. The logs are in "
                    f"{self._folder / 'logs'}; raise --ready-timeout-s on a slow machine.",
                    style="bold red",
                )
                return 1
        return 0

    def _until_stopped(self, supervisor: Supervisor) -> None:
        while not self._stop.wait(POLL_S):
            self._watch_redis()
            self._scale(supervisor)
            self._restart(supervisor)
            self._watch(supervisor)
            self._save(supervisor, ready=True)

    def _watch(self, supervisor: Supervisor) -> None:
        """Whoever died is started again after a pause, and whoever fell silent is ended first."""
        now = time.monotonic()
        for child in supervisor.children:
            if child in self._leaving:
                if now >= self._leaving[child]:
                    child.send(signal.SIGKILL)
                if child.exit_code is not None:
                    del self._leaving[child]
                    supervisor.forget(child)
                    self._say(f"{child.name} has left")
                continue
            if child.exit_code is None:
                if self._listener.silent_s(child.name, child.pid) > SILENCE_S:
                    self._say(f"{child.name} has not answered for {SILENCE_S:g} s: ending it", style="bold red")
                    child.send(signal.SIGKILL)
                continue
            if not self._restarts.waits(child.name):
                pause = self._restarts.died(now, child.name)
                self._say(f"{child.name} ended by itself with {_how(child)}; its last lines:", style="bold red")
                for line in child.tail():
                    self._say(f"  {line}")
                self._say(f"starting it again in {pause:g} s; the whole log is {child.log}")
        for name in self._restarts.due(now):
            for child in [c for c in supervisor.children if c.name == name and c.exit_code is not None]:
                supervisor.replace(child)

    def _scale(self, supervisor: Supervisor) -> None:
        """Start and drain workers until there are as many as `penumbra scale` last asked for."""
        path = self._folder / "scale.json"
        try:
            asked = json.loads(path.read_text())
            path.unlink()
        except (FileNotFoundError, ValueError):
            return
        for role, count in asked.items():
            if role not in self._counts or type(count) is not int or count < 1:
                self._say(f"scale.json asks for {count!r} {role!r} workers: ignored", style="bold red")
                continue
            here = {child.name: child for child in supervisor.children if child not in self._leaving}
            for index in range(count):
                if f"{role}-{index}" not in here:
                    supervisor.add(f"{role}-0", self._worker(role, index))
            for name, child in here.items():
                kind, _, number = name.rpartition("-")
                if kind == role and int(number) >= count:
                    self._dismiss(child)
            self._say(f"{role}: {count} instead of {self._counts[role]}")
            self._counts[role] = count

    def _restart(self, supervisor: Supervisor) -> None:
        """Go on with what `penumbra restart` asked for."""
        path = self._folder / "restart.json"
        if self._rolling is None and path.exists():
            path.unlink()
            self._rolling = self._roll(supervisor)
        if self._rolling is not None and next(self._rolling, self) is self:
            self._rolling = None

    def _roll(self, supervisor: Supervisor) -> Iterator[None]:
        """Replace every process, one after another; each turn of the loop takes a step. Routers hand their sockets on,
        and of each role there is one worker more meanwhile.
        """
        for url, router in zip(self._urls, self._current(supervisor, "router"), strict=True):
            supervisor.succeed(router)
            self._dismiss(router)
            while router in supervisor.children or fetch_json(f"{url}/readiness") is None:
                yield
        for role, count in self._counts.items():
            extra = supervisor.add(f"{role}-0", self._worker(role, count))
            yield from self._until_serving(extra.name)
            for worker in self._current(supervisor, role)[:count]:
                self._dismiss(worker)
                while worker in supervisor.children:
                    yield
                supervisor.add(extra.name, worker.spec)
                yield from self._until_serving(worker.name)
            self._dismiss(extra)
            while extra in supervisor.children:
                yield
        if self._redis is not None:
            self._redis.restart()
        self._say("every process has been replaced")

    def _current(self, supervisor: Supervisor, kind: str) -> list[Running]:
        """The children of a kind that are to stay, in the order of their numbers."""
        mine = [child for child in supervisor.children if child.name.partition("-")[0] == kind]
        return sorted((c for c in mine if c not in self._leaving), key=lambda child: (len(child.name), child.name))

    def _dismiss(self, child: Running) -> None:
        """Have it leave: it finishes what it has, or hands it over."""
        child.send(signal.SIGTERM)
        self._leaving[child] = time.monotonic() + self._config.grace_s + KILL_AFTER_S

    def _until_serving(self, name: str) -> Iterator[None]:
        while loads(self._admin_url).get(name, {}).get("state") != "serving":
            yield

    def _watch_redis(self) -> None:
        """A dead embedded Redis is replaced."""
        if self._redis is not None and not self._redis.alive and time.monotonic() >= self._redis_retry_at:
            self._redis_retry_at = time.monotonic() + REDIS_RESTART_S
            self._say("the embedded Redis died: starting an empty one on its port; workers register by themselves")
            try:
                self._redis.restart()
            except ConfigError as error:
                self._say(str(error), style="bold red")

    def _report(self, child: Running) -> int:
        code = child.exit_code
        self._say(f"{child.name} ended by itself with {_how(child)}; its last lines:", style="bold red")
        for line in child.tail():
            self._say(f"  {line}")
        self._say(f"stopping the others; the whole log is {child.log}", style="bold red")
        return ConfigError.exit_code if code == ConfigError.exit_code else 1

    def _stop_children(self, supervisor: Supervisor) -> None:
        for door in (*self._doors, *self._admin_doors):
            door.close()  # nobody is to wait for a router that will not come
        asked = self._stop.count
        killed = supervisor.stop(hurry=lambda: self._stop.count > asked)
        if killed:
            self._say(f"had to be killed: {', '.join(killed)}", style="bold red")

    # What runs.

    def _router(self, index: int) -> ChildSpec:
        """On this machine, wherever the workers are: its sockets and files are here."""
        config, doors = self._config, (self._doors[index], *self._admin_doors[index : index + 1])
        fds = tuple(door.fileno() for door in doors)
        keys = () if config.keys is None else ("--keys", str(config.keys), "--admin-listen-fd", str(fds[1]))
        command = penumbra_command(
            "router",
            *("--model", str(self._model), "--served-model-name", self._served, "--redis", self._redis_url),
            *("--host", config.host, "--listen-fd", str(fds[0]), *config.router_flags),
            *("--expected-routers", str(config.routers), "--stream-key", str(self._stream_key()), *keys),
        )
        name = f"router-{index}" if index else "router"
        return ChildSpec(name=name, command=command, env=threads_environment(1), fds=fds)

    def _stream_key(self) -> Path:
        """What the routers sign stream ids with: one key for all of them, and a new one for each run."""
        path = self._folder / "stream.key"
        if not self._stream_key_written:
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(32))
            self._stream_key_written = True
        return path

    def _worker(self, role: str, index: int) -> Startable:
        return self._machines.place(
            Service(
                name=f"{role}-{index}",
                role=role,
                arguments=(
                    *("--model", str(self._model), "--redis", self._redis_url, "--worker-id", f"{role}-{index}"),
                    *("--port", "0", "--http-port", "0"),
                    *("--threads", str(self._config.threads), *self._config.worker_flags),
                ),
                threads=self._config.threads,
            )
        )

    # What is told.

    def _state(self, supervisor: Supervisor, *, ready: bool) -> ClusterState:
        logs = self._folder / "logs"
        members = [
            Member(name=c.name, pid=c.pid, started=c.started, log=str(c.log), node=c.node) for c in supervisor.children
        ]
        if self._redis is not None and self._redis.alive:
            pid = self._redis.pid
            started = psutil.Process(pid).create_time()
            members.append(Member(name="redis", pid=pid, started=started, log=str(logs / "redis.log")))
        own = psutil.Process()
        return ClusterState(
            cluster=self._config.cluster,
            url=self._url,
            urls=tuple(self._urls),
            admin_url=self._admin_url,
            model=self._served.split(",")[0],
            ready=ready,
            supervisor=Member(
                name="supervisor", pid=own.pid, started=own.create_time(), log=str(self._folder / "penumbra.log")
            ),
            members=tuple(members),
            prefill=self._counts["prefill"],
            decode=self._counts["decode"],
        )

    def _save(self, supervisor: Supervisor, *, ready: bool) -> ClusterState:
        """Write down what runs now, where that is something else than was last written; on a full disk as soon as
        there is room.
        """
        state = self._state(supervisor, ready=ready)
        if state != self._saved:
            try:
                state.save(self._folder)
                self._saved, self._unsaved = state, False
            except OSError as error:
                if not self._unsaved:
                    self._say(f"the state file can not be written: {error}", style="bold red")
                self._unsaved = True
        return state

    def _echo(self, name: str, line: str) -> None:
        style = COLOURS.get(name.partition("-")[0], "")
        self._print(Text.assemble((f"{name:>10} ", style), ("| ", "dim"), line))

    def _say(self, text: str, style: str = "") -> None:
        self._print(Text(text, style=style))

    def _print(self, text: Text) -> None:
        with contextlib.suppress(
            OSError
        ):  # whoever can not be told must not end the cluster: a full disk, a closed pipe
            self._console.print(text, soft_wrap=True)


class _Listener:
    """Asks every process of a running cluster whether it is alive, on a thread of its own: one that froze takes a
    second to not answer.
    """

    def __init__(self) -> None:
        self._current: dict[str, tuple[int, float]] = {}  # name -> pid it was asked about, and since when
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: dict[str, float] = {}  # name -> when it last answered

    def start(self, routers: Mapping[str, str], fleet_url: str) -> None:
        """`fleet_url` is where a router shows the workers."""
        self._thread = threading.Thread(target=self._run, args=(routers, fleet_url), name="liveness", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def silent_s(self, name: str, pid: int) -> float:
        """How long the process has not answered; 0 before its first answer, which may take as long as it takes."""
        asked, since = self._current.get(name, (None, 0.0))
        if asked != pid:
            since = time.monotonic()
            self._current[name] = (pid, since)
        last = self._last.get(name, 0.0)
        return time.monotonic() - last if last > since else 0.0

    def _run(self, routers: Mapping[str, str], fleet_url: str) -> None:
        doors = dict(routers)
        while not self._stopping.wait(1.0):
            doors |= {name: f"http://{load.get('http_address')}" for name, load in loads(fleet_url).items()}
            for name, door in doors.items():
                if fetch_json(f"{door}/liveness") is not None:
                    self._last[name] = time.monotonic()


def _how(child: Running) -> str:
    code = child.exit_code
    assert code is not None
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
