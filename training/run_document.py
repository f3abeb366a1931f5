"""One YAML document for a run or a sweep: the same for the page, the API and `manage.py train`.

Its keys are those of the form and of the trainer's config; a list where the form takes several values makes a sweep.
Torch-free: what the form does not know is checked by the trainer, in the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.http import QueryDict

from saehub.typed import whole_number
from training import yaml_document
from training.models import Capture, Run, Sweep
from training.run_form import ARCHITECTURE_FIELDS, RunForm
from training.sweep_form import AXES
from training.yaml_document import DocumentError, to_yaml

WHERE = ("name", "capture", "capture_name", "corpus_sha256", "hook_name", "hook_name_out", "architecture")
AFTER = ("evaluate_after", "harvest_after")
TRAINER = ("steps", "betas", "bandwidth", "order_seed", "log_every", "checkpoint_every", "decoder")
FORM = (
    "d_sae",
    *dict.fromkeys(name for names in ARCHITECTURE_FIELDS.values() for name in names if name not in WHERE),
    *RunForm.trainer_fields,
)
KEYS = (*WHERE, *dict.fromkeys(FORM), "processes", *AFTER, *TRAINER)
FIELDS = {"source": "hook_name", "more_hooks": "hook_name"}  # of the form, where the document has another name


def of_run(run: Run) -> dict[str, Any]:
    """The document that trains this run again."""
    return _of(run, run.hook_name, run.config)


def of_sweep(sweep: Sweep) -> dict[str, Any]:
    """The document that trains this sweep again."""
    first: Any = sweep.runs.order_by("pk").first()
    config = first.config | {name: values for name, values in sweep.grid.items() if name != "hook_name"}
    return _of(first, sweep.grid.get("hook_name", first.hook_name), config) | {"name": sweep.name}


def _of(run: Run, hooks: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "name": run.name,
        "capture": run.capture_id,
        "capture_name": run.capture.name,
        "corpus_sha256": run.capture.corpus.sha256,
        "hook_name": hooks,
        **({"hook_name_out": run.hook_name_out} if run.hook_name_out else {}),
        "architecture": run.architecture,
        **config,
        "processes": run.processes,
        "evaluate_after": run.evaluate_after,
        "harvest_after": run.harvest_after,
    }
    place = {name: at for at, name in enumerate(KEYS)}
    return dict(sorted(found.items(), key=lambda item: place.get(item[0], len(place))))


def from_yaml(text: str) -> dict[str, Any]:
    """Raises DocumentError, naming the line or the key."""
    return yaml_document.from_yaml(text, KEYS)


def form_of(document: Mapping[str, Any], user: Any) -> RunForm:
    """The bound form that a document fills; what it leaves out has the form's own defaults. Its errors are the
    document's. Raises DocumentError for a capture that is not here or not of the same text."""
    capture = _capture(document)
    data = QueryDict(mutable=True)
    blank = RunForm(user=user)
    for name, field in blank.fields.items():
        initial = blank.get_initial_for_field(field, name)
        if initial is not None and initial is not False:
            data[name] = _text(initial)
    hooks = document.get("hook_name") or capture.hook_names[0]
    hooks = list(hooks) if isinstance(hooks, list | tuple) else [hooks]
    data["source"], data["more_hooks"] = f"{capture.pk}:{hooks[0]}", ", ".join(map(str, hooks[1:]))
    for name in ("name", "hook_name_out", "architecture", "processes", *FORM):
        if name in document:
            data[name] = _text(document[name])
    if data.get("precision") == "fast":  # the form's own default has no name there
        data["precision"] = ""
    for name in AFTER:
        if name in document:
            data[name] = "on" if document[name] else ""
    form = RunForm(data, user=user)
    form.more = {name: document[name] for name in TRAINER if document.get(name) is not None}
    return form


def _capture(document: Mapping[str, Any]) -> Capture:
    wanted = document.get("capture", document.get("capture_name"))
    if wanted is None:
        raise DocumentError("Say what to train on, such as `capture: 3` or the capture's name.")
    rows = Capture.objects.ready().select_related("corpus")
    pk = whole_number(wanted)
    found = rows.filter(name=wanted).order_by("-pk").first() if pk is None else rows.filter(pk=pk).first()
    if found is None:
        raise DocumentError(f"There is no finished capture {wanted} here.")
    digest = document.get("corpus_sha256")
    if digest and found.corpus.sha256 and digest != found.corpus.sha256:
        raise DocumentError(
            f"The capture {found.name} is of another text than the document's (corpus_sha256 differs); leave "
            "corpus_sha256 out to train on it all the same."
        )
    return found


def _text(value: Any) -> str:
    """As a person would type it into the form."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def said(form: RunForm) -> list[str]:
    """A form's errors, a line each, by the document's names."""
    return yaml_document.errors_of(form, FIELDS)


__all__ = ["AXES", "DocumentError", "form_of", "from_yaml", "of_run", "of_sweep", "said", "to_yaml"]
