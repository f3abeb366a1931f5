"""What tests of imports share: the form filled in, by page and by API, and the job that it queues."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse

from saehub.jobs.models import Job
from saes.models import SAE
from tests.api_calls import ask, good


def url() -> str:
    return reverse("saes:sae_import")


def zipped(folder: Path, below: str = "") -> SimpleUploadedFile:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, below + str(path.relative_to(folder)))
    return SimpleUploadedFile("sae.zip", out.getvalue())


def sent(folder: Path) -> list[SimpleUploadedFile]:
    return [SimpleUploadedFile(path.name, path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()]


@pytest.fixture
def bring(client_of: Any, run_job: Any) -> Any:
    """Fill in the form, and run the job that it queues; returns the row and the finished job."""

    def call(**data: Any) -> tuple[SAE, Job]:
        response = client_of("researcher").post(url(), data)
        assert response.status_code == 302, response.context["form"].errors
        row = SAE.objects.select_related("job").latest("pk")
        return after(row, run_job(row.job))

    return call


def after(row: SAE, job: Job) -> tuple[SAE, Job]:
    """The row as the job left it; as it was before where it is not registered any more."""
    return SAE.objects.filter(pk=row.pk).first() or row, job


@pytest.fixture
def bring_by_api(user_of: Any, run_job: Any) -> Any:
    """The same by the API: the row it says, and the finished job."""

    def call(**data: Any) -> tuple[SAE, Job]:
        data.pop("where")
        said = good(ask(user_of("researcher"), "post", "/saes/import", data=data), 202)
        row = SAE.objects.select_related("job").get(pk=said["saes"][0]["sae"])
        return after(row, run_job(row.job))

    return call
