"""A stand-in of the Hub on a free port: the part of its HTTP API that huggingface_hub calls to make a commit.

Files are kept as they arrive, so that a test can compare them byte by byte. Large files come over the LFS protocol
where HF_HUB_DISABLE_XET is set; otherwise hf_xet puts them into a store on disk, which it knows itself.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "stand" * 5


@dataclasses.dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    """Every file of the repository after it."""


@dataclasses.dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch][-1].files


Reply = tuple[int, Any, dict[str, str]]


@dataclasses.dataclass
class Hub:
    url: str = ""
    xet: Path | None = None
    """Where hf_xet keeps large files, if it is to: its own store on disk, in place of the Hub's."""
    repos: dict[tuple[str, str], Repo] = dataclasses.field(default_factory=dict)
    """By ("model" or "dataset", OWNER/NAME)."""
    store: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Large files by their SHA-256."""
    requests: list[str] = dataclasses.field(default_factory=list)
    """`METHOD /path`, in the order they came."""
    failures: dict[str, Reply] = dataclasses.field(default_factory=dict)
    """Regular expression of `METHOD /path` -> what is answered instead."""

    def reply(self, method: str, path: str, body: bytes, headers: Any) -> Reply:
        request = f"{method} {path}"
        self.requests.append(request)
        for pattern, failure in self.failures.items():
            if re.search(pattern, request):
                return failure
        if found := re.fullmatch(r"PUT /store/(\w+)", request):  # a presigned URL, which asks for no token
            assert "Authorization" not in headers
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.store[found[1]] = body
            return 200, {}, {}
        if request == "GET /api/agent-harnesses":  # huggingface_hub asks who calls it
            return 404, {}, {}
        if headers["Authorization"] != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return 401, {"error": message}, {"X-Error-Message": message}
        if request == "POST /api/repos/create":
            return self.create(json.loads(body))
        if request == "POST /api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if found := re.fullmatch(r"POST /(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", request):
            return self.batch(json.loads(body))
        if request == "POST /verify":
            expected = json.loads(body)
            return (200 if len(self.store[expected["oid"]]) == expected["size"] else 422), {}, {}
        found = re.fullmatch(
            r"\w+ /api/(model|dataset)s/([^/]+/[^/]+?)(?:/(revision|xet-write-token|preupload|commit|branch)/(.+))?",
            request,
        )
        assert found, f"the stand-in knows no {request}"
        kind, name, action, revision = found.groups()
        if (kind, name) not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        repo, branch = self.repos[kind, name], unquote(revision or "main")
        if action == "branch":
            if branch in repo.branches:
                return 409, {"error": "Reference already exists"}, {}
            repo.branches[branch] = list(repo.branches["main"])
            return 201, {}, {}
        if branch not in repo.branches:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        if action == "xet-write-token":
            return 200, {"casUrl": f"local://{self.xet}", "accessToken": "x", "exp": 9999999999}, {}
        if action == "preupload":
            return self.preupload(repo.files(branch), json.loads(body))
        if action == "commit":
            return self.commit(name, repo, branch, [json.loads(line) for line in body.splitlines()])
        last = repo.branches[branch][-1]
        siblings = [{"rfilename": path} for path in last.files]
        return 200, {"id": name, "private": repo.private, "sha": last.oid, "siblings": siblings}, {}

    def create(self, expected: dict[str, Any]) -> Reply:
        kind, name = expected.get("type", "model"), f"{expected['organization']}/{expected['name']}"
        there = (kind, name) in self.repos
        if not there:
            first = Commit("0" * 40, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.repos[kind, name] = Repo(expected["visibility"] == "private", {"main": [first]})
        return 409 if there else 200, {"url": f"{self.url}/{name}"}, {}

    def validate(self, content: str) -> Reply:
        if not content.startswith("---\n"):
            return 200, {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}, {}
        wrong = "license: nonsense" in content
        errors = [{"message": '"license" must be one of [apache-2.0, ...]'}] if wrong else []
        return (400 if wrong else 200), {"warnings": [], "errors": errors}, {}

    def preupload(self, there: dict[str, bytes], expected: dict[str, Any]) -> Reply:
        rows = []
        for file in expected["files"]:
            large, old = file["path"].endswith((".safetensors", ".png")), there.get(file["path"])
            git = None if old is None else hashlib.sha1(b"blob %d\0" % len(old) + old).hexdigest()
            oid = git if old is None or not large else hashlib.sha256(old).hexdigest()
            mode = "lfs" if large else "regular"
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": rows}, {}

    def batch(self, expected: dict[str, Any]) -> Reply:
        objects = []
        for row in expected["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/store/{row['oid']}", "header": {}},
                "verify": {"href": f"{self.url}/verify", "header": {}},
            }
            objects.append(row if row["oid"] in self.store else row | {"actions": actions})
        return 200, {"objects": objects, "transfer": "basic"}, {}

    def commit(self, name: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> Reply:
        assert lines[0]["key"] == "header"
        files = dict(repo.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                assert value["algo"] == "sha256"
                if self.xet is None and value["oid"] not in self.store:
                    return 400, {"error": f"{value['path']} was never uploaded"}, {}
                files[value["path"]] = self.store.get(value["oid"], value["oid"].encode())
        oid = hashlib.sha1(repr((len(repo.branches[branch]), sorted(files.items()))).encode()).hexdigest()
        repo.branches[branch].append(Commit(oid, lines[0]["value"]["summary"], files))
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}, {}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub, lock = Hub(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                status, value, headers = hub.reply(self.command, urlsplit(self.path).path, body, self.headers)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, text in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(data)),
                    **headers,
                }.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
