"""One YAML document for a capture: on its page, in the API and for `manage.py capture`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.urls import reverse

from saehub.jobs.models import Job, State
from saes.models import LanguageModel
from tests.api_calls import good, problem
from tests.conftest import TEXT
from tests.training.chats import CHATS, chatting, jsonl
from training.capture_document import DocumentError, form_of, from_yaml, of_capture
from training.models import Capture, Corpus
from training.numerics.shards import open_capture
from training.yaml_document import to_yaml

pytestmark = pytest.mark.django_db
HOOKS = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]


def test_a_document_comes_back_byte_for_byte_and_captures_the_same(
    make_capture: Any, client_of: Any, api: Any, run_job: Any
) -> None:
    """Through the page, the API and the form; a second capture from it has the same shards."""
    first, _ = make_capture(hook_names=HOOKS, max_tokens=700, packed=False, dtype="bfloat16", max_norm_ratio=8.5)
    page = client_of("viewer").get(reverse("training:capture_yaml", args=[first.pk]))
    text = page.content.decode()
    assert f'href="{page.wsgi_request.path}"' in client_of("viewer").get(first.get_absolute_url()).content.decode()
    assert (
        text == to_yaml(of_capture(first)) and "max_norm_ratio: 8.5\n" in text and f"hook_names: [{HOOKS[0]}, " in text
    )
    assert to_yaml(good(api("viewer", "get", f"/activations/{first.pk}/document"))) == text
    sent = [
        good(api("researcher", "post", "/activations/save", {"document": text}), 202)["id"],
        good(api("researcher", "post", "/activations/save", {"document": from_yaml(text)}), 202)["id"],
    ]
    client_of("researcher").post(reverse("training:capture_create"), {"document": text})
    sent.append(Capture.objects.latest("pk").pk)
    for pk in sent:
        row = Capture.objects.get(pk=pk)
        assert to_yaml(of_capture(row)) == text
    row = Capture.objects.get(pk=sent[-1])
    assert run_job(row.job).state == State.DONE, row.job.traceback
    hashes = [[shard["sha256"] for shard in open_capture(one.folder).shards] for one in (first, row)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corpus": 999}, "There is no corpus 999 here that is ready."),
        ({"model_name": "other", "model": 10**9}, "There is no language model other here that is ready."),
        ({"corpus_sha256": "0" * 64}, "is of another text than the document's"),
        ({"hook_names": ["blocks.7.hook_resid_post"]}, "hook_names: There is no layer 7"),
        ({"roles": ["assistant"]}, "roles: sentences holds texts, which have no roles"),
        ({"colour": "red"}, "There is no setting colour"),
    ],
)
def test_what_is_wrong_with_a_document_is_one_sentence(
    model: LanguageModel, make_corpus: Any, client_of: Any, api: Any, change: dict[str, Any], says: str
) -> None:
    corpus, _ = make_corpus(TEXT * 20)
    document = {"model": model.pk, "corpus": corpus.pk, "hook_names": HOOKS} | change
    if "model_name" not in change:
        document["model_name"] = model.name
    answer = client_of("researcher").post(reverse("training:capture_create"), {"document": to_yaml(document)})
    assert answer.status_code == 422 and says in answer.context["document_error"]
    assert to_yaml(document) == answer.context["document"], "what was typed stays"
    problem(api("researcher", "post", "/activations/save", {"document": document}), 422, says)
    assert not Capture.objects.exists()


def test_a_document_says_everything(model: LanguageModel, api: Any) -> None:
    problem(
        api("researcher", "post", "/activations/save", {"document": {}, "model_id": model.pk}), 422, "nothing beside"
    )
    problem(api("researcher", "post", "/activations/save", {}), 422, "Say the model_id, the layers and the dataset")
    with pytest.raises(DocumentError, match="Say which language model, such as `model: 1` or its name"):
        form_of({}, None)


def test_rows_are_found_by_name_on_another_instance(model: LanguageModel, make_corpus: Any) -> None:
    corpus, _ = make_corpus(TEXT * 20)
    elsewhere = {"model": 10**6, "model_name": model.name, "corpus": 10**6, "corpus_name": corpus.name}
    form = form_of(elsewhere | {"hook_names": HOOKS, "corpus_sha256": corpus.sha256}, None)
    assert form.is_valid(), form.errors
    assert (form.cleaned_data["model"], form.cleaned_data["corpus"]) == (model, corpus)


def test_the_command_captures_conversations_of_one_role(
    db: None, tiny_model_dir: Path, tmp_path: Path, run_job: Any, user_of: Any, capsys: Any
) -> None:
    model = LanguageModel.objects.create(
        name="chatting", source="folder", location=str(chatting(tiny_model_dir, tmp_path))
    )
    corpus = Corpus.objects.create(name="chats", source="text", location="chats.jsonl", owner=user_of("researcher"))
    corpus.folder.mkdir(parents=True)
    corpus.file.write_text(jsonl(CHATS))
    for row in (model, corpus):
        run_job(row.start(None))
    spec = tmp_path / "capture.yaml"
    spec.write_text("model: chatting\ncorpus: chats\nhook_names: [blocks.1.hook_resid_post]\ncontext_length: 32\n")
    with pytest.raises(CommandError, match="chat_template: chats holds conversations") as error:
        call_command("capture", str(spec), "--dry-run")
    assert error.value.returncode == 2
    call_command("capture", str(spec), "--chat-template", "true", "--roles", "assistant", "--dry-run")
    assert "The activation of every token of the assistant that is text is stored." in capsys.readouterr().out
    call_command("capture", str(spec), "--chat-template", "true", "--roles", "assistant", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["tokens"] > 100 and not Capture.objects.exists()
    with pytest.raises(CommandError, match="There is no capture 99"):
        call_command("capture", "--resume", "99")
    assert not Job.objects.filter(kind="capture").exists()
