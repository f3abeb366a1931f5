"""The form of a capture: what it queues, refuses, proposes and estimates."""

from typing import Any

import pytest
from django.urls import reverse

from saehub.jobs.models import Job
from tests.training.rows import HOOK, a_corpus, a_model, errors
from training.capture_form import CaptureForm
from training.models import Capture

pytestmark = pytest.mark.django_db


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
