"""The front page and what it lives on: static files, one frame at /fleet, a stream of changes at /fleet/events."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import mimetypes
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.admission import Admission
from router.board import TICK_S, Board, Json, now_look
from router.dialects import dump, json_response
from router.fleet import Fleet
from router.mirror import PrefixMirror
from wire.errors import Overloaded

PAGE = Path(__file__).parent / "page"

MOST_VIEWERS = 64

STALL_S = 20.0
"""A viewer that does not read for so long is let go."""

SECURITY: Mapping[str, str] = {
    # Nothing but our own files, and no markup that runs: whatever a model or a worker says stays text.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class FrontPage:
    """The routes of the page, and the ticks of its board while anybody looks."""

    def __init__(
        self,
        board: Board,
        fleet: Fleet,
        mirror: PrefixMirror,
        admission: Admission,
        router: Json,
        on_viewers: Callable[[int], None] = lambda num_viewers: None,
    ) -> None:
        self._on_viewers = on_viewers
        self._board = board
        self._fleet = fleet
        self._mirror = mirror
        self._admission = admission
        self._router = router
        self._started = time.monotonic()
        self._files = {file.name: _tagged(file.read_bytes()) for file in PAGE.iterdir() if file.is_file()}
        self._viewers = 0
        self._watched = asyncio.Event()
        self._ticked = asyncio.Condition()
        self._bytes: dict[str, tuple[int, bytes]] = {}  # kind -> (seq, event), made when first asked for

    def routes(self) -> dict[str, Callable[[Request], Coroutine[Any, Any, Response]]]:
        return {
            "/": self._index,
            "/page/{name}": self._file,
            "/fleet": self._fleet_now,
            "/fleet/events": self._fleet_events,
        }

    async def run(self) -> None:
        """Tick while somebody looks, until cancelled."""
        while True:
            await self._watched.wait()
            await self._tick()
            await asyncio.sleep(TICK_S)

    async def _index(self, request: Request) -> Response:
        return self._static("index.html", request)

    async def _file(self, request: Request) -> Response:
        return self._static(request.path_params["name"], request)

    def _static(self, name: str, request: Request) -> Response:
        """From memory and whole: no path of a client's is ever opened, and there are no ranges to ask for."""
        if name not in self._files:
            raise HTTPException(404)
        content, tag = self._files[name]
        headers = {**SECURITY, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=mimetypes.guess_type(name)[0])

    async def _fleet_now(self, _: Request) -> Response:
        if time.monotonic() - self._board.at_s > TICK_S:
            await self._tick()
        return json_response(self._board.frame)

    async def _fleet_events(self, _: Request) -> Response:
        if self._viewers >= MOST_VIEWERS:
            raise Overloaded(f"{self._viewers} pages follow this router, the most it serves. Close one, or use /fleet.")
        return _Events(self)

    async def _tick(self) -> None:
        router = self._router | {
            "uptime_s": round(time.monotonic() - self._started, 1),
            "draining": self._admission.draining,
            "viewers": self._viewers,
        }
        self._board.tick(now_look(self._fleet.snapshot(), self._mirror.num_pages(), router))
        async with self._ticked:
            self._ticked.notify_all()

    # For the streams

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._viewers += 1
        self._on_viewers(self._viewers)
        self._watched.set()
        try:
            yield
        finally:
            self._viewers -= 1
            self._on_viewers(self._viewers)
            if not self._viewers:
                self._watched.clear()

    @property
    def seq(self) -> int:
        return self._board.seq

    @property
    def over(self) -> bool:
        """The router is leaving: an open page must not hold it up."""
        return self._admission.draining

    async def next(self, seen: int | None) -> bytes:
        """The event after tick `seen`: the change where that follows, else the whole frame. Waits for the tick, where
        the last one is not of just now.
        """
        last = self._board.seq if seen is None and time.monotonic() - self._board.at_s > TICK_S else seen
        async with self._ticked:
            await self._ticked.wait_for(lambda: last is None or self._board.seq > last)
        kind = "frame" if seen is None or self._board.seq != seen + 1 else "change"
        made = self._bytes.get(kind)
        if made is None or made[0] != self._board.seq:
            body = dump(self._board.change if kind == "change" else self._board.frame)
            made = self._bytes[kind] = (self._board.seq, b"event: fleet\ndata: " + body + b"\n\n")
        return made[1]


class _Events(Response):
    """The stream to one viewer. It begins with a whole frame, and ends with the viewer or the router."""

    def __init__(self, page: FrontPage) -> None:
        self._page = page
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        head += [(b"x-accel-buffering", b"no"), (b"x-content-type-options", b"nosniff")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        with self._page.watching():
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._follow(send))
                watch = tasks.create_task(_until_gone(receive))
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                work.cancel()
                watch.cancel()

    async def _follow(self, send: Send) -> None:
        seen = None
        with contextlib.suppress(TimeoutError, OSError):
            while not self._page.over:
                body = await self._page.next(seen)
                seen = self._page.seq
                async with asyncio.timeout(STALL_S):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _tagged(content: bytes) -> tuple[bytes, str]:
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
