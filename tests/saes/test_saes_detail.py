"""The page of one SAE: what it shows, what it asks, what it starts, for whom."""

from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.abilities import why_not
from saes.models import SAE, LanguageModel, Release
from saes.snippets import snippets
from tests.sae_rows import a_catalogue_row, a_model, a_trained_sae

pytestmark = pytest.mark.django_db

METRICS = {
    "l0": {"value": 8.0, "definition": "l0", "formula": "E|acts|_0", "n": 3172, "data": "docs"},
    "explained_variance": {
        "value": 0.829, "definition": "explained_variance", "formula": "1 - E|x - x_hat|^2 / V", "n": 3172, "data": "docs",
    },
    "ce_recovered": {"value": None, "definition": "ce_recovered", "formula": "a ratio", "n": 0, "data": "docs"},
    "density_histogram": {
        "value": {"edges": [-4.0, -3.0, -2.0, -1.0, 0.0], "counts": [3, 50, 9, 1], "dead": 13},
        "definition": "density_histogram", "formula": "counts", "n": 3172, "data": "docs",
    },
}  # fmt: skip


def seen(client: Any, sae: SAE, tab: str = "") -> str:
    return str(client.get(sae.get_absolute_url() + (f"?tab={tab}" if tab else "")).content.decode())


def test_the_overview_shows_each_metric_with_its_definition(client_of: Any) -> None:
    sae = a_trained_sae(metrics=METRICS, model=a_model(), l0=8.0, explained_variance=0.829)
    page = seen(client_of("viewer"), sae)
    assert 'title="1 - E|x - x_hat|^2 / V; n = 3,172; docs">explained variance</abbr></dt><dd>0.829</dd>' in page
    assert "CE loss recovered</abbr></dt><dd>–</dd>" in page, "not measured is a dash, not a number"
    assert "<svg" in page and reverse("concepts:feature_list", args=[sae.pk]) in page


def test_published_and_measured_stand_side_by_side(client_of: Any) -> None:
    sae = a_trained_sae(published_l0=20.0, l0=8.0, published_variance=0.8, explained_variance=0.829, metrics=METRICS)
    claims = {claim.label: claim for claim in client_of("viewer").get(sae.get_absolute_url()).context["claims"]}
    assert (claims["L0"].published, claims["L0"].measured, claims["L0"].n, claims["L0"].apart) == (20, 8, 3172, True)
    assert not claims["explained variance"].apart
    assert "they differ" in seen(client_of("viewer"), sae)
    unknown = a_trained_sae("two")
    assert client_of("viewer").get(unknown.get_absolute_url()).context["claims"] == []
    half = a_trained_sae("three", published_l0=0.0)
    claim = client_of("viewer").get(half.get_absolute_url()).context["claims"][0]
    assert (claim.published, claim.measured, claim.apart) == (0.0, None, False), "not measured is not a difference"


def test_files_are_listed_with_what_is_missing(client_of: Any) -> None:
    sae = a_trained_sae(sha256="ab" * 32)
    assert "Its folder is not there any more." in seen(client_of("viewer"), sae, "files")
    sae.files.mkdir(parents=True)
    (sae.files / "sae_weights.safetensors").write_bytes(b"x" * 10)
    page = seen(client_of("viewer"), sae, "files")
    assert "sae_weights.safetensors" in page and "ab" * 32 in page and "any more" not in page
    sae.checksums = {"cfg.json": {"sha256": "cd" * 32, "bytes": 12}}
    sae.save()
    page = seen(client_of("viewer"), sae, "files")
    assert "Files are missing." in page and "cd" * 32 in page


def test_the_proof_of_a_conversion_is_shown(client_of: Any) -> None:
    proof = {
        "definition": "conversion_v1", "source_format": "gemma_scope_1", "n": 64, "seed": 0, "max_abs_acts": 0.0,
        "max_abs_x_hat": 1.5e-7, "same_active_set": True, "mean_l0": 7.0, "tolerance": 1e-5,
        "source": {"layer_1/params.npz": {"sha256": "ef" * 32, "bytes": 99}},
    }  # fmt: skip
    sae = a_trained_sae(proof=proof, facts={"hook_name": "said"})
    page = seen(client_of("viewer"), sae, "files")
    for part in ("Converted from gemma_scope_1", "layer_1/params.npz", "ef" * 32, "exactly", "conversion_v1", "said"):
        assert part in page, part
    assert "Nothing was converted" in seen(client_of("viewer"), a_trained_sae("two"), "files")


def test_how_to_load_it_fits_where_it_is_from(client_of: Any) -> None:
    release = Release.objects.create(name="scope-res", repo_id="org/scope", format="gemma_scope_1")
    row = a_catalogue_row(release=release, sae_id="layer_1", revision="c0ffee", hook_name="blocks.1.hook_resid_post")
    page = seen(client_of("viewer"), row, "python").replace("&#x27;", "'")
    assert "SAE.from_pretrained('scope-res', 'layer_1')" in page
    assert "snapshot_download('org/scope', revision='c0ffee', allow_patterns=['res/layer_1*'])" in page
    assert "'repo_id': 'org/scope'" in page and "load_from_disk" not in page
    row.hook_name = "blocks.1\nimport os"
    assert all("\nimport os" not in one.code for one in snippets(row)), "a comment stays on its line"
    ours = seen(client_of("viewer"), a_trained_sae(), "python").replace("&#x27;", "'")
    assert "load_sae('" in ours and "SAE.load_from_disk('" in ours and "snapshot_download" not in ours


def test_what_is_not_here_says_what_is_known_and_offers_to_bring_it(client_of: Any) -> None:
    row = a_catalogue_row(published_l0=71.0, model_name="gemma-2-2b", neuronpedia_id="gemma-2-2b/1-res")
    page = seen(client_of("researcher"), row)
    assert "Not on this machine" in page and ">71<" in page.replace(".0", "") and "gemma-2-2b/1-res" in page
    assert 'value="download"' in page and 'value="inspect"' in page
    viewer = seen(client_of("viewer"), row)
    assert 'value="download"' not in viewer and 'value="inspect"' not in viewer
    assert "0 features" not in page and ">0 B<" not in page, "what is not known is no zero"


@pytest.mark.parametrize("kind", ["download", "inspect"])
def test_bringing_is_queued_once(kind: str, client_of: Any, user_of: Any) -> None:
    row = a_catalogue_row()
    url = reverse("saes:sae_start", args=[row.pk])
    assert Client().post(url, {"kind": kind}).url.startswith("/login/")
    assert client_of("viewer").post(url, {"kind": kind}).status_code == 403
    assert client_of("stranger").post(url, {"kind": kind}).status_code == 403
    for _ in range(2):
        assert client_of("researcher").post(url, {"kind": kind}).status_code == 302
    job = Job.objects.get()
    assert (job.kind, job.params, job.owner) == (kind, {"sae": row.pk}, user_of("researcher"))
    page = seen(client_of("viewer"), row)
    assert f'id="job-{job.pk}"' in page and "every 3s" in page


def test_verifying_is_the_curators(client_of: Any) -> None:
    sae, url = a_trained_sae(), "saes:sae_start"
    assert client_of("researcher").post(reverse(url, args=[sae.pk]), {"kind": "verify"}).status_code == 403
    assert client_of("curator").post(reverse(url, args=[sae.pk]), {"kind": "verify"}).status_code == 302
    assert Job.objects.get().kind == "verify"
    row = a_catalogue_row()
    page = client_of("curator").post(reverse(url, args=[row.pk]), {"kind": "verify"}, follow=True).content.decode()
    assert "has no files on this machine" in page
    page = client_of("curator").post(reverse(url, args=[row.pk]), {"kind": "train"}, follow=True).content.decode()
    assert "nothing of the name train" in page and Job.objects.count() == 1


def test_jobs_that_work_on_it_are_shown_while_they_matter(client_of: Any) -> None:
    sae = a_trained_sae()
    old, live = (Job.objects.create(kind="evaluate", queue="gpu", title=f"t{i}", subject_id=sae.pk) for i in range(2))
    Job.objects.filter(pk=old.pk).update(state=State.FAILED)
    other = Job.objects.create(kind="evaluate", queue="gpu", title="other", subject_id=sae.pk + 1)
    late = Job.objects.create(kind="inspect", queue="io", title="late", subject_id=sae.pk, state=State.FAILED)
    page = seen(client_of("viewer"), sae)
    assert f'id="job-{live.pk}"' in page and "every 3s" in page
    assert f'id="job-{old.pk}"' not in page and f'id="job-{other.pk}"' not in page
    assert f'id="job-{late.pk}"' not in page, "how it came here is over"
    Job.objects.filter(pk=live.pk).update(state=State.DONE)
    page = seen(client_of("viewer"), sae)
    assert f'id="job-{live.pk}"' not in page and "hx-trigger" not in page.split('id="live"')[1][:200]


def test_what_the_files_do_not_say_is_asked_and_the_import_goes_on(client_of: Any, user_of: Any) -> None:
    job = Job.objects.create(
        kind="adopt",
        queue="io",
        title="x",
        state=State.FAILED,
        error="The files do not say k.",
        owner=user_of("curator"),
    )
    row = SAE.objects.create(name="mine", source="file", asked=["k", "hook_name"], job=job, owner=user_of("researcher"))
    url = reverse("saes:sae_facts", args=[row.pk])
    page = seen(client_of("researcher"), row)
    assert 'name="k"' in page and 'name="hook_name"' in page and 'name="repo_id"' not in page
    assert "The files do not say k." in page
    assert client_of("viewer").post(url, {"k": 4}).status_code == 403
    assert client_of("researcher").post(url, {"k": "many", "hook_name": "h"}).status_code == 422
    assert client_of("researcher").post(url, {"k": "4"}).status_code == 422, "all that is asked for"
    assert client_of("researcher").post(url, {"k": "4", "hook_name": "blocks.1.x"}).status_code == 302
    row.refresh_from_db()
    assert row.facts == {"k": 4, "hook_name": "blocks.1.x"} and row.asked == [] and row.job.kind == "adopt"
    assert "k = 4" in seen(client_of("viewer"), row, "history")


def test_somebody_elses_import_is_answered_by_who_may_act_for_others(client_of: Any, user_of: Any) -> None:
    row = SAE.objects.create(name="mine", source="file", asked=["k"], owner=user_of("curator"))
    url = reverse("saes:sae_facts", args=[row.pk])
    assert client_of("researcher").post(url, {"k": 4}).status_code == 403
    assert client_of("admin").post(url, {"k": 4}).status_code == 302


def test_curation_is_changed_with_a_line_in_the_history(client_of: Any) -> None:
    sae = a_trained_sae()
    url = reverse("saes:sae_curate", args=[sae.pk])
    assert client_of("researcher").post(url, {"curation": "published"}).status_code == 403
    assert client_of("curator").post(url, {"curation": "published", "notes": "good"}).status_code == 302
    sae.refresh_from_db()
    assert (sae.curation, sae.notes) == ("published", "good")
    history = seen(client_of("viewer"), sae, "history")
    assert "draft → published; Notes changed" in history and "a-curator" in history
    client_of("curator").post(url, {"curation": "nonsense", "notes": "good"})
    sae.refresh_from_db()
    assert sae.curation == "published"


def test_the_same_weights_are_named(client_of: Any) -> None:
    sae, twin = a_trained_sae(sha256="ab" * 32), a_catalogue_row(sha256="ab" * 32)
    page = seen(client_of("viewer"), sae)
    assert "The same weights as" in page and twin.get_absolute_url() in page and "(not here)" in page


def test_hostile_text_is_escaped(client_of: Any) -> None:
    bad = "<script>alert(1)</script>"
    sae = a_trained_sae(bad, notes=bad, hook_name=bad, repo_id=bad, repo_path=bad, config={bad: bad}, facts={bad: bad})
    for tab in ("overview", "files", "python", "history", "nonsense"):
        assert "<script>alert" not in seen(client_of("curator"), sae, tab)


# ------------------------------------------------------------------------------------------------------- abilities


def ready(**fields: Any) -> SAE:
    model = LanguageModel.objects.filter(name="tiny").first() or a_model()
    given = {"name": "x", "source": "hub", "d_in": 32, "hook_name": "blocks.1.hook_resid_post", "model": model}
    return SAE(**given | {"architecture": "topk", "ready_at": timezone.now()} | fields)


@pytest.mark.parametrize(
    "fields, steer, harvest",
    [
        ({}, "", ""),
        ({"ready_at": None}, "not on this machine", "not on this machine"),
        ({"model": None, "model_name": "gemma"}, "gemma is not among the models", "gemma is not among the models"),
        ({"hook_name": "blocks.7.x"}, "tiny has no hook point blocks.7.x", "tiny has no hook point blocks.7.x"),
        ({"d_in": 64}, "It reads vectors of 64 numbers, but", "It reads vectors of 64 numbers, but"),
        ({"architecture": "crosscoder"}, "several places", "several places"),
        ({"architecture": "causal_crosscoder"}, "A crosscoder reads", "A crosscoder reads"),
        ({"architecture": "clt"}, "cross-layer transcoder", "cross-layer transcoder"),
        ({"architecture": "temporal"}, "whole sequences", "whole sequences"),
        ({"architecture": "jumprelu_transcoder"}, "A transcoder predicts", ""),
        ({"hook_name_out": "blocks.1.hook_mlp_out"}, "predicts blocks.1.hook_mlp_out", ""),
        ({"config": {"d_out": 48}}, "A transcoder predicts", ""),
        ({"config": {"d_out": 32, "reconstructs": False}}, "not an autoencoder", ""),
    ],
)
def test_what_cannot_be_done_says_why(fields: dict[str, Any], steer: str, harvest: str) -> None:
    sae = ready(**fields)
    evaluate = "which this transcoder predicts" if "hook_name_out" in fields else steer
    evaluate = (
        "Nothing says which hook point this transcoder predicts" if steer == "A transcoder predicts" else evaluate
    )
    for action, part in (("steer", steer), ("evaluate", evaluate), ("harvest", harvest)):
        why = why_not(sae, action)
        assert (part in why) if part else why == "", f"{action}: {why}"


def test_a_crosscoders_page_names_all_its_hook_points_and_why_it_cannot_be_used(client_of: Any) -> None:
    metadata = {
        "hook_points": ["blocks.5.hook_resid_post", "blocks.9.hook_resid_post"],
        "not_an_autoencoder": "It reads two.",
    }
    sae = a_trained_sae(
        model=a_model(),
        hook_name="",
        architecture="causal_crosscoder",
        config={"metadata": metadata, "reconstructs": False},
    )
    page = seen(client_of("researcher"), sae)
    assert all(point in page for point in metadata["hook_points"]) and "It reads two." in page
    assert 'aria-disabled="true" title="A crosscoder reads or writes several places' in page


def test_buttons_of_what_cannot_be_done_are_disabled_with_the_reason(client_of: Any) -> None:
    sae = a_trained_sae(model=a_model(), hook_name_out="blocks.1.hook_mlp_out", architecture="transcoder")
    page = seen(client_of("researcher"), sae)
    assert 'aria-disabled="true" title="A transcoder predicts blocks.1.hook_mlp_out' in page
    assert reverse("inference:generation_create") + f"?sae={sae.pk}" not in page


def test_a_retry_on_its_page_shows_the_whole_page_anew(client_of: Any, user_of: Any, run_job: Any) -> None:
    row = a_catalogue_row(repo_id="")  # it has no repository, so that its download fails at once
    job = run_job(row.start(user_of("researcher")))
    assert job.state == State.FAILED
    client, headers = client_of("researcher"), {"HX-Request": "true", "HX-Target": f"job-{job.pk}"}
    url = reverse("jobs:job_retry", args=[job.pk])
    here = f"http://testserver{row.get_absolute_url()}?tab=files"
    answer = client.post(url, headers=headers | {"HX-Current-URL": here})
    assert (answer.status_code, answer["HX-Refresh"]) == (204, "true")
    run_job(Job.objects.get(pk=job.pk))
    there = f"http://testserver{job.get_absolute_url()}"
    card = client.post(url, headers=headers | {"HX-Current-URL": there})
    assert card.status_code == 200 and f'id="job-{job.pk}"' in card.content.decode()
