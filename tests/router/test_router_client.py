"""Clients that leave or stop reading: whoever writes to them hears of it, and waits no longer than it must."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.client import ClientGone, put, until_gone

MESSAGE = {"type": "http.response.body", "body": b"x", "more_body": True}


async def test_a_client_that_does_not_read_is_taken_to_be_gone_when_its_time_is_up():
    async def full(_: Any) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(20):
        with pytest.raises(ClientGone):
            await put(full, MESSAGE, 0.05)


async def test_a_broken_connection_is_a_client_that_left():
    async def broken(_: Any) -> None:
        raise ConnectionResetError

    with pytest.raises(ClientGone):
        await put(broken, MESSAGE, 20)


async def test_what_a_client_reads_is_sent_as_it_is():
    sent: list[Any] = []

    async def read(message: Any) -> None:
        sent.append(message)

    await put(read, MESSAGE, 20)
    assert sent == [MESSAGE]


async def test_a_client_is_gone_when_it_disconnects_and_not_when_it_sends():
    left = asyncio.Queue[Any]()
    for kind in ("http.request", "http.request", "http.disconnect", "http.request"):
        left.put_nowait({"type": kind})
    await until_gone(left.get)
    assert left.qsize() == 1
