"""Several prompts at once, what the model writes after them, and top_texts.json: what mi_crow's server returns of a reading."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from concepts.models import ConceptConfig
from inference.codes import CodesFile
from inference.models import Inference
from inference.neurons import response
from inference.numerics.generate import generate
from inference.numerics.steer import Edit, Steering
from saehub.jobs.models import State
from saes.numerics.formats import load_sae
from saes.numerics.lm import load_lm
from tests.inference.test_inference_playground import CREATE, TEXT, expected, inference, posted, second_sae
from tests.steering_rows import Rows
from tests.tiny_models import RESID

OTHERS = ["The dog slept by the door.", "日本 😀 <script>"]


def config(rows: Rows, **edit: Any) -> ConceptConfig:
    edits = [{"feature": 3, "mode": "add", "value": 60.0} | edit]
    return ConceptConfig.next_version(rows.sae, "cats", edits, rows.owner)


def test_each_prompt_is_read_on_its_own(rows: Rows, run_job: Any, client_of: Any) -> None:
    row = inference(rows, run_job, more_prompts=OTHERS, top_features=4)
    found = response(row)
    assert [made["text"] for made in found["outputs"]] == [TEXT, *OTHERS]
    one = found["saes"][0]
    for i, text in enumerate([TEXT, *OTHERS]):
        alone = inference(rows, run_job, prompt=text, top_features=4)
        dense = expected(rows, CodesFile(alone.folder).ids)
        best = np.argsort(-dense[1:].max(0), kind="stable")[:4]
        top = one["top_neurons"][i]
        assert (top["prompt_index"], top["prompt"], top["neuron_ids"]) == (i, text, best.tolist())
        np.testing.assert_allclose(top["activations"], dense[1:].max(0)[best], rtol=1e-4)
        at = one["token_latents"][i]["tokens"][2]
        assert at["neuron_ids"] == np.argsort(-dense[2], kind="stable")[:4].tolist()
    assert row.n_tokens == sum(len(made["tokens"]) for made in found["outputs"])
    page = client_of("viewer").get(f"{row.get_absolute_url()}?text=1")
    assert page.context["reading"].file.tokens[1:] == found["outputs"][1]["tokens"][1:]
    assert "?text=2" in page.content.decode().replace("&amp;", "&")


def test_logits_and_probabilities_are_of_the_likeliest(rows: Rows, run_job: Any) -> None:
    import torch

    row = inference(rows, run_job, top_next=3)
    made = response(row)["outputs"][0]
    logits = load_lm(rows.model.location).model(torch.tensor([made["token_ids"]])).logits[0]
    np.testing.assert_allclose(made["logits"][4], logits[4].topk(3).values.tolist(), rtol=1e-4)
    np.testing.assert_allclose(made["probabilities"][4], logits[4].softmax(0).topk(3).values.tolist(), rtol=1e-4)
    without = inference(rows, run_job, probabilities=False)
    assert response(without)["outputs"][0]["logits"] is None
    assert response(row, logits=False)["outputs"][0]["logits"] is None


def test_top_texts_are_written_for_every_sae(rows: Rows, run_job: Any, client_of: Any) -> None:
    other = second_sae(rows)
    row = inference(rows, run_job, rows.sae, other, more_prompts=[*OTHERS, TEXT], save_top_texts=True)
    address = f"{row.get_absolute_url()}?format=top_texts"
    for sae, hook in ((other, other.hook_name), (rows.sae, RESID)):
        answer = client_of("viewer").get(f"{address}&sae={sae.pk}")
        found = json.loads(b"".join(answer.streaming_content))
        assert (found["sae_id"], found["layer"], found["prompts"]) == (sae.pk, hook, row.prompts)
        codes = [expected(rows, CodesFile(row.text_folder(i)).ids, hook) for i in range(4)]
        firing = sorted(set(np.concatenate([np.flatnonzero((one[1:] != 0).any(0)) for one in codes]).tolist()))
        assert [int(feature) for feature in found["neuron_texts"]] == firing
        for feature in firing[:10]:
            texts = found["neuron_texts"][str(feature)]
            assert len({entry["text"] for entry in texts}) == len(texts), "the same text counts once"
            peaks = {text: float(one[1:, feature].max()) for text, one in zip(row.prompts, codes, strict=True)}
            assert texts[0]["score"] == pytest.approx(max(peaks.values()), rel=1e-4)
            for entry in texts:
                assert entry["score"] == pytest.approx(peaks[entry["text"]], rel=1e-4)
                tokens = CodesFile(row.text_folder(row.prompts.index(entry["text"]))).tokens
                assert tokens[entry["token_idx"]] == entry["token_str"]
            stats = found["neuron_stats"][str(feature)]
            assert stats["n_fires"] == sum(int((one[1:, feature] != 0).sum()) for one in codes)
    assert (
        list(row.folder.glob("**/top_texts.json")) and client_of("viewer").get(f"{address}&sae=99").status_code == 404
    )
    plain = inference(rows, run_job)
    assert client_of("viewer").get(f"{plain.get_absolute_url()}?format=top_texts").status_code == 404


def test_the_model_goes_on_steered_by_a_config_and_for_this_row_alone(rows: Rows, run_job: Any, client_of: Any) -> None:
    made = Inference(model=rows.model, name="x", prompt=TEXT)
    made.use_config(config(rows))
    fields = {"new_tokens": 8, "edits": made.edits, "config": made.config, "config_fact": made.config_fact}
    row = inference(rows, run_job, **fields)
    lm, sae = load_lm(rows.model.location), load_sae(rows.sae.files)
    wanted = generate(lm, TEXT, max_new_tokens=8, bos=True, steering=[Steering(sae, RESID, [Edit(3, "add", 60.0)])])
    file = CodesFile(row.folder)
    assert file.ids == [*wanted.prompt_ids, *wanted.ids] and row.outputs[0]["completion"] == wanted.text
    assert row.outputs[0]["n_prompt_tokens"] == len(wanted.prompt_ids)
    np.testing.assert_allclose(file.sae(0).along(3), expected(rows, file.ids)[:, 3], rtol=1e-4, atol=1e-5)
    plain = inference(rows, run_job, new_tokens=8)
    assert plain.outputs[0]["completion"] == generate(lm, TEXT, max_new_tokens=8, bos=True).text != wanted.text
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "steered by" in page and "cats v1" in page


def test_the_form_takes_a_config_and_prompts(rows: Rows, client_of: Any) -> None:
    wanted = config(rows)
    data = posted(rows, config=wanted.pk, new_tokens=4, more_prompts=json.dumps(OTHERS), save_top_texts="on")
    assert client_of("researcher").post(CREATE, data).status_code == 302
    row = Inference.objects.get()
    assert row.prompts == [TEXT, *OTHERS] and row.save_top_texts and row.config == wanted
    assert row.edits == [
        {"sae": rows.sae.pk, "config": wanted.pk, "feature": 3, "mode": "add", "value": 60.0}
    ] and row.config_fact == {"id": wanted.pk, "name": "cats", "version": 1, "sae": rows.sae.pk}  # fmt: skip
    fork = client_of("researcher").get(f"{CREATE}?fork={row.pk}").context["form"]
    assert fork.initial["more_prompts"] == OTHERS and fork.initial["new_tokens"] == 4


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("one\r\n\r\n two\n", ["one", " two"]),
        ("[1]\n", ["[1]"]),
        (json.dumps(["two\nlines", "<b>"]), ["two\nlines", "<b>"]),
        ("", []),
    ],
)
def test_more_texts_are_typed_one_a_line(rows: Rows, client_of: Any, typed: str, texts: list[str]) -> None:
    assert client_of("researcher").post(CREATE, posted(rows, more_prompts=typed)).status_code == 302
    row = Inference.objects.get()
    assert row.more_prompts == texts
    shown = client_of("researcher").get(f"{CREATE}?fork={row.pk}").context["form"]["more_prompts"].value()
    Inference.objects.all().delete()
    client_of("researcher").post(CREATE, posted(rows, more_prompts=shown))
    assert Inference.objects.get().more_prompts == texts, "what a fork shows is read as the same"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"new_tokens": 5000}, "Choose a length from 0 to 4,096."),
        ({"new_tokens": 256}, "holds 256 tokens in all"),
        ({"top_next": 0}, "Choose a number from 1 to 100."),
        ({"temperature": "nan"}, "Enter a number."),
        ({"more_prompts": json.dumps(["a", " "])}, "More texts must be a list of texts"),
        ({"more_prompts": json.dumps(["a"] * 64)}, "At most 64 prompts"),
        ({"more_prompts": json.dumps(["a" * 5000])}, "The text has 5,000 characters"),
        ({"more_prompts": '["a\\u0000"]'}, "Texts may hold neither the zero character"),
        ({"more_prompts": '["a\\ud800"]'}, "Texts may hold neither the zero character"),
        ({"more_prompts": "[" * 100_000}, "The text has 100,000 characters"),
        ({"config": 99}, "There is no such concept config"),
    ],
)  # fmt: skip
def test_bad_settings_get_one_sentence(rows: Rows, client_of: Any, changes: dict[str, Any], sentence: str) -> None:
    response = client_of("researcher").post(CREATE, posted(rows, **changes))
    assert response.status_code == 422 and sentence in response.content.decode() and not Inference.objects.exists()


def test_a_config_without_writing_is_refused(rows: Rows, client_of: Any) -> None:
    response = client_of("researcher").post(CREATE, posted(rows, config=config(rows).pk))
    assert "ask for tokens to write first" in response.content.decode()


def test_a_strength_that_breaks_the_model_ends_with_a_sentence(rows: Rows, run_job: Any) -> None:
    edits = [{"sae": rows.sae.pk, "feature": i, "mode": "add", "value": 3e38} for i in range(20)]
    row = Inference.objects.create(model=rows.model, owner=rows.owner, name="x", prompt=TEXT, new_tokens=4, edits=edits)
    row.saes.set([rows.sae])
    job = run_job(row.start(rows.owner))
    assert job.state == State.FAILED and "no longer finite" in job.error and not row.folder.exists()
