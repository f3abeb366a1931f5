"""What SAEs a repository of the Hub holds, told from the names of its files, for pages that cannot wait long.

The Hub is asked in a thread of its own. A page waits a few seconds for it and else says that the answer is still coming; the
thread goes on, and the next look finds what it brought.
"""

from __future__ import annotations

import posixpath
import re
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from typing import Any

from django.db import connection

from saes.gemma_scope import Variant, is_gemma_scope, of_rows, of_tree, with_rows
from saes.layouts import natural_key
from saes.models import SAE
from saes.naming import Named, named

WAIT_SECONDS = 6.0
KEEP_SECONDS = 300.0  # an answer is shown again for this long before the Hub is asked anew
Names = set[str]


class StillAsking(Exception):
    """The Hub has not answered yet; look again in a moment."""


@dataclass(frozen=True)
class Place:
    """An SAE in a repository: its folder or file, and the format its files look like ("" for none that is known)."""

    path: str
    format: str
    size_bytes: int
    said: Named


# -- asking ------------------------------------------------------------------------------------------------------------
@dataclass
class _Asked:
    future: Future[Any]
    at: float


_asked: dict[tuple[str, str, str], _Asked] = {}
_lock = threading.Lock()


def listing_of(repo_id: str, revision: str = "", token: str | None = None, *, wait: float = WAIT_SECONDS) -> Any:
    """The repository's listing (saes.hub.Listing). Raises StillAsking, and HubError with what the Hub said.

    What one person's token may see is not shown to another: the token is part of what an answer is kept under.
    """
    key = (repo_id, revision, token or "")
    with _lock:
        for old in [one for one, asked in _asked.items() if time.monotonic() - asked.at > KEEP_SECONDS]:
            del _asked[old]
        if key not in _asked:
            _asked[key] = _Asked(_in_thread(repo_id, revision, token), time.monotonic())
        future = _asked[key].future
    try:
        found = future.result(timeout=wait)
    except TimeoutError:
        raise StillAsking(f"The Hub has not answered about {repo_id} yet.") from None
    except Exception:
        with _lock:  # the next look asks again
            _asked.pop(key, None)
        raise
    return found


def _in_thread(repo_id: str, revision: str, token: str | None) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            from saes import hub  # late: the Hub's client takes its time to import

            future.set_result(hub.list_repository(repo_id, revision, token=token))
        except BaseException as error:  # raised where the future is asked
            future.set_exception(error)
        finally:
            connection.close()

    threading.Thread(target=run, daemon=True, name=f"list {repo_id}").start()
    return future


# -- reading a listing -------------------------------------------------------------------------------------------------
def places(repo_id: str, files: Iterable[Any]) -> list[Place]:
    """SAEs among the files of a repository, by the rules of their formats on names alone."""
    sizes = {file.path: file.size for file in files}
    folders: dict[str, Names] = {}
    for path in sizes:
        folder, name = posixpath.split(path)
        folders.setdefault(folder, set()).add(name)
    found = {
        path: form for folder, names in folders.items() for path, form in _in_folder(repo_id, folder, names, folders)
    }
    return [
        Place(path, form, _bytes(path, sizes), named(form, repo_id, path))
        for path, form in sorted(found.items(), key=lambda pair: natural_key(pair[0]))
    ]


FOLDERS = (  # files that have to be there -> format of the folder; the first that fits counts
    ({"cfg.json", "sae_weights.safetensors"}, "saelens"),
    ({"cfg.json", "sae_weights.safetensors.index.json"}, "saelens"),
    ({"cfg.json", "sae.safetensors"}, "sparsify"),
    ({"params.npz"}, "gemma_scope_1"),
    ({"params.safetensors"}, "gemma_scope_2"),
    ({"config.json", "sae_weights.safetensors"}, "openmoss"),
    ({"ae.pt", "config.json"}, "dictionary_learning"),
    ({"conf.yaml", "latest_ckpt.safetensors"}, "temporal"),
    ({"checkpoint.safetensors"}, "mistudio"),
)
FILES: tuple[
    tuple[re.Pattern[str], str, Names], ...
] = (  # a file that is an SAE by itself, where one of these stands beside it
    (re.compile(r"params_layer_\d+\.safetensors"), "gemma_scope_2", set()),
    (re.compile(r"W_enc_\d+\.safetensors"), "mntss_clt", {"config.yaml"}),
    (
        re.compile(r"layer_\d+\.safetensors"),
        "mwhanna_transcoder",
        {"wandb-config.yaml", "wanb-config.yaml", "config.yaml"},
    ),
    (re.compile(r"layer\d+\.sae\.pt"), "qwen_scope", set()),
)


def _in_folder(repo_id: str, folder: str, names: Names, folders: Mapping[str, Names]) -> Iterable[tuple[str, str]]:
    for wanted, form in FOLDERS:
        if wanted <= names:
            if form == "gemma_scope_1" and "transcoder" in repo_id:
                form = "gemma_scope_1_transcoder"
            if form == "openmoss" and "Llama-Scope-R1-Distill" in repo_id:
                form = "llama_scope_r1_distill"
            return [(folder, form)]
    inner = folders.get(posixpath.join(folder, "checkpoints"), set())
    if "hyperparams.json" in names and {"final.safetensors", "pruned.safetensors"} & inner:
        return [(folder, "llama_scope")]
    found = ((posixpath.join(folder, name), _file(name, names)) for name in names)
    return [(path, kind) for path, kind in found if kind is not None]


def _file(name: str, names: Names) -> str | None:
    for pattern, form, beside in FILES:
        if pattern.fullmatch(name) and (not beside or beside & names):
            return form
    stem, ending = posixpath.splitext(name)
    if ending not in (".pt", ".pth") or name.startswith(("trainer_state", "optimizer", "training_args")):
        return None
    return "connor_rob_hook_z" if f"{stem}_cfg.json" in names else ""


def _bytes(path: str, sizes: Mapping[str, int]) -> int:
    if path in sizes:
        return sizes[path]
    inside = f"{path}/" if path else ""
    return sum(
        size for name, size in sizes.items() if name.startswith(inside) and not name.endswith("examples.safetensors")
    )


# -- Gemma Scope -------------------------------------------------------------------------------------------------------
def variants(
    repo_id: str, revision: str = "", token: str | None = None, *, live: bool = True, wait: float = WAIT_SECONDS
) -> tuple[list[Variant], str]:
    """Variants of a Gemma Scope repository and where they are from: "the Hub", or "the catalogue".

    Asked live, the Hub's tree counts, with what the catalogue knows of it besides (L0 of Gemma Scope 2, canonical). When
    the Hub cannot be reached, the catalogue's rows stand in. Raises HubError when there are none, and StillAsking.
    """
    from saehub.jobs.progress import JobError

    rows = list(
        SAE.objects.filter(repo_id=repo_id).only("repo_id", "repo_path", "published_l0", "size_bytes", "aliases")
    )
    if rows and not live:
        return of_rows(rows), "the catalogue"
    try:
        listing = listing_of(repo_id, revision, token, wait=wait)
    except JobError:
        if not rows:
            raise
        return of_rows(rows), "the catalogue"
    return with_rows(of_tree(repo_id, {file.path: file.size for file in listing.files}), rows), "the Hub"


def known_gemma_scope() -> list[str]:
    """Gemma Scope repositories that the catalogue names."""
    names = SAE.objects.filter(repo_id__contains="gemma-scope").order_by("repo_id").values_list("repo_id", flat=True)
    return [name for name in names.distinct() if is_gemma_scope(name)]
