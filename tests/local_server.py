"""A server on this machine for tests that speak HTTP: its answers, its address, its end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Answering(BaseHTTPRequestHandler):
    """Answers with bytes, or with anything else as JSON."""

    def log_message(self, *_: Any) -> None:
        """Keeps the tests' output clean."""

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Sends an answer; to HEAD without its body."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running(handler: type[Answering], **state: Any) -> Iterator[str]:
    """Serves by a handler whose class has this state; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), state))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
