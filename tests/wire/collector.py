"""An OTLP/HTTP collector that keeps what it is sent."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Listens on a free port of the loopback for the length of a `with`; `spans` are protobuf messages."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.service_of: dict[bytes, str] = {}  # span id -> the service that made it
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                status = 200 if self.path == "/v1/traces" else 404
                if status == 200:
                    collector._keep(ExportTraceServiceRequest.FromString(body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def _keep(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            values = {item.key: item.value.string_value for item in resource.resource.attributes}
            self.services.add(values["service.name"])
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.service_of[span.span_id] = values["service.name"]
                    self.spans.append(span)

    def by_name(self) -> dict[str, Any]:
        found = {span.name: span for span in self.spans}
        assert len(found) == len(self.spans), "two spans of one name"
        return found

    @staticmethod
    def attributes(span: Any) -> dict[str, str | int]:
        return {
            item.key: item.value.string_value if item.value.HasField("string_value") else item.value.int_value
            for item in span.attributes
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()
