"""Rows as they stand in the database, without the jobs and files behind them: enough for forms and pages."""

from typing import Any

from django.utils import timezone

from saehub.jobs.models import Job
from saes.models import SAE, LanguageModel
from training.models import Capture, Corpus, Run, RunPoint

HOOK = "blocks.1.hook_resid_post"


def a_model(name: str = "tiny", **fields: Any) -> LanguageModel:
    points = [
        {"name": f"blocks.{i}.hook_resid_{place}", "module": f"model.layers.{i}", "side": side, "d": 32, "layer": i}
        for i in range(2)
        for place, side in (("pre", "in"), ("post", "out"))
    ]
    given = {"source": "folder", "location": "/nowhere", "n_layers": 2, "d_model": 32, "context_length": 256}
    return LanguageModel.objects.create(
        name=name, **given | {"hook_points": points, "ready_at": timezone.now()} | fields
    )


def a_corpus(name: str = "docs", **fields: Any) -> Corpus:
    given = {"source": "text", "location": "text.txt", "n_documents": 3, "n_characters": 4000, "sample": "Some text."}
    return Corpus.objects.create(name=name, **given | {"ready_at": timezone.now()} | fields)


def a_capture(name: str = "capture", **fields: Any) -> Capture:
    given = {"hook_names": [HOOK], "n_tokens": 1000, "n_contexts": 8, "ready_at": timezone.now()}
    if "model" not in fields:
        given |= {"model": LanguageModel.objects.first() or a_model()}
    if "corpus" not in fields:
        given |= {"corpus": Corpus.objects.first() or a_corpus()}
    return Capture.objects.create(name=name, **given | fields)


def a_run(name: str = "run", **fields: Any) -> Run:
    given = {"hook_name": HOOK, "architecture": "topk", "config": {"d_sae": 64, "k": 4, "n_tokens": 500}}
    return Run.objects.create(
        name=name, **given | {"capture": fields.get("capture") or a_capture(f"of {name}")} | fields
    )


def a_job(kind: str, state: str = "running", **fields: Any) -> Job:
    return Job.objects.create(kind=kind, queue="gpu", title=kind, state=state, **fields)


def errors(response: Any) -> dict[str, str]:
    assert response.status_code == 422
    return {name: " ".join(found) for name, found in response.context["form"].errors.items()}


def some_points(run: Run, n: int = 3) -> None:
    for i in range(n):
        values = {
            "loss": 1 / (i + 1), "parts": {"fvu": 1 / (i + 1)}, "l0": 4.0, "explained_variance": 0.5,
            "held_out_explained_variance": 0.4, "dead": 2, "lr": 1e-3, "tokens_per_second": 1234.5, "seconds": i,
        }  # fmt: skip
        RunPoint.objects.create(run=run, step=i, tokens=100 * i, values=values)


def an_sae(**fields: Any) -> SAE:
    given = {
        "source": "trained",
        "hook_name": HOOK,
        "architecture": "topk",
        "d_in": 32,
        "d_sae": 64,
        "path": "sae/x",
        "ready_at": timezone.now(),
    }
    return SAE.objects.create(
        name="sae", **given | {"model": LanguageModel.objects.first(), "model_name": "tiny"} | fields
    )
