"""Evaluations in /api/v1: an SAE measured on chosen data, its figures, and those of several SAEs side by side."""

from __future__ import annotations

from typing import Any

from django.http import FileResponse, HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.jobs.starting import starts
from saehub.typed import whole_number
from saes.api_forms import laid_over, refuse
from saes.models import SAE
from training.compare import MOST, differing, sides_of, table
from training.evaluation_form import EvaluationForm
from training.models import Evaluation

router = Router(tags=["Evaluations"])
METRIC: Any = {"value": 0.81, "definition": "explained_variance/1", "n": 4096, "data": "held out"}
EVALUATION: Any = {
    "id": 9, "name": "one on Python documentation", "sae_id": 12, "activations_id": 5, "corpus_id": None, "max_tokens": None,
    "max_contexts": 64, "status": "done", "metrics": {"explained_variance": METRIC}, "saebench_path": "/api/v1/evaluations/9/saebench",
    "seconds": 12.5, "owner": "ada", "created_at": "2026-11-22T08:00:00Z", "job_id": 44, "job_ids": [], "error": "",
}  # fmt: skip
COMPARED: Any = {
    "data": "c5", "on": [{"data": "c5", "name": "Python documentation", "n": 2}], "warning": "",
    "saes": [
        {"sae_id": 12, "name": "one", "evaluation_id": 9, "metrics": {"explained_variance": 0.81}, "best": ["explained_variance"]},
        {"sae_id": 13, "name": "two", "evaluation_id": 10, "metrics": {"explained_variance": 0.74}, "best": []},
    ],
}  # fmt: skip


class EvaluateIn(Schema):
    """On the held-out contexts of saved activations, or on a corpus that the model is run over."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"activations_id": 5}]})

    activations_id: int | None = None
    corpus_id: int | None = None
    max_tokens: int | None = Field(None, description="Of the corpus")
    max_contexts: int | None = Field(
        None, description="Contexts for CE and KL; each is run through the model four times"
    )


class EvaluationOut(Schema):
    """An evaluation; each of its `metrics` carries its definition, n and data."""

    model_config = ConfigDict(json_schema_extra={"examples": [EVALUATION]})

    id: int
    name: str
    sae_id: int
    activations_id: int | None
    corpus_id: int | None
    max_tokens: int | None
    max_contexts: int
    status: str
    metrics: dict[str, Any]
    saebench_path: str | None = Field(description="Address of SAEBench's core results, where it has them")
    seconds: float | None
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


def _rows() -> Any:
    return Evaluation.objects.select_related("sae", "owner", "job")


def evaluation_out(row: Evaluation) -> dict[str, Any]:
    names = (
        "id",
        "name",
        "sae_id",
        "corpus_id",
        "max_tokens",
        "max_contexts",
        "metrics",
        "seconds",
        "created_at",
        "job_id",
    )
    file = row.ready and row.saebench.is_file()
    return {name: getattr(row, name) for name in names} | {
        "activations_id": row.capture_id,
        "status": row.job.state if row.job else row.state,
        "saebench_path": f"/api/v1/evaluations/{row.pk}/saebench" if file else None,
        "owner": row.owner.get_username() if row.owner else None,
        "job_ids": [row.job_id] if row.busy else [],
        "error": row.job.error if row.job else "",
    }


def _detail(pk: Any) -> dict[str, Any]:
    return evaluation_out(get_object_or_404(_rows(), pk=pk))


@router.post(
    "/saes/{int:pk}/evaluate",
    auth=Needs("training.add_evaluation"),
    response={200: EvaluationOut, 202: EvaluationOut},
    summary="Evaluate an SAE",
)
@starts(_detail)
def evaluate(request: HttpRequest, pk: int, given: EvaluateIn) -> Any:
    """Queues a job: L0, explained variance and its variants, CE and KL, dead features, densities."""
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    fields = given.dict() | {"capture": given.activations_id, "corpus": given.corpus_id}
    fields = {name: value for name, value in fields.items() if not name.endswith("_id")}
    form = EvaluationForm(sae, laid_over(EvaluationForm(sae), fields))
    refuse(form, {"capture": "activations_id", "corpus": "corpus_id"})
    return form.make(request.user).pk


@router.get("/evaluations", auth=Needs("training.view_evaluation"), response=Page[EvaluationOut], summary="Evaluations")
def evaluation_list(
    request: HttpRequest,
    sae_id: int | None = Query(None, description="Of this SAE"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _rows()
    return page(rows.filter(sae=sae_id) if sae_id is not None else rows, limit, offset, evaluation_out)


@router.get(
    "/evaluations/{int:pk}", auth=Needs("training.view_evaluation"), response=EvaluationOut, summary="One evaluation"
)
def evaluation_detail(request: HttpRequest, pk: int) -> Any:
    return _detail(pk)


@router.get(
    "/evaluations/{int:pk}/saebench",
    auth=Needs("training.view_evaluation"),
    response=like({"eval_type_id": "core", "eval_result_metrics": {"sparsity": {"l0": 32.0}}}),
    summary="As SAEBench's core results",
)
def evaluation_saebench(request: HttpRequest, pk: int) -> Any:
    """404 of an evaluation that is not finished, or of a transcoder."""
    row = get_object_or_404(Evaluation, pk=pk)
    if not row.ready or not row.saebench.is_file():
        raise Problem(404, "This evaluation has no SAEBench file: it is not finished, or of a transcoder.")
    return FileResponse(row.saebench.open("rb"), content_type="application/json")


@router.get(
    "/saes/compare", auth=Needs("training.view_evaluation"), response=like(COMPARED), summary="SAEs side by side"
)
def sae_compare(
    request: HttpRequest,
    ids: str = Query(..., max_length=200, description=f"Two to {MOST} SAEs, with commas between", examples=["12,13"]),
    data: str = Query("", max_length=200, description="One of `on`: the data whose evaluations are shown"),
) -> Any:
    """Figures on data that all were measured on, where there is such data. `best` names the metrics in which an SAE is
    ahead; on different data nothing is, and `warning` says why."""
    saes = _wanted(ids)
    sides, options, shown = sides_of(saes, data)
    best: dict[int, list[str]] = {sae.pk: [] for sae in saes}
    for _, rows in table(sides):
        for row in rows:
            for side, (_, is_best) in zip(sides, row.values, strict=True):
                if is_best:
                    best[side.sae.pk].append(row.id)
    return {
        "data": shown,
        "on": [{"data": one.key, "name": one.name, "n": one.n} for one in options],
        "warning": differing(sides),
        "saes": [
            {
                "sae_id": side.sae.pk,
                "name": side.sae.name,
                "evaluation_id": side.evaluation.pk if side.evaluation else None,
                "metrics": {name: found.get("value") for name, found in side.metrics.items()},
                "best": best[side.sae.pk],
            }
            for side in sides
        ],
    }


def _wanted(ids: str) -> list[SAE]:
    """The SAEs of a list of numbers, in its order. Raises Problem."""
    words = ids.replace(",", " ").split()
    numbers = [number for word in words if (number := whole_number(word)) is not None]
    if len(numbers) < len(words):
        raise Problem(422, "ids: give the numbers of SAEs with commas between, such as 12,13.")
    wanted = list(dict.fromkeys(numbers))
    if not 2 <= len(wanted) <= MOST:
        raise Problem(422, f"ids: give from 2 to {MOST} SAEs, not {len(wanted)}.")
    found = SAE.objects.select_related("model", "release").in_bulk(wanted)
    if missing := [pk for pk in wanted if pk not in found]:
        raise Problem(404, f"There is no SAE {missing[0]}.")
    return [found[pk] for pk in wanted]
