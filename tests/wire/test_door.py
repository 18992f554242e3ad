"""A worker's HTTP door answers, and a server that stops loses no connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import warnings

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from wire.door import Server, StatusDoor, listen
from wire.errors import ConfigError
from wire.telemetry import WorkerMetrics


async def test_the_door_tells_ready_from_alive_and_serves_metrics() -> None:
    registry, ready = CollectorRegistry(), [False]
    WorkerMetrics(registry).running.set(3)
    handler = signal.getsignal(signal.SIGTERM)
    door = StatusDoor(registry, lambda: ready[0])
    port = await door.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        status = {path: (await client.get(path)).status_code for path in ("/health", "/readiness", "/live")}
        assert status == {"/health": 503, "/readiness": 503, "/live": 200}
        ready[0] = True
        assert (await client.get("/health")).json() == {"status": "ready"}
        metrics = await client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert "penumbra_num_requests_running 3.0" in metrics.text
    assert signal.getsignal(signal.SIGTERM) is handler
    await door.stop()
    await door.stop()
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}/live")


async def test_a_taken_http_port_is_a_config_error() -> None:
    first = StatusDoor(CollectorRegistry(), lambda: True)
    port = await first.start()
    with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port}"):
        await StatusDoor(CollectorRegistry(), lambda: True).start(port=port)
    await first.stop()


@pytest.mark.parametrize("turns", range(4))
async def test_a_connection_that_arrives_while_a_server_stops_is_closed_and_not_lost(turns: int) -> None:
    server = Server(uvicorn.Config(Starlette(), log_config=None, lifespan="off", ws="none"))
    with listen("127.0.0.1", 0) as listener, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110  uvicorn tells nobody
            await asyncio.sleep(0)
        with socket.create_connection(listener.getsockname(), timeout=10) as client:
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.shutdown([listener])
            server.should_exit = True
            await serving
            gc.collect()
            assert [str(warning.message) for warning in caught] == []
            with contextlib.suppress(ConnectionResetError):  # the kernel had taken it, and we had not yet
                assert client.recv(1) == b""
