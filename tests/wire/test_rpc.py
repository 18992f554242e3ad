"""Real servers and channels on loopback: errors keep their type, cancellation reaches the method."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from wire import errors, rpc
from wire.v1 import kv_pb2, kv_pb2_grpc


class Pages(kv_pb2_grpc.PagesServicer):
    """Does what the request id says."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def Claim(self, request, context) -> AsyncIterator[kv_pb2.PageOffer]:
        try:
            yield kv_pb2.PageOffer(seq=0, claim_id=request.request_id)
            match request.request_id:
                case "flood":
                    while True:
                        yield kv_pb2.PageOffer(seq=1, claim_id="x" * 100_000)
                case "wait":
                    await asyncio.sleep(60)
                case "refuse":
                    raise errors.ClaimRefused("The pages of this request are gone; prefill it again. é")
        finally:
            self.closed.set()

    async def Release(self, request, context) -> kv_pb2.ReleaseReply:
        match request.claim_id:
            case "invalid":
                raise errors.InvalidRequest("secret: must be 16 bytes.", param="secret", code="bad_secret")
            case "crash":
                raise ZeroDivisionError("a secret detail")
            case "abort":
                await rpc.abort(context, errors.Draining("This worker is leaving; ask another."))
            case "slow":
                await asyncio.sleep(0.2)
        return kv_pb2.ReleaseReply(valid=True)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[rpc.Server, Pages, grpc.aio.Channel]]:
    server, pages = rpc.Server(), Pages()
    server.add(kv_pb2_grpc.add_PagesServicer_to_server, pages)
    port = await server.start()
    await server.set_serving(True)
    async with rpc.open_channel(f"127.0.0.1:{port}") as channel:
        yield server, pages, channel
    await server.drain(0)


async def release(channel: grpc.aio.Channel, claim_id: str) -> errors.PenumbraError | bool:
    try:
        reply = await kv_pb2_grpc.PagesStub(channel).Release(kv_pb2.ReleaseRequest(claim_id=claim_id), timeout=5)
    except grpc.aio.AioRpcError as error:
        return rpc.error_from_rpc(error)
    return reply.valid


async def test_an_error_raised_by_a_method_arrives_as_the_same_error() -> None:
    async with serving() as (_, _, channel):
        assert await release(channel, "fine") is True
        invalid = await release(channel, "invalid")
        assert isinstance(invalid, errors.InvalidRequest)
        assert (str(invalid), invalid.param, invalid.detail_code) == (
            "secret: must be 16 bytes.",
            "secret",
            "bad_secret",
        )
        draining = await release(channel, "abort")
        assert isinstance(draining, errors.Draining)
        assert str(draining) == "This worker is leaving; ask another."


async def test_an_error_raised_in_mid_stream_arrives_after_what_was_sent() -> None:
    async with serving() as (_, pages, channel):
        call = kv_pb2_grpc.PagesStub(channel).Claim(kv_pb2.ClaimRequest(request_id="refuse"))
        assert (await call.read()).claim_id == "refuse"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        error = rpc.error_from_rpc(failed.value)
        assert isinstance(error, errors.ClaimRefused)
        assert str(error) == "The pages of this request are gone; prefill it again. é"
        assert pages.closed.is_set()


async def test_a_crash_is_an_internal_error_and_tells_no_details() -> None:
    async with serving() as (_, _, channel):
        error = await release(channel, "crash")
        assert type(error) is errors.PenumbraError
        assert "ZeroDivisionError" in str(error)
        assert "secret detail" not in str(error)
        assert await release(channel, "fine") is True


async def test_rubbish_bytes_are_an_invalid_request() -> None:
    async with serving() as (_, _, channel):
        call = channel.unary_unary("/wire.v1.Pages/Release")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(b"\xff\xff\xff\xff", timeout=5)
        assert isinstance(rpc.error_from_rpc(failed.value), errors.InvalidRequest)
        assert await release(channel, "fine") is True


@pytest.mark.parametrize("request_id", ["wait", "flood"])
async def test_cancelling_a_stream_closes_the_method_behind_it(request_id: str) -> None:
    async with serving() as (_, pages, channel):
        call = kv_pb2_grpc.PagesStub(channel).Claim(kv_pb2.ClaimRequest(request_id=request_id))
        assert (await call.read()).claim_id == request_id
        assert not pages.closed.is_set()
        call.cancel()
        await asyncio.wait_for(pages.closed.wait(), timeout=5)


async def test_a_server_that_goes_away_is_a_lost_worker() -> None:
    async with serving() as (server, _, channel):
        call = kv_pb2_grpc.PagesStub(channel).Claim(kv_pb2.ClaimRequest(request_id="wait"))
        await call.read()
        await server.drain(0)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert isinstance(rpc.error_from_rpc(failed.value), errors.WorkerLost | errors.Cancelled)
        assert isinstance(await release(channel, "fine"), errors.WorkerLost)


FROZEN = """
import asyncio
from wire import rpc

async def serve():
    server = rpc.Server()
    port = await server.start()
    await server.set_serving(True)
    print(port, flush=True)
    await asyncio.sleep(600)

asyncio.run(serve())
"""


async def test_a_server_that_is_frozen_is_a_lost_worker_though_its_kernel_still_answers() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", FROZEN, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        async with rpc.open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(60):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
            serving = await watch.read()
            assert serving.status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                await watch.read()
            assert isinstance(rpc.error_from_rpc(lost.value), errors.WorkerLost)
    finally:
        process.kill()
        await process.wait()


async def test_a_deadline_is_a_deadline() -> None:
    async with serving() as (_, _, channel):
        stub = kv_pb2_grpc.PagesStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Release(kv_pb2.ReleaseRequest(claim_id="slow"), timeout=0.01)
        assert isinstance(rpc.error_from_rpc(failed.value), errors.DeadlineExceeded)


async def test_a_drain_lets_running_calls_finish() -> None:
    async with serving() as (server, _, channel):
        running = asyncio.create_task(release(channel, "slow"))
        await asyncio.sleep(0.05)
        await server.drain(5)
        assert await running is True


async def test_a_health_watch_tells_every_change() -> None:
    async with serving() as (server, _, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        first = await watch.read()
        await server.set_serving(False)
        second = await watch.read()
        watch.cancel()
    names = [health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status) for reply in (first, second)]
    assert names == ["SERVING", "NOT_SERVING"]


async def test_health_follows_set_serving() -> None:
    server = rpc.Server()
    port = await server.start()
    async with rpc.open_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status() -> str:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

        assert await status() == "NOT_SERVING"
        await server.set_serving(True)
        assert await status() == "SERVING"
        await server.set_serving(False)
        assert await status() == "NOT_SERVING"
    await server.drain(0)


async def test_a_taken_port_is_a_config_error() -> None:
    first, second = rpc.Server(), None
    port = await first.start()
    second = rpc.Server(f"127.0.0.1:{port}")
    with pytest.raises(errors.ConfigError, match=f"Cannot listen on 127.0.0.1:{port}"):
        await second.start()
    await first.drain(0)


@pytest.mark.parametrize("cls", rpc._BY_CODE.values())
def test_every_error_has_its_own_code_and_returns_from_it(cls: type[errors.PenumbraError]) -> None:
    error = rpc.error_from_code(cls.code, "why")
    assert type(error) is cls
    assert str(error) == "why"


def test_a_code_of_a_later_version_is_a_plain_error() -> None:
    assert type(rpc.error_from_code("from_the_future", "why")) is errors.PenumbraError
