"""The router as a process: loads the tokenizer, serves until told to stop, lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import structlog
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from router.config import ModelFacts, RouterConfig
from router.fleet import Fleet
from router.http import Front
from router.mirror import PrefixMirror, follow
from router.text import Text
from wire.errors import ConfigError
from wire.events import PrefixReader
from wire.registry import Registry
from wire.telemetry import RouterMetrics, configure_logging
from wire.tracing import tracer

log = structlog.get_logger()


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
    ):
        listener = listen(config)
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        fleet, mirror = Fleet(registry, poll_s=config.registry_poll_s), PrefixMirror()
        metrics = RouterMetrics(collectors)
        front = Front(config, facts, text, fleet, mirror, metrics, collectors, spans)
        server = _Server(
            uvicorn.Config(
                front.app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, round(config.shutdown_grace_s)),
            )
        )
        signals = _stop_signals(server, front) if own_signals else contextlib.nullcontext()
        with listener, signals, contextlib.closing(front):
            async with asyncio.TaskGroup() as tasks:
                watches = [
                    tasks.create_task(fleet.run(), name="fleet"),
                    tasks.create_task(front.page.run(), name="front-page"),
                    tasks.create_task(follow(mirror, prefixes, fleet.epochs, metrics), name="prefix-mirror"),
                ]
                log.info("router_ready", url=url, models=",".join(config.model_names))
                on_ready(url)
                try:
                    await server.serve(sockets=[listener])
                except asyncio.CancelledError:
                    front.admission.draining = server.should_exit = True
                    await server.shutdown([listener])
                    raise
                finally:
                    for watch in watches:
                        watch.cancel()
        log.info("router_stopped")


@contextlib.contextmanager
def _stop_signals(server: uvicorn.Server, front: Front) -> Iterator[None]:
    """The first signal drains: no new requests, running ones finish. The second one ends them."""

    def stop() -> None:
        server.force_exit = front.admission.draining
        front.admission.draining = server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def listen(config: RouterConfig) -> socket.socket:
    """The listening socket. Raises ConfigError when the address can not be bound."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With the protocol spelled out: asyncio turns Nagle's algorithm off only on such sockets, and with it on, an
    # answer's last bytes wait 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(1024)
        return listener
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror or error}. Choose another port, "
            "or 0 for a free one."
        ) from error
