"""Sweeps: several values in the form become several runs on one stream, each the SAE that it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from django.urls import reverse
from django.utils import timezone
from safetensors.torch import load_file

from saehub.jobs.models import Job, State
from training.models import Capture, Run, Sweep
from training.sweep_form import points

HOOK = "blocks.1.hook_resid_post"
OTHER = "blocks.0.hook_resid_post"
FAST = {"n_tokens": 1280, "batch_size": 64, "log_every": 2, "checkpoint_every": 4, "lr": 1e-3}


def posted(capture: Capture, **changes: Any) -> dict[str, Any]:
    given = {
        "source": f"{capture.pk}:{HOOK}", "architecture": "topk", "k": "4, 8", "d_sae": "64", "n_tokens": 1280,
        "batch_size": 64, "seed": "0", "lr_warmup": 0.02, "lr_decay": 0.2, "aux_coefficient": 0.03125,
    }  # fmt: skip
    return given | changes


@pytest.fixture
def make_sweep(make_capture: Any, user_of: Any) -> Any:
    """A sweep of TopK runs, one for each config given."""

    def make(*configs: dict[str, Any], **fields: Any) -> Sweep:
        capture = Capture.objects.ready().first() or make_capture(hook_names=[OTHER, HOOK])[0]
        sweep = Sweep.objects.create(name="sweep", capture=capture, owner=user_of("researcher"), grid={"k": [4, 8]})
        for number, config in enumerate(configs):
            config = dict(config)
            given = {"hook_name": config.pop("hook_name", HOOK), "architecture": "topk", "harvest_after": False}
            Run.objects.create(
                name=f"run {number}", sweep=sweep, capture=capture, owner=sweep.owner, config=FAST | config,
                **given | {"evaluate_after": False} | fields,
            )  # fmt: skip
        return sweep

    return make


def weights(run: Run) -> dict[str, torch.Tensor]:
    run.refresh_from_db()
    assert run.ready and run.sae, run.error
    return load_file(run.sae.files / "sae_weights.safetensors")


def assert_same(one: Run, other: Run) -> None:
    assert weights(one).keys() == weights(other).keys()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def alone(run: Run, run_job: Any) -> Run:
    """The same run without its sweep."""
    twin = Run.objects.create(
        name=f"{run.name} alone", capture=run.capture, owner=run.owner, hook_name=run.hook_name,
        architecture=run.architecture, config=run.config, evaluate_after=False, harvest_after=False,
    )  # fmt: skip
    job = run_job(twin.start(twin.owner))
    assert job.state == State.DONE, job.error
    return twin


SEVERAL = (
    {"d_sae": 64, "k": 4},
    {"d_sae": 96, "k": 8, "seed": 3, "order_seed": 0},
    {"d_sae": 64, "k": 4, "hook_name": OTHER},
)


def test_each_run_of_a_sweep_is_the_run_it_would_be_alone(make_sweep: Any, run_job: Any) -> None:
    sweep = make_sweep(*SEVERAL)
    job = run_job(sweep.start(sweep.owner))
    assert job.state == State.DONE, job.error
    sweep.refresh_from_db()
    assert sweep.ready and sweep.seconds > 0
    runs = list(sweep.runs.order_by("pk"))
    assert job.result == {"saes": [run.sae_id for run in runs], "failed": 0, "runs": 3}
    for run in runs:
        assert_same(run, alone(run, run_job))
        assert not (run.folder / "checkpoints").exists()
        assert run.points.count() == 10


def test_a_cancelled_sweep_goes_on_where_it_was(make_sweep: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import sweeper

    monkeypatch.setattr(sweeper, "LOOK_SECONDS", 0)
    sweep = make_sweep(*SEVERAL)
    job = sweep.start(sweep.owner)
    look = sweeper.Sweeper._look

    def cancel_in_the_middle(self: Any) -> None:
        if self.members[0].training.state.step == 7:
            Job.objects.filter(pk=job.pk).update(cancel_at=timezone.now())
        self.progress._written = 0
        look(self)

    monkeypatch.setattr(sweeper.Sweeper, "_look", cancel_in_the_middle)
    assert run_job(job).state == State.CANCELLED
    assert not Run.objects.filter(ready_at__isnull=False).exists()
    monkeypatch.setattr(sweeper.Sweeper, "_look", look)
    assert job.retry()
    assert run_job(job).state == State.DONE, job.error
    assert sum("continued at step 7" in text for text in job.lines.values_list("text", flat=True)) == 3
    for run in sweep.runs.order_by("pk"):
        assert_same(run, alone(run, run_job))


def test_one_that_diverges_does_not_end_the_others(make_sweep: Any, run_job: Any, client_of: Any) -> None:
    sweep = make_sweep({"d_sae": 64, "k": 4}, {"d_sae": 64, "k": 4, "lr": 1e9})
    job = run_job(sweep.start(sweep.owner))
    assert (job.state, job.result["failed"]) == (State.DONE, 1)
    good, bad = sweep.runs.order_by("pk")
    assert good.ready and good.state == "ready"
    assert (bad.state, bad.busy, bad.sae) == ("failed", False, None)
    assert "lower the learning rate" in bad.error
    page = client_of("viewer").get(sweep.get_absolute_url()).content.decode()
    assert bad.error in page
    assert bad.error in client_of("viewer").get(bad.get_absolute_url()).content.decode()


def test_a_sweep_of_which_nothing_is_left_says_why(make_sweep: Any, run_job: Any) -> None:
    sweep = make_sweep({"d_sae": 64, "k": 4, "lr": 1e9}, {"d_sae": 64, "k": 8, "lr": 1e9})
    job = run_job(sweep.start(sweep.owner))
    assert job.state == State.FAILED
    assert job.error.startswith("None of the 2 runs became an SAE. The first: The loss")


def test_one_is_paused_and_goes_on_by_itself(make_sweep: Any, run_job: Any, client_of: Any) -> None:
    sweep = make_sweep(*SEVERAL)
    paused = sweep.runs.order_by("pk").first()
    job = sweep.start(sweep.owner)
    assert client_of("researcher").post(reverse("training:run_pause", args=[paused.pk])).status_code == 302
    paused.refresh_from_db()
    job.refresh_from_db()
    assert (paused.state, job.state) == ("paused", State.QUEUED), "at once, and the others wait on"
    assert run_job(job).state == State.DONE, job.error
    paused.refresh_from_db()
    assert (paused.state, paused.ready) == ("paused", False)
    assert sweep.runs.filter(ready_at__isnull=False).count() == 2
    assert client_of("researcher").post(reverse("training:run_resume", args=[paused.pk])).status_code == 302
    paused.refresh_from_db()
    assert run_job(paused.job).state == State.DONE, paused.job.error
    assert_same(paused, alone(paused, run_job))


def test_all_are_paused_and_go_on_together(
    make_sweep: Any, run_job: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import sweeper

    monkeypatch.setattr(sweeper, "LOOK_SECONDS", 0)
    sweep = make_sweep(*SEVERAL)
    job = sweep.start(sweep.owner)
    look = sweeper.Sweeper._look

    def pause_in_the_middle(self: Any) -> None:
        if self.members[0].training.state.step == 5:
            client_of("researcher").post(reverse("training:sweep_pause", args=[sweep.pk]))
        look(self)

    monkeypatch.setattr(sweeper.Sweeper, "_look", pause_in_the_middle)
    assert run_job(job).state == State.DONE, job.error
    assert [run.state for run in sweep.runs.all()] == ["paused"] * 3
    monkeypatch.setattr(sweeper.Sweeper, "_look", look)
    client_of("researcher").post(reverse("training:sweep_resume", args=[sweep.pk]))
    sweep.refresh_from_db()
    assert sweep.job_id != job.pk
    assert run_job(sweep.job).state == State.DONE, sweep.job.error
    for run in sweep.runs.order_by("pk"):
        assert_same(run, alone(run, run_job))


def test_a_sweep_that_waits_is_paused_at_once(make_sweep: Any, run_job: Any, client_of: Any) -> None:
    sweep = make_sweep(*SEVERAL)
    job = sweep.start(sweep.owner)
    page = client_of("researcher").get(sweep.get_absolute_url()).content.decode()
    assert 'id="pause"' in page and 'id="stop-and-keep"' not in page, "nothing to keep yet"
    stopped = client_of("researcher").post(reverse("training:sweep_stop", args=[sweep.pk]), follow=True)
    assert "nothing to keep" in stopped.content.decode() and sweep.runs.filter(stop_at=None).count() == 3
    page = client_of("researcher").post(reverse("training:sweep_pause", args=[sweep.pk]), follow=True).content.decode()
    job.refresh_from_db()
    sweep.refresh_from_db()
    assert (job.state, sweep.state) == (State.CANCELLED, "paused")
    assert [run.state for run in sweep.runs.all()] == ["paused"] * 3
    assert "3 runs rest" in page and 'id="resume"' in page and 'id="pause"' not in page
    client_of("researcher").post(reverse("training:sweep_resume", args=[sweep.pk]))
    sweep.refresh_from_db()
    assert run_job(sweep.job).state == State.DONE, sweep.job.error
    assert sweep.runs.filter(ready_at=None).count() == 0


def test_a_sweep_says_how_many_of_its_runs_it_moved(make_sweep: Any, client_of: Any) -> None:
    sweep = make_sweep(*SEVERAL)
    sweep.start(sweep.owner)
    sweep.runs.filter(pk__in=[run.pk for run in sweep.runs.order_by("pk")[1:]]).delete()
    client = client_of("researcher")
    for name, says in (
        ("sweep_pause", "1 run rests."), ("sweep_pause", "nothing to pause"),
        ("sweep_resume", "1 run goes on from its checkpoint."), ("sweep_resume", "None of its runs is paused."),
    ):  # fmt: skip
        assert says in client.post(reverse(f"training:{name}", args=[sweep.pk]), follow=True).content.decode()


def test_one_paused_as_its_sweep_begins_is_left_out(make_sweep: Any, run_job: Any) -> None:
    """Between the claim of the job and its look at the runs."""
    sweep = make_sweep(*SEVERAL)
    job = sweep.start(sweep.owner)
    first = sweep.runs.order_by("pk").first()
    type(first).objects.filter(pk=first.pk).update(pause_at="2026-01-01T00:00:00Z")
    assert run_job(job).state == State.DONE, job.error
    first.refresh_from_db()
    assert (first.state, first.job) == ("paused", None)


def test_a_single_run_pauses_and_resumes(
    make_capture: Any, run_job: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import trainer

    capture = make_capture()[0]
    run = Run.objects.create(
        name="paused", capture=capture, hook_name=HOOK, architecture="topk", config=FAST | {"d_sae": 64, "k": 4},
        evaluate_after=False, harvest_after=False,
    )  # fmt: skip
    job = run.start(None)
    page = client_of("admin").post(reverse("training:run_pause", args=[run.pk]), follow=True).content.decode()
    run.refresh_from_db()
    job.refresh_from_db()
    assert (run.state, run.job, job.state) == ("paused", None, State.CANCELLED), (
        "one that waits leaves the queue at once"
    )
    assert "It had not begun" in page and 'id="resume"' in page and 'id="keep"' not in page
    client_of("admin").post(reverse("training:run_resume", args=[run.pk]))

    look = trainer.Trainer.asked_to_stop

    def pause_in_the_middle(self: Any) -> bool:
        self.looked = 0.0
        if self.tokens >= FAST["n_tokens"] // 2:
            client_of("admin").post(reverse("training:run_pause", args=[run.pk]))
        return look(self)

    monkeypatch.setattr(trainer.Trainer, "asked_to_stop", pause_in_the_middle)
    run.refresh_from_db()
    done = run_job(run.job)
    assert done.result["paused"] is True and FAST["n_tokens"] // 2 <= done.done < FAST["n_tokens"]
    run.refresh_from_db()
    assert run.state == "paused"
    page = client_of("admin").get(run.get_absolute_url()).content.decode()
    assert 'id="resume"' in page and 'id="paused"' in page and 'class="panel job"' not in page
    assert "Resume goes on from there" in page and 'id="keep"' in page
    monkeypatch.setattr(trainer.Trainer, "asked_to_stop", look)
    client_of("admin").post(reverse("training:run_resume", args=[run.pk]))
    run.refresh_from_db()
    assert run_job(run.job).state == State.DONE, run.job.error
    assert_same(run, alone(run, run_job))


# ---------------------------------------------------------------------------------------------------- form and page


def test_the_form_makes_a_sweep_of_every_combination(make_capture: Any, client_of: Any) -> None:
    capture = make_capture(hook_names=[OTHER, HOOK])[0]
    given = posted(capture, k="4, 8", d_sae="64 128", seed="0,1", more_hooks="all")
    answer = client_of("researcher").post(reverse("training:run_create"), given)
    sweep = Sweep.objects.get()
    assert answer.status_code == 302 and answer.url == sweep.get_absolute_url()
    assert sweep.grid == {"hook_name": [HOOK, OTHER], "k": [4, 8], "d_sae": [64, 128], "seed": [0, 1]}
    runs = list(sweep.runs.all())
    made = {(run.hook_name, run.config["k"], run.config["d_sae"], run.config["seed"]) for run in runs}
    assert len(runs) == len(made) == 16
    assert {run.config["order_seed"] for run in runs} == {0}, "one order of rows for all"
    assert {run.job_id for run in runs} == {sweep.job_id}
    assert len({run.name for run in runs}) == 16


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"k": "4, 300"}, "k", "k is 300, but the SAE has only 64 features"),
        ({"k": "4, x"}, "k", "x is not a whole number"),
        ({"more_hooks": "blocks.9.hook_resid_post"}, "more_hooks", "is not in this capture"),
        ({"k": ",".join(map(str, range(1, 64))), "seed": "0,1"}, "__all__", "a sweep takes 64 at most"),
    ],
)
def test_a_sweep_that_cannot_be(make_capture: Any, client_of: Any, given: Any, field: str, says: str) -> None:
    answer = client_of("researcher").post(reverse("training:run_create"), posted(make_capture()[0], **given))
    assert answer.status_code == 422
    assert says in " ".join(answer.context["form"].errors[field])
    assert not Sweep.objects.exists() and not Run.objects.exists()


def test_the_number_of_runs_is_said_before_the_start(make_capture: Any, client_of: Any) -> None:
    address = reverse("training:run_create")
    headers = {"HX-Request": "true", "HX-Target": "estimate"}
    answer = client_of("researcher").get(address, posted(make_capture()[0], seed="0,1,2"), headers=headers)
    assert "<dt>runs, side by side</dt><dd>6</dd>" in answer.content.decode()


def test_points_are_the_product_of_what_has_several_values() -> None:
    assert points({"k": [1, 2], "seed": 0, "d_sae": [], "l1_coefficient": None}) == [
        {"k": 1, "seed": 0},
        {"k": 2, "seed": 0},
    ]


def test_the_page_shows_runs_and_the_plot(make_sweep: Any, run_job: Any, client_of: Any) -> None:
    sweep = make_sweep({"d_sae": 64, "k": 4}, {"d_sae": 64, "k": 8})
    empty = client_of("viewer").get(sweep.get_absolute_url())
    assert empty.context["chart"] is None
    run_job(sweep.start(sweep.owner))
    page = client_of("viewer").get(sweep.get_absolute_url())
    assert len(page.context["chart"].rows) == 2
    assert [row.axes for row in page.context["rows"]] == [[4], [8]]
    for run in sweep.runs.all():
        assert f'href="{run.get_absolute_url()}"' in page.content.decode()


@pytest.mark.parametrize("count", [1, 3])
def test_pages_of_sweeps_take_as_many_queries_for_three_as_for_one(
    make_sweep: Any, client_of: Any, django_assert_num_queries: Any, count: int
) -> None:
    sweep = make_sweep(*[{"d_sae": 64, "k": 4 + i} for i in range(count)])
    for number in range(1, count):
        Sweep.objects.create(name=f"sweep {number}", capture=sweep.capture)
    client = client_of("viewer")
    client.get(reverse("training:sweep_list"))
    with django_assert_num_queries(QUERIES["list"]):
        client.get(reverse("training:sweep_list"))
    with django_assert_num_queries(QUERIES["page"]):
        client.get(sweep.get_absolute_url())


QUERIES = {"list": 8, "page": 8}


def test_only_researchers_steer_a_sweep(make_sweep: Any, client_of: Any) -> None:
    sweep = make_sweep({"d_sae": 64, "k": 4})
    for name in ("sweep_stop", "sweep_pause", "sweep_resume"):
        assert client_of("viewer").post(reverse(f"training:{name}", args=[sweep.pk])).status_code == 403
    assert client_of("stranger").get(sweep.get_absolute_url()).status_code == 403
