"""Features named by a language model: the form and its estimate, the job, the labels it makes, the page, the API."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import reverse
from django.utils import timezone

from concepts.explanations import Explanation, as_ranges, expected_seconds, from_ranges, tokens_a_feature
from concepts.models import FeatureView, Label, LabelChange
from saehub.jobs.models import Job, State
from saehub.jobs.runner import execute
from saes.models import LanguageModel
from tests.api_calls import good, problem
from tests.steering_rows import DEAD, Rows

DETAIL_QUERIES = 6


@pytest.fixture(scope="session")
def reader_dir(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.tiny_models import build_reader

    return build_reader(tmp_path_factory.mktemp("reader") / "reader")


@pytest.fixture
def reader(rows: Rows, reader_dir: Any) -> LanguageModel:
    """A model with room for the question; that of the SAE reads 256 tokens."""
    return LanguageModel.objects.create(
        name="reader", source="folder", location=str(reader_dir), owner=rows.owner, ready_at=timezone.now(), n_layers=2,
        d_model=32, context_length=4096, hook_points=[],
    )  # fmt: skip


def alive(view: FeatureView) -> list[int]:
    """Features that fire, the most frequent first."""
    columns = view.opened()
    return [int(i) for i in columns.sorted("n_fires") if columns.summary["n_fires"][i]]


def asked(view: FeatureView, model: LanguageModel, **fields: Any) -> Explanation:
    given = {"features": [3, 5, DEAD], "accept_from": 0.5, "n_tested": 4, "owner": view.owner} | fields
    return Explanation.objects.create(name="some", view=view, model=model, **given)


def make(view: FeatureView, **query: Any) -> str:
    return reverse("concepts:explanation_create", args=[view.sae_id])


@pytest.mark.parametrize("features", [[3], [0, 1, 2], [3, 7, 8, 9, 40], [9, 3, 8]])
def test_ranges_are_read_as_they_are_written(features: list[int]) -> None:
    assert from_ranges(as_ranges(features), 96) == sorted(features)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Write at least one feature number."),
        (" , ;", "Write at least one feature number."),
        ("3, x", "“x” is no feature number or range; write numbers such as 3, 7-9."),
        ("-3", "“-3” is no feature number or range; write numbers such as 3, 7-9."),
        ("9-3", "The range 9-3 ends before it begins."),
        ("3, 90-96", "There is no feature 96; this SAE has features 0 to 95."),
        ("0-40", "These are more than 40 features; choose fewer, and explain the rest afterwards."),
    ],
)
def test_ranges_that_cannot_be_read_say_why(text: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        from_ranges(text, 96, most=40)
    assert str(refused.value) == said


def test_ranges_that_overlap_count_once() -> None:
    assert from_ranges("0-39, 10-20, 5", 96, most=40) == list(range(40))


def test_the_job_names_features_and_makes_labels(view: FeatureView, reader: LanguageModel, run_job: Any) -> None:
    features = [*alive(view)[:2], DEAD]
    row = asked(view, reader, features=features)
    job = run_job(row.start(view.owner))
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    assert row.ready and [one["feature"] for one in row.found] == features and row.seconds > 0
    assert row.found[2] | {"fault": ""} == {
        "feature": DEAD, "text": "", "score": None, "n_active": 0, "n_silent": 0, "fault": "", "accepted": False,
    }  # fmt: skip
    assert row.found[2]["fault"] == "It never fired."
    named = [one for one in row.found if one["text"]]
    assert named, "the tiny model writes something that can be a name"
    labels = {label.feature: label for label in Label.objects.filter(sae=view.sae)}
    assert set(labels) == {one["feature"] for one in named}
    for one in named:
        label = labels[one["feature"]]
        assert (label.text, label.source, label.by, label.score) == (one["text"], "model", "reader", one["score"])
        assert label.accepted == one["accepted"] == (one["score"] is not None and one["score"] >= 0.5)
        assert "detection_auroc_1" in label.score_means
    assert job.result == {
        "explanation": row.pk, "named": len(named), "accepted": row.accepted, "median_score": row.median,
    }  # fmt: skip
    assert LabelChange.objects.filter(sae=view.sae).count() == len(named), "each can be undone"


def test_what_people_accepted_stays(view: FeatureView, reader: LanguageModel, rows: Rows) -> None:
    row = asked(view, reader, accept_from=0.5)
    Label.objects.name_feature(view.sae, 3, "mine", rows.owner)
    for feature in (3, 5):
        row.keep({"feature": feature, "text": "cities", "score": 0.9, "n_active": 4, "n_silent": 4, "fault": ""})
    row.keep({"feature": 6, "text": "towns", "score": 0.4, "n_active": 4, "n_silent": 4, "fault": ""})
    assert [one["accepted"] for one in row.found] == [False, True, False]
    accepted = Label.objects.filter(sae=view.sae, accepted=True)
    assert dict(accepted.values_list("feature", "text")) == {3: "mine", 5: "cities"}
    assert Label.objects.filter(sae=view.sae, feature=3).count() == 2, "the other name is proposed"
    again = asked(view, reader, accept_from=None)
    again.keep({"feature": 8, "text": "rivers", "score": 1.0, "n_active": 4, "n_silent": 4, "fault": ""})
    again.keep({"feature": 5, "text": "cities", "score": 0.7, "n_active": 4, "n_silent": 4, "fault": ""})
    assert not again.accepted and Label.objects.get(sae=view.sae, feature=5).score == 0.7
    LabelChange.objects.get(feature=6).undo(rows.owner)
    assert not Label.objects.filter(feature=6).exists()
    assert (row.median, again.median, asked(view, reader).median) == (0.9, 0.85, None)


def test_a_job_that_was_killed_goes_on_after_the_last_feature(
    view: FeatureView, reader: LanguageModel, run_job: Any
) -> None:
    row = asked(view, reader, features=[3, DEAD])
    row.keep({"feature": 3, "text": "cities", "score": 0.9, "n_active": 4, "n_silent": 4, "fault": ""})
    assert run_job(row.start(view.owner)).state == State.DONE
    row.refresh_from_db()
    assert [(one["feature"], one["text"]) for one in row.found] == [(3, "cities"), (DEAD, "")]


def test_cancelling_keeps_what_was_named(view: FeatureView, reader: LanguageModel, client_of: Any) -> None:
    row = asked(view, reader, features=[3, 5])
    row.keep({"feature": 3, "text": "cities", "score": 0.9, "n_active": 4, "n_silent": 4, "fault": ""})
    job = Job.objects.claim(row.start(view.owner).pk, "test")
    assert job is not None
    job.cancel()
    execute(job)
    job.refresh_from_db()
    row.refresh_from_db()
    assert job.state == State.CANCELLED and not row.ready and len(row.found) == 1
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "cities" in page and "1 of 1 named" in page


def test_a_model_that_reads_too_little_fails_with_a_sentence(view: FeatureView, run_job: Any) -> None:
    row = asked(view, view.sae.model, features=alive(view)[:1])
    job = run_job(row.start(view.owner))
    assert job.state == State.FAILED
    assert job.error.startswith("tiny-llama reads at most 256 tokens, and the question has ")


def test_features_are_asked_for_from_list_and_page(view: FeatureView, reader: LanguageModel, client_of: Any) -> None:
    client = client_of("researcher")
    listed = client.get(reverse("concepts:feature_list", args=[view.sae_id]), {"state": "dead"}).content.decode()
    assert f'formaction="{make(view)}"' in listed and f"{make(view)}?state=dead&amp;view={view.pk}" in listed
    first = alive(view)[0]
    page = client.get(reverse("concepts:feature_detail", args=[view.sae_id, first])).content.decode()
    assert f"{make(view)}?feature={first}&amp;view={view.pk}" in page
    dead = client.get(reverse("concepts:feature_detail", args=[view.sae_id, DEAD])).content.decode()
    assert make(view) not in dead, "there is nothing to name it by"
    viewer = client_of("viewer")
    for address in (
        reverse("concepts:feature_list", args=[view.sae_id]),
        reverse("concepts:feature_detail", args=[view.sae_id, first]),
    ):
        assert make(view) not in viewer.get(address).content.decode()
    shown = client.get(make(view), {"feature": ["8", "3", "4"]})
    assert shown.context["form"].initial["features"] == "3-4, 8"
    dead = client.get(make(view), {"state": "dead"}).context["form"].initial["features"]
    assert str(DEAD) in dead


def test_the_form_starts_one_job(view: FeatureView, reader: LanguageModel, client_of: Any) -> None:
    Label.objects.name_feature(view.sae, 4, "mine", view.owner)
    client = client_of("researcher")
    given = {
        "features": "3-5",
        "model": reader.pk,
        "only_unnamed": "on",
        "n_shown": 5,
        "n_tested": 4,
        "accept_from": "",
    }
    answer = client.post(make(view), given | {"view": view.pk})
    row = Explanation.objects.get()
    assert answer.status_code == 302 and answer["Location"] == row.get_absolute_url()
    assert (row.features, row.view, row.model, row.n_shown, row.accept_from) == ([3, 5], view, reader, 5, None)
    assert (row.job.kind, row.job.queue, row.job.title) == ("explain", "gpu", "Name 2 features of tiny-sae")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": "96"}, "There is no feature 96; this SAE has features 0 to 95."),
        ({"features": ""}, "Write at least one feature number."),
        ({"features": "4"}, "All of these features have an accepted name already."),
        ({"model": "999"}, "That language model is not ready; choose another."),
        ({"n_tested": "0"}, "Without a test there is no score to accept names by; leave this empty."),
        ({"n_tested": "1"}, "A test needs at least 2 texts of either kind, or 0 for none."),
        ({"accept_from": "0.2"}, "Ensure this value is greater than or equal to 0.5."),
        ({"n_shown": "0"}, "Ensure this value is greater than or equal to 1."),
    ],
)
def test_what_cannot_be_asked_is_said(
    change: dict[str, str], said: str, view: FeatureView, reader: LanguageModel, client_of: Any
) -> None:
    Label.objects.name_feature(view.sae, 4, "mine", view.owner)
    given = {
        "features": "3",
        "model": reader.pk,
        "only_unnamed": "on",
        "n_shown": 5,
        "n_tested": 4,
        "accept_from": ".8",
    }
    answer = client_of("researcher").post(make(view), given | change)
    assert answer.status_code == 422 and said in answer.content.decode()
    assert not Explanation.objects.exists()


def test_the_estimate_says_what_it_costs(view: FeatureView, reader: LanguageModel, client_of: Any) -> None:
    assert tokens_a_feature(10, 0) < tokens_a_feature(10, 10) < tokens_a_feature(10, 20)
    query = {"features": "3-12", "model": reader.pk, "n_shown": 10, "n_tested": 10, "accept_from": ""}
    client, fragment = client_of("researcher"), {"HX-Request": "true", "HX-Target": "estimate"}
    first = client.get(make(view), query, headers=fragment).content.decode()
    assert "<html" not in first and "this model has named none here yet" in first and "<dd>10</dd>" in first
    like = asked(view, reader, n_tested=10, seconds=20.0, ready_at=timezone.now(), found=[{}] * 4)
    assert expected_seconds(reader, 10, 10, 10) == (pytest.approx(50.0), like)
    assert "50" in client.get(make(view), query, headers=fragment).content.decode()
    wrong = client.get(make(view), query | {"features": "x"}, headers=fragment)
    assert wrong.status_code == 200 and "is no feature number" in wrong.content.decode()


def test_who_may(view: FeatureView, reader: LanguageModel, client_of: Any) -> None:
    row = asked(view, reader)
    assert [client_of(role).get(make(view)).status_code for role in ("viewer", "annotator", "researcher")] == [
        403,
        403,
        200,
    ]
    assert client_of("viewer").get(row.get_absolute_url()).status_code == 200
    assert client_of("stranger").get(row.get_absolute_url()).status_code == 403


def test_without_a_harvest_the_page_says_what_is_needed(rows: Rows, reader: LanguageModel, client_of: Any) -> None:
    page = client_of("researcher").get(reverse("concepts:explanation_create", args=[rows.sae.pk])).content.decode()
    assert "Not harvested yet" in page and "Name them" not in page


@pytest.mark.parametrize("n", [1, 3])
def test_the_page_of_names(
    n: int, view: FeatureView, reader: LanguageModel, client_of: Any, django_assert_num_queries: Any
) -> None:
    row = asked(view, reader, ready_at=timezone.now())
    for i in range(n):
        row.keep(
            {"feature": 9 - i, "text": f"<b>name {i}", "score": 0.5 + i / 10, "n_active": 4, "n_silent": 4, "fault": ""}
        )
    client = client_of("viewer")
    client.get(row.get_absolute_url())
    with django_assert_num_queries(DETAIL_QUERIES):
        page = client.get(row.get_absolute_url()).content.decode()
    assert "&lt;b&gt;name 0" in page and "<b>name" not in page and "detection_auroc_1" in page
    by_score = client.get(row.get_absolute_url(), {"order": "score"}).context["page"]
    assert [one["feature"] for one in by_score] == [10 - n + i for i in range(n)]
    assert client.get(row.get_absolute_url(), {"order": "x"}).status_code == 404
    whole = client.get(row.get_absolute_url(), {"format": "json"}).json()
    assert len(whole["found"]) == n and "detection_auroc_1" in whole["definitions"]


def test_the_page_changes_while_it_works(view: FeatureView, reader: LanguageModel, client_of: Any) -> None:
    row = asked(view, reader)
    row.start(view.owner)
    client = client_of("viewer")
    assert "Names appear here one by one." in client.get(row.get_absolute_url()).content.decode()
    poll = client.get(row.get_absolute_url(), headers={"HX-Request": "true", "HX-Target": "live"})
    assert poll.content.decode().lstrip().startswith('<div id="live"') and "every 3s" in poll.content.decode()
    row.finish()
    assert client.get(row.get_absolute_url(), headers={"HX-Request": "true"})["HX-Refresh"] == "true"


def test_by_api(view: FeatureView, reader: LanguageModel, api: Any, run_job: Any) -> None:
    path = f"/saes/{view.sae_id}/explanations"
    body = {"features": [5, 3], "model_id": reader.pk, "n_tested": 4}
    made = good(api("researcher", "post", path, body), 202)
    assert made["features"] == [3, 5] and made["view_id"] == view.pk and made["job_ids"] == [made["job_id"]]
    assert run_job(Job.objects.get(pk=made["job_id"])).state == State.DONE
    found = good(api("viewer", "get", f"/explanations/{made['id']}"))
    assert found["status"] == "done" and [one["feature"] for one in found["found"]] == [3, 5]
    assert found["definitions"]["detection_auroc_1"]
    listed = good(api("viewer", "get", f"/explanations?sae_id={view.sae_id}"))
    assert listed["count"] == 1 and listed["items"][0] == found
    problem(api("annotator", "post", path, body), 403)
    refused = problem(api("researcher", "post", path, {"features": [96]}), 422)
    assert refused["errors"] == {"features": ["There is no feature 96; this SAE has features 0 to 95."]}
    other = problem(api("researcher", "post", path, body | {"model_id": 999}), 422)
    assert list(other["errors"]) == ["model_id"]
    problem(api("researcher", "post", path, body | {"view_id": 999}), 404)
