"""Giving SAEs to others by /api/v1: archives in the formats of other tools, uploads to the Hub; and access to its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.http import HttpRequest
from ninja import Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import like
from saehub.jobs.starting import starts
from saehub.streaming import stored
from saes.api_forms import laid_over, refuse
from saes.api_rows import Pair, Started, pairs_of, row_of, started
from saes.card import model_card
from saes.hub_access import access_of
from saes.sharing import AS_IS, FORMATS, ExportForm, UploadForm, archive, archives, licence_of

router = Router(tags=["SAEs"])
STARTED = {200: Started, 202: Started}
gives = starts(started, pairs_of)
ARCHIVES: Any = {"formats": FORMATS, "archives": [{"format": "sparsify", "bytes": 1204224, "name": "sae-12-sparsify.zip"}],
                 "licence": "mit", "card": "---\nlibrary_name: saelens\n---\n"}  # fmt: skip
ACCESS: Any = {
    "repo_id": "google/gemma-scope-2b-pt-res", "granted": True, "sentence": "", "hint": "", "token": "yours",
    "licence": "cc-by-4.0", "gated": "", "page": "https://huggingface.co/google/gemma-scope-2b-pt-res", "revision": "",
}  # fmt: skip


class ExportIn(Schema):
    """The format of an archive; `licence` as the Hub names it, the SAE's own or its repository's when left out."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"format": "sparsify", "licence": "mit"}]}
    )

    format: str = "saelens"
    licence: str | None = None


class UploadIn(ExportIn):
    """A place on the Hub; the repository is made when there is none, private unless said otherwise."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [
        {"repo_id": "my-lab/my-saes", "path": "blocks.12.hook_resid_post", "private": True, "licence": "mit"}
    ]})  # fmt: skip

    repo_id: str
    path: str | None = None
    private: bool = True


@router.get("/saes/{int:pk}/access", auth=Needs("saes.view_sae"), response=like(ACCESS), summary="May I download it?")
def sae_access(request: HttpRequest, pk: int) -> dict[str, Any]:
    """The Hub is asked now, with the token that a download of yours would use. `granted` is null where it cannot be."""
    row = row_of(pk)
    if not row.repo_id:
        raise Problem(404, f"{row.name} has no repository on the Hub.")
    found = access_of(request.user, row.repo_id)
    return asdict(found) | {"page": found.page, "revision": row.revision}


@router.get(
    "/saes/{int:pk}/export", auth=Needs("saes.view_sae"), response=like(ARCHIVES), summary="Its archives and model card"
)
def sae_archives(request: HttpRequest, pk: int) -> dict[str, Any]:
    """What was made of it, what can be, and the card that goes with it."""
    row = row_of(pk)
    made = [
        {"format": one.format, "bytes": one.size, "name": one.name, "made_at": one.made_at} for one in archives(row)
    ]
    licence = licence_of(row)
    form = "saelens" if row.format == "saelens" else AS_IS
    return {
        "formats": FORMATS, "archives": made, "licence": licence, "card": model_card(row, form, licence=licence)
    }  # fmt: skip


@router.post("/saes/{int:pk}/export", auth=Needs("saes.add_sae"), response=STARTED, summary="Write it as an archive")
@gives
def sae_export(request: HttpRequest, pk: int, wanted: ExportIn) -> list[Pair]:
    """A zip in the format of choice, read back and compared; what a format cannot hold is refused with the reason."""
    return _queued(request, pk, ExportForm, wanted)


@router.get("/saes/{int:pk}/export/{format}", auth=Needs("saes.view_sae"), response=like({}), summary="Get an archive")
def sae_archive(request: HttpRequest, pk: int, format: str) -> Any:
    row = row_of(pk)
    found = archive(row, format)
    if found is None:
        raise Problem(404, f"No archive of {row.name} in the format {format[:40]} was made yet.")
    return stored(request, found.pieces(), name=found.name, kind="application/zip", size=found.size)


@router.delete("/saes/{int:pk}/export/{format}", auth=Needs("saes.add_sae"), response=like({"deleted": True}),
               summary="Remove an archive")  # fmt: skip
def sae_archive_delete(request: HttpRequest, pk: int, format: str) -> dict[str, Any]:
    row = row_of(pk)
    require_own(request, "saes.add_sae", row)
    found = archive(row, format)
    if found is None:
        raise Problem(404, f"No archive of {row.name} in the format {format[:40]} was made yet.")
    found.path.unlink(missing_ok=True)
    return {"deleted": True}


@router.post("/saes/{int:pk}/upload", auth=Needs("saes.add_sae"), response=STARTED, summary="Upload it to the Hub")
@gives
def sae_upload(request: HttpRequest, pk: int, wanted: UploadIn) -> list[Pair]:
    """With a model card, in one commit, with the Hub token of your account; the job's result has the address."""
    require_own(request, "saes.add_sae", row_of(pk))
    return _queued(request, pk, UploadForm, wanted)


def _queued(request: HttpRequest, pk: int, kind: type[ExportForm], wanted: ExportIn) -> list[Pair]:
    row = row_of(pk)
    given = {name: value for name, value in wanted.dict().items() if value is not None}
    form = kind(laid_over(kind(sae=row), given), sae=row)
    refuse(form)
    try:
        job = form.make(request.user)
    except ValueError as error:
        raise Problem(409, str(error)) from None
    return [(row.pk, job.pk)]
