"""Child processes with an owner: started tethered, watched, logged, stopped in order.

Knows processes, not Penumbra; `deploy/cluster.py` says which ones make a cluster.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol

import psutil

from wire.errors import ConfigError

TAIL_LINES = 12
"""Last lines of a child kept for the report of its death."""

LOG_BYTES = 64 << 20
"""A log of so many bytes becomes `<name>.log.1`, in place of the one that was that before."""

RESTART_S = (0.5, 30.0)
"""Pause before a child that died is started again: at first, and at most. It doubles with each death."""

STEADY_S = 60.0
"""A child that lived so long died of something new: its next pause is the first one again."""

Echo = Callable[[str, str], None]
"""Called with (child, line) for every line a child writes, on that child's own reader thread."""


def tethered(command: Sequence[str]) -> list[str]:
    """`command`, changed so that the kernel kills it when this process dies."""
    script = str(Path(__file__).with_name("tether.py"))
    return [sys.executable, "-I", "-S", script, str(os.getpid()), *command]


class Running(Protocol):
    """A process that was started, here (`Child`) or on another machine (deploy/ray.py)."""

    name: str
    log: Path  # on the machine it runs on

    @property
    def spec(self) -> Startable:
        """What it was started from."""

    @property
    def node(self) -> str:
        """Address of the machine it runs on, where that is not this one."""

    @property
    def pid(self) -> int: ...

    @property
    def started(self) -> float:
        """Seconds since the epoch, as the kernel tells it."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""

    def tail(self) -> list[str]:
        """The last lines it wrote; complete once it has ended."""

    def send(self, number: signal.Signals) -> None: ...

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, waiting at most `timeout_s`."""

    def again(self) -> Running:
        """Let go of it, which has ended, and start it once more; its log goes on."""

    def close(self) -> None:
        """Let go of a process that has ended."""


class Startable(Protocol):
    """What a supervisor can start."""

    @property
    def name(self) -> str: ...

    def start(self, *, log: Path, echo: Echo) -> Running: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """A process to start. `env` is laid over this process's own environment."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    fds: tuple[int, ...] = ()  # open files of this process that it gets too, under the same numbers
    nice: int = 0  # how much more than we do it yields where processors are short

    def start(self, *, log: Path, echo: Echo) -> Child:
        return Child(self, log=log, echo=echo)


class Child:
    """A running child in a process group of its own; what it writes goes to its log file and to `echo`."""

    def __init__(self, spec: ChildSpec, *, log: Path, echo: Echo) -> None:
        self.name = spec.name
        self.node = ""
        self.spec = spec
        self.log = log
        self._echo = echo
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            self._process = subprocess.Popen(
                tethered(spec.command),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,  # a Ctrl-C at the terminal is for the supervisor, which then stops us in order
                pass_fds=spec.fds,
            )
        except OSError as error:
            raise ConfigError(f"Cannot start {spec.name}: {error}.") from error
        if spec.nice:
            with contextlib.suppress(ProcessLookupError):  # it may be over already
                ours = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, self._process.pid, min(ours + spec.nice, 19))
        self.started = psutil.Process(self._process.pid).create_time()
        self._reader = threading.Thread(target=self._read, name=f"log-{spec.name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def tail(self) -> list[str]:
        if self.exit_code is not None:
            self._reader.join(1.0)
        return list(self._tail)

    def send(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def again(self) -> Child:
        self.close()
        return Child(self.spec, log=self.log, echo=self._echo)

    def close(self) -> None:
        # A grandchild may still hold the pipe; what it writes is nobody's business any more.
        self._reader.join(1.0)
        if not self._reader.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        """Until the child's end, whatever becomes of the log: a child that nobody reads stands still."""
        assert self._process.stdout is not None
        lost = 0
        log = self.log.open("ab", buffering=0)
        try:
            for raw in self._process.stdout:
                try:
                    if log.tell() >= LOG_BYTES:
                        log = self._put_aside(log)
                    if lost:
                        log.write(b"... %d lines are missing: they could not be written\n" % lost)
                        lost = 0
                    log.write(raw)
                except OSError:  # the disk is full
                    lost += 1
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                self._tail.append(line)
                self._echo(self.name, line)
        finally:
            log.close()

    def _put_aside(self, full: FileIO) -> FileIO:
        """A log to go on with where one has grown long: the same where no other can be opened."""
        try:
            # Whoever succeeds a child writes to the same log, and may have put it aside already.
            if os.path.samestat(os.fstat(full.fileno()), self.log.stat()):
                self.log.replace(_before(self.log))
            new = self.log.open("ab", buffering=0)
        except OSError:
            return full
        full.close()
        return new


def _before(log: Path) -> Path:
    """Where a log goes when it has grown long."""
    return log.with_name(f"{log.name}.1")


class Supervisor:
    """Children in tiers, held by a `with`. Tiers stop in the reverse of the order they started in.

    Every call belongs on the thread that made the supervisor: children die with the thread that started them.
    """

    def __init__(self, *, log_dir: Path, echo: Echo, grace_s: float = 10.0) -> None:
        """grace_s: what one tier gets between SIGTERM and SIGKILL."""
        self._log_dir = log_dir
        self._echo = echo
        self._grace_s = grace_s
        self._tiers: list[list[Running]] = []

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def children(self) -> list[Running]:
        return [child for tier in self._tiers for child in tier]

    def start(self, specs: Sequence[Startable]) -> list[Running]:
        """Start one tier. Its earlier logs are replaced."""
        tier: list[Running] = []
        self._tiers.append(tier)  # first, so that a start that fails half-way leaves nothing behind
        for spec in specs:
            tier.append(spec.start(log=self._new_log(spec.name), echo=self._echo))
        return tier

    def _new_log(self, name: str) -> Path:
        log = self._log_dir / f"{name}.log"
        for old in (log, _before(log)):
            old.unlink(missing_ok=True)
        return log

    def dead(self) -> Running | None:
        """A child that has ended by itself, if any."""
        return next((child for child in self.children if child.exit_code is not None), None)

    def replace(self, child: Running) -> Running:
        """Start a child that has ended once more, in its old place; its log goes on."""
        tier = next(tier for tier in self._tiers if child in tier)
        again = tier[tier.index(child)] = child.again()
        return again

    def succeed(self, child: Running) -> Running:
        """Start another one of a child that still runs, in its tier and with its log."""
        tier = next(tier for tier in self._tiers if child in tier)
        tier.append(child.spec.start(log=child.log, echo=self._echo))
        return tier[-1]

    def add(self, beside: str, spec: Startable) -> Running:
        """Start one more child in the tier of the child called `beside`."""
        tier = next(tier for tier in self._tiers if any(child.name == beside for child in tier))
        tier.append(spec.start(log=self._new_log(spec.name), echo=self._echo))
        return tier[-1]

    def forget(self, child: Running) -> None:
        """Let go of a child that has ended and was meant to."""
        child.close()
        for tier in self._tiers:
            if child in tier:
                tier.remove(child)

    def stop(self, *, hurry: Callable[[], bool] = lambda: False) -> list[str]:
        """Stop everything; returns the names that had to be killed. `hurry` turning true ends every grace."""
        killed: list[str] = []
        while self._tiers:
            tier = self._tiers[-1]
            for child in tier:
                child.send(signal.SIGTERM)
            deadline = time.monotonic() + self._grace_s
            for child in tier:
                while not child.wait(min(0.1, deadline - time.monotonic())):
                    if hurry() or time.monotonic() >= deadline:
                        killed.append(child.name)
                        child.send(signal.SIGKILL)
                        child.wait(5.0)  # the kernel ends it; an unkillable one (state D) must not hold us for ever
                        break
            for child in tier:
                child.close()
            self._tiers.pop()
        return killed


class Restarts:
    """When children that died are to be started again. Pure: time is an argument, in monotonic seconds."""

    def __init__(self, longest_s: float = RESTART_S[1]) -> None:
        self._longest_s = longest_s
        self._pauses: dict[str, float] = {}
        self._died_at: dict[str, float] = {}
        self._due: dict[str, float] = {}

    def died(self, now_s: float, name: str) -> float:
        """The child was found dead; -> seconds until it is to be started. Once for each death."""
        first = min(RESTART_S[0], self._longest_s)
        steady = now_s - self._died_at.get(name, -STEADY_S) >= STEADY_S
        pause = first if steady else min(2 * self._pauses[name], self._longest_s)
        self._pauses[name], self._died_at[name], self._due[name] = pause, now_s, now_s + pause
        return pause

    def waits(self, name: str) -> bool:
        return name in self._due

    def due(self, now_s: float) -> list[str]:
        """Children to start now; each is named once."""
        found = [name for name, at in self._due.items() if at <= now_s]
        for name in found:
            del self._due[name]
        return found
