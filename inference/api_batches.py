"""Batches of prompts in /api/v1: every text of a corpus read on its own, as one Parquet table of what fires."""

from __future__ import annotations

from typing import Any

from django.http import FileResponse, HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from inference.infer_forms import PromptBatchForm
from inference.models import PromptBatch
from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse

router = Router(tags=["Inference"])
BATCH: Any = {
    "id": 4, "name": "questions by one", "status": "done", "model_id": 1, "sae_ids": [12], "corpus_id": 2, "prepend_bos": True,
    "top": 20, "max_prompts": None, "n_prompts": 800, "n_cut": 0, "n_tokens": 16200, "n_rows": 310000, "size_bytes": 2100000,
    "file_path": "/api/v1/infer/batches/4/file", "seconds": 14.2, "owner": "ada", "created_at": "2026-11-22T08:00:00Z",
    "job_id": 53, "job_ids": [], "error": "",
}  # fmt: skip


class BatchIn(Schema):
    """Which texts, and which SAEs of one model read them. A file of prompts is a corpus: POST /corpora/upload."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"corpus_id": 2, "sae_ids": [12]}]})

    corpus_id: int
    sae_ids: list[int] = Field(min_length=1, max_length=100)
    top: int = Field(20, description="Strongest features kept of every token; 0 keeps all")
    max_prompts: int | None = Field(None, description="All of the corpus when left out")
    prepend_bos: bool = True


class BatchOut(Schema):
    """A batch. `n_cut` counts prompts that are longer than the model reads."""

    model_config = ConfigDict(json_schema_extra={"examples": [BATCH]})

    id: int
    name: str
    status: str
    model_id: int
    sae_ids: list[int]
    corpus_id: int
    prepend_bos: bool
    top: int
    max_prompts: int | None
    n_prompts: int | None
    n_cut: int | None
    n_tokens: int | None
    n_rows: int | None
    size_bytes: int | None
    file_path: str | None
    seconds: float | None
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


def _rows() -> Any:
    return PromptBatch.objects.select_related("owner", "job").prefetch_related("saes")


def batch_out(row: PromptBatch) -> dict[str, Any]:
    made = ("status", "sae_ids", "file_path", "owner", "job_ids", "error")
    return {name: getattr(row, name) for name in BATCH if name not in made} | {
        "status": row.job.state if row.job else row.state,
        "sae_ids": [fact["sae"] for fact in row.facts] or [sae.pk for sae in row.saes.all()],
        "file_path": f"/api/v1/infer/batches/{row.pk}/file" if row.ready else None,
        "owner": row.owner.get_username() if row.owner else None,
        "job_ids": [row.job_id] if row.busy else [],
        "error": row.job.error if row.job else "",
    }


def _detail(pk: Any) -> dict[str, Any]:
    return batch_out(get_object_or_404(_rows(), pk=pk))


@router.post(
    "/infer/batches",
    auth=Needs("inference.add_promptbatch"),
    response={200: BatchOut, 202: BatchOut},
    summary="Read every text of a corpus",
)
@starts(_detail)
def batch_create(request: HttpRequest, given: BatchIn) -> Any:
    """Queues a job that writes one Parquet table: a row for each feature that fires on a token of a prompt."""
    fields = given.dict(exclude={"corpus_id", "sae_ids"}) | {"corpus": given.corpus_id, "saes": given.sae_ids}
    form = PromptBatchForm(laid_over(PromptBatchForm(), fields))
    refuse(form, {"corpus": "corpus_id", "saes": "sae_ids"})
    return form.begin(request.user).pk


@router.get("/infer/batches", auth=Needs("inference.view_promptbatch"), response=Page[BatchOut], summary="Batches")
def batch_list(
    request: HttpRequest,
    sae_id: int | None = Query(None, description="By this SAE"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _rows()
    return page(rows.filter(saes=sae_id) if sae_id is not None else rows, limit, offset, batch_out)


@router.get(
    "/infer/batches/{int:pk}", auth=Needs("inference.view_promptbatch"), response=BatchOut, summary="How a batch stands"
)
def batch_detail(request: HttpRequest, pk: int) -> Any:
    return _detail(pk)


@router.get("/infer/batches/{int:pk}/file", auth=Needs("inference.view_promptbatch"), summary="Its Parquet table")
def batch_file(request: HttpRequest, pk: int) -> Any:
    """409 before it is finished."""
    row = get_object_or_404(PromptBatch, pk=pk)
    if not row.ready:
        raise Problem(409, "This batch is not finished yet.")
    if not row.file.is_file():
        raise Problem(410, "The table of this batch is gone; run it again.")
    name = f"prompts-{row.pk}.parquet"
    kind = "application/vnd.apache.parquet"
    return FileResponse(row.file.open("rb"), as_attachment=True, filename=name, content_type=kind)
