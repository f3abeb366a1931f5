"""Files of names: read by each format's rules, previewed, applied whole or not at all, written so that little is lost."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse

from concepts import file_writer, imports, interchange
from concepts.interchange import Facts
from concepts.models import ConceptDictionary, ConceptImport, Label
from tests.sae_rows import a_trained_sae

FILES = Path(__file__).parent / "files"
FACTS = Facts(256, "gemma-2-2b/20-gemmascope-res-16k")
CSV = b"neuron_idx,concept_name,score\n"


# -- preview and import
@pytest.fixture
def dictionary(user_of: Any) -> ConceptDictionary:
    sae = a_trained_sae(neuronpedia_id=FACTS.neuronpedia_id)
    return ConceptDictionary.objects.create(sae=sae, name="kin", owner=user_of("researcher"))


def sent(client: Any, path: str, content: bytes, name: str = "names.csv", **data: Any) -> Any:
    return client.post(path, {"file": SimpleUploadedFile(name, content), "accept": "on"} | data)


def into(dictionary: ConceptDictionary) -> str:
    return reverse("concepts:dictionary_import", args=[dictionary.pk])


def test_what_is_lost_is_said_before(dictionary: ConceptDictionary, client_of: Any) -> None:
    state = {"description": "kin", "members": [[3, 0.5, -1, None], [9, 1.0, 1, 0.5]]}
    dictionary.change({"family": state, "other": {"description": "", "members": [[9, 1.0, 1, 0.1]]}}, None, "made")
    said = {form: " ".join(sentences) for form, _, sentences in imports.losses(dictionary)}
    assert "Weights are left out: 1 row would" in said["csv"] and "Signs are left out: 1 row would" in said["csv"]
    assert "Descriptions are left out: 2 rows" in said["neuronpedia"] and said["jsonl"] == ""
    assert "1 is written for the 1 row without one" in said["mi_crow"] and "one name a feature" not in said["csv"]
    assert "the one with the largest score: 1 would be left out" in said["mi_crow"]
    page = client_of("viewer").get(dictionary.get_absolute_url()).content.decode()
    assert "Weights are left out" in page and "holds all of it" in page
    Label.objects.create(sae=dictionary.sae, feature=3, text="x", by="gpt", score=1)
    assert "Who wrote a name" in {form: " ".join(s) for form, _, s in imports.losses(dictionary.sae)}["csv"]


def test_nothing_happens_before_the_preview_is_confirmed(dictionary: ConceptDictionary, client_of: Any) -> None:
    dictionary.change(
        {"family": {"description": "kin", "members": [[5, 2.0, -1, 0.5], [6, 1.0, 1, 0.9]]}}, dictionary.owner, "before"
    )
    client = client_of("researcher")
    content = CSV + b"5,family,0.8\n6,family,0.9\n7,family,0.1\n999,family,1\n8,<script>alert(1)</script>,1\n"
    response = sent(client, into(dictionary), content, name="../../<b>names.csv")
    row = ConceptImport.objects.get()
    assert response.url == row.get_absolute_url() and row.name == "b>names.csv".join(["<", ""])
    page = client.get(response.url)
    plan, body = page.context["plan"], page.content.decode()
    assert plan.counts == {"added": 2, "changed": 1, "unchanged": 1, "refused": 1}
    assert "score 0.5 → 0.8" in body and "There is no feature 999" in body and "<script>alert" not in body
    assert dictionary.states().keys() == {"family"} and dictionary.revisions.count() == 1
    done = client.post(response.url, {"apply": "1"})
    assert done.url == dictionary.get_absolute_url()
    assert dictionary.states()["family"] == {
        "description": "kin", "members": [[5, 2.0, -1, 0.8], [6, 1.0, 1, 0.9], [7, 1.0, 1, 0.1]],
    }  # fmt: skip
    row.refresh_from_db()
    assert row.ready and row.counts["added"] == 2 and not row.file.exists() and row.form == "csv"
    client.post(response.url, {"apply": "1"})
    assert dictionary.revisions.count() == 2, "it is applied once"
    dictionary.revert(1, None)
    assert dictionary.states()["family"]["members"] == [[5, 2.0, -1, 0.5], [6, 1.0, 1, 0.9]]


def test_an_import_is_its_owners_and_the_dictionarys_owners(dictionary: ConceptDictionary, client_of: Any) -> None:
    for who in ("viewer", "annotator", "stranger"):
        assert sent(client_of(who), into(dictionary), CSV + b"5,x,1\n").status_code == 403
    client = client_of("researcher")
    path = sent(client, into(dictionary), CSV + b"5,x,1\n").url
    from tests.conftest import make_user

    other = client_of("viewer")
    other.force_login(make_user("another", "researcher"), backend="django.contrib.auth.backends.ModelBackend")
    assert other.post(path, {"apply": "1"}).status_code == 403 and other.get(path).status_code == 200
    assert client_of("viewer").post(path, {"apply": "1"}).status_code == 403 and dictionary.states() == {}
    again = sent(client, into(dictionary), CSV + b"6,y,1\n").url
    assert client.get(path).status_code == 404, "a new file takes the place of one that waits"
    folder = ConceptImport.objects.get().folder
    assert client.post(again, {"discard": "1"}).url == dictionary.get_absolute_url()
    assert not ConceptImport.objects.exists() and not folder.exists()


def test_labels_are_imported_and_never_change_a_persons(
    dictionary: ConceptDictionary, client_of: Any, user_of: Any
) -> None:
    sae, client = dictionary.sae, client_of("researcher")
    Label.objects.name_feature(sae, 5, "cats", user_of("annotator"))
    model = Label.objects.create(sae=sae, feature=6, text="old", source="model", by="gpt", score=0.1)
    lines = [
        {"index": 5, "description": "cats", "scores": [{"value": 0.9}]},
        {"index": 5, "description": "felines", "explanationModelName": "gpt", "scores": [{"value": 0.9}]},
        {"index": 6, "description": "old", "explanationModelName": "gpt", "scores": [{"value": 0.6}]},
        {"index": 7, "description": "weak", "explanationModelName": "gpt", "scores": [{"value": 0.2}]},
        {"index": 7, "description": "strong", "explanationModelName": "gpt", "scores": [{"value": 0.8}]},
        {"index": 256, "description": "beyond"},
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    path = sent(client, reverse("concepts:label_import", args=[sae.pk]), content, name="np.jsonl").url
    assert client.get(path).context["plan"].counts == {"added": 3, "changed": 1, "unchanged": 1, "refused": 1}
    assert client.post(path, {"apply": "1"}).url == reverse("concepts:label_files", args=[sae.pk])
    assert Label.objects.accepted_of(sae, range(10)) == {5: "cats", 7: "strong"}
    model.refresh_from_db()
    assert model.score == 0.6 and Label.objects.get(text="felines").source == "model"
    page = client.get(reverse("concepts:label_files", args=[sae.pk])).content.decode()
    assert "np.jsonl" in page and "5 labels" in page
    exported = b"".join(client.get(reverse("concepts:label_export", args=[sae.pk]), {"format": "neuronpedia"}))
    assert [json.loads(line)["description"] for line in exported.splitlines()] == [
        "cats",
        "felines",
        "old",
        "strong",
        "weak",
    ]
    client.post(path, {"undo": "1"})
    model.refresh_from_db()
    assert model.score == 0.1 and Label.objects.count() == 2 and not ConceptImport.objects.exists()


def test_imported_labels_can_stay_proposals(dictionary: ConceptDictionary, client_of: Any) -> None:
    client = client_of("researcher")
    path = reverse("concepts:label_import", args=[dictionary.sae.pk])
    response = client.post(path, {"file": SimpleUploadedFile("a.csv", CSV + b"5,x,1\n")})
    client.post(response.url, {"apply": "1"})
    assert Label.objects.get().accepted is False


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a,b\n", "must be neuron_idx,concept_name,score"),
        (b'{"n_size": 5000, "concepts": {"5": {"name": "x", "score": 1}}}', "for an SAE of 5000 features"),
        (CSV, "There is nothing to apply."),
    ],
)
def test_a_file_without_anything_to_apply_says_so(
    dictionary: ConceptDictionary, client_of: Any, content: bytes, sentence: str
) -> None:
    client = client_of("researcher")
    path = sent(client, into(dictionary), content).url
    assert sentence in client.get(path).content.decode()
    client.post(path, {"apply": "1"})
    assert not dictionary.revisions.exists()


def test_what_is_no_file_is_an_error_at_the_field(dictionary: ConceptDictionary, client_of: Any) -> None:
    client = client_of("researcher")
    assert "Choose a file." in client.post(into(dictionary), {}).content.decode()
    assert "The file is empty." in sent(client, into(dictionary), b"").content.decode()
    unknown = a_trained_sae("unknown", d_sae=None)
    response = client.get(reverse("concepts:label_import", args=[unknown.pk]), follow=True)
    assert "is not known yet" in response.content.decode()


def test_a_file_above_the_limit_is_refused_before_it_is_kept(
    dictionary: ConceptDictionary, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interchange, "MOST_BYTES", 1000)
    response = sent(client_of("researcher"), into(dictionary), CSV + b"5,x,1\n" * 300)
    assert response.status_code == 422 and "Split it." in response.content.decode()
    assert not ConceptImport.objects.exists()


def test_a_long_import_goes_on_as_a_job(
    dictionary: ConceptDictionary, client_of: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(imports, "APPLY_AT_ONCE", 2)
    client = client_of("researcher")
    path = sent(client, into(dictionary), CSV + b"5,x,1\n6,x,1\n7,y,1\n").url
    assert "goes on as a job" in client.get(path).content.decode()
    assert client.post(path, {"apply": "1"}).url == path
    row = ConceptImport.objects.get()
    assert row.job.kind == "import_concepts" and 'hx-trigger="every 3s' in client.get(path).content.decode()
    client.post(path, {"apply": "1"})
    assert ConceptImport.objects.get().job_id == row.job_id, "one job does it"
    job = run_job(row.job)
    assert job.state == "done" and job.result == {
        "import": row.pk,
        "added": 3,
        "changed": 0,
        "unchanged": 0,
        "refused": 0,
    }
    assert len(dictionary.states()) == 2 and "Applied" in client.get(path).content.decode()


def test_a_long_file_is_looked_at_by_a_job_and_shown_from_what_it_found(
    dictionary: ConceptDictionary, client_of: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "LOOK_AT_ONCE", 100)
    client = client_of("researcher")
    dictionary.change({"x": {"description": "", "members": [[6, 1.0, 1, 0.5]]}}, dictionary.owner, "before")
    content = CSV + b"5,x,1\n6,x,1\n7,y,1\n999,far,1\n" + b"5,x,1\n" * 12
    path = sent(client, into(dictionary), content).url
    row = ConceptImport.objects.get()
    assert row.job.kind == "look_concepts" and row.looking
    page = client.get(path).content.decode()
    assert "a job looks through it" in page and "What it would do</h2>" not in page and "every 3s" in page
    assert client.post(path, {"apply": "1"}, follow=True).context["row"].job_id == row.job_id, "not before it is seen"
    job = run_job(row.job)
    counts = {"added": 2, "changed": 1, "unchanged": 0, "refused": 13}
    assert job.state == "done" and job.result == {"import": row.pk, **counts}
    row.refresh_from_db()
    fresh, page = imports.plan(row), client.get(path)
    seen = page.context["plan"]
    assert (seen.form, seen.counts, seen.added, seen.changed, seen.refused) == (
        (fresh.form, fresh.counts, fresh.added, fresh.changed, fresh.refused)
    )
    assert seen.counts == counts and "it is compared again when it is applied" in page.content.decode()
    assert client.post(path, {"apply": "1"}).url == path
    row.refresh_from_db()
    assert row.job.kind == "import_concepts" and run_job(row.job).state == "done"
    row.refresh_from_db()
    assert row.ready and row.counts == counts and row.look is None and set(dictionary.states()) == {"x", "y"}


def test_a_long_file_that_cannot_be_read_says_so_where_it_would_be_shown(
    dictionary: ConceptDictionary, client_of: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "LOOK_AT_ONCE", 1000)
    monkeypatch.setattr("concepts.file_reader.MOST_ROWS", 20)
    client = client_of("researcher")
    path = sent(client, into(dictionary), gzip.compress(CSV + b"5,x,1\n" * 21), "names.csv.gz").url
    row = ConceptImport.objects.get()
    assert row.looking, "gzipped files are longer than they look"
    assert run_job(row.job).state == "done"
    page = client.get(path).content.decode()
    assert "The file has more than 20 rows; split it." in page and "Nothing was changed." in page and "discard" in page
    sent(client, into(dictionary), CSV + b"5,x,1\n" * 300)
    stopped = ConceptImport.objects.get()
    assert stopped.pk != row.pk, "a new file takes its place"
    stopped.job.cancel()
    page = client.get(stopped.get_absolute_url()).content.decode()
    assert "not looked at to its end; send it again" in page and "discard" in page
    client.post(stopped.get_absolute_url(), {"discard": "1"})
    assert not ConceptImport.objects.exists()


def test_a_failed_apply_changes_nothing(
    dictionary: ConceptDictionary, user_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = imports.keep(SimpleUploadedFile("a.csv", CSV + b"5,x,1\n"), user_of("researcher"), dictionary.sae, dictionary)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(ConceptImport, "finish", full)
    with pytest.raises(OSError):
        imports.apply(row, user_of("researcher"))
    row.refresh_from_db()
    assert not row.ready and row.file.exists() and dictionary.states() == {} and not dictionary.revisions.exists()


def test_a_file_that_cannot_be_kept_leaves_nothing_and_the_one_that_waits_stays(
    dictionary: ConceptDictionary, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of("researcher")
    sent(client, into(dictionary), CSV + b"5,x,1\n")
    waiting = ConceptImport.objects.get()
    there = set(waiting.folder.parent.iterdir())

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("os.rename", full)
        sent(client, into(dictionary), CSV + b"7,y,1\n")
    assert ConceptImport.objects.get() == waiting and waiting.file.exists()
    assert set(waiting.folder.parent.iterdir()) == there


@pytest.mark.parametrize("form", interchange.FORMATS)
def test_a_dictionary_goes_out_and_comes_back(dictionary: ConceptDictionary, client_of: Any, form: str) -> None:
    states = {
        "family": {"description": "", "members": [[3, 1.0, 1, 0.9], [17, 1.0, 1, 0.2]]},
        "-1": {"description": "", "members": [[9, 1.0, 1, 0.5]]},
    }
    dictionary.change(states, dictionary.owner, "made")
    client = client_of("researcher")
    response = client.get(reverse("concepts:dictionary_export", args=[dictionary.pk]), {"format": form})
    assert response["Content-Disposition"].startswith(f'attachment; filename="dictionary-{dictionary.pk}.')
    content = b"".join(response)
    other = ConceptDictionary.objects.create(sae=dictionary.sae, name="other", owner=dictionary.owner)
    client.post(sent(client, into(other), content).url, {"apply": "1"})
    assert other.states() == states
    assert client_of("stranger").get(response.request["PATH_INFO"]).status_code == 403
    assert client.get(reverse("concepts:dictionary_export", args=[dictionary.pk]), {"format": "exe"}).status_code == 404


def test_confidence_and_notes_of_labels_go_out_and_come_back(user_of: Any) -> None:
    sae, other = a_trained_sae(), a_trained_sae("other")
    Label.objects.name_feature(sae, 3, "cats", user_of("annotator"), confidence=0.75, notes="two\nlines")
    told = file_writer.losses("csv", imports._held_by_labels(sae))
    assert any("Confidence and notes are left out: 1 row" in sentence for sentence in told)
    row = kept(user_of("researcher"), other, "".join(imports.export("jsonl", sae)).encode())
    assert imports.apply(row, user_of("researcher"))["added"] == 1
    label = Label.objects.get(sae=other)
    assert (label.text, label.confidence, label.notes) == ("cats", 0.75, "two\nlines")
    better = b'{"feature": 3, "name": "cats", "confidence": 0.5, "notes": "one"}\n{"feature": 4, "name": "x", "confidence": 2}'
    row = kept(user_of("researcher"), other, better)
    plan = imports.plan(row)
    assert [one.words for one in plan.changed] == ["confidence 0.75 → 0.5, notes"]
    assert plan.refused[0].reason == "The confidence is 2; it must lie between 0 and 1."
    imports.apply(row, user_of("researcher"))
    label.refresh_from_db()
    assert (label.confidence, label.notes) == (0.5, "one")
    imports.undo_labels(row)
    label.refresh_from_db()
    assert (label.confidence, label.notes) == (0.75, "two\nlines"), "what was there returns"


def kept(user: Any, sae: Any, content: bytes) -> ConceptImport:
    return imports.keep(SimpleUploadedFile("labels.jsonl", content), user, sae, None)
