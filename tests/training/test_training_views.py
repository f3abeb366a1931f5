"""Pages of corpora, captures, runs and evaluations: lists, what they show while a job works and after it, the admin."""

import csv
import io
import runpy
from typing import Any

import pytest
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from tests.training.rows import HOOK, a_capture, a_corpus, a_job, a_model, a_run, an_sae, some_points
from training.models import Evaluation

pytestmark = pytest.mark.django_db
# session, user, two of permissions, one a facet, count, rows, running jobs
LIST_QUERIES = {"corpus_list": 8, "capture_list": 9, "run_list": 9}


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


def test_the_last_poll_of_a_run_that_is_paused_replaces_its_card(client_of: Any) -> None:
    job = a_job("train", "done", result={"paused": True}, done=300, total=500, unit="tokens")
    run = a_run(job=job, pause_at=timezone.now())
    fragment = client_of("researcher").get(run.get_absolute_url(), headers={"HX-Request": "true"}).content.decode()
    assert '<div id="card" hx-swap-oob="true"><p class="note" id="paused">Paused at 300 tokens' in fragment
    assert job.fraction == 0.6, "its bar stands where it was paused"


def test_a_run_page_at_rest_does_not_poll(client_of: Any) -> None:
    run = a_run(ready_at=timezone.now(), tokens=500, seconds=3.0)
    some_points(run)
    page = client_of("researcher").get(run.get_absolute_url()).content.decode()
    assert "every 2s" not in page and "At its last point" in page and "Stop and keep" not in page
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
    assert response["Content-Type"] == "text/csv; charset=utf-8"
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


def test_a_stopped_runs_figures_say_that_they_are_of_its_last_point(make_run, client_of):
    run, _ = make_run(evaluate_after=False, harvest_after=False)
    client = client_of("viewer")
    page = client.get(run.get_absolute_url()).content.decode()
    assert "At the end" in page and "At its last point" not in page
    run.points.last().delete()  # as where it was stopped between two points
    page = client.get(run.get_absolute_url()).content.decode()
    assert "At its last point" in page and "At the end" not in page
    assert "The run ended 128 tokens later" in page
