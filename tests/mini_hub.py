"""A small Hugging Face Hub on this machine: the real client library talks to it over HTTP, as it does to the real one.

It answers what downloads and streams ask: repository facts, trees, files with ranges and etags, and the Hub's own error
codes for repositories that are missing or gated.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?")
FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class MiniHub:
    """`repos["models/org/name"] = {path: bytes}`; `gated` and `revisions` name what is refused and what exists."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.revisions = {"main", COMMIT}
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: MiniHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {unquote(path)}")
        if found := API.fullmatch(path):
            self._api(*(part and unquote(part) for part in found.groups()))
        elif found := FILE.fullmatch(path):
            self._file(*(part and unquote(part) for part in found.groups()))
        else:
            self._answer(404, b"")

    do_HEAD = do_POST = do_GET

    def _api(self, kind: str, repo: str, what: str | None, revision: str | None, below: str | None) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = parse_qs(self.rfile.read(length).decode()) if length else {}
        files = self._repo(f"{kind}/{repo}", revision or "main")
        if files is None:
            return
        if what in (None, "revision"):
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": "b", "lfs": _lfs(data)} for name, data in files.items()
            ]
            self._json(
                {
                    "id": repo,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                }
            )
        elif what == "tree":
            prefix = (below or "").strip("/")
            self._json([_entry(name, data) for name, data in files.items() if name.startswith(prefix)])
        else:
            self._json([_entry(name, files[name]) for name in body.get("paths", []) if name in files])

    def _file(self, kind: str | None, repo: str, revision: str, name: str) -> None:
        files = self._repo(f"{'datasets' if kind else 'models'}/{repo}", revision)
        if files is None:
            return
        if name not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_sha(data)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self._answer(206, data[start : end + 1], headers)
        else:
            self._answer(200, data, headers)

    def _repo(self, key: str, revision: str) -> dict[str, bytes] | None:
        if key in self.hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif key not in self.hub.repos:
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.hub.revisions:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.hub.repos[key]
        return None

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _lfs(data: bytes) -> dict[str, Any]:
    return {"sha256": _sha(data), "oid": _sha(data), "size": len(data), "pointerSize": 130}


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": "b", "lfs": _lfs(data)}
