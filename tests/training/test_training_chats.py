"""A corpus of conversations from upload to evaluation, by its real jobs and pages."""

import json
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse

from saehub.jobs.models import Job, State
from saes.models import LanguageModel
from saes.numerics.lm import load_lm
from tests.api_calls import good, problem
from tests.training.chats import CHATS, chatting, jsonl, sharegpt
from tests.training.conftest import HOOK, TEXT
from tests.training.rows import errors
from training.models import Capture, Corpus, Evaluation
from training.numerics.shards import open_capture
from training.policies import policy_on

pytestmark = pytest.mark.django_db
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHATS[0]]


@pytest.fixture
def chat_model(db: None, tiny_model_dir: Any, tmp_path: Any, run_job: Any, user_of: Any) -> LanguageModel:
    folder = chatting(tiny_model_dir, tmp_path)
    row = LanguageModel.objects.create(
        name="chatting", source="folder", location=str(folder), owner=user_of("researcher")
    )
    run_job(row.start(row.owner))
    row.refresh_from_db()
    return row


@pytest.fixture
def add(client_of: Any, run_job: Any) -> Any:
    """A file that is uploaded as a researcher does it."""

    def call(rows: list[Any], name: str = "chats") -> tuple[Corpus, Job]:
        file = SimpleUploadedFile(f"{name}.jsonl", jsonl(rows).encode())
        client_of("researcher").post(reverse("training:corpus_create"), {"source": "upload", "file": file})
        row = Corpus.objects.latest("pk")
        job = run_job(row.job)
        row.refresh_from_db()
        return row, job

    return call


def form(model: LanguageModel, corpus: Corpus, **more: Any) -> dict[str, Any]:
    given = {"model": model.pk, "corpus": corpus.pk, "hook_names": HOOK, "context_length": 32, "dtype": "float32"}
    return given | {"prepend_bos": "on"} | more


def test_an_upload_of_conversations_is_read_and_shown(add: Any, client_of: Any) -> None:
    row, job = add([{"conversations": sharegpt(chat)} for chat in CHATS])
    assert job.state == State.DONE, job.traceback
    assert row.chats and row.n_documents == len(CHATS)
    assert row.n_characters == sum(len(message["content"]) for chat in CHATS for message in chat)
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert (
        "<dt>assistant</dt><dd" in page
        and "What is the capital of number 0?" in page
        and "<dt>conversations</dt>" in page
    )
    assert "conversations</span>" in client_of("viewer").get(reverse("training:corpus_list")).content.decode()


def test_ends_of_lines_that_json_does_not_know_do_not_break_the_page(add: Any, client_of: Any) -> None:
    row, job = add([{"messages": [{"role": "user", "content": "one\u2028two\x85three"}, *CHATS[0][1:]]}])
    assert job.state == State.DONE, job.traceback
    assert "one\u2028two\x85three" in client_of("viewer").get(row.get_absolute_url()).content.decode()


@pytest.mark.parametrize(
    "rows, says",
    [
        (
            [{"messages": CHATS[0]}, {"text": "a text"}],
            "chats.jsonl line 2 holds text and chats.jsonl line 1 a conversation",
        ),
        ([{"messages": [{"role": "user"}, "x"]}], "chats.jsonl line 1: message 2 is a str"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_and_the_file_stays(add: Any, rows: Any, says: str) -> None:
    row, job = add(rows)
    assert job.state == State.FAILED and not row.ready and says in job.error
    assert row.file.read_text() == jsonl(rows)


def test_the_form_says_what_a_conversation_becomes(
    add: Any, chat_model: LanguageModel, client_of: Any, make_corpus: Any
) -> None:
    corpus, _ = add(CHATS)
    make_corpus(TEXT)
    client, url = client_of("researcher"), reverse("training:capture_create")
    begun = client.get(url, {"model": chat_model.pk, "corpus": corpus.pk})
    assert begun.context["form"]["chat_template"].value() is True, "a link from the corpus proposes the template"

    shown = client.get(url, form(chat_model, corpus, chat_template="on", packed="0", look=1))
    examples = shown.context["estimate"].preview.examples
    text = "".join(token.text for token in examples[0].tokens)
    assert text.startswith("<bos><|user|>What is the capital of number 0?<eos>")
    tokenizer = load_lm(chat_model.load_from).tokenizer
    ids = tokenizer.apply_chat_template(CHATS[0], tokenize=True, return_dict=True)["input_ids"]
    assert [token.text for token in examples[0].tokens] == [
        tokenizer.decode([token]) for token in ids[: len(examples[0].tokens)]
    ]

    said = " ".join(shown.context["estimate"].kept)
    assert "contexts of 32 tokens, each from one conversation, padded at its end; BOS comes first" in said
    assert said in " ".join(shown.content.decode().replace("</li><li>", " ").split())

    plain = client.get(url, form(chat_model, corpus, plain_chats="on", look=1, stored="0", max_norm_ratio=10, parts=2))
    said = " ".join(plain.context["estimate"].kept)
    assert "Only the tokens are stored; every run computes the activations again." in said
    assert "above 10 times the median of the first contexts are replaced" in said and "2 jobs share" in said
    tokens = plain.context["estimate"].preview.examples[0].tokens
    assert "".join(token.text for token in tokens).startswith("<bos>user: What is the capital of")

    unsaid = client.get(url, form(chat_model, corpus, look=1))
    assert "The corpus holds conversations: put them through" in unsaid.context["estimate"].preview.fault
    assert unsaid.context["estimate"].preview.fault in unsaid.content.decode().replace("&#x27;", "'")


@pytest.mark.parametrize(
    "given, field, says",
    [
        ({}, "chat_template", "chats holds conversations: put them through the chat template, or join"),
        ({"chat_template": "on", "plain_chats": "on"}, "plain_chats", "are joined plainly, not both."),
    ],
)
def test_how_conversations_become_text_has_to_be_said(
    add: Any, chat_model: LanguageModel, client_of: Any, given: dict[str, str], field: str, says: str
) -> None:
    corpus, _ = add(CHATS)
    found = errors(client_of("researcher").post(reverse("training:capture_create"), form(chat_model, corpus, **given)))
    assert list(found) == [field] and says in found[field] and not Capture.objects.exists()


def test_a_row_that_the_template_refuses_is_named_before_the_start_and_by_the_job(
    add: Any, chat_model: LanguageModel, client_of: Any, run_job: Any
) -> None:
    """Though it is far behind what the sample shows."""
    corpus, _ = add([*CHATS, SYSTEM])
    client, url = client_of("researcher"), reverse("training:capture_create")
    shown = client.get(url, form(chat_model, corpus, chat_template="on", look=1)).context["estimate"].preview
    assert len(shown.examples) == 3
    assert shown.fault == (
        "A capture that reaches chats.jsonl line 41 would end there: the model's chat template does not take it: "
        "System role not supported."
    )
    client.post(url, form(chat_model, corpus, chat_template="on"))
    job = run_job(Capture.objects.get().job)
    assert job.state == State.FAILED
    assert "chats.jsonl line 41: the model's chat template does not take these messages: System role not" in job.error


def test_capture_train_evaluate_harvest_on_conversations(
    add: Any, chat_model: LanguageModel, client_of: Any, run_job: Any, make_run: Any
) -> None:
    corpus, _ = add(CHATS)
    client_of("researcher").post(reverse("training:capture_create"), form(chat_model, corpus, chat_template="on"))
    row = Capture.objects.get()
    assert run_job(row.job).state == State.DONE, row.job.traceback
    row.refresh_from_db()
    assert row.chat_template and row.manifest["policy"]["chat_template"]
    text = load_lm(chat_model.load_from).tokenizer.decode(open_capture(row.folder).contexts()[0])
    assert text.startswith("<bos><|user|>What is the capital of number 0?<eos>")
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "<dt>chat template</dt><dd>yes</dd>" in page and "How contexts begin" in page

    run, job = make_run()
    assert job.state == State.DONE, job.traceback
    for kind in ("evaluate", "harvest"):
        done = run_job(Job.objects.get(kind=kind))
        assert done.state == State.DONE, done.traceback
    url = reverse("training:evaluation_create", args=[run.sae.pk])
    client_of("researcher").post(url, {"corpus": corpus.pk, "max_tokens": 500, "max_contexts": 2})
    made = Evaluation.objects.latest("pk")
    done = run_job(made.job)
    assert done.state == State.DONE, done.traceback
    made.refresh_from_db()
    assert "corpus chats, contexts of 32 tokens with BOS, through the chat template" in made.metrics["l0"]["data"]


def test_an_sae_that_never_saw_a_conversation_is_measured_on_them_as_its_model_writes_them(
    add: Any, chat_model: LanguageModel, model: LanguageModel, make_capture: Any, make_run: Any
) -> None:
    corpus, _ = add(CHATS)
    Corpus.objects.update(ready_at=corpus.ready_at)
    row, _ = make_capture(plain_chats=True)
    sae = make_run(evaluate_after=False, harvest_after=False)[0].sae
    assert row.corpus == corpus and policy_on(sae, corpus).plain_chats
    row.plain_chats = False
    row.save()
    sae.run.capture.refresh_from_db()
    assert policy_on(sae, corpus).plain_chats, "its model has no template"
    sae.model = chat_model
    assert policy_on(sae, corpus).chat_template
    corpus.chats = False
    assert not policy_on(sae, corpus).chat_template and not policy_on(sae, corpus).plain_chats


def test_the_api_takes_conversations_and_says_so(add: Any, chat_model: LanguageModel, api: Any, run_job: Any) -> None:
    corpus, _ = add(CHATS)
    assert good(api("viewer", "get", f"/corpora/{corpus.pk}"))["chats"] is True
    body = {"model_id": chat_model.pk, "layers": [HOOK], "dataset": {"corpus_id": corpus.pk}}
    save = lambda **options: api("researcher", "post", "/activations/save", body | {"options": options})  # noqa: E731
    problem(save(context_length=32), 422, "chats holds conversations: put them")
    row = Capture.objects.get(pk=good(save(context_length=32, plain_chats=True), 202)["id"])
    assert run_job(row.job).state == State.DONE
    row.refresh_from_db()
    assert row.manifest["policy"]["plain_chats"] is True


def test_system_and_tools_columns_reach_the_chat_template(
    tiny_model_dir: Any, tmp_path: Any, run_job: Any, user_of: Any, add: Any, client_of: Any
) -> None:
    template = (
        "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    )
    model = LanguageModel.objects.create(
        name="calling", source="folder", location=str(chatting(tiny_model_dir, tmp_path, template)), owner=None
    )
    run_job(model.start(None))
    model.refresh_from_db()
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"key": "ünï"}}}
    corpus, job = add([{"messages": chat, "system": "Be brief.", "tools": json.dumps([tool])} for chat in CHATS])
    assert job.state == State.DONE, job.traceback
    page = client_of("viewer").get(corpus.get_absolute_url()).content.decode()
    assert "<dt>system</dt>" in page and "<dt>tools</dt>" in page

    url = reverse("training:capture_create")
    given = form(model, corpus, chat_template="on", packed="0", context_length=64)
    shown = client_of("researcher").get(url, given | {"look": 1}).context["estimate"].preview
    client_of("researcher").post(url, given)
    row = Capture.objects.get()
    assert run_job(row.job).state == State.DONE, row.job.traceback
    ids = open_capture(row.folder).contexts()[0].tolist()
    tokenizer = load_lm(model.load_from).tokenizer
    messages = [{"role": "system", "content": "Be brief."}, *CHATS[0]]
    own = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=True, return_dict=True)["input_ids"]
    assert ids == own[:64] and "look_up" in tokenizer.decode(ids).replace(" ", "")
    assert [token.text for token in shown.examples[0].tokens] == [tokenizer.decode([token]) for token in own[:64]]


def test_only_the_assistants_tokens_from_the_form_to_the_evaluation(
    add: Any, chat_model: LanguageModel, client_of: Any, run_job: Any, make_run: Any
) -> None:
    corpus, _ = add(CHATS)
    client, url = client_of("researcher"), reverse("training:capture_create")
    given = form(chat_model, corpus, chat_template="on", roles="assistant")
    page = client.get(url, given | {"look": 1})
    estimate = page.context["estimate"]
    marked = "".join(token.text for token in estimate.preview.examples[0].tokens if token.stored)
    assert marked.startswith("Paris is") and '<mark class="piece">P' in page.content.decode()
    assert "The activation of every token of the assistant that is text is stored." in estimate.kept
    every = client.get(url, given | {"look": 1, "roles": ""}).context["estimate"]
    assert estimate.preview.share and every.preview.share is None
    assert estimate.tokens == int(corpus.n_characters / every.preview.characters_per_token * estimate.preview.share)

    client.post(url, given)
    row = Capture.objects.get()
    assert run_job(row.job).state == State.DONE, row.job.traceback
    row.refresh_from_db()
    made = open_capture(row.folder)
    assert row.manifest["policy"]["roles"] == ["assistant"] and row.n_tokens < made.contexts().size / 2
    context, position = next((context, position) for _, context, position in made.rows(HOOK, chunk=10**6))
    text = load_lm(chat_model.load_from).tokenizer.decode(made.contexts()[context, position])
    assert "Paris is the capital" in text and "What" not in text
    shown = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "<dt>only tokens of</dt><dd>assistant</dd>" in shown and "marked ones</mark> are" in shown

    run, job = make_run(harvest_after=False)
    assert job.state == State.DONE, job.traceback
    assert run_job(Job.objects.get(kind="evaluate")).state == State.DONE
    address = reverse("training:evaluation_create", args=[run.sae.pk])
    client.post(address, {"corpus": corpus.pk, "max_contexts": 2})
    measured = Evaluation.objects.latest("pk")
    assert run_job(measured.job).state == State.DONE, measured.job.traceback
    measured.refresh_from_db()
    assert ", only tokens of assistant, special tokens left out" in measured.metrics["l0"]["data"]
    assert measured.metrics["l0"]["n"] == row.n_tokens, "the same tokens of the same corpus"


@pytest.mark.parametrize(
    "given, says",
    [
        (
            {"chat_template": "on", "roles": "asistant"},
            "No conversation of chats has a message of asistant; its roles are",
        ),
        ({"plain_chats": "on", "roles": "assistant tool"}, "message of tool; its roles are user, assistant."),
    ],
)
def test_roles_are_those_of_the_corpus(
    add: Any, chat_model: LanguageModel, client_of: Any, given: dict[str, str], says: str
) -> None:
    corpus, _ = add(CHATS)
    found = errors(client_of("researcher").post(reverse("training:capture_create"), form(chat_model, corpus, **given)))
    assert list(found) == ["roles"] and says in found["roles"] and not Capture.objects.exists()


def test_a_template_that_hides_its_turns_is_refused_before_the_start(
    add: Any, client_of: Any, run_job: Any, user_of: Any, tiny_model_dir: Any, tmp_path: Any
) -> None:
    template = "{% for m in messages %}{{ messages | length }} {{ m.content }} {{ m.content }}{% endfor %}"
    folder = chatting(tiny_model_dir, tmp_path, template)
    model = LanguageModel.objects.create(name="hiding", source="folder", location=str(folder))
    run_job(model.start(user_of("researcher")))
    corpus, _ = add(CHATS)
    given = form(model, corpus, chat_template="on", roles="assistant")
    found = errors(client_of("researcher").post(reverse("training:capture_create"), given))
    assert found == {
        "roles": "A capture that reaches chats.jsonl line 1 would end there: the model's chat template does not let the "
        "tokens of message 2 (assistant) be told from the rest; keep the tokens of all roles, or join messages plainly."
    }
    plain = client_of("researcher").post(
        reverse("training:capture_create"), form(model, corpus, plain_chats="on", roles="user")
    )
    assert plain.status_code == 302 and Capture.objects.get().roles == ["user"]


def test_roles_of_texts_are_refused_and_the_api_takes_a_list(
    add: Any, chat_model: LanguageModel, make_corpus: Any, api: Any, run_job: Any
) -> None:
    chats, _ = add(CHATS)
    texts, _ = make_corpus(TEXT)
    options = {"context_length": 32, "chat_template": True, "roles": ["assistant", "user"]}
    body = {"model_id": chat_model.pk, "layers": [HOOK], "options": options}
    save = lambda corpus: api("researcher", "post", "/activations/save", body | {"dataset": {"corpus_id": corpus.pk}})  # noqa: E731
    problem(save(texts), 422, "holds texts, which have no roles; leave this empty.")
    made = good(save(chats), 202)
    assert made["roles"] == ["assistant", "user"]
    row = Capture.objects.get(pk=made["id"])
    assert run_job(row.job).state == State.DONE, row.job.traceback
