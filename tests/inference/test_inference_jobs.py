"""The generate job, run the way the live worker runs it, on a tiny real model."""

from __future__ import annotations

import threading
import time
from statistics import mean
from typing import Any

import pytest
import torch

from inference import jobs
from inference.jobs import Warm
from inference.models import Generation
from inference.numerics.quality import plain_logprobs, repetition
from saehub.jobs.models import Job, State
from saehub.jobs.progress import Progress
from saehub.jobs.runner import execute
from saes.numerics.lm import load_lm
from tests.steering_rows import Rows

PROMPT = "Paris is the capital"


def generation(rows: Rows, *edits: tuple[int, str, float], **changes: Any) -> Generation:
    made = [{"feature": feature, "mode": mode, "value": value} for feature, mode, value in edits]
    fields = {"name": "x", "prompt": PROMPT, "max_new_tokens": 12, "sae": rows.sae, "owner": rows.owner} | changes
    return Generation.objects.create(model=rows.model, edits=made, **fields)


def run(row: Generation, run_job: Any) -> Generation:
    job = run_job(row.start(row.owner))
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    return row


def test_the_baseline_is_what_transformers_generates(rows: Rows, run_job: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = run(generation(rows, (3, "add", 60.0)), run_job)
    model, tokenizer = (auto.from_pretrained(rows.model.location) for auto in (AutoModelForCausalLM, AutoTokenizer))
    given = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, given["input_ids"].shape[1] :]
    assert row.baseline["ids"] == out.tolist()
    assert row.baseline["text"] == tokenizer.decode(out, skip_special_tokens=True)
    assert row.policy["prompt_ids"] == given["input_ids"][0].tolist()


def test_an_edit_changes_the_text_and_everything_is_stored(rows: Rows, run_job: Any) -> None:
    row = run(generation(rows, (3, "add", 60.0)), run_job)
    assert row.ready and row.steered["ids"] != row.baseline["ids"]
    for side in (row.baseline, row.steered):
        assert "".join(side["pieces"]) == side["text"]
        assert len(side["ids"]) == len(side["pieces"]) == len(side["tokens"]) == len(side["logprobs"])
        assert side["repetition"] == repetition(side["ids"]) and side["tokens_per_second"] > 0
    assert row.baseline["mean_plain_logprob"] == pytest.approx(mean(row.baseline["logprobs"]))
    expected = plain_logprobs(load_lm(rows.model.location), row.policy["prompt_ids"], row.steered["ids"])
    assert row.steered["mean_plain_logprob"] == pytest.approx(mean(expected), abs=1e-5)
    assert row.steered["mean_plain_logprob"] != pytest.approx(mean(row.steered["logprobs"]), abs=1e-3)
    assert row.versions["torch"] == torch.__version__ and row.policy["equation"].startswith("x' = x + decode(z')")
    assert row.job.result == {
        "generation": row.pk, "baseline_tokens": len(row.baseline["ids"]), "steered_tokens": len(row.steered["ids"]),
    }  # fmt: skip


def test_without_edits_the_steered_text_is_the_baseline(rows: Rows, run_job: Any) -> None:
    row = run(generation(rows), run_job)
    assert row.steered == row.baseline and row.baseline["ids"]
    assert [line.text for line in row.job.lines.all()] == ["Loading tiny-llama", "Writing the baseline text"]


def test_the_same_seed_gives_the_same_texts(rows: Rows, run_job: Any) -> None:
    made = [run(generation(rows, (3, "clamp", 9.0), temperature=1.5, seed=seed), run_job) for seed in (4, 4, 5)]
    texts = [(row.baseline["text"], row.steered["text"]) for row in made]
    assert texts[0] == texts[1] != texts[2]


class Watching(Progress):
    """A progress that looks at the generation's row whenever it is told of a token, and cancels after `stop` of them."""

    def __init__(self, job: Job, row: Generation, stop: int | None = None) -> None:
        super().__init__(job)
        self.row, self.stop, self.seen = row, stop, []

    def __call__(self, done: int, total: int | None = None, step: str = "") -> None:
        if done == self.stop:
            self.job.cancel()
            self._written = 0.0
        self.row.refresh_from_db()
        self.seen.append((len(self.row.baseline.get("ids", [])), len(self.row.steered.get("ids", []))))
        super().__call__(done, total, step)


def test_the_text_is_in_the_row_while_it_is_written(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WRITE_SECONDS", 0.0)
    row = generation(rows, (3, "add", 60.0))
    job = Job.objects.claim(row.start(rows.owner).pk, "test")
    assert job is not None
    watching = Watching(job, row)
    jobs.generate(watching, row.pk)
    row.refresh_from_db()
    baseline, steered = len(row.baseline["ids"]), len(row.steered["ids"])
    assert watching.seen == [(i + 1, 0) for i in range(baseline)] + [(baseline, i + 1) for i in range(steered)]


def test_cancel_stops_within_a_token_and_keeps_what_was_written(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr("saehub.jobs.runner.Progress", lambda job: Watching(job, row, stop=3))
    row = generation(rows, (3, "add", 60.0))
    job = Job.objects.claim(row.start(rows.owner).pk, "test")
    assert job is not None
    execute(job)
    job.refresh_from_db()
    row.refresh_from_db()
    assert job.state == State.CANCELLED and not row.ready
    assert len(row.baseline["ids"]) == 3 and row.steered == {}


def test_bad_input_that_only_the_model_can_tell(rows: Rows, run_job: Any) -> None:
    long = run_job(generation(rows, prompt="The cat " * 120).start(rows.owner))
    assert long.state == State.FAILED
    assert "12 new ones were asked for, but tiny-llama reads at most 256 in all" in long.error
    wrong = run_job(generation(rows, (96, "add", 1.0)).start(rows.owner))
    assert wrong.error == "There is no feature 96; this SAE has features 0 to 95."
    chat = run_job(generation(rows, chat=True).start(rows.owner))
    assert "has no chat template" in chat.error


def test_a_generation_that_was_deleted_meanwhile(rows: Rows, run_job: Any) -> None:
    row = generation(rows)
    job = row.start(rows.owner)
    Generation.objects.filter(pk=row.pk).delete()
    assert run_job(job).error == "The generation is not there any more."


def test_models_stay_warm(rows: Rows, run_job: Any) -> None:
    run(generation(rows, (3, "add", 1.0)), run_job)
    first = jobs.warm_lm(rows.model), jobs.warm_sae(rows.sae)
    run(generation(rows, (3, "add", 2.0)), run_job)
    assert first == (jobs.warm_lm(rows.model), jobs.warm_sae(rows.sae))


def test_warm_keeps_the_most_recently_used_and_loads_once() -> None:
    warm: Warm[str] = Warm(2)
    loaded: list[str] = []

    def load(name: str) -> str:
        time.sleep(0.01)
        loaded.append(name)
        return name * 2

    threads = [threading.Thread(target=lambda: warm.get("a", lambda: load("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["a"]
    assert [warm.get(name, lambda name=name: load(name)) for name in "abaca"] == ["aa", "bb", "aa", "cc", "aa"]
    assert loaded == ["a", "b", "c"], "b was the least recently used when c came"
    with pytest.raises(ZeroDivisionError):
        warm.get("d", lambda: str(1 / 0))
    assert warm.get("d", lambda: load("d")) == "dd", "what failed to load is tried again"


# -- quality
def test_plain_logprobs_are_those_of_one_forward_pass(tiny_model_dir: Any) -> None:
    lm = load_lm(tiny_model_dir)
    prompt, new = [0, 20, 30, 40], [50, 60, 20]
    logits = lm.model(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
    expected = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(new)]
    assert plain_logprobs(lm, prompt, new) == pytest.approx(expected, abs=1e-5)
    assert plain_logprobs(lm, prompt, []) == []


def test_repetition() -> None:
    assert repetition([1, 2]) is None
    assert repetition([1, 2, 3, 4]) == 0.0
    assert repetition([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repetition([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)
