"""add_model, run the way a worker runs it: a folder, a GGUF file, the Hub out of reach."""

import json
import shutil

import pytest
from django.utils import timezone

from saehub.jobs.models import State
from saes.models import SAE, LanguageModel

pytestmark = pytest.mark.django_db


@pytest.fixture
def add(run_job, user_of):
    def call(**fields):
        row = LanguageModel.objects.create(owner=user_of("researcher"), **{"name": "tiny"} | fields)
        job = run_job(row.start(row.owner))
        row.refresh_from_db()
        return row, job

    return call


def test_a_folder_is_described_without_being_copied(add, tiny_model_dir):
    row, job = add(source="folder", location=str(tiny_model_dir))
    assert job.state == State.DONE, job.traceback
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert (row.architecture, row.n_layers, row.d_model) == ("LlamaForCausalLM", 2, 32)
    assert (row.vocabulary, row.context_length) == (config["vocab_size"], 256)
    assert row.size_bytes == (tiny_model_dir / "model.safetensors").stat().st_size
    assert row.has_bos and not row.has_chat and row.ready
    assert row.hook("blocks.1.hook_resid_post")["d"] == 32
    assert row.load_from == str(tiny_model_dir) and not row.folder.exists()
    assert job.result == {"model": row.pk, "folder": str(tiny_model_dir), "saes": 0}


def test_saes_that_were_here_first_are_linked(add, tiny_model_dir):
    def sae(model_name, **fields):
        given = {"name": model_name, "source": "file", "ready_at": timezone.now()} | fields
        return SAE.objects.create(model_name=model_name, **given)

    meant = [sae("tiny"), sae("Lab/Tiny"), sae("tiny-small")]
    others = [sae("tiny-it"), sae(""), sae("tiny", ready_at=None), sae("shiny")]
    row, job = add(source="folder", location=str(tiny_model_dir))
    assert job.result["saes"] == 3
    assert set(row.saes.all()) == set(meant)
    assert not SAE.objects.filter(pk__in=[other.pk for other in others], model__isnull=False).exists()


def test_parameters_are_counted_as_torch_counts_them(add, tiny_model_dir):
    from saes.numerics.lm import load_lm

    row, _ = add(source="folder", location=str(tiny_model_dir))
    assert row.n_parameters == sum(parameter.numel() for parameter in load_lm(tiny_model_dir).model.parameters())


def test_a_folder_that_lost_its_tokenizer_fails_with_a_sentence(add, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    row, job = add(source="folder", location=str(folder))
    assert job.state == State.FAILED and not row.ready
    assert "has no tokenizer that can be read" in job.error


def test_the_hub_out_of_reach_is_one_sentence(add):
    row, job = add(source="hub", location="HuggingFaceTB/SmolLM2-135M")
    assert job.state == State.FAILED and not row.ready
    assert job.error.startswith("HuggingFaceTB/SmolLM2-135M is not on this machine")


def test_a_module_path_means_the_modules_output(add, tiny_model_dir):
    row, _ = add(source="folder", location=str(tiny_model_dir))
    assert row.hook("model.layers.1")["name"] == "blocks.1.hook_resid_post"
    assert row.hook("blocks.1.hook_resid_pre")["module"] == "model.layers.1"
    assert row.hook("blocks.7.hook_resid_post") is None
