"""The router as a process: loads the tokenizer, serves until told to stop, lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import structlog
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from router.config import ModelFacts, RouterConfig
from router.connection import Connection
from router.fleet import Fleet
from router.http import Front
from router.mirror import PrefixMirror, follow
from router.replicas import Replicas
from router.text import Text
from router.tls import Certificate
from wire.door import Server, adopt, listen
from wire.events import PrefixReader
from wire.registry import Registry
from wire.telemetry import RouterMetrics, configure_logging
from wire.tracing import tracer

LATE_S = 0.5
"""After the first signal to stop, requests on connections that are open are still taken for so long."""

FIND_S = 10.0
"""A router that takes over a socket looks for workers for so long before it accepts anybody."""

GC_THRESHOLDS = (2_000, 20, 50)
"""Rarer than Python's own: what a request leaves behind frees itself, and every collection looks at all that run."""

log = structlog.get_logger()


def run(config: RouterConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code; raises ConfigError for what can not run."""
    configure_logging("router", config.router_id, config.log_level, config.log_json)
    uvloop.run(serve(config, own_signals=True))
    return 0


async def serve(
    config: RouterConfig, *, on_ready: Callable[[str], None] = lambda url: None, own_signals: bool = False
) -> None:
    """Serve until cancelled, or with `own_signals` until SIGINT or SIGTERM. `on_ready` gets the URL.

    Raises ConfigError before anything is served: an unusable checkpoint directory, URL or address.
    """
    facts = ModelFacts.load(config.model)
    text = Text(config.model, facts, config.model_names, thinking=config.default_thinking)
    collectors = CollectorRegistry()
    spans = tracer(config.otlp_traces_endpoint, service="router", instance=config.router_id)
    async with (
        contextlib.aclosing(spans),
        Registry(config.redis_url, config.namespace) as registry,
        PrefixReader(config.redis_url, config.namespace) as prefixes,
        contextlib.aclosing(Replicas(config.redis_url, config.namespace, expected=config.expected_routers)) as replicas,
    ):
        fleet, mirror = Fleet(registry, poll_s=config.registry_poll_s), PrefixMirror()
        metrics = RouterMetrics(collectors, config.duration_buckets_s)
        with contextlib.ExitStack() as held:
            front = Front(config, facts, text, fleet, mirror, metrics, collectors, spans, replicas)
            held.enter_context(contextlib.closing(front))
            certificate = None
            if config.tls_cert_path is not None and config.tls_key_path is not None:
                certificate = Certificate(config.tls_cert_path, config.tls_key_path)
            public = listen(config.host, config.port) if config.listen_fd is None else adopt(config.listen_fd)
            doors = [(_server(config, front.app, metrics, certificate), held.enter_context(public))]
            if config.admin_listen_fd is not None or config.admin_port is not None:
                fd, port = config.admin_listen_fd, config.admin_port or 0
                admin_listener = held.enter_context(
                    listen(config.admin_host, port, flag="--admin-port") if fd is None else adopt(fd)
                )
                doors.append((_server(config, front.admin_app, metrics), admin_listener))
            if own_signals:
                held.enter_context(_stop_signals([server for server, _ in doors], front))
            async with asyncio.TaskGroup() as tasks:
                watches = [
                    tasks.create_task(fleet.run(), name="fleet"),
                    tasks.create_task(front.page.run(), name="front-page"),
                    tasks.create_task(front.admission.run(), name="admission"),
                    tasks.create_task(replicas.run(front.refresh_keys), name="replicas"),
                    tasks.create_task(follow(mirror, prefixes, fleet.epochs, metrics), name="prefix-mirror"),
                ]
                if certificate is not None:
                    watches.append(tasks.create_task(certificate.follow(), name="certificate"))
                if config.listen_fd is not None:
                    # Who connects waits until we accept, and may have another router to go to meanwhile.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(FIND_S):
                            await fleet.found()
                url, *others = [_url(listener, server.config.is_ssl) for server, listener in doors]
                log.info("router_ready", url=url, models=",".join(config.model_names), admin_url=",".join(others))
                on_ready(url)
                if own_signals:
                    # What lives by now lives for good. Looking through all of it takes a tenth of a second, in which
                    # nobody gets an answer.
                    gc.collect()
                    gc.freeze()
                    gc.set_threshold(*GC_THRESHOLDS)
                try:
                    async with asyncio.TaskGroup() as serving:
                        for server, listener in doors:
                            serving.create_task(_serve_until_told(server, listener, front))
                finally:
                    for watch in watches:
                        watch.cancel()
        log.info("router_stopped")


def _url(listener: socket.socket, tls: bool) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' * tls}://" + (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _server(
    config: RouterConfig, app: ASGIApp, metrics: RouterMetrics, certificate: Certificate | None = None
) -> Server:
    return Server(
        uvicorn.Config(
            app,
            http=functools.partial(  # type: ignore[arg-type]
                Connection,
                header_s=config.header_s,
                on_refusal=lambda error: metrics.requests.labels("none", str(error.http_status)).inc(),
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(config.shutdown_grace_s)),
            ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
        )
    )


async def _serve_until_told(server: Server, listener: socket.socket, front: Front) -> None:
    try:
        await server.serve(sockets=[listener])
    except asyncio.CancelledError:
        front.admission.draining = server.should_exit = True
        await server.shutdown([listener])
        raise


@contextlib.contextmanager
def _stop_signals(servers: Sequence[Server], front: Front) -> Iterator[None]:
    """The first signal drains: no new connections, then no new requests on those there are, and running ones finish.
    The second one ends them.
    """
    loop, asked = asyncio.get_running_loop(), False

    def stop() -> None:
        nonlocal asked
        for server in servers:
            server.force_exit = asked
            for listener in getattr(server, "servers", ()):
                listener.close()
        if asked:
            drain()
        else:
            # Whoever has just connected is still served: from the next moment on clients find our successor.
            loop.call_later(LATE_S, drain)
        asked = True

    def drain() -> None:
        front.admission.draining = True
        for server in servers:
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
