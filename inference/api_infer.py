"""Inference in /api/v1: texts read by SAEs, with what the model writes after them, in the words of the seed's server."""

from __future__ import annotations

import json
from typing import Any, Literal

from django.http import FileResponse, HttpRequest
from django.shortcuts import get_object_or_404
from django.urls import reverse
from ninja import Field, Query, Router, Schema
from pydantic import AliasChoices, ConfigDict

from concepts.api_configs import ConfigIn, edits_of
from concepts.compile import compile as compiled
from inference.codes import CodesError, CodesFile
from inference.contrast import Contrast, contrasts
from inference.infer_forms import InferenceForm
from inference.models import Inference
from inference.neurons import response
from inference.text_search import Ranking, ranking, readers
from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.jobs.starting import starts
from saes.abilities import why_not
from saes.api_forms import laid_over, refuse
from saes.models import SAE

router = Router(tags=["Inference"])
BRIEF: Any = {
    "id": 21, "status": "done", "model_id": 1, "sae_ids": [12], "prompts": ["Paris is the capital of"], "n_tokens": 8,
    "owner": "ada", "created_at": "2026-11-22T08:00:00Z", "job_id": 50, "job_ids": [], "error": "",
}  # fmt: skip
OUTPUT: Any = {
    "prompt_index": 0, "prompt": "Paris is the capital of", "text": "Paris is the capital of France",
    "completion": " France", "tokens": ["<bos>", "Paris"], "token_ids": [1, 5570], "n_prompt_tokens": 6,
    "logprobs": [None, -9.1], "next_tokens": [["The", "A"], [" is", ","]], "logits": [[12.1, 11.0], [14.0, 12.9]],
    "probabilities": [[0.2, 0.1], [0.4, 0.1]], "timing_ms": 31.0,
}  # fmt: skip
NEURONS: Any = {"prompt_index": 0, "prompt": "Paris is the capital of", "neuron_ids": [2117], "activations": [11.8]}
LATENTS: Any = {"prompt_index": 0, "tokens": [{"token_index": 1, "neuron_ids": [2117], "activations": [11.8]}]}
ANSWER: Any = BRIEF | {
    "sae_id": 12, "sae_path": "/api/v1/saes/12", "metadata_path": "/api/v1/saes/12/metadata", "outputs": [OUTPUT],
    "top_neurons": [NEURONS], "token_latents": [LATENTS], "top_texts_path": "/api/v1/infer/21/top-texts?sae_id=12",
    "saes": [{"sae_id": 12, "top_neurons": [NEURONS]}], "concept_config": None, "seconds": 0.4,
}  # fmt: skip
TOP_TEXTS: Any = {
    "sae_id": 12, "layer": "blocks.9.hook_resid_post", "prompts": ["Paris is"], "top_neurons": [NEURONS],
    "neuron_texts": {"2117": [{"text": "Paris is", "score": 11.8, "token_idx": 1, "token_str": "Paris"}]},
}  # fmt: skip
ASKED: Any = {
    "sae_ids": [12], "inputs": [{"prompt": "Paris is the capital of"}], "generation": {"max_new_tokens": 16},
    "top_k_neurons": 5, "return_logits": True, "return_probabilities": True, "return_token_latents": True,
}  # fmt: skip


class GenerationOptions(Schema):
    """How the model goes on from each prompt before it is read; 0 tokens reads the prompts as they are."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0


class InputIn(Schema):
    """One prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: str


class InferIn(Schema):
    """Prompts for one or several SAEs of one model."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [ASKED]})

    sae_id: int | None = None
    sae_ids: list[int] = Field(default_factory=list, max_length=100)
    inputs: list[InputIn] = Field(default_factory=list, max_length=1000)
    prompts: list[str] = Field(default_factory=list, max_length=1000, description="Another form of inputs")
    generation: GenerationOptions = GenerationOptions()
    concept_config_id: int | None = Field(None, description="Steers what the model writes, in this request alone")
    concept_config: ConfigIn | None = Field(None, description="The same, said here and not kept")
    return_logits: bool = False
    return_probabilities: bool = False
    top_next: int | None = Field(None, description="Likeliest tokens whose logits and probabilities are returned")
    top_k_neurons: int = Field(5, validation_alias=AliasChoices("top_k_neurons", "top_k"))
    return_token_latents: bool = False
    save_top_texts: bool = Field(False, validation_alias=AliasChoices("save_top_texts", "track_texts"))
    chat: bool = False
    prepend_bos: bool = True


class InferBrief(Schema):
    """Texts that were read, in short."""

    model_config = ConfigDict(json_schema_extra={"examples": [BRIEF]})

    id: int
    status: str
    model_id: int
    sae_ids: list[int]
    prompts: list[str]
    n_tokens: int | None
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


class InferOut(InferBrief):
    """What came out. Without a finished job the lists are empty. `top_neurons`, `token_latents` and `sae_id` are those of
    the first SAE; all are in `saes`. Activations are codes, never values before the activation; control tokens are in no
    ranking of a prompt. Codes are of the plain model reading the text, whatever steered its writing."""

    model_config = ConfigDict(json_schema_extra={"examples": [ANSWER]})

    sae_id: int | None
    sae_path: str | None
    metadata_path: str | None
    outputs: list[dict[str, Any]]
    top_neurons: list[dict[str, Any]]
    token_latents: list[dict[str, Any]] | None
    top_texts_path: str | None
    saes: list[dict[str, Any]]
    concept_config: dict[str, Any] | None
    seconds: float | None


def _rows() -> Any:
    return Inference.objects.select_related("owner", "job").prefetch_related("saes")


def infer_brief(row: Inference) -> dict[str, Any]:
    names = ("id", "model_id", "prompts", "n_tokens", "created_at", "job_id")
    return {name: getattr(row, name) for name in names} | {
        "status": row.job.state if row.job else row.state,
        "sae_ids": [fact["sae"] for fact in row.facts] or [sae.pk for sae in row.saes.all()],
        "owner": row.owner.get_username() if row.owner else None,
        "job_ids": [row.job_id] if row.busy else [],
        "error": row.job.error if row.job else "",
    }


def infer_out(pk: Any, *, latents: bool = True, logits: bool = True, probabilities: bool = True) -> dict[str, Any]:
    """A reading; its numbers, where it is ready, without the parts that are not asked for."""
    row: Inference = get_object_or_404(_rows(), pk=pk)
    found: dict[str, Any] = {"outputs": [], "saes": [], "concept_config": row.config_fact or None}
    if row.ready:
        try:
            found = response(row, token_latents=latents, logits=logits, probabilities=probabilities)
        except CodesError as error:
            raise Problem(410, str(error)) from None
    brief = infer_brief(row)
    first = found["saes"][0] if found["saes"] else {}
    sae = brief["sae_ids"][0] if brief["sae_ids"] else None
    texts = row.ready and sae is not None and row.top_texts_file(sae).is_file()
    return brief | found | {
        "sae_id": sae,
        "sae_path": reverse("api:sae_detail", args=[sae]) if sae else None,
        "metadata_path": reverse("api:sae_metadata", args=[sae]) if sae else None,
        "top_neurons": first.get("top_neurons", []),
        "token_latents": first.get("token_latents"),
        "top_texts_path": f"{reverse('api:infer_top_texts', args=[row.pk])}?sae_id={sae}" if texts else None,
        "seconds": row.seconds,
    }  # fmt: skip


@router.post(
    "/infer",
    auth=Needs("inference.add_inference"),
    response={200: InferOut, 202: InferOut},
    summary="Read texts by SAEs",
)
@starts(infer_out)
def infer(request: HttpRequest, given: InferIn) -> Any:
    """Queues a job of the live worker, where models stay warm; `?wait=` returns the answer with the request."""
    prompts = [one.prompt for one in given.inputs] + given.prompts
    if not prompts:
        raise Problem(422, "inputs: give at least one prompt.")
    saes = given.sae_ids + ([given.sae_id] if given.sae_id is not None else [])
    fields = {
        "prompt": prompts[0],
        "more_prompts": json.dumps(prompts[1:]),
        "saes": list(dict.fromkeys(saes)),
        "chat": given.chat,
        "prepend_bos": given.prepend_bos,
        "probabilities": given.return_logits or given.return_probabilities,
        "top_next": given.top_next,
        "new_tokens": given.generation.max_new_tokens,
        "temperature": given.generation.temperature,
        "seed": given.generation.seed,
        "top_features": given.top_k_neurons,
        "save_top_texts": given.save_top_texts,
        "config": given.concept_config_id,
    }
    form = InferenceForm(laid_over(InferenceForm(), fields))
    refuse(form, NAMES)
    if given.concept_config is not None:
        form.instance.edits = _inline(form, given)
    return form.begin(request.user).pk


NAMES = {
    "prompt": "inputs", "more_prompts": "inputs", "saes": "sae_ids", "new_tokens": "generation.max_new_tokens",
    "temperature": "generation.temperature", "seed": "generation.seed", "top_features": "top_k_neurons",
    "config": "concept_config_id",
}  # fmt: skip


def _inline(form: InferenceForm, given: InferIn) -> list[dict[str, Any]]:
    """The edits of a config said in the request, as rows hold them. Raises Problem."""
    config = given.concept_config
    assert config is not None
    sae = get_object_or_404(SAE.objects.select_related("model"), pk=config.sae_id)
    if given.concept_config_id is not None:
        raise Problem(422, "Say one of concept_config_id and concept_config.")
    if reason := why_not(sae, "steer"):
        raise Problem(422, f"concept_config: {sae.name} cannot steer. {reason}")
    if form.model_of is None or sae.model_id != form.model_of.pk:
        raise Problem(422, f"concept_config: {sae.name} is of another model; one request has one model.")
    if not given.generation.max_new_tokens:
        raise Problem(422, "concept_config: it steers what the model writes; ask for generation.max_new_tokens.")
    return [{"sae": sae.pk} | edit for edit in compiled(edits_of(sae, config))]


@router.get("/infer", auth=Needs("inference.view_inference"), response=Page[InferBrief], summary="Texts that were read")
def infer_list(
    request: HttpRequest,
    sae_id: int | None = Query(None, description="By this SAE"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _rows()
    return page(rows.filter(saes=sae_id) if sae_id is not None else rows, limit, offset, infer_brief)


@router.get("/infer/{int:pk}", auth=Needs("inference.view_inference"), response=InferOut, summary="What came out")
def infer_detail(
    request: HttpRequest,
    pk: int,
    return_token_latents: bool = True,
    return_logits: bool = True,
    return_probabilities: bool = True,
) -> Any:
    return infer_out(pk, latents=return_token_latents, logits=return_logits, probabilities=return_probabilities)


RANKING: Any = {
    "prompt_index": 0, "sae_id": 12, "n_features": 41, "harvested": True, "features": [
        {"feature": 2117, "value": 11.8, "token": 5, "n_fires": 1, "score": 92.3, "share": 0.84, "density": 0.0004,
         "label": "capital cities", "tokens": [" Paris"]}
    ],
}  # fmt: skip


class RankingOut(Schema):
    """The features of one SAE that fire on one of the texts, strongest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [RANKING]})

    prompt_index: int
    sae_id: int
    n_features: int
    harvested: bool = False
    features: list[dict[str, Any]]


@router.get(
    "/infer/{int:pk}/features",
    auth=Needs("inference.view_inference"),
    response=Page[RankingOut],
    summary="What fires on the texts, over all of their SAEs",
)
def infer_features(
    request: HttpRequest,
    pk: int,
    order: Literal["score", "value", "share", "total"] = Query("score", description="score weighs density in"),
    prompt_index: int | None = Query(None, ge=0, description="Of this text alone; of every text when left out"),
    token: int | None = Query(None, ge=0, description="Only on this token; of several texts say which one"),
    density_max: float | None = Query(None, ge=0, le=1),
    top: int = Query(10, ge=1, le=200, description="Features of each SAE"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    """Of every text in order, and of each by every SAE. score = z ln((n + 1) / (fires + 1)), with the fires in n tokens of
    the SAE's view over the most tokens."""
    row = get_object_or_404(_rows(), pk=pk)
    if not row.ready:
        raise Problem(409, "This text is not read yet.")
    texts, saes = _texts(row, prompt_index, token), readers(row)

    def shown(at: tuple[int, tuple[int, SAE]]) -> dict[str, Any]:
        text, (number, sae) = at
        fires = CodesFile(row.text_folder(text)).sae(number)
        return _ranking(text, ranking(sae, fires, order, token, density_max, top))

    try:
        if token is not None and token >= (n_tokens := len(CodesFile(row.text_folder(texts[0])))):
            raise Problem(422, f"token: the text has {n_tokens} tokens, counted from 0.")
        return page([(text, sae) for text in texts for sae in saes], limit, offset, shown)
    except CodesError as error:
        raise Problem(410, str(error)) from None


DIFFERING: Any = {
    "feature": 2117, "first": 10.2, "second": 0.0, "difference": 10.2, "score": 80.1, "effect": 1.0, "n_first": 3,
    "n_second": 0, "density": 0.0004, "label": "capital cities", "tokens": [" Paris"],
}  # fmt: skip
CONTRAST: Any = {"sae_id": 12, "n_features": 310, "harvested": True, "first": [DIFFERING], "second": []}


class ContrastOut(Schema):
    """The features of one SAE that differ most between the first texts and the others, those of either side."""

    model_config = ConfigDict(json_schema_extra={"examples": [CONTRAST]})

    sae_id: int
    n_features: int
    harvested: bool = False
    first: list[dict[str, Any]]
    second: list[dict[str, Any]]


@router.get(
    "/infer/{int:pk}/contrast",
    auth=Needs("inference.view_inference"),
    response=Page[ContrastOut],
    summary="What tells the first texts from the others, over all of their SAEs",
)
def infer_contrast(
    request: HttpRequest,
    pk: int,
    first: int = Query(..., ge=1, description="How many texts are the first set"),
    order: Literal["score", "difference", "effect"] = Query("score", description="score weighs density in"),
    density_max: float | None = Query(None, ge=0, le=1),
    top: int = Query(10, ge=1, le=200, description="Features of each SAE and side"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    """difference: of the means, over the texts of a set, of a feature's largest code in each. effect: Cliff's delta."""
    row = get_object_or_404(_rows(), pk=pk)
    if not row.ready:
        raise Problem(409, "These texts are not read yet.")
    if first >= len(row.prompts):
        raise Problem(
            422, f"first: {len(row.prompts)} texts were read; at least one of them must be in the second set."
        )
    try:
        found = contrasts(row, first, order=order, density_max=density_max, n=top)
    except CodesError as error:
        raise Problem(410, str(error)) from None
    return page(found, limit, offset, _contrast_out)


def _contrast_out(one: Contrast) -> dict[str, Any]:
    sides = {side: [vars(feature) for feature in getattr(one, side)] for side in ("first", "second")}
    return {"sae_id": one.sae.pk, "n_features": one.n_features, "harvested": one.harvested} | sides


def _texts(row: Inference, wanted: int | None, token: int | None) -> list[int]:
    """Which of its texts are meant. Raises Problem."""
    n = len(row.prompts)
    if wanted is not None and wanted >= n:
        raise Problem(422, f"prompt_index: {n} texts were read, counted from 0.")
    if wanted is None and token is not None and n > 1:
        raise Problem(422, "token: several texts were read; say with prompt_index which one is meant.")
    return list(range(n)) if wanted is None else [wanted]


def _ranking(text: int, one: Ranking) -> dict[str, Any]:
    return {
        "prompt_index": text, "sae_id": one.sae.pk, "n_features": one.n_features, "harvested": one.harvested,
        "features": [vars(hit) for hit in one.hits],
    }  # fmt: skip


@router.get(
    "/infer/{int:pk}/top-texts",
    auth=Needs("inference.view_inference"),
    response=like(TOP_TEXTS),
    summary="Its top_texts.json",
)
def infer_top_texts(request: HttpRequest, pk: int, sae_id: int | None = None) -> Any:
    """Of one SAE: the texts on which each feature fires most, once each, with statistics. 404 where it was not asked for."""
    row = get_object_or_404(Inference, pk=pk)
    asked = [fact["sae"] for fact in row.facts if sae_id in (None, fact["sae"])]
    if not asked or not row.ready or not row.top_texts_file(asked[0]).is_file():
        raise Problem(404, "No top texts were saved; give save_top_texts when the texts are read.")
    return FileResponse(row.top_texts_file(asked[0]).open("rb"), content_type="application/json")
