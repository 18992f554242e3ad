"""A real OpenAI-compatible server that takes every request and answers none until it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GATE_S = 60.0


class Stalling(ThreadingHTTPServer):
    """`arrived` counts requests for answers, `gate` lets their answers out; completions are never answered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.gate = threading.Event()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.arrived: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def handle_error(self, *_: object) -> None:
        """A client that has left: what its test is about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def wait_for(self, count: int) -> None:
        """Until so many requests wait for their answers, all at once."""
        deadline = time.monotonic() + GATE_S
        while len(self.arrived) < count:
            assert time.monotonic() < deadline, f"{len(self.arrived)} of {count} requests came while none was answered"
            time.sleep(0.02)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stalling

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json({"object": "list", "data": [{"id": "stalling", "object": "model", "owned_by": "a test"}]})
        else:
            self._json({"error": {"message": "nothing here", "code": "not_found"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not body.get("stream"):
            # No /tokenize: what a prompt has of tokens shows in the usage of a short request alone.
            if self.path == "/v1/chat/completions":
                chars = sum(len(message["content"]) for message in body["messages"])
                self._json({"choices": [], "usage": {"prompt_tokens": chars // 4, "completion_tokens": 1}})
            else:
                self._json({"error": {"message": "nothing here", "code": "not_found"}}, 404)
            return
        with self.server.lock:
            self.server.arrived.append(body)
            self.server.keys.append(self.headers.get("authorization"))
        if self.path == "/v1/completions":
            self.server.ended.wait(GATE_S)
            self.close_connection = True
            return
        self.server.gate.wait(GATE_S)
        words = ["It", " was", " so", "."]
        events = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
        events.append({"choices": [], "usage": {"prompt_tokens": 16, "completion_tokens": len(words)}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for data in (*map(json.dumps, events), "[DONE]"):
            line = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    def _json(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def stalling() -> Iterator[Stalling]:
    server = Stalling()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.ended.set()
        server.shutdown()
        thread.join(30)
        server.server_close()
