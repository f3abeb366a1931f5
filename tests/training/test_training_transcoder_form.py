"""A transcoder from the form, a document and the API: two hook points of one capture, and a sentence where they are not."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import reverse

from training.models import Run, Sweep
from training.run_document import form_of, from_yaml, of_run, to_yaml
from training.run_form import like

IN, OUT, WIDE = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"


@pytest.fixture
def capture(make_capture: Any) -> Any:
    return make_capture(hook_names=[IN, OUT, WIDE])[0]


def posted(capture: Any, **changes: Any) -> dict[str, Any]:
    given = {
        "source": f"{capture.pk}:{IN}", "architecture": "topk_transcoder", "hook_name_out": OUT, "k": "4",
        "d_sae": "64", "n_tokens": "1000", "batch_size": "64", "seed": "0", "lr_warmup": "0.02", "lr_decay": "0.2",
        "l1_warmup": "0.05", "aux_coefficient": "0.03125", "l0_coefficient": "1",
    }  # fmt: skip
    return given | changes


def test_the_form_makes_a_transcoders_run(capture, client_of, user_of):
    answer = client_of("researcher").post(reverse("training:run_create"), posted(capture, skip="on"))
    assert answer.status_code == 302, answer.context["form"].errors
    run = Run.objects.get()
    assert (run.hook_name, run.hook_name_out, run.architecture) == (IN, OUT, "topk_transcoder")
    assert run.config["skip"] is True and "hook_name_out" not in run.config
    assert run.sae_architecture == "topk_skip_transcoder" and "topk4-skip-transcoder" in run.name
    assert like(run)["hook_name_out"] == OUT
    page = client_of("researcher").get(run.get_absolute_url()).content.decode()
    assert IN in page and OUT in page and "topk_skip_transcoder" in page
    again = form_of(from_yaml(to_yaml(of_run(run))), user_of("researcher"))
    assert again.is_valid(), again.errors
    twin = again.make()
    assert (twin.hooks, twin.architecture, twin.config) == (run.hooks, run.architecture, run.config)


def test_several_values_make_a_sweep_of_transcoders(capture, client_of):
    given = posted(capture, architecture="jumprelu_transcoder", hook_name_out=WIDE, target_l0="4, 8")
    client_of("researcher").post(reverse("training:run_create"), given)
    runs = Sweep.objects.get().runs.all()
    assert [run.hooks for run in runs] == [(IN, WIDE)] * 2 and {run.sae_architecture for run in runs} == {
        "jumprelu_transcoder"
    }


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"hook_name_out": ""}, "hook_name_out", "Choose the hook point that the transcoder predicts"),
        ({"hook_name_out": IN}, "hook_name_out", "predicts another hook point than the one it reads"),
        ({"hook_name_out": WIDE}, "hook_name_out", "has 32 dimensions and blocks.1.mlp.hook_post"),
        ({"hook_name_out": "blocks.7.hook_mlp_out"}, "hook_name_out", "No capture here holds the hook point blocks.7"),
        ({"more_hooks": "all"}, "more_hooks", "A transcoder reads one hook point"),
    ],
)
def test_what_is_no_pair_gets_one_sentence(capture, client_of, changes, field, says):
    answer = client_of("researcher").post(reverse("training:run_create"), posted(capture, **changes))
    assert answer.status_code == 422 and not Run.objects.exists()
    (said,) = answer.context["form"].errors[field]
    assert says in said


def test_a_capture_of_one_hook_point_is_not_enough(make_capture, client_of):
    capture = make_capture(hook_names=[IN])[0]
    answer = client_of("researcher").post(reverse("training:run_create"), posted(capture))
    assert answer.context["form"].errors["hook_name_out"] == [
        f"A transcoder needs two hook points of the same tokens, and this capture holds only {IN}; capture both in one pass."
    ]


def test_a_hook_point_left_over_from_another_choice_is_not_kept(capture, client_of):
    client_of("researcher").post(reverse("training:run_create"), posted(capture, architecture="topk", skip="on"))
    run = Run.objects.get()
    assert run.hook_name_out == "" and "skip" not in run.config and run.sae_architecture == "topk"
