"""A hub of data sets on this machine, as far as the library datasets asks it for files to stream."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Sets = dict[str, dict[str, bytes]]
"""From the name of a set to its files."""
COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sets: Sets
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        """Keeps the tests' output clean."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(*found.groups())
        if (found := re.match(r"/api/datasets/([^/]+/[^/]+)", path)) is None or found[1] not in self.sets:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            prefix = path.split(f"/tree/{COMMIT}")[-1].split("/tree/main")[-1].strip("/")
            names = [name for name in self.sets[found[1]] if name.startswith(prefix)]
            return self._answer(200, [self._entry(found[1], name) for name in names])
        siblings = [{"rfilename": name} for name in sorted(self.sets[found[1]])]
        self._answer(200, {"id": found[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.asked.append(f"POST {path}")
        found = re.match(r"/api/datasets/([^/]+/[^/]+)/paths-info/", path)
        if found is None or found[1] not in self.sets:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        wanted = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", unquote(body))
        self._answer(200, [self._entry(found[1], name) for name in wanted if name in self.sets[found[1]]])

    def _entry(self, owner: str, name: str) -> dict[str, Any]:
        content = self.sets[owner][name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, owner: str, name: str) -> None:
        content = self.sets.get(owner, {}).get(name)
        if content is None:
            return self._answer(404, {}, {"X-Error-Code": f"{'Entry' if owner in self.sets else 'Repo'}NotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._answer(206, content[first : last + 1], headers)
        return self._answer(200, content, headers)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def served(sets: Sets) -> Iterator[tuple[str, list[str]]]:
    """Serves data sets; yields the address, and what is asked for as it is."""
    handler: Any = type("Handler", (_Handler,), {"sets": sets, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
