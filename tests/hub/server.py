"""A stand-in for the Hub on loopback: what huggingface_hub asks of it, real storage, and faults on demand.

It keeps models only, speaks the LFS protocol (not Xet), and remembers every request for tests to look into.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hub.wire import Refusal, Request, handler

TOKEN = "hf_" + "C4nary" * 6
USER = "me"
LARGE = (".safetensors", ".pt", ".pth", ".bin", ".png")
FIRST = {".gitattributes": b"*.safetensors filter=lfs\n"}


@dataclass
class Repository:
    """Branches of a repository, each a list of commits: id, message, and the files as `{name: sha256}`."""

    private: bool = False
    branches: dict[str, list[tuple[str, str, dict[str, str]]]] = field(default_factory=dict)


class Hub:
    """The stand-in, serving from its construction to `close`.

    A fault of a route is a status, `cut` (the connection breaks in the middle of the body), `hash` (what arrives is not
    what was sent), `("wait", seconds)` before the answer, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.stored: list[str] = []  # in order, every object that came over the wire whole
        self.faults: dict[str, Iterator[Any]] = {}
        self.tokens = {TOKEN}
        self.may_write = True
        folder.mkdir(parents=True, exist_ok=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, route: str, *faults: Any, for_ever: Any = None) -> None:
        """The next requests of a route meet these faults, one each, and all after them the last one."""
        self.faults[route] = itertools.chain(faults, itertools.repeat(for_ever))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What the head of a branch holds, without what every repository starts with."""
        head = self.repositories[repo].branches[revision][-1][2]
        return {name: self._object(digest).read_bytes() for name, digest in head.items() if name not in FIRST}

    def commits(self, repo: str, revision: str = "main") -> list[str]:
        """Messages of a branch's commits, the first one (of the repository itself) left out."""
        return [message for _, message, _ in self.repositories[repo].branches[revision][1:]]

    def took(self, route: str) -> list[Request]:
        return [request for request in self.requests if request.route == route]

    # What the routes answer

    def whoami(self, **_: Any) -> Any:
        return {"type": "user", "name": USER, "orgs": []}

    def create(self, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.url}/{repo}"}
        if repo in self.repositories:
            raise Refusal(409, json.dumps(answer))
        first = {name: self._store(content) for name, content in FIRST.items()}
        self.repositories[repo] = Repository(asked.get("visibility") == "private")
        self._commit(repo, "main", "initial commit", first)
        return answer

    def yaml(self, body: bytes, **_: Any) -> Any:
        if not json.loads(body)["content"].startswith("---\n"):
            raise Refusal(400, json.dumps({"errors": [{"message": "no metadata"}]}))
        return {"warnings": []}

    def branch(self, repo: str, revision: str, **_: Any) -> Any:
        branches = self._repository(repo).branches
        if revision in branches:
            raise Refusal(409)
        branches[revision] = list(branches["main"])
        return {}

    def tree(self, repo: str, revision: str, path: str | None, **_: Any) -> Any:
        head = self._head(repo, revision)[2]
        return [self._entry(name, digest) for name, digest in sorted(head.items()) if name.startswith(path or "")]

    def info(self, repo: str, revision: str | None, **_: Any) -> Any:
        oid, _, files = self._head(repo, revision or "main")
        return {"id": repo, "sha": oid, "siblings": [{"rfilename": name} for name in files], "tags": []}

    def preupload(self, repo: str, revision: str, body: bytes, **_: Any) -> Any:
        head = self._head(repo, revision)[2]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": self._oid(file["path"], head[file["path"]]) if file["path"] in head else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def batch(self, repo: str, body: bytes, **_: Any) -> Any:
        self._repository(repo)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if not self._object(entry["oid"]).exists():
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(422, "the content does not have this hash")
        self._store(body)
        self.stored.append(oid)
        return {}

    def commit(self, repo: str, revision: str, body: bytes, **_: Any) -> Any:
        files = dict(self._head(repo, revision)[2])
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self._store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if not self._object(value["oid"]).exists():
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            else:
                del files[value["path"]]
        oid = self._commit(repo, revision, header["value"]["summary"], files)
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}

    def resolve(self, repo: str, revision: str, path: str, **_: Any) -> Any:
        oid, _, files = self._head(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return self._object(files[path]), {"X-Repo-Commit": oid, "ETag": f'"{self._oid(path, files[path])}"'}

    # Storage

    def _repository(self, repo: str) -> Repository:
        if repo not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo]

    def _head(self, repo: str, revision: str) -> tuple[str, str, dict[str, str]]:
        branches = self._repository(repo).branches
        everything: Iterable[tuple[str, str, dict[str, str]]] = (one for branch in branches.values() for one in branch)
        if revision not in branches:
            found = next((commit for commit in everything if commit[0] == revision), None)
            if found is None:
                raise Refusal(404, "Revision not found", "RevisionNotFound")
            return found
        return branches[revision][-1]

    def _commit(self, repo: str, revision: str, message: str, files: dict[str, str]) -> str:
        branch = self.repositories[repo].branches.setdefault(revision, [])
        oid = hashlib.sha1(json.dumps([repo, revision, len(branch), files]).encode()).hexdigest()
        branch.append((oid, message, files))
        return oid

    def _object(self, digest: str) -> Path:
        return self.folder / digest

    def _store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self._object(digest).write_bytes(content)
        return digest

    def _oid(self, name: str, digest: str) -> str:
        content = self._object(digest).read_bytes()
        return digest if name.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _entry(self, name: str, digest: str) -> dict[str, Any]:
        size = self._object(digest).stat().st_size
        large = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if name.endswith(LARGE) else {}
        return {"type": "file", "path": name, "size": size, "oid": self._oid(name, digest), **large}
