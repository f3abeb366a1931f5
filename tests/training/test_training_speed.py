"""The estimated time of a run rests on measured steps, not on how long some other run happened to take."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import reverse

from tests.training.rows import HOOK, a_capture, a_run
from training.models import Capture, Run, RunPoint, Sweep
from training.speed import Speeds, measure

pytestmark = pytest.mark.django_db
WIDTH, BATCH = 32, 2048


def measured_run(capture: Capture, rates: list[float], *, step: int = 10_000, **fields: Any) -> Run:
    """A run with a point every `step` tokens, at these rates."""
    config = {"d_sae": 64, "k": 4, "batch_size": BATCH} | fields.pop("config", {})
    run = a_run(fields.pop("name", "measured"), capture=capture, config=config, **fields)
    for at, rate in enumerate(rates, start=1):
        RunPoint.objects.create(run=run, step=at, tokens=at * step, values={"tokens_per_second": rate})
    return run


def speed(capture: Capture, architecture: str = "topk", d_sae: int = 64, batch_size: int = BATCH) -> Any:
    return Speeds(capture).of(architecture, WIDTH, d_sae, batch_size)


def test_the_rate_is_the_median_of_the_stretches_after_the_first(django_assert_num_queries: Any) -> None:
    run = measured_run(a_capture(), [10.0, 1000.0, 1200.0, 1100.0, 3.0, 1000.0])
    with django_assert_num_queries(1):
        found = measure(run)
    assert found is not None
    assert (found.tokens_per_second, found.stretches) == (1000.0, 5), "neither compiling nor a pause counts"


def test_a_run_too_small_to_tell_is_passed_over() -> None:
    capture = a_capture()
    long = measured_run(capture, [100.0] * 6, name="long")
    measured_run(capture, [100.0] * 3, name="few stretches")
    measured_run(capture, [90_000.0] * 6, name="a moment")
    a_run("no points", capture=capture)
    found = speed(capture)
    assert found.measured.run == long and found.tokens_per_second == 100.0


def test_the_nearest_in_cost_counts_and_of_near_ones_the_newest() -> None:
    capture = a_capture()
    small, older, newer, large = (
        measured_run(capture, [rate] * 6, name=name, config={"d_sae": d_sae})
        for name, rate, d_sae in (("s", 800, 64), ("older", 200, 512), ("newer", 100, 640), ("l", 10, 8192))
    )
    assert speed(capture, d_sae=512).measured.run == newer
    assert speed(capture, d_sae=64).measured.run == small
    assert speed(capture, d_sae=16_384).measured.run == large
    assert speed(capture, d_sae=16_384).tokens_per_second == pytest.approx(5.0), "twice the features, half the rate"
    newer.delete()
    assert speed(capture, d_sae=512).measured.run == older


def test_a_small_batch_costs_more_updates() -> None:
    capture = a_capture()
    measured_run(capture, [1000.0] * 6)
    smaller = speed(capture, batch_size=256).tokens_per_second
    assert smaller == pytest.approx(1000 * (1 + 800 / 2048) / (1 + 800 / 256))


def test_another_architecture_stands_in_at_the_ratio_of_the_benchmarks() -> None:
    capture = a_capture()
    measured_run(capture, [1000.0] * 6)
    found = speed(capture, "gated")
    assert found.other and found.tokens_per_second == pytest.approx(1000 / 2.77)
    assert speed(capture, "topk_transcoder") is None, "nobody has compared them"
    own = measured_run(capture, [50.0] * 6, architecture="gated", config={"d_sae": 4096})
    assert speed(capture, "gated").measured.run == own


def test_a_run_of_a_sweep_shared_its_time() -> None:
    capture = a_capture()
    sweep = Sweep.objects.create(name="sweep", capture=capture, grid={"k": [4, 8]})
    for k in (4, 8):
        measured_run(capture, [500.0] * 6, name=f"k{k}", sweep=sweep, config={"k": k})
    assert speed(capture).tokens_per_second == 1000.0


def test_streamed_and_stored_activations_are_not_compared() -> None:
    stored = a_capture()
    measured_run(stored, [1000.0] * 6)
    streamed = a_capture("streamed", stored=False)
    assert speed(streamed) is None
    own = measured_run(streamed, [30.0] * 6)
    assert speed(streamed, d_sae=128).measured.run == own and speed(stored).tokens_per_second == 1000.0


def test_the_page_and_the_command_say_what_the_time_rests_on(
    client_of: Any, user_of: Any, tmp_path: Any, capsys: Any
) -> None:
    from django.core.management import call_command

    user_of("admin")
    capture = a_capture()
    query = {"source": f"{capture.pk}:{HOOK}", "architecture": "topk", "k": 4, "n_tokens": 4000, "d_sae": 64}

    def html() -> str:
        url = reverse("training:run_create")
        return client_of("researcher").get(url, query, headers={"HX-Request": "true"}).content.decode()

    assert "not known yet" in html() and "has been measured here" in html()
    run = measured_run(capture, [100.0] * 6)
    page = html()
    assert "about 40 s" in page and "the median of 5 measured stretches" in page and run.get_absolute_url() in page
    assert ">4.2</data>" in page, "passes over the 95 % that are not held out"
    document = tmp_path / "run.yaml"
    document.write_text(f"capture: {capture.pk}\nk: 4\nd_sae: 64\nn_tokens: 4000\n")
    call_command("train", str(document), "--dry-run")
    assert f"about 40 s (as measured on run {run.pk})" in capsys.readouterr().out
    query["k"] = "2, 4"
    assert "about 1 min 20 s" in html() and "for the first of them alone" in html()


def test_a_sweep_of_many_runs_asks_once(client_of: Any, django_assert_num_queries: Any) -> None:
    capture = a_capture()
    measured_run(capture, [100.0] * 6)
    with django_assert_num_queries(2):
        speeds = Speeds(capture)
        assert all(speeds.of("topk", WIDTH, d_sae, BATCH) for d_sae in (64, 128, 256))
