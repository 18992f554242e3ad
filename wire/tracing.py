"""Spans of a request across processes: OpenTelemetry where an endpoint is configured, nothing at all where none is.

A span's context has one form, inside a process and between two: W3C's `traceparent` line, which travels as an HTTP
header and as gRPC metadata. Spans are exported by OTLP over HTTP on a thread of their own, and lost when nobody takes
them. The libraries are imported only when they are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wire.errors import ConfigError, PenumbraError

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

TRACEPARENT = "traceparent"
EXPORT_TIMEOUT_S = 5.0
"""A collector that does not answer costs a batch of spans after so long, and a stopping process twice that at most."""


class Span:
    """One step of a request, open until `end`. This one is of a process that does not trace: it does nothing."""

    traceparent = ""

    def child(self, name: str, **attributes: str | int | float) -> Span:
        """A step of this one that another process carries out: a call."""
        return self

    def part(self, name: str, begin_s: float, end_s: float) -> None:
        """A step of this one that is over, between two moments of the monotonic clock."""

    def set(self, **attributes: str | int | float) -> None:
        pass

    def end(self, error: BaseException | None = None) -> None:
        """Once. A cancelled step is one without an answer, not a failed one."""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a gRPC call inside this step carries."""
        return ((TRACEPARENT, self.traceparent),) if self.traceparent else ()


NO_SPAN = Span()

_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def current_span() -> Span:
    """The span of the gRPC call that is being served."""
    return _current.get()


class Tracer:
    """Begins traces and carries on those of others. Without an endpoint it makes no spans."""

    def serving(self, name: str, traceparent: str, *, begin_s: float | None = None) -> Span:
        """A request that came in, from the caller whose `traceparent` this is; a new trace where that is none."""
        return NO_SPAN

    @contextlib.contextmanager
    def rpc(self, method: str, traceparent: str) -> Iterator[None]:
        """Serves a gRPC call, as `current_span`, if its caller traces it. Nobody begins a trace here."""
        span = self.serving(method.lstrip("/"), traceparent) if traceparent else NO_SPAN
        if span is NO_SPAN:
            yield
            return
        token = _current.set(span)
        try:
            yield
        except BaseException as error:
            span.end(error)
            raise
        else:
            span.end()
        finally:
            _current.reset(token)

    async def aclose(self) -> None:
        """Export what is left, in bounded time."""


def tracer(endpoint: str, *, service: str, instance: str) -> Tracer:
    """One that exports to `endpoint`, an http or https URL whose path is /v1/traces if it has none; empty: none.

    Raises ConfigError for a URL that can not be one, or without the libraries.
    """
    if not endpoint:
        return Tracer()
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r} is not an http or https URL. Give the collector's OTLP/HTTP address, "
            "such as http://127.0.0.1:4318/v1/traces."
        )
    if url.path in ("", "/"):
        url = url._replace(path="/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint is set, but {error.name} is not installed. Install penumbra[trace], or leave the "
            "endpoint empty."
        ) from error
    # Ours to shut down: the library's own exit handler would wait for a collector that may be gone.
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"penumbra-{service}", "service.instance.id": instance}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=url.geturl(), timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1_000))
    return _Exporting(provider)


class _Exporting(Tracer):
    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("penumbra")
        self._propagator = TraceContextTextMapPropagator()

    def serving(self, name: str, traceparent: str, *, begin_s: float | None = None) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        # An empty context, not the current one: the caller's line says who the parent is, and nothing else does.
        parent = self._propagator.extract({TRACEPARENT: traceparent}, Context())
        begin = None if begin_s is None else _epoch_ns(begin_s)
        return _Recorded(self, self._tracer.start_span(name, parent, SpanKind.SERVER, start_time=begin))

    async def aclose(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * EXPORT_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)


class _Recorded(Span):
    def __init__(self, tracer: _Exporting, span: trace.Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self._made_by = tracer
        self._span = span
        self._context = set_span_in_context(span)
        carrier: dict[str, str] = {}
        tracer._propagator.inject(carrier, self._context)
        self.traceparent = carrier.get(TRACEPARENT, "")

    def child(self, name: str, **attributes: Any) -> Span:
        from opentelemetry.trace import SpanKind

        span = self._made_by._tracer.start_span(name, self._context, SpanKind.CLIENT, attributes)
        return _Recorded(self._made_by, span)

    def part(self, name: str, begin_s: float, end_s: float) -> None:
        part = self._made_by._tracer.start_span(name, self._context, start_time=_epoch_ns(begin_s))
        part.end(_epoch_ns(end_s))

    def set(self, **attributes: Any) -> None:
        self._span.set_attributes(attributes)

    def end(self, error: BaseException | None = None) -> None:
        from opentelemetry.trace import Status, StatusCode

        match error:
            case PenumbraError():
                self._span.set_status(Status(StatusCode.ERROR, str(error)))
                self._span.set_attribute("error.type", error.code)
            case Exception():
                self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                self._span.set_attribute("error.type", type(error).__name__)
            case None:
                pass
            case _:
                self._span.set_attribute("cancelled", True)
        self._span.end()


def _epoch_ns(monotonic_s: float) -> int:
    """What collectors want, of a moment that just was. Lengths stay those of the monotonic clock."""
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
