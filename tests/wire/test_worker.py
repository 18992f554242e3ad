"""The frame of a worker process: ports, readiness, signals, the orderly end. Redis is away; nobody minds."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable

import httpx
import pytest
from prometheus_client import CollectorRegistry

from wire.errors import ConfigError
from wire.rpc import Server
from wire.types import Role, WorkerInfo
from wire.worker import DoorConfig, serve

NO_REDIS = "redis://127.0.0.1:1"


class Quiet:
    """A service with nothing to do, which notes what the frame does with it."""

    def __init__(self) -> None:
        self.draining = False
        self.idle = True
        self.broken: str | None = None
        self.ended = False
        self.fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add_to(self, server: Server) -> None:
        pass

    async def run(self) -> None:
        try:
            await self.fault
        finally:
            self.ended = True

    def info(self, address: str) -> WorkerInfo:
        return WorkerInfo(
            worker_id="w-0",
            role=Role.DECODE,
            address=address,
            epoch=1,
            model="m",
            signature="s",
            draining=self.draining,
        )

    def is_idle(self) -> bool:
        return self.idle


def door(**changes: object) -> DoorConfig:
    values = {"worker_id": "w-0", "redis_url": NO_REDIS, "drain_s": 20.0, **changes}
    return DoorConfig(**values)  # type: ignore[arg-type]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a test looks from outside
            await asyncio.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def readiness(port: int) -> int:
    async with httpx.AsyncClient() as client:
        for _ in range(200):
            try:
                return (await client.get(f"http://127.0.0.1:{port}/readiness")).status_code
            except httpx.ConnectError:
                await asyncio.sleep(0.02)
    raise AssertionError("the HTTP door never opened")


async def test_sigterm_drains_until_the_service_is_idle_and_exits_0() -> None:
    service, port = Quiet(), free_port()
    service.idle = False
    frame = asyncio.create_task(serve(service, door(http_port=port), CollectorRegistry()))
    assert await readiness(port) == 200
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: service.draining)
    assert await readiness(port) == 503
    assert not service.ended
    service.idle = True
    assert await frame == 0
    assert service.ended


async def test_a_second_signal_does_not_wait_for_the_work() -> None:
    service, port = Quiet(), free_port()
    service.idle = False
    frame = asyncio.create_task(serve(service, door(http_port=port, drain_s=1_000.0), CollectorRegistry()))
    assert await readiness(port) == 200
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: service.draining)
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(20):
        assert await frame == 0
    assert service.ended


async def test_work_that_never_ends_is_given_up_after_the_drain_time() -> None:
    service, port = Quiet(), free_port()
    service.idle = False
    frame = asyncio.create_task(serve(service, door(http_port=port, drain_s=0.1), CollectorRegistry()))
    assert await readiness(port) == 200
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(20):
        assert await frame == 0


async def test_a_broken_worker_drains_by_itself_and_exits_1() -> None:
    service, port = Quiet(), free_port()
    frame = asyncio.create_task(serve(service, door(http_port=port), CollectorRegistry()))
    assert await readiness(port) == 200
    service.broken = "a kernel failed"
    async with asyncio.timeout(20):
        assert await frame == 1
    assert service.ended


async def test_a_service_that_raises_ends_the_process_with_its_error() -> None:
    service, port = Quiet(), free_port()
    frame = asyncio.create_task(serve(service, door(http_port=port), CollectorRegistry()))
    assert await readiness(port) == 200
    service.fault.set_exception(RuntimeError("lost"))
    with pytest.raises(RuntimeError, match="lost"):
        async with asyncio.timeout(20):
            await frame


async def test_a_port_that_is_taken_is_a_config_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="Cannot listen"):
        await serve(Quiet(), door(port=taken.getsockname()[1]), CollectorRegistry())
