"""A hub in memory: the methods of huggingface_hub's client that are used, and the same over HTTP."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from local_server import Answering, running

ADDRESS = "https://hub.test"
USER = "ann"


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """Returns what the client raises at a status."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error", response=response, server_message=f"server says {status}")


@dataclass
class Repo:
    """Branches, each from paths to bytes, and the commit that it stands at."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    def head(self, branch: str = "main") -> str:
        content = repr((sorted(self.branches[branch].items()), len(self.messages)))
        return hashlib.sha1(content.encode()).hexdigest()


class FakeHub:
    """Remembers what was asked, and raises `failing[method]` in the place of an answer."""

    def __init__(self, **repos: Repo) -> None:
        self.repos = {f"{USER}/{name}": repo for name, repo in repos.items()}
        self.calls: list[str] = []
        self.failing: dict[str, Exception] = {}

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """Returns what a branch holds, but for what the hub itself puts there."""
        return {p: content for p, content in self.repos[name].branches[branch].items() if p != ".gitattributes"}

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if method in self.failing:
            raise self.failing[method]

    def whoami(self) -> dict[str, Any]:
        self._called("whoami")
        return {"name": USER}

    def model_info(self, repo_id: str, *, revision: str | None = None) -> Any:
        self._called("model_info")
        if repo_id not in self.repos:
            raise refusal(404, RepositoryNotFoundError)
        repo, branch = self.repos[repo_id], revision or "main"
        if branch not in repo.branches:
            raise refusal(404, RevisionNotFoundError)
        siblings = [SimpleNamespace(rfilename=path) for path in sorted(repo.branches[branch])]
        return SimpleNamespace(id=repo_id, private=repo.private, sha=repo.head(branch), siblings=siblings)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None, local_dir: str) -> str:
        self._called("hf_hub_download")
        file = Path(local_dir) / filename
        file.write_bytes(self.at(repo_id, revision)[filename])
        return str(file)

    def at(self, repo_id: str, commit: str | None) -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return next(files for branch, files in repo.branches.items() if repo.head(branch) == commit)

    def create_repo(self, repo_id: str, *, private: bool | None) -> str:
        self._called("create_repo")
        assert repo_id not in self.repos
        self.repos[repo_id] = Repo(private=bool(private))
        return f"{ADDRESS}/{repo_id}"

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self._called("create_branch")
        assert exist_ok
        branches = self.repos[repo_id].branches
        branches.setdefault(branch, dict(branches["main"]))

    def create_commit(
        self, repo_id: str, operations: Any, *, commit_message: str, revision: str | None, parent_commit: str | None
    ) -> CommitInfo:
        self._called("create_commit")
        changes: dict[str, bytes | None] = {}
        for operation in operations:
            assert operation.path_in_repo not in changes
            changes[operation.path_in_repo] = None
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    changes[operation.path_in_repo] = file.read()
        oid = self.change(repo_id, changes, commit_message, revision or "main", parent_commit)
        place = f"{ADDRESS}/{repo_id}/commit/{oid}"
        return CommitInfo(
            commit_url=place, commit_message=commit_message, commit_description="", oid=oid, _endpoint=ADDRESS
        )

    def change(
        self, repo_id: str, changes: dict[str, bytes | None], message: str, branch: str, parent: str | None
    ) -> str:
        repo = self.repos[repo_id]
        if parent is not None and parent != repo.head(branch):
            raise refusal(412)
        for path, content in changes.items():
            if content is None:
                del repo.branches[branch][path]
            else:
                repo.branches[branch][path] = content
        repo.messages.append(message)
        return repo.head(branch)


@contextmanager
def served(hub: FakeHub, *, token: str) -> Iterator[str]:
    """Serves a hub on this machine; yields its address."""
    with running(_Handler, hub=hub, token=token) as address:
        yield address


class _Handler(Answering):
    """Answers as the hub does, for models whose files are all small."""

    hub: FakeHub
    token: str

    def do_GET(self) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.headers["Authorization"] != f"Bearer {self.token}":
            return self.answer(401, {"error": "Invalid user token."})
        try:
            if path == ["api", "whoami-v2"]:
                return self.answer(200, self.hub.whoami())
            if path[:2] == ["api", "models"]:
                info = self.hub.model_info("/".join(path[2:4]), revision=path[5] if len(path) > 4 else None)
                siblings = [{"rfilename": file.rfilename} for file in info.siblings]
                return self.answer(200, {**vars(info), "siblings": siblings})
            commit, name = path[3], "/".join(path[4:])  # owner/name/resolve/commit/file
            content = self.hub.at("/".join(path[:2]), commit)[name]
        except RevisionNotFoundError:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        except RepositoryNotFoundError:
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        tag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")][1:]
        if self.headers["Authorization"] != f"Bearer {self.token}":
            return self.answer(401, {"error": "Invalid user token."})
        if path == ["validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if path == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.create_repo(name, private=asked.get("visibility") == "private" or asked.get("private"))
            return self.answer(200, {"url": f"{self._address}/{name}"})
        name, action, branch = "/".join(path[1:3]), path[3], path[4]
        if action == "branch":
            self.hub.create_branch(name, branch=branch, exist_ok=True)
            return self.answer(200, {})
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        return self._commit(name, branch, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        header = lines[0]["value"]
        changes: dict[str, bytes | None] = {}
        for line in lines[1:]:
            value = line["value"]
            changes[value["path"]] = base64.b64decode(value["content"]) if line["key"] == "file" else None
        oid = self.hub.change(name, changes, header["summary"], branch, header.get("parentCommit"))
        self.answer(200, {"commitUrl": f"{self._address}/{name}/commit/{oid}", "commitOid": oid})

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"
