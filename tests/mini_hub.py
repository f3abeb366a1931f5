"""A small Hugging Face Hub on this machine: the real client library talks to it over HTTP, as it does to the real one.

It answers what listings, downloads and streams ask: revisions and refs, trees in pages, files with ranges and etags,
large ones over a redirect to another path or host, who a token belongs to, and the Hub's own error codes; and what uploads
send: a new repository, large files, a commit. `fault` makes it misbehave in every way that was seen or may be expected, for
a path and a number of times.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = r"[\w.-]+/[\w.-]+"
API = re.compile(rf"/api/(models|datasets)/({REPO})(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(/.*)?)?)?")
FILE = re.compile(rf"/(datasets/)?({REPO})/resolve/([^/]+)/(.+)")
AUTH = re.compile(rf"/api/(models|datasets)/({REPO})/auth-check")
SENT = re.compile(rf"/api/(models|datasets)/({REPO})/(preupload|commit)/([^/]+)")
BATCH = re.compile(rf"/(datasets/)?({REPO})\.git/info/lfs/objects/batch")
STORED = re.compile(rf"/lfs/(models|datasets)/({REPO})/(.+)")
LARGE = (".safetensors", ".npz", ".pt", ".bin", ".gguf", ".parquet", ".zip", ".h5", ".msgpack", ".onnx")


@dataclass
class Fault:
    """What goes wrong at addresses that contain `where`, the next `times` times (None: always).

    On every request: `status` (with `headers`), `delay` in seconds. On the content of a file: `cut` (the connection ends
    after this share of what was asked for), `corrupt` (wrong bytes of the right length), `wrong_range` (bytes of another
    place under the right header), `wrong_header` (the header of another place), `whole` (the range is not looked at),
    `no_range` (416 to every range), `rate` (bytes a second), `short` (complete by its headers, but less than the file).
    """

    where: str
    what: str
    value: Any = True
    times: int | None = 1
    headers: dict[str, str] = field(default_factory=dict)

    def fits(self, path: str) -> bool:
        """`where` ends with "$": the path ends there."""
        return path.endswith(self.where[:-1]) if self.where.endswith("$") else self.where in path


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    range: str
    authorization: str


class MiniHub:
    """`repos["models/org/name"] = {path: bytes}`.

    `gated` repositories show their listing and refuse their files, but to tokens in `granted`; `private` ones are shown to
    nobody without a token. `tokens` maps a token to the account's name; those in `writers` may write. `cards` maps a
    repository to what its card's metadata say. `storage` is another MiniHub that large files are
    redirected to; `next_page_at` an address that the listing's second page is said to be at.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.granted: set[str] = set()
        self.private: set[str] = set()
        self.tokens: dict[str, str] = {}
        self.writers: set[str] = set()
        self.cards: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}  # large files that were sent, by their SHA-256
        self.messages: list[str] = []  # of the commits that were made
        self.revisions = {"main", COMMIT}
        self.page_size = 1000
        self.endless = False
        self.next_page_at = ""
        self.storage: MiniHub | None = None
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.requests: list[Asked] = []
        self.closed = False
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.closed = True
        self.server.shutdown()
        self.server.server_close()

    def fault(self, where: str, what: str, value: Any = True, times: int | None = 1, **headers: str) -> Fault:
        """Switch a fault on; `headers` go with a `status`, "_" in their names for "-"."""
        made = Fault(where, what, value, times, {name.replace("_", "-"): value for name, value in headers.items()})
        self.faults.append(made)
        return made

    def take(self, path: str, *whats: str) -> dict[str, Fault]:
        """The faults of these kinds that are on for this path, each used up by one."""
        found: dict[str, Fault] = {}
        with self.lock:
            for fault in self.faults:  # of several of a kind, the first
                if fault.fits(path) and fault.what in whats and fault.times != 0:
                    found.setdefault(fault.what, fault)
            for fault in found.values():
                fault.times = fault.times if fault.times is None else fault.times - 1
        return found

    def gets(self, name: str) -> list[Asked]:
        """The GET requests whose path ends so."""
        return [asked for asked in self.requests if asked.method == "GET" and asked.path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    hub: MiniHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.hub.closed:
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {unquote(path)}")
        sent = self.headers.get("Authorization") or ""
        self.hub.requests.append(Asked(self.command, unquote(path), self.headers.get("Range") or "", sent))
        if self._stopped(unquote(path)):
            return
        if path == "/api/whoami-v2":
            self._whoami()
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []} if self._body() else {})
        elif path == "/api/repos/create":
            self._create()
        elif found := AUTH.fullmatch(path):
            if self._repo(f"{found[1]}/{found[2]}", "main", content=True) is not None:
                self._answer(200, b"")
        elif found := BATCH.fullmatch(path):
            self._batch()
        elif found := SENT.fullmatch(path):
            self._sent(f"{found[1]}/{found[2]}", found[3])
        elif path.startswith("/objects/"):
            self._object(path.removeprefix("/objects/"))
        elif found := STORED.fullmatch(path):
            self._stored(*(unquote(part) for part in found.groups()))
        elif found := API.fullmatch(path):
            self._api(*(part and unquote(part) for part in found.groups()))
        elif found := FILE.fullmatch(path):
            self._file(*(part and unquote(part) for part in found.groups()))
        else:
            self._answer(404, b"")

    do_HEAD = do_POST = do_PUT = do_GET

    # -- what is sent
    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while length := int(self.rfile.readline(), 16):
            found += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _may_write(self) -> bool:
        if self.token in self.hub.writers:
            return True
        self._answer(403 if self.token in self.hub.tokens else 401, b'{"error":"You may not write here"}')
        return False

    def _create(self) -> None:
        asked = json.loads(self._body())
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if not self._may_write():
            return
        known = f"models/{name}" in self.hub.repos
        self.hub.repos.setdefault(f"models/{name}", {})
        if (asked.get("private") or asked.get("visibility") == "private") and not known:
            self.hub.private.add(f"models/{name}")
        about = {"url": f"{self.hub.url}/{name}", "name": name}
        self._answer(409 if known else 200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _batch(self) -> None:
        asked = json.loads(self._body())
        if not self._may_write():
            return
        found = [
            {"oid": one["oid"], "size": one["size"]}
            | ({} if one["oid"] in self.hub.objects else {
                "actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            })
            for one in asked["objects"]
        ]  # fmt: skip
        self._json({"transfer": "basic", "objects": found})

    def _object(self, oid: str) -> None:
        body = self._body()
        assert _sha256(body) == oid, "what was sent is not what was announced"
        self.hub.objects[oid] = body
        self._answer(200, b"")

    def _sent(self, key: str, what: str) -> None:
        body = self._body()
        if not self._may_write():
            return
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {
                one["path"]: "lfs" if one["path"].endswith(LARGE) or one["size"] > 1 << 20 else "regular"
                for one in files
            }
            self._json({"files": [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes.items()
            ]})  # fmt: skip
            return
        rows = [json.loads(line) for line in body.decode().splitlines() if line]
        files = dict(self.hub.repos[key])
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self.hub.messages.append(value["summary"])
        self.hub.repos[key] = files
        repo = key.partition("/")[2]
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}"})

    def _stopped(self, path: str) -> bool:
        faults = self.hub.take(path, "status", "delay")
        if "delay" in faults:
            time.sleep(faults["delay"].value)
        if "status" in faults:
            self._answer(faults["status"].value, b"", faults["status"].headers)
        return "status" in faults

    # -- who asks
    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _whoami(self) -> None:
        if self.token in self.hub.tokens:
            self._json({"type": "user", "name": self.hub.tokens[self.token], "auth": {"type": "access_token"}})
        else:
            self._answer(401, b'{"error":"Invalid username or password."}', {"Content-Type": "application/json"})

    def _repo(self, key: str, revision: str, content: bool = False) -> dict[str, bytes] | None:
        known = self.token in self.hub.tokens
        if self.token and self.hub.tokens and not known:
            self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif key not in self.hub.repos or (key in self.hub.private and not known):
            self._answer(404 if known else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif content and key in self.hub.gated and self.token not in self.hub.granted:
            self._answer(403 if self.token else 401, b"", {"X-Error-Code": "GatedRepo"})
        elif revision not in self.hub.revisions:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.hub.repos[key]
        return None

    # -- what there is
    def _api(self, kind: str, repo: str, what: str | None, revision: str | None, below: str | None) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = parse_qs(self.rfile.read(length).decode()) if length else {}
        files = self._repo(f"{kind}/{repo}", revision or "main")
        if files is None:
            return
        if what == "refs":
            branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}]
            self._json({"branches": branches, "tags": [], "converts": []})
        elif what == "tree":
            self._tree([_entry(name, data) for name, data in files.items() if name.startswith((below or "")[1:])])
        elif what == "paths-info":
            self._json([_entry(name, files[name]) for name in body.get("paths", []) if name in files])
        else:
            siblings = [
                {"rfilename": name} | {key: entry[key] for key in ("size", "lfs") if key in entry}
                | {"blobId": entry["oid"]}
                for name, entry in ((name, _entry(name, data)) for name, data in files.items())
            ]  # fmt: skip
            about = {"id": repo, "sha": COMMIT, "siblings": siblings}
            gated = "auto" if f"{kind}/{repo}" in self.hub.gated else False
            card = self.hub.cards.get(f"{kind}/{repo}", {})
            about |= {"private": f"{kind}/{repo}" in self.hub.private, "gated": gated, "cardData": card}
            self._json(about | {"downloads": 0, "likes": 0, "tags": []})

    def _tree(self, entries: list[dict[str, Any]]) -> None:
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        headers = {"Content-Type": "application/json"}
        if end < len(entries) or self.hub.endless:
            at = (self.hub.next_page_at if not start else "") or self.hub.url
            headers["Link"] = f'<{at}{urlsplit(self.path).path}?recursive=true&cursor={end}>; rel="next"'
        page = entries if self.hub.endless else entries[start:end]
        self._answer(200, json.dumps(page).encode(), headers)

    # -- files
    def _file(self, kind: str | None, repo: str, revision: str, name: str) -> None:
        key = f"{'datasets' if kind else 'models'}/{repo}"
        files = self._repo(key, revision, content=True)
        if files is None:
            return
        if name not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(LARGE):
            where = f"{(self.hub.storage or self.hub).url}/lfs/{key}/{quote(name)}"
            headers = {"X-Linked-Etag": f'"{_sha256(files[name])}"', "X-Linked-Size": str(len(files[name]))}
            self._answer(302, b"", headers | {"X-Repo-Commit": COMMIT, "Location": f"{where}?signature=secret"})
        else:
            self._content(name, files[name], _git_sha1(files[name]))

    def _stored(self, kind: str, repo: str, name: str) -> None:
        data = self.hub.repos[f"{kind}/{repo}"][name]
        self._content(name, data, _sha256(data))

    def _content(self, name: str, data: bytes, etag: str) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        kinds = ("cut", "corrupt", "wrong_range", "wrong_header", "whole", "no_range", "rate", "short")
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.command == "HEAD":
            self._answer(200, data, headers)
            return
        of_ranges = ("wrong_range", "wrong_header", "whole", "no_range")
        faults = self.hub.take(unquote(urlsplit(self.path).path), *(k for k in kinds if ranged or k not in of_ranges))
        start, end = 0, len(data)
        if ranged and "whole" not in faults:
            start, end = int(ranged[1]), min(int(ranged[2] or len(data) - 1) + 1, len(data))
            if start >= len(data) or "no_range" in faults:
                self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            shift = 1 if "wrong_header" in faults else 0
            headers["Content-Range"] = f"bytes {start - shift}-{end - 1 - shift}/{len(data)}"
        body = data[start:end]
        if "wrong_range" in faults:
            body = data[: end - start]
        if "corrupt" in faults:
            body = bytes(byte ^ 1 for byte in body[:1]) + body[1:]
        if "short" in faults:
            body = body[: len(body) // 2]
        self._send(206 if "Content-Range" in headers else 200, body, headers, faults)

    def _send(self, status: int, body: bytes, headers: dict[str, str], faults: dict[str, Fault]) -> None:
        """The content of a file, perhaps slowly, perhaps not to its end."""
        ends = int(len(body) * faults["cut"].value) if "cut" in faults else len(body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        view, at = memoryview(body)[:ends], 0
        try:
            while at < ends:
                piece = (
                    max(faults["rate"].value // 20, 1) if "rate" in faults else 1 << 20
                )  # a test may change the rate
                self.wfile.write(view[at : at + piece])
                at += piece
                if "rate" in faults and not self.hub.closed:
                    time.sleep(0.05)
        except OSError:  # the client went away
            self.close_connection = True
        if ends < len(body):
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # the client went away
                self.wfile.write(body)


@lru_cache(64)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as the tree shows it; a large one is a pointer in git."""
    if not name.endswith(LARGE):
        return {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
    sha256 = _sha256(data)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    lfs = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(pointer), "lfs": lfs}
