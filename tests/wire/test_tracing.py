"""Spans as a collector gets them: this one is real as far as the processes that export to it can tell."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.wire.collector import Collector
from wire.errors import ConfigError, Overloaded
from wire.rpc import Server, open_channel
from wire.tracing import NO_SPAN, Tracer, current_span, tracer
from wire.v1 import kv_pb2, kv_pb2_grpc

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_a_request_joins_its_callers_trace_and_its_steps_lie_within_it():
    with Collector() as collector:
        spans = tracer(collector.url, service="router", instance="r0")
        request = spans.serving("POST /v1/completions", PARENT, begin_s=asyncio.get_running_loop().time() - 1.0)
        call = request.child("Decode.Start", attempt=1)
        request.part("tokenize", 5.0, 5.25)
        call.end(Overloaded("full"))
        request.end()
        await spans.aclose()
    found = collector.by_name()
    root, rpc, part = (found[name] for name in ("POST /v1/completions", "Decode.Start", "tokenize"))
    assert {span.trace_id.hex() for span in found.values()} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
    assert root.parent_span_id.hex() == "00f067aa0ba902b7"
    assert rpc.parent_span_id == part.parent_span_id == root.span_id
    assert call.traceparent == f"00-{rpc.trace_id.hex()}-{rpc.span_id.hex()}-01"
    assert call.metadata() == (("traceparent", call.traceparent),)
    assert abs(part.end_time_unix_nano - part.start_time_unix_nano - 250_000_000) < 1_000_000
    assert root.end_time_unix_nano - root.start_time_unix_nano >= 1_000_000_000
    assert (rpc.status.code, rpc.status.message) == (2, "full")
    assert collector.attributes(rpc) == {"attempt": 1, "error.type": "overloaded"}
    assert collector.services == {"penumbra-router"}


@pytest.mark.parametrize("line", ["", "rubbish", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é\n"])
async def test_a_request_whose_caller_does_not_trace_begins_a_trace(line: str):
    with Collector() as collector:
        spans = tracer(collector.url, service="router", instance="r0")
        spans.serving("GET /", line).end()
        await spans.aclose()
    (root,) = collector.spans
    assert root.parent_span_id == b""
    assert any(root.trace_id)


class _Pages(kv_pb2_grpc.PagesServicer):
    async def Claim(self, request, context):
        span = current_span()
        span.set(claim=request.request_id)
        yield kv_pb2.PageOffer(claim_id=span.traceparent)
        if request.attempt:
            raise Overloaded("no more")

    async def Release(self, request, context):
        return kv_pb2.ReleaseReply(valid=current_span() is not NO_SPAN)


async def test_a_grpc_call_is_served_inside_a_span_of_its_callers_trace_and_only_then():
    with Collector() as collector:
        spans = tracer(collector.url, service="prefill", instance="p0")
        server = Server(tracer=spans)
        server.add(kv_pb2_grpc.add_PagesServicer_to_server, _Pages())
        async with open_channel(f"127.0.0.1:{await server.start()}") as channel:
            stub = kv_pb2_grpc.PagesStub(channel)
            traced = {"metadata": (("traceparent", PARENT),)}
            (offer,) = [offer async for offer in stub.Claim(kv_pb2.ClaimRequest(request_id="a"), **traced)]
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in stub.Claim(kv_pb2.ClaimRequest(request_id="b", attempt=1), **traced):
                    pass
            assert (await stub.Release(kv_pb2.ReleaseRequest(), **traced)).valid
            assert not (await stub.Release(kv_pb2.ReleaseRequest())).valid
        await server.drain(0)
        await spans.aclose()
    good, bad, release = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert {span.parent_span_id.hex() for span in collector.spans} == {"00f067aa0ba902b7"}
    assert [span.name for span in (good, bad, release)] == [
        *["wire.v1.Pages/Claim"] * 2,
        "wire.v1.Pages/Release",
    ]
    assert offer.claim_id == f"00-{good.trace_id.hex()}-{good.span_id.hex()}-01"
    assert collector.attributes(good) == {"claim": "a"}
    assert collector.attributes(bad) == {"claim": "b", "error.type": "overloaded"}


def test_without_an_endpoint_nothing_is_traced_and_nothing_travels():
    spans = tracer("", service="router", instance="r0")
    span = spans.serving("POST /", PARENT)
    assert span is span.child("Decode.Start") is NO_SPAN
    assert (span.traceparent, span.metadata()) == ("", ())
    assert type(spans) is Tracer


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://collector/v1/traces", "http://", "grpc://c:4317"])
def test_an_endpoint_that_can_be_none_is_refused(endpoint: str):
    with pytest.raises(ConfigError, match="is not an http or https URL"):
        tracer(endpoint, service="router", instance="r0")


async def test_a_collector_that_is_not_there_costs_spans_and_bounded_time():
    with Collector() as collector:
        url = collector.url
    spans = tracer(url, service="router", instance="r0")
    spans.serving("POST /", "").end()
    async with asyncio.timeout(30):
        await spans.aclose()
