"""Documents of a dataset on the Hugging Face Hub, for jobs: its Parquet files, streamed row by row, nothing kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet
from huggingface_hub import HfFileSystem

from saes.hub import HubError, HubFile, Listing, hub_errors, list_repository
from training.numerics.corpus_files import parquet_rows, pieces
from training.numerics.documents import CorpusError, Document, Kinds

CONVERTED = "refs/convert/parquet"  # the Hub's own conversion of every public dataset: <subset>/<split>/0000.parquet


@dataclass(frozen=True)
class Part:
    """The Parquet files of one split of one subset, at one commit."""

    repo_id: str
    commit: str
    subset: str
    split: str
    files: tuple[HubFile, ...]

    @property
    def sha256(self) -> str:
        """Of the names and content hashes of its files, as the Hub states them."""
        return hashlib.sha256("\n".join(f"{file.path} {file.etag}" for file in self.files).encode()).hexdigest()


def find_part(repo_id: str, revision: str, subset: str, split: str) -> Part:
    """The files to read. Without a revision it is the Hub's Parquet conversion, else what the repository itself holds.

    Raises CorpusError, listing what there is, when the subset or split is not there or has to be named.
    """
    listing = _parquet_of(repo_id, revision)
    places: dict[tuple[str, str], list[HubFile]] = {}
    for file in sorted(listing.files, key=lambda file: file.path):
        if file.path.endswith(".parquet"):
            places.setdefault(place_of(file.path), []).append(file)
    if not places:
        raise CorpusError(f"{repo_id} has no Parquet files at this revision; choose another revision or dataset.")
    chosen = choose(repo_id, list(places), subset, split)
    return Part(repo_id, listing.commit, *chosen, tuple(places[chosen]))


def _parquet_of(repo_id: str, revision: str) -> Listing:
    if revision:
        return list_repository(repo_id, revision, "dataset")
    try:
        return list_repository(repo_id, CONVERTED, "dataset")
    except HubError:  # not converted (private, or too new): what the repository holds itself, or why it cannot be had
        return list_repository(repo_id, "", "dataset")


def place_of(path: str) -> tuple[str, str]:
    """(subset, split) of a Parquet file's path, by the two layouts in use.

    `subset/split/0000.parquet` (the Hub's conversion), and `[subset or data/]train-00000-of-00002.parquet`.
    """
    *folders, name = path.split("/")
    if len(folders) >= 2:
        return "/".join(folders[:-1]), folders[-1].removeprefix("partial-")
    subset = folders[0] if folders and folders[0] != "data" else "default"
    return subset, name.removesuffix(".parquet").partition("-0")[0]


def choose(repo_id: str, places: list[tuple[str, str]], subset: str, split: str) -> tuple[str, str]:
    """The one place that is meant; "default" and "train" where nothing is said, or the only one there is."""
    subsets = sorted({place[0] for place in places})
    wanted = subset or ("default" if "default" in subsets else subsets[0] if len(subsets) == 1 else "")
    if wanted not in subsets:
        said = f"no subset {subset}" if subset else f"{len(subsets)} subsets"
        raise CorpusError(f"{repo_id} has {said}; name one of {_listed(subsets)}.")
    splits = sorted({place[1] for place in places if place[0] == wanted})
    chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        said = f"no split {split}" if split else f"{len(splits)} splits"
        raise CorpusError(f"{repo_id} has {said} in {wanted}; name one of {_listed(splits)}.")
    return wanted, chosen


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (" …" if len(names) > 12 else "")


def stream_documents(part: Part, text_field: str, filesystem: Any = None) -> Iterator[Document]:
    """Documents of the part, in order, read through range requests; the field as in `read_documents`.

    filesystem: an fsspec file system; the Hub's own unless given. Raises CorpusError for a missing field, rows that are
    neither text nor conversations or of both kinds, or a file that is not Parquet; HubError when the Hub cannot be reached.
    """
    kinds = Kinds()
    for file in part.files:
        with _table(part, file, filesystem) as table:
            for value, where in parquet_rows(table, file.path, text_field or None):
                yield from pieces(kinds.document(value, where))


def count_rows(part: Part, filesystem: Any = None) -> int:
    """Documents of the part, from the footers of its files: a few kilobytes each, no data."""
    rows = 0
    for file in part.files:
        with _table(part, file, filesystem) as table:
            rows += table.metadata.num_rows
    return rows


@contextmanager
def _table(part: Part, file: HubFile, filesystem: Any) -> Iterator[pyarrow.parquet.ParquetFile]:
    filesystem = filesystem or HfFileSystem()
    try:
        with (
            hub_errors(part.repo_id),
            filesystem.open(f"datasets/{part.repo_id}@{part.commit}/{file.path}", "rb") as handle,
        ):
            yield pyarrow.parquet.ParquetFile(handle)
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{file.path} is not a readable Parquet file; choose another dataset or revision.") from error
