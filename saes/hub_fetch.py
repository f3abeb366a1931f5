"""Files of one repository on their way into the Hub's cache: fetched, resumed, checked, and only then put in place.

huggingface_hub 2.4 writes every download to a name of its own and throws it away when it ends, so that a worker that is
killed loses all it had, and it does not look at the content. Here the unfinished file is `blobs/<hash>.incomplete`, the
same for every process (a lock keeps them apart), and a file gets its name in the cache when its hash is right.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
from filelock import Timeout
from huggingface_hub import constants, errors, file_download, hf_hub_url
from huggingface_hub.utils import WeakFileLock, get_session, hf_raise_for_status

from saehub.jobs.progress import Progress
from saes import hub_client
from saes.hub_client import DROPPED, HubError, explain, headers, pause, worth_another
from saes.hub_listing import HubFile, Listing

THREADS = 4  # files at once, of one job
CHUNK = 1024 * 1024
RESTARTS = 4  # of one file from its beginning, for whatever reason
POLL_SECONDS = 0.25


class Stopped(Exception):
    """Ends a thread after a cancel, or after another thread's failure; never leaves this module."""


class Unsound(Exception):
    """What lies or came here is not the file: begin it again. The text says what was seen."""


class Transfer:
    """`run(progress)` brings the files here with a few threads and returns when each is in place."""

    def __init__(self, listing: Listing, files: list[HubFile], token: str | None) -> None:
        self.listing, self.token = listing, token
        self.total = sum(file.size for file in files)
        self.counts = {file.path: 0 for file in files}  # bytes that are here and hashed
        self.blobs = listing.store / "blobs"
        self.locks = Path(constants.HF_HUB_CACHE) / ".locks" / listing.store.name
        self.waiting: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.failures: list[BaseException] = []
        self.stop = threading.Event()
        self.current = ""
        for file in sorted(files, key=lambda file: file.size):  # configs first: a bad one fails before gigabytes
            self.waiting.put(file)

    def run(self, progress: Progress) -> None:
        for folder in (self.blobs, self.locks, self.listing.snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        count = min(THREADS, len(self.counts))
        threads = [threading.Thread(target=self._work, daemon=True, name=f"hub-{n}") for n in range(count)]
        for thread in threads:
            thread.start()
        try:
            while alive := [thread for thread in threads if thread.is_alive()]:
                self._report(progress)
                alive[0].join(POLL_SECONDS)
        finally:
            self.stop.set()
        self._report(progress)
        if self.failures:
            raise self.failures[0]
        self._remember()

    def _report(self, progress: Progress) -> None:
        while not self.notes.empty():
            progress.log(self.notes.get())
        progress(min(sum(self.counts.values()), self.total), self.total, self.current)

    def _remember(self) -> None:
        """Which commit the branch or tag is at, so that the files are found by its name when the Hub cannot be asked."""
        listing = self.listing
        revision = listing.revision or constants.DEFAULT_REVISION
        if not listing.offline:
            file_download._cache_commit_hash_for_specific_revision(str(listing.store), revision, listing.commit)

    # -- a thread
    def _work(self) -> None:
        try:
            while True:
                file = self.waiting.get_nowait()
                self._bring(file)
        except (queue.Empty, Stopped):
            return
        except BaseException as error:
            self.failures.append(error)
            self.stop.set()

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def _bring(self, file: HubFile) -> None:
        blob, pointer = self.blobs / file.etag, self.listing.snapshot / file.path
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(file.etag, file.path):
            place = blob if blob.exists() else pointer
            if not (place.is_file() and self._sound(place, file)):
                self.current = f"Downloading {self.listing.repo_id}: {file.path}"
                part = self.blobs / f"{file.etag}.incomplete"
                self._fetch(file, part)
                file_download._chmod_and_move(part, blob)
            elif place == pointer:
                return
            if not (pointer.exists() and pointer.samefile(blob)):
                file_download._create_symlink(str(blob), str(pointer), new_blob=True)

    @contextmanager
    def _locked(self, etag: str, path: str) -> Iterator[None]:
        """The lock huggingface_hub takes for this blob: another process that has it is waited for."""
        told = False
        with ExitStack() as held:
            while True:
                self._go_on()
                try:
                    held.enter_context(WeakFileLock(self.locks / f"{etag}.lock", timeout=POLL_SECONDS))
                    break
                except Timeout:
                    if not told:
                        self.notes.put(f"{path} is being downloaded by another job, which is waited for")
                    told = True
            yield

    def _sound(self, place: Path, file: HubFile) -> bool:
        """Whether a file of the cache is what the listing says; one that is not is removed."""
        if place.stat().st_size == file.size and self._hash(place, file).hexdigest() == file.etag:
            return True
        place.unlink()
        self.notes.put(f"{file.path} was in the cache with other content than the Hub's; it is fetched again")
        return False

    def _hash(self, place: Path, file: HubFile) -> Any:
        """Hash of a whole or unfinished file, to be gone on with."""
        digest, seen = digest_of(file), 0
        with place.open("rb") as handle:
            while chunk := handle.read(CHUNK):
                self._go_on()
                digest.update(chunk)
                seen += len(chunk)
                self.counts[file.path] = min(seen, file.size)
        return digest

    # -- one file
    def _fetch(self, file: HubFile, part: Path) -> None:
        """Until the file is whole and sound; raises when attempts in a row gain nothing, or it stays unsound."""
        attempt = restarts = spoilt = 0
        while True:
            self._go_on()
            before = _size(part)
            try:
                return self._stream(file, part)
            except Unsound as error:
                part.unlink(missing_ok=True)
                self.counts[file.path] = 0
                restarts, spoilt = restarts + 1, spoilt + (before == 0)
                if spoilt > 1 or restarts > RESTARTS:
                    raise HubError(
                        f"{file.path} of {self.listing.repo_id} arrives damaged: {error}. It was fetched more than once "
                        "and nothing of it was kept.",
                        "Something between here and the Hub changes the data (a proxy, a mirror); press Retry later.",
                    ) from None
                self.notes.put(f"{file.path}: {error}; it is fetched again from the beginning")
            except (*DROPPED, errors.HfHubHTTPError) as error:
                attempt = 1 if _size(part) > before else attempt + 1
                if attempt >= hub_client.ATTEMPTS or not worth_another(error):
                    raise explain(error, self.listing.repo_id, file.path, self.listing.kind) from None
                seconds = pause(error, attempt)
                self.notes.put(f"{file.path}: {_seen(error)}; again in {seconds:.1f} s from byte {_size(part):,}")
                self.stop.wait(seconds)

    def _stream(self, file: HubFile, part: Path) -> None:
        """One request: the rest of the file onto what is here. Raises Unsound, or what the connection or the Hub says."""
        have = _size(part)
        if have > file.size:
            raise Unsound("what was left of an earlier download is longer than the file")
        digest = self._hash(part, file) if have else digest_of(file)
        if have < file.size or not part.exists():
            url = hf_hub_url(
                self.listing.repo_id, file.path, repo_type=self.listing.kind, revision=self.listing.commit
            )  # fmt: skip
            asked = headers(self.token) | {"Accept-Encoding": "identity"}
            if have:
                asked["Range"] = f"bytes={have}-"
            with get_session().stream("GET", url, headers=asked) as response:
                _check(response, have, file)
                if response.status_code == 200 and have:  # the whole file, though its rest was asked for
                    have, digest = 0, digest_of(file)
                self._write(response, part, have, file, digest)
        if digest.hexdigest() != file.etag:
            raise Unsound("its content does not have the checksum the Hub gives for it")

    def _write(self, response: httpx2.Response, part: Path, have: int, file: HubFile, digest: Any) -> None:
        """Onto the unfinished file, in large pieces: each small one would cost the lock between Python's threads twice."""
        with part.open("r+b" if have else "wb") as handle:
            handle.seek(have)
            handle.truncate()
            came: list[bytes] = []
            waiting, last = 0, time.monotonic()

            def flush() -> None:
                nonlocal have, waiting, last
                piece = b"".join(came)
                came.clear()
                waiting, last = 0, time.monotonic()
                if have + len(piece) > file.size:
                    raise Unsound("more came than the file is long")
                digest.update(piece)
                handle.write(piece)
                have += len(piece)
                self.counts[file.path] = have

            try:
                for chunk in response.iter_bytes():
                    self._go_on()
                    came.append(chunk)
                    waiting += len(chunk)
                    if waiting >= CHUNK or time.monotonic() - last > POLL_SECONDS:
                        flush()
            finally:  # of a connection that was cut, too
                flush()
        if have < file.size:  # the answer was complete by its own account
            raise Unsound(f"only {have:,} of {file.size:,} bytes came")


def digest_of(file: HubFile) -> Any:
    """The hash that `etag` is: SHA-256 of a large file, git's SHA-1 of a small one."""
    if len(file.etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _check(response: httpx2.Response, have: int, file: HubFile) -> None:
    """Raises for an answer that is not the file from byte `have` on."""
    if response.status_code == 416:
        raise Unsound("the Hub does not know the place where the download ended")
    hf_raise_for_status(response)
    said = response.headers.get("content-range", "").replace(" ", "")
    if response.status_code == 206 and said != f"bytes{have}-{file.size - 1}/{file.size}":
        raise Unsound(f"the Hub answered another part of it ({said or 'unnamed'})")
    if response.status_code not in (200, 206):
        raise Unsound(f"the Hub answered with code {response.status_code}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _seen(error: Exception) -> str:
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}"
    return "the Hub did not answer in time" if isinstance(error, httpx2.TimeoutException) else "the connection was cut"
