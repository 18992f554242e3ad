"""A fleet that is not there: records as a thousand workers would write them, behind the real front page.

python -m tests.page.thousand [WORKERS]    serves it, to look at
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from router.attempts import RelayRequest
from router.board import Board
from router.fleet import FleetSnapshot, WorkerView
from router.front_page import FrontPage
from router.live import LiveRequests
from router.timeline import Timeline
from wire.registry import decode_record, encode_record
from wire.types import Link, Role, SamplingParams, WorkerInfo

POOL = 6000  # full pages of each worker


class Thousand:
    """In place of `router.fleet.Fleet`: every look is a second later, with another load on each worker."""

    def __init__(self, num_workers: int = 1000) -> None:
        self._random = random.Random(1)
        self._prefill = num_workers * 2 // 5
        self._ids = [f"prefill-{i}" for i in range(self._prefill)]
        self._ids += [f"decode-{i}" for i in range(num_workers - self._prefill)]
        self._read = dict.fromkeys(self._ids, 0)
        self.draining = False  # also in place of the router's admission

    def num_pages(self) -> dict[str, int]:
        """In place of the prefix mirror."""
        return {}

    def snapshot(self) -> FleetSnapshot:
        views = [WorkerView(info=self._worker(i, name), serving=i % 89 != 11) for i, name in enumerate(self._ids)]
        return FleetSnapshot(prefill=tuple(views[: self._prefill]), decode=tuple(views[self._prefill :]))

    def _worker(self, i: int, name: str) -> WorkerInfo:
        chance, role = self._random, Role(name.partition("-")[0])
        used = int(POOL * chance.uniform(0.2, 0.8))
        cached = int((POOL - used) * chance.uniform(0, 0.8))
        quarantined = 3 if i % 97 == 5 else 0
        links: tuple[Link, ...] = ()
        if role is Role.DECODE:
            self._read[name] += (chance.random() < 0.3) * chance.randint(1, 9) * 10**8
            links = tuple(
                Link(
                    source=f"prefill-{(i * 7 + k) % self._prefill}",
                    bytes_per_s=int(chance.uniform(2, 48) * 1e9),
                    p50_us=chance.randint(500, 90_000),
                    reads=9,
                    read_bytes=self._read[name] + k,
                )
                for k in range(3)
            )
        info = WorkerInfo(
            worker_id=name,
            role=role,
            address=f"10.0.{i // 250}.{i % 250}:50051",
            epoch=i + 1,
            model="f3" * 32,
            signature="5a" * 32,
            draining=i % 101 == 7,
            running=chance.randint(0, 24),
            waiting=chance.randint(0, 5) * (chance.random() < 0.2),
            queued_tokens=chance.randint(0, 90_000),
            free_tokens=(POOL - used) * 256,
            total_tokens=POOL * 256,
            free_pages=POOL - used - cached - quarantined,
            used_pages=used,
            cached_pages=cached,
            quarantined_pages=quarantined,
            read_bytes=self._read[name],
            reading_bytes=chance.randint(0, 10**9),
            links=links,
        )
        return decode_record(name, encode_record(info))


def some_requests(num_flying: int = 300, num_ended: int = 400) -> LiveRequests:
    requests, chance = LiveRequests(), random.Random(2)
    now = time.monotonic()

    def timeline(arrived: float, first_token: float | None) -> Timeline:
        line = Timeline(arrived)
        line.ended("tokenize", arrived + 0.02)
        line.ended("route", arrived + 0.1)
        line.ended("retry", arrived + 0.1)
        if first_token is not None:
            line.delivered(first_token)
        return line

    for i in range(num_ended):
        line = timeline(now - chance.lognormvariate(0.5, 1.1) - 2, now - 1)
        with requests.follow(_request(f"{i:04x}ended"), line) as live:
            live.generated_tokens = chance.randint(20, 90)
            line.delivered(now)
    for i in range(num_flying):
        line = timeline(now - chance.uniform(6, 40), now - chance.uniform(0, 5) if i % 3 else None)
        live = requests.follow(_request(f"{i:04x}flying"), line).__enter__()
        live.generated_tokens = 7 if i % 3 else 0
    return requests


def _request(name: str) -> RelayRequest:
    return RelayRequest(
        request_id=name, prompt=(1,) * 4000, sampling=SamplingParams(max_tokens=128, seed=1), vocab_size=10
    )


@contextlib.contextmanager
def served(num_workers: int = 1000, port: int = 0) -> Iterator[str]:
    """The page over that fleet, on a thread of its own. -> its URL"""
    ready, url, stop = threading.Event(), "", lambda: None

    async def serve() -> None:
        nonlocal url, stop
        fleet = Thousand(num_workers)
        about = {"router_id": "router-0", "models": ["deepseek-v4-flash"]}
        page = FrontPage(Board(some_requests()), fleet, fleet, fleet, about)  # type: ignore[arg-type]
        app = FastAPI()
        for path, endpoint in page.routes().items():
            app.add_api_route(path, endpoint, methods=["GET"], response_model=None)

        @app.get("/v1/models")
        async def models() -> dict[str, object]:
            return {"object": "list", "data": [{"id": "deepseek-v4-flash", "object": "model"}]}

        listener = socket.create_server(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        loop = asyncio.get_running_loop()

        def leave() -> None:
            fleet.draining = server.should_exit = True

        async with asyncio.TaskGroup() as tasks:
            ticks = tasks.create_task(page.run())
            serving = tasks.create_task(server.serve([listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            stop = lambda: loop.call_soon_threadsafe(leave)  # noqa: E731
            ready.set()
            await serving
            ticks.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="thousand")
    thread.start()
    assert ready.wait(30)
    try:
        yield url
    finally:
        stop()
        thread.join(30)
    assert not thread.is_alive(), "an open page must not keep the server from leaving"


if __name__ == "__main__":
    import sys

    with served(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, port=8001) as address:
        print(address)
        threading.Event().wait()
