"""Pages of corpora, captures and runs: what forms refuse, what they queue, what the pages show while a job works."""

import csv
import io
import runpy
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.models import SAE, LanguageModel
from training.capture_form import CaptureForm
from training.models import Capture, Corpus, Evaluation, Run, RunPoint
from training.run_form import ARCHITECTURES, RunForm

pytestmark = pytest.mark.django_db
HOOK = "blocks.1.hook_resid_post"
# session, user, two of permissions, one a facet, count, rows, running jobs
LIST_QUERIES = {"corpus_list": 8, "capture_list": 9, "run_list": 9}


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


# ---------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("page", LIST_QUERIES)
def test_a_list_asks_as_often_for_three_rows_as_for_one(
    page: str, client_of: Any, user_of: Any, django_assert_num_queries: Any
) -> None:
    client, owner = client_of("viewer"), user_of("curator")

    def make(name: str) -> None:
        corpus = a_corpus(name, owner=owner, job=a_job("read_corpus", "done"))
        capture = a_capture(name, model=a_model(name), corpus=corpus, owner=owner, job=a_job("capture", "done"))
        a_run(name, capture=capture, owner=owner, job=a_job("train", "done"))

    make("first")
    client.get(reverse(f"training:{page}"))
    with django_assert_num_queries(LIST_QUERIES[page]):
        client.get(reverse(f"training:{page}"))
    make("second"), make("third")
    with django_assert_num_queries(LIST_QUERIES[page]):
        html = client.get(reverse(f"training:{page}")).content.decode()
    assert all(name in html for name in ("first", "second", "third"))


@pytest.mark.parametrize("what", ["corpus", "capture", "run"])
def test_empty_lists_name_the_next_action(what: str, client_of: Any) -> None:
    url, action = reverse(f"training:{what}_list"), reverse(f"training:{what}_create")
    assert action in client_of("researcher").get(url).content.decode()
    viewer = client_of("viewer").get(url).content.decode()
    assert action not in viewer and "Ask a researcher" in viewer
    assert client_of("viewer").get(action).status_code == 403


def test_a_list_polls_only_while_something_is_made(client_of: Any) -> None:
    run = a_run(job=a_job("train"))
    url = reverse("training:run_list")
    assert "every 3s" in client_of("viewer").get(url).content.decode()
    Job.objects.filter(pk=run.job_id).update(state=State.DONE)
    assert "every 3s" not in client_of("viewer").get(url).content.decode()


def test_captures_are_filtered_by_model_and_corpus(client_of: Any) -> None:
    a_capture("one", model=a_model("m1"), corpus=a_corpus("c1"))
    a_capture("two", model=a_model("m2"), corpus=a_corpus("c2"), n_tokens=5000)
    client, url = client_of("viewer"), reverse("training:capture_list")
    for query, expected in (
        ("?model=m1", ["one"]),
        ("?corpus=c2", ["two"]),
        ("?sort=-tokens", ["two", "one"]),
        ("?q=m2", ["two"]),
    ):
        assert [row.name for row in client.get(url + query).context["page"]] == expected, query


# ---------------------------------------------------------------------------------------------------- corpora


def add_corpus(client: Any, **given: Any) -> Any:
    return client.post(reverse("training:corpus_create"), given)


def test_an_upload_is_stored_and_queued(client_of: Any, user_of: Any) -> None:
    file = SimpleUploadedFile("../../my docs.txt", "Grüße\n".encode())
    response = add_corpus(client_of("researcher"), source="upload", file=file)
    row = Corpus.objects.get()
    assert response.status_code == 302 and response.url == row.get_absolute_url()
    assert (row.name, row.location, row.owner) == ("my docs", "my_docs.txt", user_of("researcher"))
    assert row.file == row.folder / "my_docs.txt" and row.file.read_text() == "Grüße\n"
    assert (row.job.kind, row.job.params) == ("read_corpus", {"corpus": row.pk})


def test_pasted_text_is_stored_as_it_is(client_of: Any) -> None:
    add_corpus(client_of("researcher"), source="text", text="  First.\n\n\nSecond.  ", name="two documents")
    row = Corpus.objects.get()
    assert row.name == "two documents" and row.file.read_text().replace("\r\n", "\n") == "  First.\n\n\nSecond.  "


def test_a_path_under_the_import_folder_is_read_in_place(client_of: Any, settings: Any) -> None:
    file = settings.IMPORT_DIRS[0] / "book.txt"
    file.write_text("Once upon a time.")
    add_corpus(client_of("researcher"), source="path", path=str(file))
    row = Corpus.objects.get()
    assert (row.location, row.name) == (str(file), "book") and not row.folder.exists()


def test_a_dataset_is_known_by_its_id(client_of: Any) -> None:
    given = {
        "dataset": "https://huggingface.co/datasets/Salesforce/wikitext",
        "subset": "wikitext-2-v1",
        "split": "train",
    }
    add_corpus(client_of("researcher"), source="hub", **given)
    row = Corpus.objects.get()
    assert (row.location, row.name, row.subset, row.split) == (
        "Salesforce/wikitext",
        "wikitext",
        "wikitext-2-v1",
        "train",
    )


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("photo.txt", b"\x89PNG\r\n\x1a\n\xff\xd8", "photo.txt is not UTF-8 text"),
        ("zeros.txt", b"text\0text", "zeros.txt is not UTF-8 text"),
        ("blank.txt", b"  \n\n ", "blank.txt is empty"),
        ("empty.txt", b"", "The file is empty"),
        ("table.parquet", b"not parquet at all", "table.parquet is not a Parquet file"),
        ("data.json", b'{"text": "x"}', "save it as JSON Lines"),
    ],
)
def test_a_file_that_is_not_text_is_refused(client_of: Any, name: str, content: bytes, says: str) -> None:
    response = add_corpus(client_of("researcher"), source="upload", file=SimpleUploadedFile(name, content), name="kept")
    assert says in errors(response)["file"]
    assert 'value="kept"' in response.content.decode()
    assert not Corpus.objects.exists() and not Job.objects.exists()


def test_a_character_cut_by_the_sniffing_is_no_error(client_of: Any) -> None:
    content = b"x" * 65535 + "ü".encode()
    assert (
        add_corpus(client_of("researcher"), source="upload", file=SimpleUploadedFile("a.txt", content)).status_code
        == 302
    )


def test_a_file_above_the_limit_is_refused(client_of: Any, settings: Any) -> None:
    settings.UPLOAD_LIMIT = 2**20
    file = SimpleUploadedFile("big.txt", b"x" * (2**20 + 1))
    assert "larger than 1 MB" in errors(add_corpus(client_of("researcher"), source="upload", file=file))["file"]


@pytest.mark.parametrize(
    "given, field, says",
    [
        ({"source": "upload"}, "file", "Choose a file to upload."),
        ({"source": "text", "text": " \n"}, "text", "Paste some text."),
        ({"source": "text", "text": "a\0b"}, "text", "Null characters are not allowed."),
        ({"source": "path", "path": ""}, "path", "Give the path of a file or folder"),
        ({"source": "path", "path": "/etc/passwd"}, "path", "Pages may read only under"),
        ({"source": "path", "path": "IMPORT"}, "path", "is empty; choose a file with text"),
        ({"source": "hub", "dataset": "a b"}, "dataset", "Give the dataset's id as on the Hub"),
        ({"source": "elsewhere"}, "source", "Select a valid choice"),
    ],
)
def test_a_corpus_that_cannot_be_is_an_error_at_its_field(
    client_of: Any, settings: Any, given: dict[str, str], field: str, says: str
) -> None:
    given = {key: value.replace("IMPORT", str(settings.IMPORT_DIRS[0])) for key, value in given.items()}
    found = errors(add_corpus(client_of("researcher"), **given))
    assert list(found) == [field] and says in found[field]
    assert not Corpus.objects.exists()


def test_the_secret_key_is_out_of_reach(client_of: Any, settings: Any) -> None:
    (settings.DATA_DIR / "secret_key").write_text("secret")
    found = errors(add_corpus(client_of("researcher"), source="path", path=str(settings.DATA_DIR / "secret_key")))
    assert "Pages may read only under" in found["path"]


def test_nothing_is_left_when_storing_fails(client_of: Any, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.models.Corpus.start", full)
    with pytest.raises(OSError):
        add_corpus(client_of("researcher"), source="text", text="Some text.")
    assert not Corpus.objects.exists()
    assert not any((Corpus(pk=1).folder.parent).glob("*"))


# ---------------------------------------------------------------------------------------------------- captures


def add_capture(client: Any, **given: Any) -> Any:
    data = {"context_length": 128, "dtype": "float32", "prepend_bos": "on"} | given
    return client.post(
        reverse("training:capture_create"), {key: value for key, value in data.items() if value is not None}
    )


def test_a_capture_is_queued_with_its_policy(client_of: Any, user_of: Any) -> None:
    model, corpus = a_model(), a_corpus()
    given = {"hook_names": [HOOK, "blocks.0.hook_resid_post"], "hook_names_typed": "model.layers.1", "max_tokens": 500}
    response = add_capture(client_of("researcher"), model=model.pk, corpus=corpus.pk, **given)
    row = Capture.objects.get()
    assert response.url == row.get_absolute_url() and row.owner == user_of("researcher")
    assert row.hook_names == ["blocks.0.hook_resid_post", HOOK], "one name each, in the order of a forward pass"
    assert (row.name, row.max_tokens, row.context_length, row.dtype) == ("docs · tiny", 500, 128, "float32")
    assert row.prepend_bos and not row.store_special
    assert (row.job.kind, row.job.params) == ("capture", {"capture": row.pk})


def test_a_model_without_bos_is_captured_without_it(client_of: Any) -> None:
    add_capture(client_of("researcher"), model=a_model(has_bos=False).pk, corpus=a_corpus().pk, hook_names=[HOOK])
    assert Capture.objects.get().prepend_bos is False


@pytest.mark.parametrize(
    "given, field, says",
    [
        (
            {"hook_names": ["blocks.9.hook_resid_post"]},
            "hook_names",
            "There is no layer 9 for blocks.9.hook_resid_post: the layers of tiny are 0 to 1.",
        ),
        ({"hook_names_typed": "blocks.1.hook_resid_psot"}, "hook_names", "did you mean blocks.1.hook_resid_post"),
        ({"hook_names_typed": "lm_head"}, "hook_names", "tiny has no hook point lm_head"),
        ({}, "hook_names", "Choose at least one hook point."),
        ({"hook_names": [HOOK], "context_length": 257}, "context_length", "tiny reads at most 256 tokens at once."),
        ({"hook_names": [HOOK], "context_length": 1}, "context_length", "greater than or equal to 2"),
        ({"hook_names": [HOOK], "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"hook_names": [HOOK], "max_tokens": "nan"}, "max_tokens", "Enter a whole number."),
        ({"hook_names": [HOOK], "dtype": "int8"}, "dtype", "Select a valid choice"),
    ],
)  # fmt: skip
def test_a_capture_that_cannot_be_is_an_error_at_its_field(
    client_of: Any, given: dict[str, Any], field: str, says: str
) -> None:
    response = add_capture(client_of("researcher"), model=a_model().pk, corpus=a_corpus().pk, **given)
    assert says in errors(response)[field]
    typed = given.get("hook_names_typed") or (given.get("hook_names") or [""])[0]
    assert typed in response.content.decode(), "what was chosen is kept"
    if "hook_names_typed" in given:
        assert 'aria-invalid="true" aria-describedby="id_hook_names_error"' in response.content.decode()
    assert not Capture.objects.exists() and not Job.objects.exists()


def test_a_capture_larger_than_the_disk_is_refused(client_of: Any, settings: Any) -> None:
    settings.DISK_RESERVE = 10**18
    found = errors(add_capture(client_of("researcher"), model=a_model().pk, corpus=a_corpus().pk, hook_names=[HOOK]))
    assert "and the disk has 0.0 GB to spare" in found["max_tokens"]


def test_a_stream_of_unknown_length_needs_a_limit(client_of: Any) -> None:
    stream = a_corpus("stream", source="hub", n_characters=None)
    found = errors(add_capture(client_of("researcher"), model=a_model().pk, corpus=stream.pk, hook_names=[HOOK]))
    assert "set a limit" in found["max_tokens"]


def test_unready_rows_cannot_be_chosen(client_of: Any) -> None:
    model, corpus = a_model(ready_at=None), a_corpus(ready_at=None)
    found = errors(add_capture(client_of("researcher"), model=model.pk, corpus=corpus.pk, hook_names=[HOOK]))
    assert set(found) == {"model", "corpus"}


def test_the_form_proposes_a_layer_and_what_a_link_chose(client_of: Any) -> None:
    model, corpus = a_model(), a_corpus()
    a_corpus("another")
    page = client_of("researcher").get(reverse("training:capture_create") + f"?model={model.pk}&corpus={corpus.pk}")
    html = page.content.decode()
    assert f'value="{HOOK}" aria-label="{HOOK}, model.layers.1" checked' in html
    assert f'<option value="{corpus.pk}" selected>' in html
    estimate = page.context["estimate"]
    assert (estimate.tokens, estimate.bytes) == (1000, 1000 * (32 * 4 + 12)), "4 characters a token, float32"


def test_a_form_without_anything_to_choose_leads_on(client_of: Any) -> None:
    page = client_of("researcher").get(reverse("training:capture_create")).content.decode()
    assert (
        reverse("saes:model_create") in page
        and reverse("training:corpus_create") in page
        and '<form class="form' not in page
    )
    page = client_of("researcher").get(reverse("training:run_create")).content.decode()
    assert reverse("training:capture_create") in page and '<form class="form' not in page


def test_the_estimate_follows_the_form(client_of: Any) -> None:
    model, corpus = a_model(), a_corpus()
    query = {"model": model.pk, "corpus": corpus.pk, "hook_names": [HOOK], "context_length": 128, "dtype": "bfloat16"}
    client, url, htmx = client_of("researcher"), reverse("training:capture_create"), {"HX-Request": "true"}
    answer = client.get(url, query | {"max_tokens": 100}, headers=htmx)
    html = answer.content.decode()
    assert "about 100<" in html and "7.60 kB" in html, "76 bytes a token"
    assert html.strip().startswith('<aside class="estimate" id="estimate"')
    broken = client.get(url, query | {"hook_names": ["blocks.77.x"]}, headers=htmx)
    assert broken.status_code == 200 and "Choose a model, at least one hook point" in broken.content.decode()


def test_another_model_brings_its_hook_points(client_of: Any) -> None:
    other = a_model(
        "other", hook_points=[{"name": "blocks.0.hook_mlp_out", "module": "h.0.mlp", "side": "out", "d": 8, "layer": 0}]
    )
    a_corpus()
    headers = {"HX-Request": "true", "HX-Target": "hooks"}
    html = (
        client_of("researcher")
        .get(reverse("training:capture_create"), {"model": other.pk}, headers=headers)
        .content.decode()
    )
    assert html.strip().startswith('<div id="hooks"') and "blocks.0.hook_mlp_out" in html and "resid_post" not in html


def test_the_policy_is_shown_on_the_text_with_the_models_own_tokenizer(model: Any, make_corpus: Any) -> None:
    corpus, _ = make_corpus("The cat sat on the mat. " * 20)
    form = CaptureForm(user=None, initial={"model": model.pk, "corpus": corpus.pk})
    estimate = form.estimate()
    assert estimate and estimate.preview
    tokens = estimate.preview.tokens
    assert (tokens[0].text, tokens[0].stored) == ("<bos>", False), "seen, and not stored"
    assert "".join(token.text for token in tokens[1:]) == corpus.sample[: sum(len(token.text) for token in tokens[1:])]
    from saes.numerics.lm import load_lm

    ids = load_lm(model.load_from).tokenizer(corpus.sample, add_special_tokens=False)["input_ids"]
    assert estimate.preview.characters_per_token == pytest.approx(len(corpus.sample) / len(ids))


# ---------------------------------------------------------------------------------------------------- runs


def add_run(client: Any, **given: Any) -> Any:
    defaults = {
        "architecture": "topk", "k": 4, "n_tokens": 500, "batch_size": 64, "seed": 0, "lr_warmup": 0.02, "lr_decay": 0.2,
        "l1_warmup": 0.05, "aux_coefficient": 0.03125,
    }  # fmt: skip
    data = defaults | given
    return client.post(reverse("training:run_create"), {key: value for key, value in data.items() if value is not None})


def test_a_run_is_queued_with_its_config(client_of: Any, user_of: Any) -> None:
    capture = a_capture()
    response = add_run(client_of("researcher"), source=f"{capture.pk}:{HOOK}", evaluate_after="on", lr="1e-3")
    row = Run.objects.get()
    assert response.url == row.get_absolute_url() and row.owner == user_of("researcher")
    assert (row.capture, row.hook_name, row.architecture) == (capture, HOOK, "topk")
    assert row.config == {
        "d_sae": 256, "k": 4, "n_tokens": 500, "batch_size": 64, "lr": 1e-3, "seed": 0, "lr_warmup": 0.02, "lr_decay": 0.2,
        "aux_coefficient": 0.03125,
    }  # fmt: skip
    assert row.name == "tiny-layer1-topk4-256", "made up from what it is; 8 features a dimension"
    assert row.evaluate_after and not row.harvest_after
    assert (row.job.kind, row.job.queue, row.job.params) == ("train", "gpu", {"run": row.pk})


def test_relu_takes_its_own_fields(client_of: Any) -> None:
    given = {"architecture": "standard", "k": None, "l1_coefficient": 2.5, "d_sae": 64}
    add_run(client_of("researcher"), source=f"{a_capture().pk}:{HOOK}", **given)
    config = Run.objects.get().config
    assert config["l1_coefficient"] == 2.5 and config["l1_warmup"] == 0.05 and "k" not in config


@pytest.mark.parametrize(
    ("architecture", "given", "kept", "name"),
    [
        ("batchtopk", {"k": 4}, {"k": 4}, "batchtopk4"),
        (
            "batchtopk",
            {"k": 4, "matryoshka_widths": "16, 32"},
            {"k": 4, "matryoshka_widths": [16, 32, 64]},
            "matryoshka-batchtopk4",
        ),
        ("jumprelu", {"l0_coefficient": 0.5}, {"l0_coefficient": 0.5, "l1_warmup": 0.05}, "jumprelu-0.5"),
        ("jumprelu", {"l0_coefficient": 1, "target_l0": 8}, {"l0_coefficient": 1, "target_l0": 8}, "jumprelu-l0-8"),
        ("gated", {"l1_coefficient": 2}, {"l1_coefficient": 2, "l1_warmup": 0.05}, "gated-l1-2"),
    ],
)
def test_each_architecture_takes_its_own_fields(
    client_of: Any, architecture: str, given: Any, kept: Any, name: str
) -> None:
    client = client_of("researcher")
    others = {"k": None} if "k" not in given else {}
    add_run(client, source=f"{a_capture().pk}:{HOOK}", architecture=architecture, d_sae=64, **others | given)
    row = Run.objects.get()
    assert row.config.items() >= (kept | {"d_sae": 64}).items() and row.architecture == architecture
    asked = {"k", "matryoshka_widths", "l0_coefficient", "target_l0", "l1_coefficient"}
    assert asked & set(row.config) == asked & set(kept), "nothing that another architecture is asked"
    assert name in row.name
    again = client.get(f"/training/new/?like={row.pk}")
    assert again.status_code == 200


@pytest.mark.parametrize("widths", ["32, 16", "a", "16,,x", "0", "65", "16 16", "64 64"])
def test_nested_widths_that_cannot_be_are_refused(client_of: Any, widths: str) -> None:
    given = {"architecture": "batchtopk", "k": 4, "d_sae": 64, "matryoshka_widths": widths}
    response = add_run(client_of("researcher"), source=f"{a_capture().pk}:{HOOK}", **given)
    assert response.status_code == 422 and not Run.objects.exists()
    assert "Give rising whole numbers below 64" in response.content.decode()


@pytest.mark.parametrize(
    "given, field, says",
    [
        ({"k": 300}, "k", "k is 300, but the SAE has only 256 features"),
        ({"k": 0}, "k", "is not between 1 and"),
        ({"k": ""}, "k", "This field is required."),
        ({"architecture": "standard", "l1_coefficient": "nan"}, "l1_coefficient", "nan is not between 0 and"),
        ({"architecture": "standard"}, "l1_coefficient", "This field is required."),
        ({"architecture": "jumprelu9"}, "architecture", "Select a valid choice"),
        ({"d_sae": 0}, "d_sae", "is not between 1 and"),
        ({"d_sae": 10**9}, "d_sae", "is not between 1 and"),
        ({"n_tokens": -1}, "n_tokens", "greater than or equal to 1"),
        ({"lr": "inf"}, "lr", "Enter a number."),
        ({"lr_warmup": 2}, "lr_warmup", "less than or equal to 1"),
        ({"source": ""}, "source", "This field is required."),
        ({"source": "99:blocks.1.hook_resid_post"}, "source", "That capture does not hold this hook point"),
        ({"source": "CAPTURE:blocks.0.hook_resid_post"}, "source", "That capture does not hold this hook point"),
    ],
)
def test_a_run_that_cannot_be_is_an_error_at_its_field(
    client_of: Any, given: dict[str, Any], field: str, says: str
) -> None:
    capture = a_capture()
    source = str(given.pop("source", f"{capture.pk}:{HOOK}")).replace("CAPTURE", str(capture.pk))
    response = add_run(client_of("researcher"), source=source, name="kept", **given)
    assert says in errors(response)[field]
    assert 'value="kept"' in response.content.decode()
    assert not Run.objects.exists() and not Job.objects.exists()


def test_a_fold_with_an_error_in_it_is_open(client_of: Any) -> None:
    response = add_run(client_of("researcher"), source=f"{a_capture().pk}:{HOOK}", seed=-1)
    assert '<details class="advanced" id="advanced" open>' in response.content.decode()


def test_checkpoints_that_do_not_fit_the_disk_are_refused(client_of: Any, settings: Any) -> None:
    settings.DISK_RESERVE = 10**18
    found = errors(add_run(client_of("researcher"), source=f"{a_capture().pk}:{HOOK}"))
    assert "free some space" in found["d_sae"]


def test_train_like_this_fills_the_form(client_of: Any) -> None:
    run = a_run(config={"d_sae": 640, "k": 7, "n_tokens": 12345, "lr": 0.002}, harvest_after=False)
    form = client_of("researcher").get(reverse("training:run_create") + f"?like={run.pk}").context["form"]
    shown = {
        name: form[name].value() for name in ("source", "architecture", "d_sae", "k", "n_tokens", "lr", "harvest_after")
    }
    assert shown == {
        "source": f"{run.capture_id}:{HOOK}", "architecture": "topk", "d_sae": "640", "k": "7", "n_tokens": 12345, "lr": 0.002,
        "harvest_after": False,
    }  # fmt: skip
    assert client_of("researcher").get(reverse("training:run_create") + "?like=9999").status_code == 404


def test_the_form_has_the_trainers_own_defaults_and_architectures() -> None:
    from saes.numerics.architectures import TRAINABLE
    from training.numerics.train import TrainConfig

    made = {Run(architecture=name, config={"skip": skip}).sae_architecture for name in ARCHITECTURES for skip in (0, 1)}
    assert made == set(TRAINABLE)
    form, config = RunForm(user=None), TrainConfig()
    for name in (
        "batch_size",
        "seed",
        "lr_warmup",
        "lr_decay",
        "l1_warmup",
        "l1_coefficient",
        "aux_coefficient",
        "n_tokens",
    ):
        assert form.fields[name].initial == getattr(config, name), name
    assert config.lr is None and config.clip is None and config.dead_after_tokens is None


def test_the_estimate_scales_the_last_run_of_its_kind(client_of: Any) -> None:
    capture = a_capture()
    sae = SAE.objects.create(
        name="s", source="trained", hook_name=HOOK, architecture="topk", d_in=32, d_sae=64, path="x"
    )
    a_run(capture=capture, sae=sae, seconds=10.0, tokens=1000, ready_at=timezone.now())
    query = {"source": f"{capture.pk}:{HOOK}", "architecture": "topk", "k": 4, "n_tokens": 4000, "d_sae": 128}
    page = client_of("researcher").get(reverse("training:run_create"), query, headers={"HX-Request": "true"})
    html = page.content.decode()
    assert "about 1 min 20 s" in html, "four times the tokens, twice the features: 10 s * 8"
    assert ">4.2</data>" in html, "passes over the 95 % that are not held out"


# ---------------------------------------------------------------------------------------------------- one run


def some_points(run: Run, n: int = 3) -> None:
    for i in range(n):
        values = {
            "loss": 1 / (i + 1), "parts": {"fvu": 1 / (i + 1)}, "l0": 4.0, "explained_variance": 0.5,
            "held_out_explained_variance": 0.4, "dead": 2, "lr": 1e-3, "tokens_per_second": 1234.5, "seconds": i,
        }  # fmt: skip
        RunPoint.objects.create(run=run, step=i, tokens=100 * i, values=values)


def test_a_run_page_draws_its_curves_while_it_works(client_of: Any) -> None:
    run = a_run(job=a_job("train"))
    page = client_of("researcher").get(run.get_absolute_url()).content.decode()
    assert "No points yet" in page and "every 2s, htmx:wsAfterMessage from:body throttle:1s" in page
    some_points(run)
    fragment = client_of("researcher").get(run.get_absolute_url(), headers={"HX-Request": "true"}).content.decode()
    assert fragment.strip().startswith('<div id="live"') and fragment.count("<svg") == 4
    assert "0.400" in fragment and "2 (3.1 %)" in fragment and "1,234 tokens/s" in fragment
    assert 'hx-swap-oob="true"' in fragment and "Stop and keep" in fragment and "<article" not in fragment
    assert "Stop and keep" not in client_of("viewer").get(run.get_absolute_url()).content.decode()


def test_a_run_page_at_rest_does_not_poll(client_of: Any) -> None:
    run = a_run(ready_at=timezone.now(), tokens=500, seconds=3.0)
    some_points(run)
    page = client_of("researcher").get(run.get_absolute_url()).content.decode()
    assert "every 2s" not in page and "At the end" in page and "Stop and keep" not in page
    assert "build_sae(SAEConfig(architecture=&#x27;topk&#x27;, d_in=32, d_sae=64, k=4)" in page
    assert f"?like={run.pk}" in page


def test_the_snippet_of_a_run_trains_an_sae(make_run: Any, tmp_path: Any, monkeypatch: Any) -> None:
    from saes.numerics.formats import load_sae
    from training.curves import snippet

    run, _ = make_run()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "again.py").write_text(snippet(run))
    runpy.run_path(str(tmp_path / "again.py"))
    again, first = load_sae(tmp_path / "my-sae"), load_sae(run.sae.files)
    import torch

    assert torch.equal(again.W_dec, first.W_dec)


def test_points_come_as_csv(client_of: Any) -> None:
    run = a_run()
    some_points(run, 2)
    response = client_of("viewer").get(reverse("training:run_points", args=[run.pk]))
    assert response["Content-Type"] == "text/csv"
    rows = list(csv.DictReader(io.StringIO(response.content.decode())))
    assert [row["step"] for row in rows] == ["0", "1"] and rows[1]["loss"] == "0.5" and "parts" not in rows[0]


def test_stop_and_keep_asks_the_run_to_end(client_of: Any, user_of: Any) -> None:
    run = a_run(job=a_job("train"), owner=user_of("researcher"))
    url = reverse("training:run_stop", args=[run.pk])
    assert client_of("researcher").get(url).status_code == 405
    assert client_of("viewer").post(url).status_code == 403
    assert client_of("curator").post(url).status_code == 302, "may act for others"
    run.refresh_from_db()
    asked = run.stop_at
    assert (
        asked is not None
        and "stopping, and keeping" in client_of("researcher").get(run.get_absolute_url()).content.decode()
    )
    client_of("researcher").post(url)
    run.refresh_from_db()
    assert run.stop_at == asked


def test_somebody_elses_run_is_not_stopped(client_of: Any, user_of: Any) -> None:
    run = a_run(job=a_job("train"), owner=user_of("curator"))
    assert client_of("researcher").post(reverse("training:run_stop", args=[run.pk])).status_code == 403


def test_a_finished_run_is_not_stopped(client_of: Any) -> None:
    run = a_run(ready_at=timezone.now())
    page = client_of("researcher").post(reverse("training:run_stop", args=[run.pk]), follow=True).content.decode()
    assert "finished already" in page
    run.refresh_from_db()
    assert run.stop_at is None


# ---------------------------------------------------------------------------------------------------- evaluation


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


def test_an_evaluation_is_queued(client_of: Any, user_of: Any) -> None:
    capture = a_capture()
    sae = an_sae()
    response = client_of("researcher").post(
        reverse("training:evaluation_create", args=[sae.pk]), {"capture": capture.pk}
    )
    row = Evaluation.objects.get()
    assert response.url == sae.get_absolute_url()
    assert (row.sae, row.capture, row.owner, row.max_contexts) == (sae, capture, user_of("researcher"), 64)
    assert (row.job.kind, row.job.subject_id) == ("evaluate", sae.pk)
    page = client_of("researcher").get(sae.get_absolute_url()).content.decode()
    assert f'id="job-{row.job.pk}"' in page and "Evaluate" in page


@pytest.mark.parametrize("of", ["another hook point", "another model", "nothing"])
def test_a_capture_that_does_not_fit_is_refused(client_of: Any, of: str) -> None:
    a_model()
    sae = an_sae()
    capture = {
        "another hook point": lambda: a_capture(hook_names=["blocks.0.hook_resid_post"]).pk,
        "another model": lambda: a_capture(model=a_model("other")).pk,
        "nothing": lambda: "",
    }[of]()
    client = client_of("researcher")
    page = client.post(reverse("training:evaluation_create", args=[sae.pk]), {"capture": capture}, follow=True)
    assert f"Choose a capture that holds {HOOK} of tiny" in page.content.decode()
    assert not Evaluation.objects.exists() and not Job.objects.exists()


def test_a_capture_of_another_width_is_refused(client_of: Any) -> None:
    capture = a_capture()
    sae = an_sae(d_in=64)
    url = reverse("training:evaluation_create", args=[sae.pk])
    page = client_of("researcher").post(url, {"capture": capture.pk}, follow=True).content.decode()
    assert f"It reads vectors of 64 numbers, but {HOOK} of tiny gives 32" in page
    assert not Evaluation.objects.exists()


# ---------------------------------------------------------------------------------------------------- pages, admin


def test_pages_of_what_failed_offer_retry_and_do_not_poll(client_of: Any, user_of: Any) -> None:
    owner = user_of("researcher")

    def failed(kind: str) -> Job:
        return a_job(kind, "failed", error="It went wrong.", owner=owner)

    corpus = a_corpus(ready_at=None, job=failed("read_corpus"))
    capture = a_capture(ready_at=None, job=failed("capture"), corpus=a_corpus("other"))
    run = a_run(job=failed("train"), capture=capture)
    for row in (corpus, capture, run):
        page = client_of("researcher").get(row.get_absolute_url()).content.decode()
        assert "It went wrong." in page and "Retry" in page and "every 2s" not in page


def test_a_corpus_page_shows_its_text_escaped(client_of: Any) -> None:
    corpus = a_corpus(sample="<script>alert(1)</script>", sha256="ab" * 32)
    page = client_of("viewer").get(corpus.get_absolute_url()).content.decode()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page and "ab" * 32 in page


def test_a_capture_page_shows_policy_and_norms(client_of: Any) -> None:
    capture = a_capture(manifest={"norms": {HOOK: 12.345}, "held_out_fraction": 0.05, "n_documents": 3})
    page = client_of("researcher").get(capture.get_absolute_url()).content.decode()
    assert "12.3" in page and "5.0 %" in page and "model.layers.1" in page
    assert f"?capture={capture.pk}&amp;hook={HOOK}" in page


def test_the_admin_shows_and_guards_them(client_of: Any) -> None:
    run = a_run(job=a_job("train", "done"))
    some_points(run, 1)
    sae = an_sae()
    evaluation = Evaluation.objects.create(name="e", sae=sae, capture=run.capture)
    client = client_of("curator")
    for name, row in (
        ("corpus", run.capture.corpus),
        ("capture", run.capture),
        ("run", run),
        ("evaluation", evaluation),
    ):
        assert client.get(reverse(f"admin:training_{name}_changelist") + "?q=x").status_code == 200
        page = client.get(reverse(f"admin:training_{name}_change", args=[row.pk])).content.decode()
        assert row.get_absolute_url() in page
        assert client_of("researcher").get(reverse(f"admin:training_{name}_changelist")).status_code == 403
    assert client.get(reverse("admin:training_runpoint_changelist")).status_code == 200


def test_names_made_up_twice_are_told_apart(client_of: Any) -> None:
    capture = a_capture()
    for _ in range(3):
        add_run(client_of("researcher"), source=f"{capture.pk}:{HOOK}")
    assert [run.name for run in Run.objects.order_by("pk")] == [
        "tiny-layer1-topk4-256", "tiny-layer1-topk4-256 2", "tiny-layer1-topk4-256 3",
    ]  # fmt: skip
