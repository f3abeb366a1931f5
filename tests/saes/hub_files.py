"""A small Hub with files in it, and our client that brings them: fixtures and figures of the tests of downloads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from saehub.jobs.models import enqueue
from saehub.jobs.progress import Progress
from saes import hub as our
from saes.hub import HubFile, Listing
from tests.mini_hub import MiniHub

REPO = "lab/saes"
NAME = "layer_0/weights.safetensors"
WEIGHTS = os.urandom(600_000)
CONFIG = b'{"d_in": 3}'


@pytest.fixture
def stocked(hub: MiniHub) -> MiniHub:
    hub.repos[f"models/{REPO}"] = {NAME: WEIGHTS, "layer_0/cfg.json": CONFIG, "layer_1/cfg.json": b"{}"}
    return hub


@pytest.fixture
def storage() -> Iterator[MiniHub]:
    """Another host."""
    made = MiniHub()
    yield made
    made.close()


@pytest.fixture
def progress() -> Progress:
    job = enqueue("probe", None, title="download")
    from saehub.jobs.models import Job

    claimed = Job.objects.claim(job.pk, "test")
    assert claimed is not None
    return Progress(claimed)


@pytest.fixture
def get(progress: Progress) -> Callable[..., Path]:
    """Download the SAE of layer 0 and return its folder; every byte of it has been compared."""

    def call(token: str | None = None) -> Path:
        listing = our.list_repository(REPO, token=token)
        files = [file for file in listing.files if file.path.startswith("layer_0/")]
        folder = our.download(progress, listing, files, token)
        assert (folder / NAME).read_bytes() == WEIGHTS and (folder / "layer_0/cfg.json").read_bytes() == CONFIG
        return folder

    return call


def said(progress: Progress) -> str:
    return "\n".join(progress.job.lines.values_list("text", flat=True))


def part_of(listing: Listing, name: str = NAME) -> Path:
    return listing.store / "blobs" / f"{file_of(listing, name).etag}.incomplete"


def file_of(listing: Listing, name: str = NAME) -> HubFile:
    return next(file for file in listing.files if file.path == name)


def leave_part(data: bytes) -> None:
    """What a killed worker leaves."""
    part = part_of(our.list_repository(REPO))
    part.parent.mkdir(parents=True)
    part.write_bytes(data)


def no_parts_left() -> bool:
    return not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
