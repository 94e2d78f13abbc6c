"""A stand-in for the Hugging Face hub on the loopback, with every fault that a download must survive.

It speaks the part of the hub's interface that huggingface_hub uses for models: information with sizes and hashes,
the tree, `resolve` with ETag and X-Repo-Commit, Range, and redirects of large files to another origin.

    with HubStandIn({"org/name": folder}) as hub:
        plan = plan_download("org/name", endpoint=hub.endpoint, cache_dir=tmp_path)
        run_cli("models", "pull", "org/name", **hub.variables(tmp_path))
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote, unquote, urlsplit

from hub_repos import Blob, Repo, file_entry, folder_content

PAGE = b"<!doctype html><html><title>Welcome</title><body>Please log in to the network.</body></html>"
TOKEN = "hf_accepted"
PIECE = 1 << 14  # bytes written at once


@dataclass
class Faults:
    """What goes wrong; all may be changed while the stand-in runs. File names are those in the repository."""

    bytes_per_second: float | None = None
    cut_after: int | None = None  # bytes of a body after which the connection is closed
    cuts: int = 0  # how many bodies are cut; a large number cuts all
    cut_names: str = r".*\.safetensors"
    redirect: bool = True  # LFS files are served from another origin, as on the real hub
    ignore_range: bool = False
    refuse_range: bool = False
    unlisted_404: set[str] = field(default_factory=set)  # listed, but answered with 404
    web_pages: set[str] = field(default_factory=set)  # answered with a login page; "api" for all information
    replaced: dict[str, bytes] = field(default_factory=dict)  # content that does not match its hash
    statuses: list[int] = field(default_factory=list)  # answers to the next requests, one each
    listing: dict[str, Any] = field(default_factory=dict)  # changes to the information about a repository


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    origin: str  # the host that was asked


class HubStandIn:
    """The server; use as a context manager. `repos` maps ids to folders, or to names and contents."""

    def __init__(self, repos: Mapping[str, Path | Mapping[str, bytes]] | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.sent = 0  # bytes of file bodies
        for repo_id, files in (repos or {}).items():
            self.push(repo_id, files)

    def push(self, repo_id: str, files: Path | Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit of a repository, which need not exist yet -> its hash."""
        content = folder_content(files) if isinstance(files, Path) else files
        return self.repos.setdefault(repo_id, Repo()).push(content, branch)

    def downloads(self, name: str = "") -> list[Request]:
        """The requests for file bodies whose path ends in `name` or, after a redirect, in its hash."""
        hashes = {
            blob.sha256
            for repo in self.repos.values()
            for files in repo.commits.values()
            for blob in files.values()
            if blob.name.endswith(name)
        }
        return [
            request
            for request in self.requests
            if request.method == "GET"
            and (
                ("/resolve/" in request.path and request.path.endswith(name))
                or (request.path.startswith("/cdn/") and request.path.rpartition("/")[2] in hashes)
            )
        ]

    def variables(self, home: Path) -> dict[str, str | None]:
        """Environment variables for a process that is to use this hub and a cache below `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_CACHE": None,
            "HF_HUB_OFFLINE": None,
            "HF_TOKEN": None,
        }

    @contextlib.contextmanager
    def in_process(self, home: Path) -> Iterator[None]:
        """The same for this process, within the block."""
        changes: dict[str, Any] = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        with mock.patch.multiple("huggingface_hub.constants", **changes):
            yield

    def __enter__(self) -> "HubStandIn":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=10)


class Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is set by the stand-in."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubStandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: requests are recorded instead."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        get = self.headers.get
        request = Request(self.command, path, get("Range"), get("Authorization"), get("Host", ""))
        self.hub.requests.append(request)
        if self.hub.faults.statuses:
            return self.answer(self.hub.faults.statuses.pop(0), b"an injected answer")
        if path.startswith("/api/models/"):
            return self.information(path.removeprefix("/api/models/"))
        if path.startswith("/cdn/"):
            return self.stored(path.rpartition("/")[2])
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path)
        if found:
            return self.resolve(*found.groups())
        return self.answer(404, b"Not Found")

    def information(self, path: str) -> None:
        """/api/models/{id}, with /revision/{revision} or /tree/{revision}."""
        if "api" in self.hub.faults.web_pages:
            return self.answer(200, PAGE, kind="text/html")
        parts = path.split("/", 3)
        commit = self.find_commit("/".join(parts[:2]), parts[3] if len(parts) > 3 else "main")
        if commit is None:
            return None
        repo = self.hub.repos["/".join(parts[:2])]
        blobs = list(repo.commits[commit].values())
        if parts[2:3] == ["tree"]:
            return self.answer_json(
                [{"type": "file", "path": blob.name, **file_entry(blob, "oid")} for blob in blobs]
            )
        body = {
            "id": "/".join(parts[:2]),
            "sha": commit,
            "gated": "manual" if repo.is_gated else False,
            "siblings": [{"rfilename": blob.name, **file_entry(blob, "blobId")} for blob in blobs],
        }
        return self.answer_json(body | self.hub.faults.listing)

    def find_commit(self, repo_id: str, revision: str) -> str | None:
        """The commit, or None after an answer that says why there is none."""
        repo = self.hub.repos.get(repo_id)
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}", "Bearer hf_not_accepted"):
            self.answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None:
            status, text = (
                (404, "Repository not found") if authorization else (401, "Invalid username or password.")
            )
            self.answer(status, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": text})
        elif (commit := repo.refs.get(revision, revision)) in repo.commits:
            return commit
        else:
            text = f"Invalid rev id: {revision}"
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": text})
        return None

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        """A file of a repository, or the way to where it is stored."""
        faults = self.hub.faults
        if name in faults.web_pages:
            return self.answer(200, PAGE, kind="text/html")
        commit = self.find_commit(repo_id, revision)
        if commit is None:
            return None
        repo = self.hub.repos[repo_id]
        authorization = self.headers.get("Authorization")
        if repo.is_gated and authorization != f"Bearer {TOKEN}":
            text = f"Access to model {repo_id} is restricted."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": text}
            return self.answer(403 if authorization else 401, b"", headers)
        blob = repo.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if blob is None or name in faults.unlisted_404:
            return self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        if blob.is_lfs and faults.redirect:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{quote(repo_id)}/{blob.sha256}"
            return self.answer(302, b"Found. Redirecting", headers)
        return self.body(blob, headers)

    def stored(self, sha256: str) -> None:
        """What the other origin serves."""
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for blob in files.values():
                    if blob.is_lfs and blob.sha256 == sha256:
                        return self.body(blob, {})
        return self.answer(404, b"Not Found")

    def body(self, blob: Blob, headers: dict[str, str]) -> None:
        """A file's bytes, from where Range says."""
        faults = self.hub.faults
        content = faults.replaced.get(blob.name, blob.content)
        headers = headers | {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or faults.ignore_range:
            return self.send_slowly(blob.name, 200, content, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if start > end or faults.refuse_range:
            return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.send_slowly(blob.name, 206, content[start : end + 1], headers)

    def send_slowly(self, name: str, status: int, content: bytes, headers: dict[str, str]) -> None:
        """The answer at the speed and up to the byte that the faults say."""
        faults = self.hub.faults
        self.head(
            status,
            {"Content-Type": "application/octet-stream", "Content-Length": str(len(content)), **headers},
        )
        if self.command == "HEAD":
            return
        end = len(content)
        if faults.cut_after is not None and faults.cuts > 0 and re.fullmatch(faults.cut_names, name):
            faults.cuts -= 1
            end = min(end, faults.cut_after)
        for start in range(0, end, PIECE):
            piece = content[start : min(start + PIECE, end)]
            try:
                self.wfile.write(piece)
            except OSError:  # the other side has gone
                break
            self.hub.sent += len(piece)
            if faults.bytes_per_second:
                time.sleep(len(piece) / faults.bytes_per_second)
        if end < len(content):
            self.close_connection = True

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), kind="application/json; charset=utf-8")

    def answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, kind: str = "text/plain"
    ) -> None:
        self.head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
