"""The form of a run: what each architecture is asked, what it queues, refuses and estimates."""

from typing import Any

import pytest
from django.urls import reverse

from saehub.jobs.models import Job
from tests.training.rows import HOOK, a_capture, a_run, errors
from training.models import Run
from training.run_form import ARCHITECTURES, INITIALIZATIONS, RunForm

pytestmark = pytest.mark.django_db


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
    from training.numerics.initial import INITIALIZATIONS as OF_THE_TRAINER
    from training.numerics.train_config import PRECISIONS, TrainConfig

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
    assert {key: set(kinds) for key, (_, kinds) in INITIALIZATIONS.items() if key} == {
        key: set(kinds) for key, kinds in OF_THE_TRAINER.items()
    }
    assert {key or "fast" for key, _ in form.fields["precision"].choices} == set(PRECISIONS)


def test_first_weights_and_products_are_a_choice(client_of: Any) -> None:
    where = {"source": f"{a_capture().pk}:{HOOK}"}
    add_run(client_of("researcher"), **where)
    assert not {"initialization", "precision"} & Run.objects.get().config.keys(), "nothing said means the trainer's own"
    add_run(client_of("researcher"), **where, initialization="sparsify", precision="bfloat16")
    config = Run.objects.order_by("-pk")[0].config
    assert (config["initialization"], config["precision"]) == ("sparsify", "bfloat16")
    answer = add_run(
        client_of("researcher"), **where, architecture="jumprelu", l0_coefficient=1, initialization="sparsify"
    )
    assert errors(answer) == {"initialization": "They train no SAE of this architecture; choose other first weights."}


def test_names_made_up_twice_are_told_apart(client_of: Any) -> None:
    capture = a_capture()
    for _ in range(3):
        add_run(client_of("researcher"), source=f"{capture.pk}:{HOOK}")
    assert [run.name for run in Run.objects.order_by("pk")] == [
        "tiny-layer1-topk4-256", "tiny-layer1-topk4-256 2", "tiny-layer1-topk4-256 3",
    ]  # fmt: skip
