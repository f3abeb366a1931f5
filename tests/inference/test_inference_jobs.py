"""The generate job, run the way the live worker runs it, on a tiny real model."""

from __future__ import annotations

import threading
import time
from statistics import mean
from typing import Any

import pytest
import torch

from inference import jobs
from inference.models import Generation, Resident, Sweep
from inference.numerics.quality import plain_reading, repetition, zlib_ratio
from inference.numerics.warm import TooLarge, Warm, size_of
from inference.residency import residency
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
    expected = plain_reading(load_lm(rows.model.location), row.policy["prompt_ids"], row.steered["ids"]).logprobs
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


def test_warm_loads_once_whoever_asks() -> None:
    warm, loaded = Warm(lambda: 10), []

    def load() -> str:
        time.sleep(0.01)
        loaded.append(1)
        return "thing"

    threads = [threading.Thread(target=lambda: warm.get("a", load)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [1]
    with pytest.raises(ZeroDivisionError):
        warm.get("b", lambda: 1 // 0)
    assert warm.get("b", lambda: "again") == "again", "what failed to load is tried again"


def test_warm_keeps_within_its_budget_and_drops_the_least_recently_used() -> None:
    """Linear layers of 400 bytes, with room for two and a half of them."""
    warm = Warm(lambda: 1000)

    def names() -> list[str]:
        return [kept.key for kept in warm.held()]

    def load() -> torch.nn.Module:
        seen.append(names())
        return torch.nn.Linear(10, 10, bias=False)

    seen: list[list[str]] = []
    assert size_of(load()) == 400
    seen.clear()
    for key in "abaca":
        warm.get(key, load, name=key, expected=400)
    assert seen == [[], ["a"], ["a"]], "room is made before loading, b being the least recently used when c came"
    assert names() == ["c", "a"] and sum(kept.n_bytes for kept in warm.held()) == 800
    with pytest.raises(TooLarge, match=r"big takes about 1\.20 GB, and the live worker may keep 0\.0 MB in memory"):
        warm.get("big", load, name="big", expected=1_200_000_000)
    assert names() == ["c", "a"], "for what cannot fit nothing is given up"
    warm.get("d", load)  # nobody said how large it is: room is made when it is known
    assert names() == ["a", "d"]
    whole = Warm(lambda: 100)
    whole.get("a", load)
    assert len(whole.held()) == 1, "what was expected to be smaller than it is, is used all the same"


def test_the_pages_say_what_is_warm(rows: Rows, run_job: Any, client_of: Any) -> None:
    row = run(generation(rows, (3, "add", 1.0)), run_job)
    found = residency()
    mine = next(worker for worker in found.workers if any(one.name == rows.sae.name for one in worker.held))
    by_name = {one.name: one for one in mine.held}
    assert by_name["tiny-llama"].n_bytes == size_of(jobs.warm_lm(rows.model)) > 10_000
    assert by_name[rows.sae.name].n_bytes == size_of(jobs.warm_sae(rows.sae)) == 4 * (2 * 32 * 96 + 96 + 32)
    assert mine.budget == jobs.warm_budget() and mine.held[0].name == rows.sae.name, "most recently used first"
    generation(rows).start(rows.owner)
    for url in ("/steering/new/", "/playground/new/"):
        page = client_of("researcher").get(url).content.decode()
        assert "In memory now" in page and "tiny-llama" in page and "0 running, 1 waiting" in page
    Resident.objects.update(started=1.0)
    assert residency().workers == [], "another process has that id now"
    assert row.ready


def test_what_is_larger_than_the_budget_is_refused_with_a_sentence(rows: Rows, run_job: Any, settings: Any) -> None:
    settings.WARM_BYTES = 1000
    rows.model.n_parameters, rows.model.location = 5_000_000, rows.model.location + "/."
    rows.model.save()
    job = run_job(generation(rows).start(rows.owner))
    assert job.error == "tiny-llama takes about 20.0 MB, and the live worker may keep 0.0 MB in memory."
    assert "SAEHUB_WARM_MB" in job.hint


# -- several SAEs, places, words, strengths
def another_sae(rows: Rows, hook: str = "blocks.0.attn.hook_z") -> Any:
    from saes.models import SAE

    sae = SAE.objects.get(pk=rows.sae.pk)
    sae.pk, sae.name, sae.hook_name, sae.layer, sae.path = None, "second", hook, 0, "saes/second"
    sae.save()
    (rows.data / "saes" / "second").symlink_to(rows.sae.files.resolve())
    return sae


def test_two_saes_in_two_layers_steer_one_generation(rows: Rows, run_job: Any) -> None:
    from inference.numerics.generate import generate
    from inference.numerics.steer import Edit, Steering

    other = another_sae(rows)
    row = generation(rows, (3, "add", 30.0))
    row.edits.append({"sae": other.pk, "feature": 3, "mode": "clamp", "value": 20.0})
    row.edits.append({"feature": 9, "mode": "cap", "value": 0.1})
    row.save()
    row = run(row, run_job)
    lm, sae = load_lm(rows.model.location), jobs.warm_sae(rows.sae)
    steering = [
        Steering(sae, rows.sae.hook_name, [Edit(3, "add", 30.0), Edit(9, "cap", 0.1)]),
        Steering(sae, other.hook_name, [Edit(3, "clamp", 20.0)]),
    ]
    assert row.steered["ids"] == generate(lm, PROMPT, steering=steering, max_new_tokens=12).ids
    assert [one["sae"] for one in row.policy["saes"]] == [rows.sae.pk, other.pk]
    x = lm.activations(
        torch.tensor([row.policy["prompt_ids"] + row.steered["ids"]]), [rows.sae.hook_name, other.hook_name]
    )
    n = len(row.policy["prompt_ids"])
    mine, theirs = (sae.encode(x[name][0, n:]).mean(0) for name in (rows.sae.hook_name, other.hook_name))
    expected = [mine[3].item(), theirs[3].item(), mine[9].item()]
    assert row.steered["effects"] == pytest.approx(expected, abs=1e-4), "in the order of the edits"


@pytest.mark.parametrize(("scope", "first"), [("generated", 0), ("not_special", 0), ("from", 3)])
def test_edits_act_where_they_are_asked_to(rows: Rows, run_job: Any, scope: str, first: int) -> None:
    from inference.numerics.generate import generate
    from inference.numerics.steer import Edit, Steering

    row = run(generation(rows, (3, "add", 60.0), scope=scope, scope_from=first), run_job)
    steering = [Steering(jobs.warm_sae(rows.sae), rows.sae.hook_name, [Edit(3, "add", 60.0)], scope, first)]  # type: ignore[arg-type]
    made = generate(load_lm(rows.model.location), PROMPT, steering=steering, max_new_tokens=12)
    assert (row.steered["ids"], row.steered["logprobs"]) == (made.ids, pytest.approx(made.logprobs, abs=1e-5))


def test_the_same_in_words_is_a_third_text(rows: Rows, run_job: Any) -> None:
    from inference.numerics.generate import generate

    row = run(generation(rows, (3, "add", 60.0), instruction="Talk about dogs."), run_job)
    lm = load_lm(rows.model.location)
    made = generate(lm, f"Talk about dogs.\n\n{PROMPT}", max_new_tokens=12)
    assert row.prompted["ids"] == made.ids and row.prompted["zlib_ratio"] == zlib_ratio(made.text)
    expected = plain_reading(lm, row.policy["prompt_ids"], made.ids).logprobs
    assert row.prompted["mean_plain_logprob"] == pytest.approx(mean(expected), abs=1e-5), "given the prompt alone"
    assert run(generation(rows, (3, "add", 1.0)), run_job).prompted == {}


def test_a_strength_that_breaks_the_model_ends_with_a_sentence(rows: Rows, run_job: Any) -> None:
    edits = [(i, "add", 3e38) for i in range(20)]
    row = generation(rows, *edits)
    job = run_job(row.start(rows.owner))
    row.refresh_from_db()
    assert job.state == State.FAILED and job.error.endswith("no longer finite numbers; use smaller steering values.")
    assert row.baseline["text"] and not row.ready, "the baseline is kept"


def test_an_sae_that_is_gone_is_named(rows: Rows, run_job: Any) -> None:
    row = generation(rows, (3, "add", 1.0))
    row.edits[0]["sae"] = 9999
    row.save()
    assert run_job(row.start(rows.owner)).error == "An SAE of these edits is not there any more."


def test_a_sweep_makes_the_generation_at_every_strength(rows: Rows, run_job: Any, client_of: Any) -> None:
    row = run(generation(rows, (3, "add", 60.0), scope="generated"), run_job)
    response = client_of("researcher").post(f"/steering/{row.pk}/sweep/", {"factors": "1, 0 2;0.5 1"})
    made = Sweep.objects.get()
    assert response.url == f"/steering/sweeps/{made.pk}/" and made.factors == [0, 0.5, 1, 2] and made.job.queue == "gpu"
    client_of("viewer").get(response.url)
    job = run_job(made.job)
    assert job.state == State.DONE, job.traceback
    made.refresh_from_db()
    points = {point["factor"]: point for point in made.points}
    assert points[0]["ids"] == row.baseline["ids"] and points[1]["ids"] == row.steered["ids"] != points[0]["ids"]
    assert points[1]["mean_plain_logprob"] == pytest.approx(row.steered["mean_plain_logprob"], abs=1e-5)
    assert points[1]["effect"] == pytest.approx(row.steered["effects"][0], abs=1e-5)
    page = client_of("viewer").get(response.url)
    text = page.content.decode()
    assert text.count("<svg") == 3 and len(page.context["points"]) == 4 and "0.500" in text
    record = client_of("viewer").get(response.url + "?format=json").json()
    assert record["points"] == made.points and record["generation"]["prompt"] == PROMPT
    assert f"/steering/sweeps/{made.pk}/" in client_of("viewer").get(row.get_absolute_url()).content.decode()


@pytest.mark.parametrize(
    ("factors", "sentence"),
    [
        ("", "Give the multiples, such as 0 0.5 1 2."),
        ("1 x", "Give numbers with spaces between, such as 0 0.5 1 2."),
        ("1 nan", "Every multiple must lie between -100 and 100."),
        ("1 1e9", "Every multiple must lie between -100 and 100."),
        ("2 2", "Give from 2 to 16 different multiples, not 1."),
        (" ".join(map(str, range(17))), "Give from 2 to 16 different multiples, not 17."),
    ],
)
def test_bad_strengths(rows: Rows, client_of: Any, factors: str, sentence: str) -> None:
    row = generation(rows, (3, "add", 60.0))
    response = client_of("researcher").post(f"/steering/{row.pk}/sweep/", {"factors": factors})
    assert response.status_code == 422 and sentence in response.content.decode() and not Sweep.objects.exists()


def test_what_has_no_strength_is_not_swept(rows: Rows, client_of: Any) -> None:
    row = generation(rows, (3, "ablate", 0.0))
    response = client_of("researcher").post(f"/steering/{row.pk}/sweep/", {"factors": "0 1"})
    assert response.status_code == 422 and not Sweep.objects.exists()
    assert client_of("viewer").post(f"/steering/{row.pk}/sweep/", {"factors": "0 1"}).status_code == 403
    assert client_of("researcher").get(f"/steering/{row.pk}/sweep/").status_code == 405


# -- quality
def test_plain_logprobs_are_those_of_one_forward_pass(tiny_model_dir: Any) -> None:
    lm = load_lm(tiny_model_dir)
    prompt, new = [0, 20, 30, 40], [50, 60, 20]
    logits = lm.model(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
    expected = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(new)]
    assert plain_reading(lm, prompt, new).logprobs == pytest.approx(expected, abs=1e-5)
    assert plain_reading(lm, prompt, []).logprobs == []


def test_repetition() -> None:
    assert repetition([1, 2]) is None
    assert repetition([1, 2, 3, 4]) == 0.0
    assert repetition([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repetition([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


def test_when_memory_runs_out_it_says_what_fits(rows: Rows, monkeypatch: pytest.MonkeyPatch, run_job: Any) -> None:
    run(generation(rows, (3, "add", 1.0)), run_job)
    assert jobs.MODELS_AND_SAES.held()

    def too_much(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(1 << 55)  # the allocator's own refusal

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "generate_text", too_much)
        row = generation(rows, (3, "add", 1.0))
        job = run_job(row.start(row.owner))
    assert job.state == State.FAILED and job.error.startswith("Memory ran out with a text of up to")
    assert "tiny-llama takes" in job.error and "are free" in job.error and "half as much" in job.hint
    assert not jobs.MODELS_AND_SAES.held(), "what was warm is let go"
    run(generation(rows, (3, "add", 1.0)), run_job)
