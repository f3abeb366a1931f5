"""Evaluations: asked for on a capture or a corpus, run, listed, downloaded as SAEBench's JSON, compared."""

import json
from typing import Any

import pytest
from django.urls import reverse
from django.utils import timezone

from saehub.figures import fig
from saehub.jobs.models import Job, State
from saes.abilities import why_not
from saes.claims import claims
from saes.models import SAE
from training.models import Evaluation
from training.policies import policy_of

pytestmark = pytest.mark.django_db
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def trained(make_run) -> SAE:
    run, job = make_run(evaluate_after=False, harvest_after=False)
    assert job.state == State.DONE, job.traceback
    return run.sae


def evaluated(sae: SAE, l0: float, variance: float, **fields: Any) -> Evaluation:
    """A finished evaluation with made-up figures, for pages."""
    data = fields.pop("data", "held-out contexts of capture 1")

    def metric(name: str, value: Any) -> dict[str, Any]:
        return {"value": value, "definition": name, "formula": f"formula of {name}", "n": 1000, "data": data}

    bins = {"edges": [-2.0, -1.0, 0.0], "counts": [3, 5], "dead": 2}
    values = {"l0": l0, "explained_variance": variance, "ce_recovered": variance, "density_histogram": bins}
    metrics = {name: metric(name, value) for name, value in values.items()}
    SAE.objects.filter(pk=sae.pk).update(metrics=metrics, l0=l0, explained_variance=variance)
    return Evaluation.objects.create(name="e", sae=sae, metrics=metrics, ready_at=timezone.now(), **fields)


def an_sae(name: str = "sae", **fields: Any) -> SAE:
    given = {"hook_name": HOOK, "architecture": "topk", "d_in": 32, "d_sae": 64, "model_name": "tiny"}
    return SAE.objects.create(name=name, **given | {"path": f"sae/{name}", "ready_at": timezone.now()} | fields)


# ---------------------------------------------------------------------------------------------------- asking, running


def test_a_corpus_of_choice_is_run_through_the_model_and_stores_no_activations(
    client_of, trained, make_corpus, run_job, data_folder
):
    corpus, _ = make_corpus("Numbers such as 3.14 and 2.71 are floats; 42 is an integer.\n" * 80, name="numbers")
    before = {path for path in data_folder.rglob("*") if path.is_file()}
    url = reverse("training:evaluation_create", args=[trained.pk])
    client = client_of("researcher")
    page = client.get(url).content.decode()
    assert "contexts of 32 tokens with BOS, special tokens left out (as in the capture it was trained on)" in page
    assert client.post(url, {"corpus": corpus.pk, "max_tokens": 300, "max_contexts": 3}).status_code == 302
    job = run_job(Job.objects.get(kind="evaluate"))
    assert job.state == State.DONE, job.traceback
    row = Evaluation.objects.get()
    assert row.capture is None and row.corpus == corpus
    assert 300 <= row.metrics["l0"]["n"] < 332 and row.metrics["ce_original"]["n"] == 3 * 31
    assert row.metrics["l0"]["data"].startswith("corpus numbers, contexts of 32 tokens")
    new = {path for path in data_folder.rglob("*") if path.is_file()} - before
    assert new == {row.saebench}
    trained.refresh_from_db()
    assert trained.metrics == row.metrics

    page = client.get(trained.get_absolute_url()).content.decode()
    assert "numbers</a>" in page and "SAEBench JSON" in page
    answer = client.get(reverse("training:evaluation_saebench", args=[row.pk]))
    output = json.loads(b"".join(answer.streaming_content))
    assert output["eval_result_metrics"]["sparsity"]["l0"] == row.metrics["l0"]["value"]
    assert output["eval_config"]["context_size"] == 32 and len(output["eval_result_details"]) == 64
    folder = row.folder
    row.delete()
    assert not folder.exists()


def test_a_corpus_and_a_capture_make_two_evaluations_not_one(client_of, trained, make_corpus):
    corpus, _ = make_corpus("Some text.\n" * 50, name="numbers")
    url = reverse("training:evaluation_create", args=[trained.pk])
    client = client_of("researcher")
    page = client.post(url, {"corpus": corpus.pk, "capture": trained.run.capture_id, "max_tokens": 77})
    assert page.status_code == 422 and "Choose a capture or a corpus, not both" in page.content.decode()
    assert 'value="77"' in page.content.decode(), "what was typed is kept"
    page = client.post(url, {})
    assert (
        page.status_code == 422 and f"Choose a capture that holds {HOOK} of tiny, or a corpus" in page.content.decode()
    )
    assert not Evaluation.objects.exists()


def test_text_too_short_for_one_context_is_a_sentence(trained, make_corpus, run_job, user_of):
    corpus, _ = make_corpus("Short.", name="short")
    row = Evaluation.objects.create(name="e", sae=trained, corpus=corpus, owner=user_of("researcher"))
    job = run_job(row.start(row.owner))
    assert job.state == State.FAILED and "fewer than one context of 32" in job.error


@pytest.mark.parametrize(("role", "status"), [("stranger", 403), ("viewer", 403), ("researcher", 200)])
def test_who_may_ask_for_an_evaluation(client_of, role, status):
    assert client_of(role).get(reverse("training:evaluation_create", args=[an_sae().pk])).status_code == status


def test_an_unfinished_evaluation_has_no_file(client_of):
    row = Evaluation.objects.create(name="e", sae=an_sae())
    assert client_of("viewer").get(reverse("training:evaluation_saebench", args=[row.pk])).status_code == 404


# ---------------------------------------------------------------------------------------------------- which policy


def test_the_policy_is_what_the_config_says_within_what_the_model_takes(model):
    said = an_sae(
        "said", config={"metadata": {"context_size": 1024, "prepend_bos": False, "exclude_special_tokens": False}}
    )
    policy = policy_of(said)
    assert (policy.context_length, policy.prepend_bos, policy.store_special) == (1024, False, True)
    said.model = model
    assert policy_of(said).context_length == model.context_length == 256
    assert str(policy_of(an_sae("silent"))).endswith("special tokens left out (its config does not say; the usual)")


def test_a_transcoder_is_evaluated_where_it_writes_or_says_why_not(model):
    fields = {"architecture": "transcoder", "model": model, "hook_name": "blocks.1.hook_resid_pre"}
    sae = an_sae("to", **fields, hook_name_out=HOOK)
    assert why_not(sae, "evaluate") == "" and "reconstructs nothing of its own" in why_not(sae, "steer")
    assert "Nothing says which hook point" in why_not(an_sae("nowhere", **fields), "evaluate")
    missing = an_sae("gone", **fields, hook_name_out="blocks.9.hook_resid_post")
    assert why_not(missing, "evaluate").startswith("tiny has no hook point blocks.9.hook_resid_post")


# ---------------------------------------------------------------------------------------------------- published


def test_a_measured_figure_far_from_the_published_one_says_by_how_much_and_what_differs(client_of):
    sae = an_sae(
        published_l0=100.0, published_variance=0.8, config={"metadata": {"dataset_path": "pile", "context_size": 1024}}
    )
    evaluated(sae, 60.0, 0.78)
    sae.refresh_from_db()
    l0, variance = claims(sae)
    assert l0.apart and not variance.apart
    assert l0.why == (
        "They differ by 40 % of the published value; up to 20 % is usual. Measured on held-out contexts of capture 1; "
        "published on pile in contexts of 1,024."
    )
    page = client_of("viewer").get(sae.get_absolute_url()).content.decode()
    assert "they differ" in page and "published on pile" in page


# ---------------------------------------------------------------------------------------------------- side by side


def compare(client: Any, query: str) -> Any:
    return client.get(reverse("training:sae_compare") + query)


def test_two_saes_side_by_side(client_of, make_corpus, django_assert_num_queries):
    corpus, _ = make_corpus("Some text.\n" * 50)
    first, second = an_sae("first"), an_sae("second")
    for sae, l0, variance in ((first, 20.0, 0.7), (second, 40.0, 0.9)):
        evaluated(sae, l0, variance, corpus=corpus)
    client = client_of("viewer")
    page = compare(client, f"?ids={second.pk},{first.pk}").content.decode()
    assert page.index(">second</a>") < page.index(">first</a>"), "in the order of the address"
    assert f"<b>{fig(0.9)}</b>" in page and f"<b>{fig(0.7)}</b>" not in page and "different data" not in page
    assert page.count('<figure class="chart"') == 3
    table = compare(client, f"?ids={first.pk},{second.pk}&format=csv").content.decode().splitlines()
    assert table[0] == "metric,definition,first,second"
    assert "explained_variance,formula of explained_variance,0.7,0.9" in table


def test_different_data_is_flagged_and_nothing_is_best(client_of, make_corpus):
    one, _ = make_corpus("Some text.\n" * 50, name="one")
    two, _ = make_corpus("Other text.\n" * 50, name="two")
    first, second = an_sae("first"), an_sae("second")
    evaluated(first, 20.0, 0.7, corpus=one)
    evaluated(second, 40.0, 0.9, corpus=two)
    client = client_of("viewer")
    page = compare(client, f"?ids={first.pk},{second.pk}").content.decode()
    assert "They were measured on different data" in page and "best of these" not in page
    evaluated(second, 44.0, 0.8, corpus=one)
    evaluated(second, 50.0, 0.95, corpus=two)
    page = compare(client, f"?ids={first.pk},{second.pk}").content.decode()
    assert "different data" not in page and f"{fig(0.8)}" in page, "data that both were measured on comes first"
    page = compare(client, f"?ids={first.pk},{second.pk}&data=newest").content.decode()
    assert "They were measured on different data" in page and fig(0.95) in page


def test_best_is_said_of_what_can_be_compared_only(client_of, make_corpus):
    corpus, _ = make_corpus("Some text.\n" * 50)
    saes = [an_sae(name) for name in ("first", "second", "third")]
    rows = [evaluated(sae, 20.0, variance, corpus=corpus) for sae, variance in zip(saes, (0.7, 0.8, 0.9), strict=True)]

    def page(of: list[SAE] = saes) -> str:
        return compare(client_of("viewer"), "?ids=" + ",".join(str(sae.pk) for sae in of)).content.decode()

    assert page().count("best of these") == 2 and "none is best" not in page()

    del rows[1].metrics["ce_recovered"]
    rows[1].save()
    assert page().count("best of these") == 1 and "none is best: not measured for B" in page()

    rows[1].metrics["ce_recovered"] = rows[0].metrics["ce_recovered"] | {"n": 4096}
    rows[2].metrics["explained_variance"]["formula"] = "another one"
    rows[1].save()
    rows[2].save()
    assert "best of these" not in page()
    assert "none is best: on different tokens: 1,000, 4,096, 1,000" in page()
    assert "none is best: by different definitions" in page()

    unmeasured = an_sae("fourth")
    told = page([saes[0], saes[1], unmeasured])
    assert "C was not measured on this, and might be the best." in told and "best of these" not in told


def test_queries_do_not_grow_with_the_saes(client_of, make_corpus, django_assert_num_queries):
    corpus, _ = make_corpus("Some text.\n" * 50)
    saes = [an_sae(f"sae-{i}") for i in range(6)]
    for i, sae in enumerate(saes):
        evaluated(sae, 10.0 + i, 0.5 + i / 20, corpus=corpus)
    client = client_of("viewer")
    client.get("/")
    for n in (1, 3, 6):
        with django_assert_num_queries(7 if n == 6 else 8):
            assert compare(client, "?ids=" + ",".join(str(sae.pk) for sae in saes[:n])).status_code == 200


def test_bad_addresses_are_pages_with_a_sentence(client_of):
    client = client_of("viewer")
    sae = an_sae()
    assert "Nothing chosen" in compare(client, "").content.decode()
    assert "There is no SAE 999 here" in compare(client, f"?ids={sae.pk},999,abc,{sae.pk}").content.decode()
    assert "Only the first 6 are shown; 2 more were" in compare(client, "?ids=1,2,3,4,5,6,7,8").content.decode()
    assert compare(client_of("stranger"), "?ids=1").status_code == 403


def test_the_lists_checkboxes_lead_to_the_page(client_of):
    first, second = an_sae("first"), an_sae("second")
    client = client_of("researcher")
    assert "Compare" in client.get(reverse("saes:sae_list")).content.decode()
    answer = client.post(reverse("training:sae_compare"), {"sae": [first.pk, second.pk], "next": "/saes/"})
    assert answer.url == reverse("training:sae_compare") + f"?ids={first.pk},{second.pk}"
