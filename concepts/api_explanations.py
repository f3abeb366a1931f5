"""Features named by a language model, in /api/v1."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from concepts.api_features import opened, sae_of
from concepts.explain_forms import ExplainForm
from concepts.explanations import MOST_FEATURES, Explanation, as_ranges
from concepts.numerics.explain_prompts import DEFINITIONS
from saehub.accounts.api_access import Needs
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse

router = Router(tags=["Features"])
FOUND: Any = {
    "feature": 2117, "text": "names of capital cities", "score": 0.93, "n_active": 10, "n_silent": 10, "fault": "",
    "accepted": True,
}  # fmt: skip
EXPLANATION: Any = {
    "id": 4, "sae_id": 12, "view_id": 3, "model_id": 1, "name": "2117 of sae", "status": "done", "features": [2117],
    "n_shown": 10, "n_tested": 10, "accept_from": 0.8, "definitions": DEFINITIONS, "found": [FOUND], "seconds": 3.1,
    "owner": "ada", "created_at": "2026-11-22T08:00:00Z", "job_id": 61, "job_ids": [], "error": "",
}  # fmt: skip


class ExplainIn(Schema):
    """Which features, and the language model that names them: the SAE's own when left out."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"features": [2117], "model_id": 1}]})

    features: list[int] = Field(min_length=1, max_length=MOST_FEATURES)
    model_id: int | None = None
    view_id: int | None = Field(None, description="The one over the most tokens when left out")
    n_shown: int = Field(10, description="Top texts that it sees of a feature")
    n_tested: int = Field(10, description="Texts of either kind in the test; 0 makes none")
    accept_from: float | None = Field(
        0.8, allow_inf_nan=False, description="Accept names from this score on, where none is; null: none"
    )
    only_unnamed: bool = Field(True, description="Leave out features that have an accepted name")


class ExplanationOut(Schema):
    """What a language model was asked, and what it said of each feature so far. The names are labels too."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXPLANATION]})

    id: int
    sae_id: int
    view_id: int
    model_id: int
    name: str
    status: str
    features: list[int]
    n_shown: int
    n_tested: int
    accept_from: float | None
    definitions: dict[str, str]
    found: list[dict[str, Any]]
    seconds: float | None
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


def _rows() -> Any:
    return Explanation.objects.select_related("owner", "job", "view")


def explanation_out(row: Explanation) -> dict[str, Any]:
    made = ("sae_id", "status", "definitions", "owner", "job_ids", "error")
    return {name: getattr(row, name) for name in EXPLANATION if name not in made} | {
        "sae_id": row.view.sae_id,
        "status": row.job.state if row.job else row.state,
        "definitions": DEFINITIONS,
        "owner": row.owner.get_username() if row.owner else None,
        "job_ids": [row.job_id] if row.busy else [],
        "error": row.job.error if row.job else "",
    }


def _detail(pk: Any) -> dict[str, Any]:
    return explanation_out(get_object_or_404(_rows(), pk=pk))


@router.post(
    "/saes/{int:pk}/explanations",
    auth=Needs("concepts.add_explanation"),
    response={200: ExplanationOut, 202: ExplanationOut},
    summary="Have features named by a language model",
)
@starts(_detail)
def explanation_create(request: HttpRequest, pk: int, given: ExplainIn) -> Any:
    """Queues a job that names each feature from its top texts, and tests the name on texts it has not seen."""
    view, _ = opened(sae_of(pk), given.view_id)
    fields = given.dict(exclude={"view_id", "model_id"}) | {"features": as_ranges(given.features)}
    asked = fields | {"model": given.model_id if given.model_id is not None else view.sae.model_id}
    form = ExplainForm(view, laid_over(ExplainForm(view), asked))
    refuse(form, {"model": "model_id"})
    return form.begin(request.user).pk


@router.get(
    "/explanations",
    auth=Needs("concepts.view_explanation"),
    response=Page[ExplanationOut],
    summary="What language models were asked",
)
def explanation_list(
    request: HttpRequest,
    sae_id: int | None = Query(None, description="Of this SAE"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _rows()
    return page(rows.filter(view__sae=sae_id) if sae_id is not None else rows, limit, offset, explanation_out)


@router.get(
    "/explanations/{int:pk}",
    auth=Needs("concepts.view_explanation"),
    response=ExplanationOut,
    summary="What a language model said of features",
)
def explanation_detail(request: HttpRequest, pk: int) -> Any:
    return _detail(pk)
