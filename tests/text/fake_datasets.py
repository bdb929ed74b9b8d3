"""A hub of data sets on this machine, as far as the library datasets asks it for files to stream."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from local_server import Answering, running

Sets = dict[str, dict[str, bytes]]
"""From the name of a set to its files."""
COMMIT = "0" * 40


class _Handler(Answering):
    protocol_version = "HTTP/1.1"
    sets: Sets
    asked: list[str]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(*found.groups())
        if (found := re.match(r"/api/datasets/([^/]+/[^/]+)", path)) is None or found[1] not in self.sets:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            prefix = path.split(f"/tree/{COMMIT}")[-1].split("/tree/main")[-1].strip("/")
            names = [name for name in self.sets[found[1]] if name.startswith(prefix)]
            return self.answer(200, [self._entry(found[1], name) for name in names])
        siblings = [{"rfilename": name} for name in sorted(self.sets[found[1]])]
        self.answer(200, {"id": found[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.asked.append(f"POST {path}")
        found = re.match(r"/api/datasets/([^/]+/[^/]+)/paths-info/", path)
        if found is None or found[1] not in self.sets:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        wanted = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", unquote(body))
        self.answer(200, [self._entry(found[1], name) for name in wanted if name in self.sets[found[1]]])

    def _entry(self, owner: str, name: str) -> dict[str, Any]:
        content = self.sets[owner][name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, owner: str, name: str) -> None:
        content = self.sets.get(owner, {}).get(name)
        if content is None:
            return self.answer(404, {}, {"X-Error-Code": f"{'Entry' if owner in self.sets else 'Repo'}NotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], headers)
        return self.answer(200, content, headers)


@contextmanager
def served(sets: Sets) -> Iterator[tuple[str, list[str]]]:
    """Serves data sets; yields the address, and what is asked for as it is."""
    asked: list[str] = []
    with running(_Handler, sets=sets, asked=asked) as address:
        yield address, asked
