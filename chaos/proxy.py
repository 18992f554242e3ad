"""Bad networks: TCP proxies that hold bytes back, slow them down, or break connections. All run on one thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

PIECE = 65_536
CONNECT_S = 5.0

T = TypeVar("T")


class Proxy:
    """Forwards what connects to `address`. Set the attributes at any time, from any thread; they hold for connections
    that are open too.
    """

    def __init__(self, target: tuple[str, int], loop: asyncio.AbstractEventLoop) -> None:
        self.target = target  # (host, port), for connections yet to come
        self.delay_s = 0.0  # of every piece, each way
        self.bytes_per_s = 0.0  # each way; 0: as fast as it goes
        self.address = ("", 0)
        self._loop = loop
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    def hold(self, held: bool) -> None:
        """Half-open while held: connections stay and are accepted, and nothing passes, nor does the end of one."""
        self._loop.call_soon_threadsafe(self._flowing.clear if held else self._flowing.set)

    async def listen(self, address: tuple[str, int]) -> None:
        self._server = await asyncio.start_server(self._serve, *address)
        self.address = self._server.sockets[0].getsockname()[:2]

    async def reset(self) -> None:
        """Break every connection with a RST, as a peer does that knows nothing of it."""
        for writer in list(self._writers):
            raw = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                replies, there = await asyncio.open_connection(*self.target)
            self._writers.add(there)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._forward(reader, there))
                ways.create_task(self._forward(replies, writer))
        except (OSError, TimeoutError):
            pass  # nobody answers there: whoever called finds the connection closed
        finally:
            for one in (writer, *([there] if there else [])):
                self._writers.discard(one)
                one.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE):
                if pause := self.delay_s + (len(piece) / self.bytes_per_s if self.bytes_per_s else 0.0):
                    await asyncio.sleep(pause)
                await self._flowing.wait()
                writer.write(piece)
                await writer.drain()
        await self._flowing.wait()
        writer.close()


class Network:
    """The thread that the proxies run on, for the length of a `with`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._proxies: list[Proxy] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for proxy in self._proxies:
            proxy.hold(False)
            self._wait_for(proxy.close())
        self._wait_for(_end_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def proxy(self, target: tuple[str, int], listen: tuple[str, int] = ("127.0.0.1", 0)) -> Proxy:
        """A proxy in front of `target`; port 0 takes a free one."""
        proxy = Proxy(target, self._loop)
        self._proxies.append(proxy)
        self._wait_for(proxy.listen(listen))
        return proxy

    def reset(self, proxy: Proxy) -> None:
        self._wait_for(proxy.reset())

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
