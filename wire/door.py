"""HTTP doors of our processes: to listen, to serve until told to stop, and what workers are watched through."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wire.errors import ConfigError


def listen(host: str, port: int, *, flag: str = "--port") -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError, naming the `flag` it came by, when the address
    can not be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol spelled out: asyncio turns Nagle's algorithm off only on such sockets, and with it on, an
    # answer's last bytes wait 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        return listener
    except OSError as error:
        listener.close()
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {reason}. Choose another with {flag}, or let {flag} 0 find a free one."
        ) from error


def adopt(fd: int) -> socket.socket:
    """The listening socket that whoever started us has opened. Raises ConfigError when it is none."""
    try:
        listener = socket.socket(fileno=fd)
        if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return listener
        listener.detach()
    except OSError:
        pass
    raise ConfigError(
        f"File descriptor {fd} is no listening socket. Open one before starting the process, or give it a port."
    )


_TURNS_TO_CONNECT = 3


class Server(uvicorn.Server):
    """Leaves SIGINT and SIGTERM to the process that runs it, and loses no connection when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A connection becomes one of ours in turns of asyncio's loop: accepted, then given its transport, then made. A
        # listener closed in between leaves its socket unclosed, or us waiting for a client we never told to go.
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
        for _ in range(_TURNS_TO_CONNECT):
            await asyncio.sleep(0)
        await super().shutdown(sockets)


class StatusDoor:
    """A worker's HTTP port: /health, /live, /liveness, /readiness and /metrics.

    `ready` says whether the worker takes new requests: 200 or 503 on /health and /readiness. Liveness is
    200 as long as the event loop turns.
    """

    def __init__(self, registry: CollectorRegistry, ready: Callable[[], bool]) -> None:
        async def live(_: Request) -> Response:
            return JSONResponse({"status": "alive"})

        async def readiness(_: Request) -> Response:
            if ready():
                return JSONResponse({"status": "ready"})
            return JSONResponse({"status": "not ready"}, status_code=503)

        async def metrics(_: Request) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        self._app = Starlette(
            routes=[
                Route("/health", readiness),
                Route("/readiness", readiness),
                Route("/live", live),
                Route("/liveness", live),
                Route("/metrics", metrics),
            ]
        )
        self._server: Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Serve until `stop`. Returns the port. Raises ConfigError when the address can not be bound."""
        listener = listen(host, port, flag="--http-port")
        bound: int = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=5,
        )
        self._server = Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="status-door")
        return bound

    async def stop(self) -> None:
        """Close the port. Safe to call twice, or without `start`."""
        server, task, self._task = self._server, self._task, None
        if server is None or task is None:
            return
        server.should_exit = True
        await task
