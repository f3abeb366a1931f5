"""Corpora in /api/v1: the texts that models are run on."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.utils.datastructures import MultiValueDict
from ninja import Field, File, Form, Router, Schema
from ninja.files import UploadedFile
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse
from training.forms import CorpusForm
from training.models import Corpus

router = Router(tags=["Corpora"])
CORPUS: Any = {
    "id": 2, "name": "wikitext", "source": "hub", "location": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1",
    "split": "train", "text_field": "text", "revision": "b08601e04326c79dfdd32d625aee71d232d685c3", "state": "ready",
    "n_documents": 1801350, "n_characters": None, "size_bytes": 312000000, "sha256": "", "chats": False, "sample": "Valkyria Chronicles",
    "owner": "ada", "created_at": "2026-11-22T08:00:00Z", "job_id": None, "job_ids": [], "error": "",
}  # fmt: skip


class CorpusOut(Schema):
    """A corpus. What is null is not known, or not yet."""

    model_config = ConfigDict(json_schema_extra={"examples": [CORPUS]})

    id: int
    name: str
    source: str
    location: str
    subset: str
    split: str
    text_field: str
    revision: str
    state: str
    n_documents: int | None
    n_characters: int | None
    size_bytes: int | None
    sha256: str
    chats: bool = Field(description="Its documents are conversations; the sample is then JSON Lines")
    sample: str
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


class DatasetIn(Schema):
    """A dataset of the Hub."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=400, description="Its id, such as Salesforce/wikitext")
    split: str = Field("", max_length=60)
    text_field: str = Field("", max_length=80)
    subset: str = Field("", max_length=120)
    revision: str = Field("", max_length=80)


class CorpusIn(Schema):
    """One of `text`, `dataset` and `path`; a file goes to /corpora/upload."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"name": "sentences", "text": "The first document.\n\n\nThe second document."},
                {"dataset": {"name": "Salesforce/wikitext", "subset": "wikitext-2-raw-v1", "split": "train"}},
                {"path": "/data/import/texts.jsonl", "text_field": "text"},
            ]
        },
    )

    name: str = Field("", max_length=120)
    text: str | None = Field(None, description="Two empty lines part documents")
    dataset: DatasetIn | None = None
    path: str | None = Field(None, max_length=400, description="On the server, below SAEHUB_IMPORT_DIRS")
    text_field: str = Field("", max_length=80)


class UploadIn(Schema):
    """What goes along with a file."""

    name: str = Field("", max_length=120)
    text_field: str = Field("", max_length=80)


def corpus_out(row: Corpus) -> dict[str, Any]:
    names = [name for name in CORPUS if name not in ("owner", "job_ids", "error")]
    return {name: getattr(row, name) for name in names} | {
        "owner": row.owner.get_username() if row.owner else None,
        "job_ids": [row.job_id] if row.busy else [],
        "error": row.job.error if row.job else "",
    }


def corpus_of(pk: Any) -> Corpus:
    return get_object_or_404(Corpus.objects.select_related("owner", "job"), pk=pk)


def _answer(pk: Any) -> dict[str, Any]:
    return corpus_out(corpus_of(pk))


@router.get("/corpora", auth=Needs("training.view_corpus"), response=Page[CorpusOut], summary="Corpora here")
def corpus_list(request: HttpRequest, q: str = "", limit: int = LIMIT, offset: int = OFFSET) -> Any:
    rows = Corpus.objects.select_related("owner", "job").filter(name__icontains=q).order_by("-pk")
    return page(rows, limit, offset, corpus_out)


@router.post(
    "/corpora",
    auth=Needs("training.add_corpus"),
    response={200: CorpusOut, 202: CorpusOut},
    summary="Add a corpus from text, a dataset of the Hub, or a path",
)
@starts(_answer)
def corpus_create(request: HttpRequest, given: CorpusIn) -> Any:
    """Queues a job that reads it: counts documents and characters, and takes its checksum."""
    return new_corpus(request, given).pk


def new_corpus(request: HttpRequest, given: CorpusIn) -> Corpus:
    """The row with its job queued. Raises Problem."""
    wanted: dict[str, Any] = {"name": given.name, "text_field": given.text_field}
    if [given.text, given.dataset, given.path].count(None) != 2:
        raise Problem(422, "Say one of text, dataset and path.")
    if given.dataset is not None:
        dataset = given.dataset.dict()
        wanted |= {"source": "hub", "dataset": dataset.pop("name")} | {
            key: value for key, value in dataset.items() if value
        }
    elif given.text is not None:
        wanted |= {"source": "text", "text": given.text}
    else:
        wanted |= {"source": "path", "path": given.path}
    return _made(request, wanted)


@router.post(
    "/corpora/upload",
    auth=Needs("training.add_corpus"),
    response={200: CorpusOut, 202: CorpusOut},
    summary="Add a corpus from a file",
)
@starts(_answer)
def corpus_upload(request: HttpRequest, file: UploadedFile = File(...), form: UploadIn = Form(...)) -> Any:
    """Text, JSON (an array), JSON Lines, CSV or Parquet."""
    return _made(request, form.dict() | {"source": "upload"}, MultiValueDict({"file": [file]})).pk


def _made(request: HttpRequest, wanted: dict[str, Any], files: Any = None) -> Corpus:
    blank = CorpusForm(user=request.user)
    form = CorpusForm(laid_over(blank, wanted), files, user=request.user)
    refuse(form)
    row: Corpus = form.make()
    return row


@router.get("/corpora/{int:pk}", auth=Needs("training.view_corpus"), response=CorpusOut, summary="One corpus")
def corpus_detail(request: HttpRequest, pk: int) -> Any:
    return _answer(pk)
