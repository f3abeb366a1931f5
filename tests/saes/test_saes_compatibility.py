"""Whether an SAE fits a language model that is here: told from names, hook points, widths and what its config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saes.compatibility import Fit, fits
from saes.models import SAE
from tests.sae_rows import a_catalogue_row, a_model, a_trained_sae, write_sae

pytestmark = pytest.mark.django_db


def only(sae: SAE) -> Fit:
    (found,) = fits(sae)
    return found


def faults(sae: SAE) -> dict[str, str]:
    return {reason.about: reason.text for reason in only(sae).reasons if reason.level != "fits"}


def test_its_own_model_fits() -> None:
    model = a_model()
    fit = only(a_trained_sae(model=model))
    assert (fit.level, fit.word, fit.named) == ("fits", "fits", True)
    assert [reason.about for reason in fit.reasons] == ["model", "hook point"]
    assert only(a_trained_sae("named", model=None, model_name="lab/tiny")).level == "fits", "by name alone"
    module = a_trained_sae("module", hook_name="model.layers.1", model=model)
    assert only(module).level == "fits", "a module's path names its output"


@pytest.mark.parametrize(
    "changed, about, said, level",
    [
        ({"d_in": 48}, "width", "reads vectors of 48 numbers, but blocks.1.hook_resid_post of tiny gives 32", "no"),
        ({"hook_name": "blocks.7.hook_resid_post"}, "hook point", "tiny has no hook point blocks.7", "no"),
        ({"hook_name": ""}, "hook point", "Nothing says at which hook point", "care"),
        ({"d_in": None}, "width", "not known until its config is read; blocks.1.hook_resid_post gives 32", "care"),
        ({"model_name": "gemma-2-2b", "model": None}, "model", "It is of gemma-2-2b, and what its features mean", "no"),
        ({"model_name": "", "model": None}, "model", "Nothing says which model", "care"),
        ({"model_name": "lab/tiny-it", "model": None}, "model", "this is another version", "care"),
        ({"architecture": "transcoder", "hook_name_out": "blocks.9.x"}, "prediction", "no hook point blocks.9.x", "no"),
        ({"architecture": "clt", "hook_name": ""}, "hook points", "nothing says which", "care"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_named(changed: dict[str, Any], about: str, said: str, level: str) -> None:
    sae = a_trained_sae(**{"model": a_model(), **changed})
    assert said in faults(sae)[about] and list(faults(sae)) == [about]
    assert only(sae).level == level


@pytest.mark.parametrize(
    "config, model, about",
    [
        ({"prepend_bos": True}, {"has_bos": False}, "tokenizer"),
        ({"prepend_bos": False}, {"has_bos": False}, None),
        ({"context_size": 512}, {"context_length": 256}, "context"),
        ({"normalize_activations": "expected_average_only_in"}, {}, "scale"),
        ({"normalize_activations": "layer_norm", "apply_b_dec_to_input": True}, {}, None),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, {"architecture": "GPT2LMHeadModel"}, "preprocessing"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, {"architecture": "LlamaForCausalLM"}, None),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": True}}, {}, None),
        ({"model_from_pretrained_kwargs": "nonsense", "prepend_bos": "yes", "context_size": "long"}, {}, None),
    ],
)  # fmt: skip
def test_what_was_done_before_its_inputs(config: dict[str, Any], model: dict[str, Any], about: str | None) -> None:
    row = a_model(**model)
    for name, kept in (("flat", config), ("nested", {"metadata": config}), ("odd", config | {"metadata": None})):
        assert list(faults(a_trained_sae(name, model=row, config=kept))) == ([about] if about else []), name


def test_value_biases_matter_to_heads_alone() -> None:
    points = [
        {"name": "blocks.0.attn.hook_z", "module": "model.layers.0.self_attn.o_proj", "side": "in", "d": 32, "layer": 0}
    ]
    config = {"model_from_pretrained_kwargs": {"fold_value_biases": True}}
    row = a_model(hook_points=points)
    assert list(faults(a_trained_sae(model=row, hook_name="blocks.0.attn.hook_z", config=config))) == ["preprocessing"]


def test_places_of_a_crosscoder_are_all_looked_for() -> None:
    row = a_model()
    both = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    sae = a_trained_sae(model=row, architecture="crosscoder", hook_name="", config={"metadata": {"hook_points": both}})
    assert only(sae).level == "fits"
    sae.config = {"metadata": {"hook_points": [*both, "blocks.2.hook_resid_post"]}}
    assert only(sae).level == "no" and "blocks.2.hook_resid_post" in faults(sae)["hook points"]


def test_a_real_saelens_folder_says_what_it_fits(tmp_path: Path, run_job: Any, settings: Any, client_of: Any) -> None:
    """The config as SAELens writes it, through a real import."""
    from saehub.jobs.models import Job
    from saes.numerics.formats import load_sae

    a_model(has_bos=False, architecture="GPTNeoXForCausalLM")
    folder = write_sae(tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= {"prepend_bos": True, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert load_sae(folder).config.metadata["prepend_bos"] is True
    settings.IMPORT_DIRS = [str(tmp_path)]
    sae = SAE.objects.create(source="file", name="real", facts={"server_path": str(folder)})
    job = sae.start(None)
    run_job(Job.objects.get(pk=job.pk))
    sae.refresh_from_db()
    assert sae.ready and sae.model is not None
    assert list(faults(sae)) == ["tokenizer", "preprocessing"] and only(sae).level == "care"


def test_the_page_shows_its_own_model_first_and_folds_the_others(
    client_of: Any, django_assert_num_queries: Any
) -> None:
    sae = a_trained_sae(model_name="tiny-2", model=None, config={"prepend_bos": True})
    page = client_of("viewer").get(sae.get_absolute_url())
    assert "No language model is here yet." in page.content.decode() and "It is of tiny-2." in page.content.decode()
    a_model("aaa"), a_model("tiny-2", has_bos=False), a_model("not-ready", ready_at=None)
    page = client_of("viewer").get(sae.get_absolute_url())
    assert [fit.model.name for fit in page.context["fits"]] == ["tiny-2", "aaa"]
    assert [fit.model.name for fit in page.context["others"]] == ["aaa"]
    html = page.content.decode()
    assert "with care" in html and "does not fit" in html and "1 model of other names" in html
    with django_assert_num_queries(1):
        fits(sae)


def test_scripts_ask_too(api: Any) -> None:
    model, row = a_model(), a_catalogue_row(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    (found,) = api("viewer", "get", f"/saes/{row.pk}/compatibility").json()
    assert (found["model"], found["level"], found["named"]) == (model.pk, "care", True)
    assert [reason["about"] for reason in found["reasons"]] == ["model", "width"]
