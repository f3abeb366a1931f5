"""The playground: a text and a corpus of texts read by SAEs, through their jobs and pages, on a tiny real model."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile

from inference.codes import CodesError, CodesFile, Fires
from inference.models import Inference, PromptBatch
from saehub.jobs.models import Job, State
from saes.models import SAE
from saes.numerics.formats import load_sae
from saes.numerics.lm import load_lm
from tests.steering_rows import Rows
from tests.tiny_models import RESID

CREATE = "/playground/new/"
TEXT = "Paris is the capital of France."
LIST_QUERIES = 11


def second_sae(rows: Rows) -> SAE:
    """The same weights as another SAE, at another hook point."""
    sae = SAE.objects.get(pk=rows.sae.pk)
    sae.pk, sae.name, sae.hook_name, sae.layer, sae.path = None, "second", "blocks.0.attn.hook_z", 0, "saes/second"
    sae.save()
    (rows.data / "saes" / "second").symlink_to(rows.sae.files.resolve())
    return sae


def posted(rows: Rows, *saes: Any, **changes: Any) -> dict[str, Any]:
    data = {"prompt": TEXT, "saes": saes or [rows.sae.pk], "prepend_bos": "on", "probabilities": "on"} | changes
    return {name: value for name, value in data.items() if value is not None}


def inference(rows: Rows, run_job: Any, *saes: SAE, **fields: Any) -> Inference:
    row = Inference.objects.create(model=rows.model, owner=rows.owner, **({"name": "x", "prompt": TEXT} | fields))
    row.saes.set(saes or [rows.sae])
    job = run_job(row.start(rows.owner))
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    return row


def expected(rows: Rows, ids: list[int], hook: str = RESID) -> np.ndarray:
    """Dense codes by another way: captured activations through the SAE's encoder."""
    lm, sae = load_lm(rows.model.location), load_sae(rows.sae.files)
    with torch.inference_mode():
        return sae.encode(lm.activations(torch.tensor([ids]), [hook])[hook][0]).numpy()


def test_an_sae_of_sequences_reads_the_whole_text(rows: Rows, run_job: Any, client_of: Any) -> None:
    """A temporal SAE's codes depend on the tokens before, so it is given them all, in order."""
    from saes.numerics.architectures import sae_class
    from saes.numerics.formats import save_sae
    from saes.numerics.sae import SAEConfig

    torch.manual_seed(0)
    options = {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 6}
    config = SAEConfig("temporal", 32, 64, hook_name=RESID, options=options, model_name="tiny-llama")
    weights = sae_class("temporal")(config).requires_grad_(False)
    for tensor in weights.parameters():
        tensor.copy_(0.3 * torch.randn(tensor.shape))
    sae = SAE.objects.get(pk=rows.sae.pk)
    sae.pk, sae.name, sae.architecture, sae.d_sae, sae.path = None, "sequences", "temporal", 64, "saes/sequences"
    sae.save()
    save_sae(weights, rows.data / "saes" / "sequences")
    assert client_of("researcher").post(CREATE, posted(rows, sae.pk)).status_code == 302
    row = inference(rows, run_job, sae)
    file, lm = CodesFile(row.folder), load_lm(rows.model.location)
    with torch.inference_mode():
        dense = load_sae(sae.files).encode(lm.activations(torch.tensor([file.ids]), [RESID])[RESID][0]).numpy()
    assert (dense != 0).any()
    for feature in range(64):
        np.testing.assert_allclose(file.sae(0).along(feature), dense[:, feature], rtol=1e-4, atol=1e-6)
    steering = client_of("researcher").get(f"/steering/new/?sae={sae.pk}").content.decode()
    assert "sequences cannot steer. Its codes depend on whole sequences" in steering


# -- the job
def test_everything_that_fires_is_kept(rows: Rows, run_job: Any) -> None:
    other = second_sae(rows)
    row = inference(rows, run_job, rows.sae, other)
    file = CodesFile(row.folder)
    assert file.tokens[0] == "<bos>" and "".join(file.tokens[1:]) == TEXT
    assert [fact["sae"] for fact in row.facts] == [other.pk, rows.sae.pk], "by layer"
    for number, hook in enumerate([other.hook_name, RESID]):
        dense = expected(rows, file.ids, hook)
        fires = file.sae(number)
        for feature in range(96):
            np.testing.assert_allclose(fires.along(feature), dense[:, feature], rtol=1e-4, atol=1e-5)
        assert row.facts[number]["fires"] == (dense != 0).sum()
        assert row.facts[number]["l0"] == pytest.approx((dense[1:] != 0).sum(1).mean())
    assert row.n_tokens == len(file.ids) and row.policy["bos"] and row.versions["torch"] == torch.__version__


def test_next_tokens_are_those_of_the_model(rows: Rows, run_job: Any) -> None:
    row = inference(rows, run_job)
    file, lm = CodesFile(row.folder), load_lm(rows.model.location)
    logits = lm.model(torch.tensor([file.ids])).logits[0]
    for token in (0, 3, len(file) - 1):
        best = logits[token].softmax(0).topk(10)
        assert [one.id for one in file.likely(token)] == best.indices.tolist()
        assert [one.probability for one in file.likely(token)] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert file.likely(token)[0].text
    plain = inference(rows, run_job, probabilities=False)
    assert CodesFile(plain.folder).likely(0) == [] and CodesFile(plain.folder).logprobs is None


def test_bos_is_as_asked(rows: Rows, run_job: Any) -> None:
    row = inference(rows, run_job, prepend_bos=False)
    assert CodesFile(row.folder).tokens[0] != "<bos>" and row.policy["bos"] is False


def test_odd_text_is_read_whole(rows: Rows, run_job: Any, client_of: Any) -> None:
    """Right to left, CJK, emoji and markup come back letter for letter and escaped."""
    text = "שלום עולם <script>alert(1)</script> 日本語 😀\n=1+1"
    row = inference(rows, run_job, prompt=text)
    file = CodesFile(row.folder)
    raw = b"".join(
        bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.encode()
        for token in (part for token in file.tokens[1:] for part in _bytes_apart(token))
    )
    assert raw.decode() == text
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "<script>alert" not in page and "&lt;" in page and 'dir="auto"' in page


def _bytes_apart(token: str) -> list[str]:
    import re

    return re.findall(r"<0x[0-9A-F]{2}>|.", token, re.DOTALL)


def test_a_text_longer_than_the_model_reads_fails_with_a_sentence(rows: Rows, run_job: Any) -> None:
    row = Inference.objects.create(model=rows.model, owner=rows.owner, name="x", prompt="The cat " * 200)
    row.saes.set([rows.sae])
    job = run_job(row.start(rows.owner))
    assert job.state == State.FAILED and "reads at most 256" in job.error and not row.folder.exists()
    Inference.objects.filter(pk=row.pk).delete()
    assert run_job(_queued_for(row, rows)).error == "The text is not there any more."


def _queued_for(row: Inference, rows: Rows) -> Job:
    from saehub.jobs.models import enqueue

    return enqueue("infer", rows.owner, title="x", inference=row.pk)


# -- the form
def test_a_text_is_saved_and_queued(rows: Rows, client_of: Any, user_of: Any) -> None:
    other = second_sae(rows)
    response = client_of("researcher").post(CREATE, posted(rows, rows.sae.pk, other.pk, prompt=" a\r\nb "))
    row = Inference.objects.get()
    assert response.status_code == 302 and response.url == f"/playground/{row.pk}/"
    assert (row.prompt, row.model, row.owner) == (" a\nb ", rows.model, user_of("researcher"))
    assert set(row.saes.all()) == {rows.sae, other} and row.prepend_bos and row.probabilities and not row.chat
    job = Job.objects.get()
    assert (job.kind, job.queue, job.params) == ("infer", "live", {"inference": row.pk})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": ""}, "Write the text to read."),
        ({"prompt": " \n"}, "Write the text to read."),
        ({"prompt": "a\0b"}, "Null characters are not allowed."),
        ({"prompt": "a" * 1025}, "The text has 1,025 characters; tiny-llama reads 256 tokens, and at most 1,024"),
        ({"saes": []}, "Choose at least one SAE."),
        ({"saes": [999]}, "SAE 999 cannot be used here"),
        ({"saes": ["x"]}, "“x” is no SAE; choose one of the list."),
        ({"chat": "on"}, "tiny-llama has no chat template; leave this off to give it the plain text."),
    ],
)
def test_bad_input_gets_one_sentence(rows: Rows, client_of: Any, changes: dict[str, Any], sentence: str) -> None:
    response = client_of("researcher").post(CREATE, posted(rows, **changes))
    assert response.status_code == 422 and sentence in response.content.decode()
    assert not Inference.objects.exists() and not Job.objects.exists()


def test_ten_megabytes_are_refused(rows: Rows, client_of: Any) -> None:
    response = client_of("researcher").post(CREATE, posted(rows, prompt="a" * 10_000_000))
    assert response.status_code in (400, 413, 422) and not Inference.objects.exists()


def test_saes_that_cannot_read_are_shown_with_the_reason(rows: Rows, client_of: Any) -> None:
    wrong = second_sae(rows)
    SAE.objects.filter(pk=wrong.pk).update(hook_name="blocks.9.hook_resid_post", layer=9)
    page = client_of("researcher").get(CREATE).content.decode()
    assert f'<option value="{wrong.pk}" disabled>' in page
    assert "not possible. tiny-llama has no hook point blocks.9.hook_resid_post." in page
    response = client_of("researcher").post(CREATE, posted(rows, wrong.pk))
    assert response.status_code == 422 and "second cannot read a text here." in response.content.decode()


def test_saes_of_two_models_are_refused(rows: Rows, client_of: Any) -> None:
    other = second_sae(rows)
    model = type(rows.model).objects.get(pk=rows.model.pk)
    model.pk, model.name = None, "other"
    model.save()
    SAE.objects.filter(pk=other.pk).update(model=model)
    page = client_of("researcher").post(CREATE, posted(rows, rows.sae.pk, other.pk)).content.decode()
    assert "Choose SAEs of one model" in page


def test_the_form_is_filled_from_the_url_and_from_a_fork(rows: Rows, client_of: Any, run_job: Any) -> None:
    form = client_of("researcher").get(f"{CREATE}?prompt=Rome&sae={rows.sae.pk}").context["form"]
    assert form["prompt"].value() == "Rome" and form["saes"].value() == [rows.sae.pk]
    row = inference(rows, run_job, prompt="Rome is old", prepend_bos=False)
    form = client_of("researcher").get(f"{CREATE}?fork={row.pk}").context["form"]
    assert form["prompt"].value() == "Rome is old" and form["prepend_bos"].value() is False
    for odd in ("x", "999", "9" * 40):
        assert client_of("researcher").get(f"{CREATE}?fork={odd}").status_code == 404


def test_who_may(rows: Rows, client_of: Any, run_job: Any) -> None:
    row = inference(rows, run_job)
    assert client_of("viewer").get(CREATE).status_code == 403
    assert client_of("viewer").get(row.get_absolute_url()).status_code == 200
    assert client_of("stranger").get(row.get_absolute_url()).status_code == 403
    assert client_of("annotator").get(CREATE).status_code == 200
    assert client_of("annotator").get("/playground/batches/new/").status_code == 403


# -- one text
def test_the_page_shows_tokens_features_and_next_tokens(rows: Rows, view: Any, run_job: Any, client_of: Any) -> None:
    row = inference(rows, run_job)
    response = client_of("viewer").get(row.get_absolute_url())
    reading, page = response.context["reading"], response.content.decode()
    dense = expected(rows, CodesFile(row.folder).ids)
    strongest = int(dense[1:].max(0).argmax())
    assert reading.choice.feature == strongest and reading.choice.token == int(dense[1:, strongest].argmax()) + 1
    assert [one.feature for one in reading.text_rows[:5]] == np.argsort(-dense[1:].max(0))[:5].tolist()
    assert reading.text_rows[0].known.maximum == view.opened().feature(strongest).maximum
    assert page.count('class="t') > row.n_tokens and f"/features/{strongest}/" in page
    assert len(reading.likely) == 10 and "In Python" in page


def test_a_token_is_chosen_by_a_plain_link(rows: Rows, run_job: Any, client_of: Any) -> None:
    row = inference(rows, run_job)
    dense = expected(rows, CodesFile(row.folder).ids)
    reading = client_of("viewer").get(f"{row.get_absolute_url()}?token=4&feature=3").context["reading"]
    assert [one.feature for one in reading.token_rows] == np.argsort(-dense[4], kind="stable")[
        : len(reading.token_rows)
    ].tolist()
    assert (reading.choice.token, reading.choice.feature, reading.n_at_token) == (4, 3, (dense[4] != 0).sum())
    for odd in ("token=999&feature=999", "token=-1&feature=x", "sae=abc", "token=" + "9" * 50):
        assert client_of("viewer").get(f"{row.get_absolute_url()}?{odd}").status_code == 200


def test_two_saes_have_a_tab_each(rows: Rows, run_job: Any, client_of: Any) -> None:
    other = second_sae(rows)
    row = inference(rows, run_job, rows.sae, other)
    page = client_of("viewer").get(f"{row.get_absolute_url()}?sae={rows.sae.pk}")
    assert page.context["reading"].fact["sae"] == rows.sae.pk
    assert client_of("viewer").get(row.get_absolute_url()).context["reading"].fact["sae"] == other.pk


def test_the_grid_holds_the_codes(rows: Rows, run_job: Any, client_of: Any) -> None:
    row = inference(rows, run_job)
    dense = expected(rows, CodesFile(row.folder).ids)
    grid = client_of("viewer").get(row.get_absolute_url()).context["reading"].grid()
    assert grid.rows and (grid.first, grid.last) == (0, row.n_tokens)
    for one, cells in grid.rows:
        assert [cell.value for cell in cells] == pytest.approx(dense[:, one.feature].tolist(), abs=1e-5)


def test_csv_and_json_hold_every_code(rows: Rows, run_job: Any, client_of: Any) -> None:
    row = inference(rows, run_job, prompt="=1+1 is two")
    dense = expected(rows, CodesFile(row.folder).ids)
    response = client_of("viewer").get(f"{row.get_absolute_url()}?format=csv")
    found = list(csv.DictReader(io.StringIO(response.getvalue().decode())))
    assert len(found) == (dense != 0).sum() and response["Content-Type"].startswith("text/csv")
    for one in found:
        assert float(one["value"]) == pytest.approx(dense[int(one["token_index"]), int(one["feature"])], rel=1e-5)
    assert found[-1]["sae"] == str(rows.sae.pk) and any(one["token"].startswith("'=") for one in found)
    record = json.loads(client_of("viewer").get(f"{row.get_absolute_url()}?format=json").content)
    assert record["prompt"] == "=1+1 is two" and len(record["tokens"]) == row.n_tokens
    third = record["saes"][0]["token_features"][3]
    assert dense[3, third["features"]] == pytest.approx(third["activations"], rel=1e-4) and third["n_fires"] == 6
    assert len(record["tokens"][0]["next"]) == 10 and record["tokens"][0]["logprob"] is None


def test_the_python_on_the_page_reads_the_same(rows: Rows, run_job: Any, client_of: Any, tmp_path: Path) -> None:
    row = inference(rows, run_job)
    response = client_of("viewer").get(row.get_absolute_url())
    (tmp_path / "page.py").write_text(response.context["python"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = runpy.run_path(str(tmp_path / "page.py"))["found"]
    assert found.ids == CodesFile(row.folder).ids and len(printed.getvalue().splitlines()) == row.n_tokens
    np.testing.assert_allclose(found.codes[0].values, CodesFile(row.folder).sae(0).values, rtol=1e-5)


def test_lost_files_are_told(rows: Rows, run_job: Any, client_of: Any) -> None:
    row = inference(rows, run_job)
    (row.folder / "values_0.npy").write_bytes(b"x")
    page = client_of("viewer").get(row.get_absolute_url())
    assert page.status_code == 200 and "are gone or damaged; run it again" in page.content.decode()
    (row.folder / "text.json").unlink()
    with pytest.raises(CodesError):
        CodesFile(row.folder)


def test_deleting_a_text_deletes_its_files(rows: Rows, run_job: Any) -> None:
    row = inference(rows, run_job)
    folder = row.folder
    assert folder.is_dir()
    row.delete()
    assert not folder.exists()


def test_control_tokens_count_in_no_summary() -> None:
    start = np.array([0, 2, 3, 5])
    fires = Fires(
        start, np.array([1, 2, 2, 1, 3]), np.array([90.0, 50.0, 4.0, 2.0, -7.0]), np.array([True, False, False])
    )
    found = [(one.feature, one.maximum, one.token, one.n_fires) for one in fires.strongest(5)]
    assert found == [(3, -7.0, 2, 1), (2, 4.0, 1, 1), (1, 2.0, 2, 1)]
    assert fires.at(0) == [(1, 90.0), (2, 50.0)] and fires.strongest(0) == []


def test_while_it_waits_the_page_polls(rows: Rows, client_of: Any) -> None:
    row = Inference.objects.create(model=rows.model, owner=rows.owner, name="x", prompt="<b>")
    row.saes.set([rows.sae])
    row.start(rows.owner)
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "every 2s" in page and "&lt;b&gt;" in page and "place 1 in the live queue" in page


# -- the list
@pytest.mark.parametrize("n", [1, 3])
def test_the_list_asks_the_same_queries(n: int, rows: Rows, client_of: Any, django_assert_num_queries: Any) -> None:
    for i in range(n):
        row = Inference.objects.create(model=rows.model, owner=rows.owner, name=f"text {i}", prompt=f"text {i}")
        row.saes.set([rows.sae])
        row.start(rows.owner)
    client = client_of("viewer")
    client.get("/playground/")
    with django_assert_num_queries(LIST_QUERIES):
        page = client.get("/playground/").content.decode()
    assert all(f"text {i}" in page for i in range(n)) and "text 3" not in page


def test_empty_lists_say_what_to_do(client_of: Any) -> None:
    assert "No text read yet" in client_of("researcher").get("/playground/").content.decode()
    assert "No SAE to read with yet" in client_of("researcher").get(CREATE).content.decode()
    assert "No file of prompts read yet" in client_of("researcher").get("/playground/batches/").content.decode()
    assert "No SAE to read with yet" in client_of("researcher").get("/playground/batches/new/").content.decode()


# -- a corpus of prompts
PROMPTS = ["Paris is the capital.", "Rome", "The dog slept by the door. 日本", "a " * 400]


@pytest.fixture
def corpus(rows: Rows) -> Any:
    from django.utils import timezone

    from training.jobs import digest
    from training.models import Corpus

    row = Corpus.objects.create(name="prompts", source="upload", location="prompts.jsonl", owner=rows.owner)
    row.folder.mkdir(parents=True)
    row.file.write_text("\n".join(json.dumps(text) for text in PROMPTS))
    row.n_documents, row.sha256, row.ready_at = len(PROMPTS), digest(row.file), timezone.now()
    row.save()
    return row


def test_a_corpus_becomes_a_table(rows: Rows, corpus: Any, run_job: Any, client_of: Any) -> None:
    other = second_sae(rows)
    data = {"corpus": corpus.pk, "saes": [rows.sae.pk, other.pk], "top": 0, "prepend_bos": "on"}
    response = client_of("researcher").post("/playground/batches/new/", data)
    row = PromptBatch.objects.get()
    assert response.url == f"/playground/batches/{row.pk}/" and row.job.queue == "gpu"
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    table = pq.read_table(row.file)
    columns = {name: np.array(table.column(name).to_pylist()) for name in table.column_names}
    lm = load_lm(rows.model.location)
    n_tokens = 0
    for number, text in enumerate(PROMPTS):
        ids = [0, *lm.tokenizer(text.rstrip("\n"))["input_ids"]][:256]
        n_tokens += len(ids)
        for sae, hook in ((rows.sae, RESID), (other, other.hook_name)):
            mine = (columns["prompt"] == number) & (columns["sae"] == sae.pk)
            dense = np.zeros((len(ids), 96), np.float32)
            dense[columns["position"][mine], columns["feature"][mine]] = columns["value"][mine]
            np.testing.assert_allclose(dense, expected(rows, ids, hook), rtol=1e-3, atol=1e-4)
            assert columns["token_id"][mine].tolist() == np.repeat(ids, (dense != 0).sum(1)).tolist()
    assert (row.n_prompts, row.n_cut, row.n_tokens, row.n_rows) == (4, 1, n_tokens, table.num_rows)
    assert set(columns["token"][columns["special"]]) == {"<bos>"}
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "features.parquet" in page and "of which 1 were longer" in page
    sent = client_of("viewer").get(f"/playground/batches/{row.pk}/features.parquet")
    assert b"".join(sent.streaming_content) == row.file.read_bytes()


def test_fewer_features_and_prompts(rows: Rows, corpus: Any, run_job: Any) -> None:
    row = PromptBatch.objects.create(name="b", model=rows.model, corpus=corpus, top=2, max_prompts=2, owner=rows.owner)
    row.saes.set([rows.sae])
    assert run_job(row.start(rows.owner)).state == State.DONE
    row.refresh_from_db()
    assert row.n_prompts == 2 and row.n_rows == 2 * row.n_tokens


def test_a_batch_that_fails_leaves_nothing(rows: Rows, corpus: Any, run_job: Any, settings: Any) -> None:
    settings.BATCH_LIMIT = 1
    row = PromptBatch.objects.create(name="b", model=rows.model, corpus=corpus, owner=rows.owner)
    row.saes.set([rows.sae])
    job = run_job(row.start(rows.owner))
    assert job.state == State.FAILED and "The table is larger than" in job.error
    assert not row.folder.exists() and not list(row.folder.parent.glob(".*"))
    settings.BATCH_LIMIT = 10**9
    job.retry()
    assert run_job(job).state == State.DONE, "tried again, it begins anew"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"top": -1}, "greater than or equal to 0"),
        ({"top": 10_001}, "Choose from 0 (all) to 10,000."),
        ({"max_prompts": 0}, "Choose at least one prompt"),
        ({"corpus": 999}, "That corpus is not ready; choose another."),
        ({"saes": []}, "Choose at least one SAE."),
    ],
)
def test_bad_batches(rows: Rows, corpus: Any, client_of: Any, changes: dict[str, Any], sentence: str) -> None:
    data = {"corpus": corpus.pk, "saes": [rows.sae.pk], "top": 5} | changes
    response = client_of("researcher").post("/playground/batches/new/", data)
    assert response.status_code == 422 and sentence in response.content.decode()
    assert not PromptBatch.objects.exists()


def test_a_file_of_prompts_becomes_a_corpus_and_a_table(rows: Rows, run_job: Any, client_of: Any) -> None:
    file = SimpleUploadedFile("questions.jsonl", b'{"q": "The cat sat."}\n{"q": "Paris is the capital of France."}\n')
    data = {"file": file, "text_field": "q", "saes": [rows.sae.pk], "top": 3, "prepend_bos": "on"}
    assert client_of("researcher").post("/playground/batches/new/", data).status_code == 302
    row = PromptBatch.objects.get()
    assert row.corpus.name == "questions" and row.corpus.busy and row.corpus.text_field == "q"
    assert run_job(row.corpus.job).state == State.DONE
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    assert row.n_prompts == 2 and pq.read_table(row.file).num_rows == row.n_rows > 0


def test_a_file_that_cannot_be_read_ends_the_batch_with_its_sentence(rows: Rows, run_job: Any, client_of: Any) -> None:
    file = SimpleUploadedFile("questions.jsonl", b'{"q": "The cat sat."}\n')
    data = {"file": file, "text_field": "words", "saes": [rows.sae.pk], "top": 3}
    client_of("researcher").post("/playground/batches/new/", data)
    row = PromptBatch.objects.get()
    corpus = run_job(row.corpus.job)
    assert corpus.state == State.FAILED and corpus.error
    job = run_job(row.job)
    assert job.state == State.FAILED and corpus.error in job.error


@pytest.mark.parametrize(
    ("content", "corpus_too", "sentence"),
    [
        (b"", False, "The file is empty"),
        (b"\xff\xfe\x00", False, "not UTF-8"),
        (None, False, "Choose a file of prompts, or a corpus."),
        (b"words", True, "not both"),
    ],
)
def test_bad_files_of_prompts(
    rows: Rows, corpus: Any, client_of: Any, content: bytes | None, corpus_too: bool, sentence: str
) -> None:
    data: dict[str, Any] = {"saes": [rows.sae.pk], "top": 5}
    data |= {"file": SimpleUploadedFile("a.txt", content)} if content is not None else {}
    data |= {"corpus": corpus.pk} if corpus_too else {}
    response = client_of("researcher").post("/playground/batches/new/", data)
    assert response.status_code == 422 and sentence in response.content.decode()
    assert not PromptBatch.objects.exists()
