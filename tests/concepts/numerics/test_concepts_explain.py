"""Names by a language model: what it is asked, what it answers, and which texts the names are tested on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concepts import featurefile
from concepts.numerics.explain import ExplainError, Namer, Silent, auroc, explain
from concepts.numerics.explain_prompts import cleaned, marked, name_turns, plain, tell_turns
from concepts.numerics.token_text import joined
from tests.tiny_models import RESID, build_reader, tiny_lm

TEXTS = ["the cat «sat» on", "a dog «slept» by the door", "Rome is that of «Italy»"]


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama that reads long questions."""
    from saes.numerics.lm import load_lm

    return load_lm(build_reader(tmp_path_factory.mktemp("reader") / "reader"))


def test_marks_go_around_runs_of_strong_tokens() -> None:
    tokens = ["The", " city", " of", " light", " is", " Par", "is"]
    assert marked(tokens, [0, 0, 0, 2, 0, 4, 10]) == "The city of light is «Paris»"
    assert marked(tokens, [0, 0, 0, 4, 0, 4, 10]) == "The city of «light» is «Paris»"
    assert marked(tokens, [0.0] * 7) == "The city of light is Paris"
    assert marked([], []) == ""


def test_a_question_ends_where_the_answer_begins() -> None:
    asked = plain(name_turns(TEXTS), "In common")
    assert asked.endswith("- Rome is that of «Italy»\nIn common:") and asked.count("\nIn common: ") == 3
    told = plain(tell_turns("verbs", "the cat\n\nsat"), "Answer")
    assert told.endswith("Description: verbs\nText: the cat sat\nAnswer:")
    assert (told.count("\nAnswer: Yes"), told.count("\nAnswer: No")) == (2, 2)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (" names of cities.\nDescription: other", "names of cities"),
        ("- “capital cities”", "capital cities"),
        ("1. capital cities", "capital cities"),
        ("1999 and 2.5", "1999 and 2.5"),
        ('the word "return"', 'the word "return"'),
        ("cafe\u0301s", "cafés"),
        ("  \n ", ""),
        ("... 12", ""),
        ("words between « and »", ""),
        ("One part of a language model is active on", ""),
        ("x" * 121, ""),
        ("a\x00b", ""),
    ],
)
def test_what_is_taken_as_a_name(written: str, name: str) -> None:
    assert cleaned(written) == name


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 9).astype(float), rng.integers(0, 6, 7).astype(float)
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(a, b)]
    assert auroc(a, b) == pytest.approx(np.mean(pairs)) and auroc(b, a) == pytest.approx(1 - np.mean(pairs))
    assert (auroc(np.array([2.0]), np.array([1.0])), auroc(np.array([1.0]), np.array([1.0]))) == (1.0, 0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_answers_are_those_of_the_whole_question_read_at_once(kind: str, tiny_model_dir: Path) -> None:
    """Whatever cache the architecture keeps: GPT-2's, or Gemma 3's with layers that see a window of 8 tokens."""
    lm = tiny_lm(kind, tiny_model_dir)
    if kind == "gpt2":  # learned positions
        lm.model.transformer.wpe = torch.nn.Embedding(2048, 32).requires_grad_(False)
    lm.max_context = 2048
    namer, texts = Namer(lm), ["the cat sat", "Paris is the capital of France", "42"]
    told = namer.tell("cities", texts)
    for text, found in zip(texts, told, strict=True):
        asked = plain(tell_turns("cities", text), "Answer")
        yes, no = (lm.tokenizer(asked + word)["input_ids"] for word in (" Yes", " No"))
        same = next(i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b)
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([yes[:same]]), use_cache=False).logits[0, -1]
        log_p = logits.log_softmax(0)
        assert found == pytest.approx(float(log_p[yes[same]] - log_p[no[same]]), abs=2e-4)
    assert np.ptp(told) > 1e-3, "the texts make a difference"


def test_a_name_is_what_the_model_writes_by_itself(reader: Any) -> None:
    asked = reader.tokenizer(plain(name_turns(TEXTS), "In common"), return_tensors="pt")
    with torch.no_grad():
        made = reader.model.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert Namer(reader).name(TEXTS) == cleaned(reader.tokenizer.decode(made, skip_special_tokens=True))


def test_a_model_that_reads_too_little_says_so(llama: Any) -> None:
    with pytest.raises(ExplainError, match=r"reads at most 256 tokens, and the question has \d"):
        Namer(llama).name(TEXTS)


def test_silent_texts_are_those_on_which_the_feature_does_not_fire(
    sae: Any, small_capture: Any, view_dir: Path, llama: Any
) -> None:
    """Each window found again in the capture, encoded plainly."""
    columns = featurefile.open_view(view_dir)
    features = list(range(96))
    found = Silent(small_capture, RESID, sae, features, columns)
    fires: dict[str, set[int]] = {}
    for x, context, position in small_capture.rows(RESID):
        acts = sae.encode(x) > 0
        tokens = small_capture.contexts()
        for c in np.unique(context):
            ids = tokens[c][~np.isin(tokens[c], columns.facts["special_ids"])]
            text = joined(columns.token_texts(ids))
            fires.setdefault(text, set()).update(acts[context == c].any(0).nonzero().flatten().tolist())
        assert len(position)
    assert len(found.texts) > 20 and set(found.texts) <= set(fires)
    some = 0
    for feature in features:
        silent = found.texts_without(feature, 10)
        assert len(silent) == len(set(silent)) or len(set(found.texts)) < len(found.texts)
        assert all(feature not in fires[text] for text in silent)
        some += bool(silent)
    assert some > 40


def test_every_feature_gets_its_name_and_score(sae: Any, small_capture: Any, view_dir: Path, reader: Any) -> None:
    columns = featurefile.open_view(view_dir)
    features = [int(i) for i in columns.sorted("n_fires")[[0, 40]]] + [int(columns.sorted("n_fires")[-1])]
    silent = Silent(small_capture, RESID, sae, features, columns)
    asked: list[int] = []
    said = list(explain(Namer(reader), columns, features, silent, n_tested=4, report=lambda: asked.append(1)))
    assert [one.feature for one in said] == features and len(asked) >= 3
    for one in said:
        record = columns.feature(one.feature)
        assert bool(record.top) or one.fault == "It never fired."
        if one.score is not None:
            assert one.text and 0 <= one.score <= 1 and 2 <= one.n_active <= 4 and 2 <= one.n_silent <= 4
        else:
            assert one.fault
    again = list(
        explain(Namer(reader), columns, features, Silent(small_capture, RESID, sae, features, columns), n_tested=4)
    )
    assert again == said
    untested = list(explain(Namer(reader), columns, features, None))
    assert [(one.text, one.score) for one in untested] == [(one.text, None) for one in said]
