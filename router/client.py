"""The client at the other end of an answer: it leaves, or stops reading, and neither may hold us up."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Send


class ClientGone(Exception):
    """The client left or stopped reading; there is nobody to tell."""


async def put(send: Send, message: Message, stall_s: float) -> None:
    """A client that does not read fills the socket; the write then waits for it, but not for ever.

    Raises ClientGone after `stall_s`, or when the connection is broken.
    """
    try:
        async with asyncio.timeout(stall_s):
            await send(message)
    except (TimeoutError, OSError) as error:
        raise ClientGone from error


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
