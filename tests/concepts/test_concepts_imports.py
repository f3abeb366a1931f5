"""Files of names: read by each format's rules, previewed, applied whole or not at all, written so that little is lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse

from concepts import file_writer, imports, interchange
from concepts.file_reader import read
from concepts.file_writer import Held, losses, write
from concepts.interchange import Entry, Facts, FileRefused, Refused
from concepts.models import ConceptDictionary, ConceptImport, Label
from tests.sae_rows import a_trained_sae

FILES = Path(__file__).parent / "files"
FACTS = Facts(256, "gemma-2-2b/20-gemmascope-res-16k")
CSV = b"neuron_idx,concept_name,score\n"


def rows(content: bytes, facts: Facts = FACTS) -> list[Entry | Refused]:
    return list(read(io.BytesIO(content), facts)[1])


def names(content: bytes) -> list[tuple[int, str, float | None]]:
    found = rows(content)
    assert not [row for row in found if isinstance(row, Refused)], found
    return [(row.feature, row.name, row.score) for row in found if isinstance(row, Entry)]


# -- reading
def test_a_file_that_mi_crow_wrote() -> None:
    content = (FILES / "mi_crow_concepts.json").read_bytes()
    assert read(io.BytesIO(content), Facts(96))[0] == "mi_crow"
    found = rows(content, Facts(96))
    assert [(e.feature, e.name, e.score) for e in found if isinstance(e, Entry)] == [
        (0, "family", 0.9), (3, 'żółć, "quoted"', 0.25), (95, "=SUM(A1)", 1.0),
    ]  # fmt: skip
    with pytest.raises(FileRefused, match="for an SAE of 96 features; this one has 256"):
        rows(content)


def test_the_three_shapes_of_mi_crow_and_csv_say_the_same() -> None:
    expected = [(5, "family", 0.9), (7, "tools", 0.5)]
    whole = {"n_size": 256, "concepts": {"5": {"name": "family", "score": 0.9}, "7": {"name": "tools", "score": 0.5}}}
    lists = {
        "5": [{"name": "family", "score": 0.9}, {"name": "kin", "score": 0.1}],
        "7": [{"name": "tools", "score": 0.5}],
    }
    for shape in (whole, whole["concepts"]):
        for indent in (None, 2):
            assert names(json.dumps(shape, indent=indent).encode()) == expected
    assert names(json.dumps(lists).encode()) == [expected[0], (5, "kin", 0.1), expected[1]], "none of a list is dropped"
    assert names(json.dumps({"concepts": lists}).encode())[0] == expected[0]
    assert names(CSV + b"5,family,0.9\r\n7,tools,0.5\r\n") == expected
    assert names("\ufeff".encode() + gzip.decompress(gzip.compress(CSV + b"\n5,family,0.9\n7,tools,.5"))) == expected
    assert names(gzip.compress(CSV + b"5,family,0.9\n7,tools,0.5\n")) == expected


def test_explanations_of_neuronpedia() -> None:
    one = {
        "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "5", "description": " references to\nfamily ",
        "explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair", "scores": [{"value": 0.4}, {"value": 0.7}],
        "embedding": [0.1] * 256,
    }  # fmt: skip
    two = {"index": 7, "description": "tools"}
    other = one | {"modelId": "gpt2-small"}
    for content in (json.dumps([one, two, other], indent=1), "\n".join(map(json.dumps, [one, two, other]))):
        form, found = read(io.BytesIO(content.encode()), FACTS)
        first, second, third = found
        assert form == "neuronpedia" and isinstance(first, Entry) and isinstance(second, Entry)
        assert (first.feature, first.name, first.score) == (5, "references to family", 0.7)
        assert (first.by, first.method) == ("gpt-4o-mini", "oai_token-act-pair")
        assert (second.feature, second.name, second.score, second.by) == (7, "tools", None, "")
        assert (
            isinstance(third, Refused)
            and "of gpt2-small/20-gemmascope-res-16k, and this SAE is gemma-2-2b" in third.reason
        )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"256,x,1", "There is no feature 256; this SAE has features 0 to 255."),
        (b"-1,x,1", "There is no feature -1"),
        (b"1_0,x,1", "is not the number of a feature"),
        (b"5.0,x,1", "is not the number of a feature"),
        ("٣,x,1".encode(), "is not the number of a feature"),
        (b"99999999999999999999,x,1", "is not the number of a feature"),
        (b"../../etc/passwd,x,1", "is not the number of a feature"),
        (b",x,1", "It does not say which feature."),
        (b"5,,1", "It has no name."),
        (b"5,  ,1", "It has no name."),
        (b"5,x,nan", "The score is nan; it must be a finite number."),
        (b"5,x,1e400", "The score is 1e400; it must be a finite number."),
        (b"5,x,high", 'The score "high" is not a number.'),
        (b"5,x", "It has 2 columns, not 3."),
        (b"5,x,1,2", "It has 4 columns, not 3."),
        (b"5,a\xffb,1", "The name is not UTF-8 text: it has the byte 0xff."),
        (b"5,a\x00b,1", "The name holds the character U+0000, which cannot be shown."),
        (b"5," + b"x" * 10_000 + b",1", "The name has 10,000 characters; at most 500 are kept."),
        (b"5," + b"x" * 200_000 + b",1", "It cannot be read as CSV (field larger than field limit (131072))."),
        (b"1,first,1", "It names feature 1 as row 2 does."),
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_the_others_go_on(row: bytes, reason: str) -> None:
    found = rows(CSV + b"1,first,1\n\n" + row + b"\n2,last,1\n")
    assert [e.name for e in found if isinstance(e, Entry)] == ["first", "last"]
    refused = [e for e in found if isinstance(e, Refused)]
    assert len(refused) == 1 and refused[0].row == 4 and reason in refused[0].reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nope", "The line is not a JSON object."),
        (b"[1]", "The line is not a JSON object."),
        (b"[" * 100_000, "The line is not a JSON object."),
        (b'{"feature": true, "name": "x"}', "is not the number of a feature"),
        (b'{"feature": 5, "name": 7}', "It has no name."),
        (b'{"feature": 5, "name": "x", "sign": 2}', "The sign must be 1 or -1."),
        (b'{"feature": 5, "name": "x", "sign": true}', "The sign must be 1 or -1."),
        (b'{"feature": 5, "name": "x", "weight": -1}', "The weight is negative"),
        (b'{"feature": 5, "name": "x", "score": NaN}', "The score is nan"),
        (b'{"feature": 5, "name": "x", "score": [1]}', "is not a number"),
        (b'{"feature": 5, "name": "\\ud800"}', "U+D800, which cannot be shown"),
        (b'{"feature": 5, "name": "a\xff"}', "not UTF-8 text"),
        (b'{"feature": 5, "name": "' + b"x" * 3_000_000 + b'"}', "The line is longer than a record may be"),
    ],
)
def test_a_bad_line_of_json_is_refused_alone(line: bytes, reason: str) -> None:
    found = rows(b'{"feature": 1, "name": "first"}\n\n' + line + b'\n{"feature": 2, "name": "last"}')
    assert [e.name for e in found if isinstance(e, Entry)] == ["first", "last"]
    refused = [e for e in found if isinstance(e, Refused)]
    assert len(refused) == 1 and refused[0].row == 3 and reason in refused[0].reason


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "The file is empty."),
        (b" \n\n", "The file is empty."),
        (b"neuron_idx,concept_name,confidence\n1,x,1\n", "must be neuron_idx,concept_name,score; here it is"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "must be neuron_idx,concept_name,score"),
        ("neuron_idx,concept_name,score\n1,x,1\n".encode("utf-16"), "The file is UTF-16 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{\n", "The file is not JSON"),
        (b'{"0": {"name": "a", "score": 1},\n "0": {"name": "b", "score": 2}}', 'the key "0" is there twice'),
        (b'{"n_size": 5000, "concepts": {}}', "The dictionary is for an SAE of 5000 features; this one has 256."),
        (b'{"n_size": 256,\n "concepts": [1]}', "must map features to concepts"),
        (b'{"5": {"name": "a\xff",\n "score": 1}}', "not UTF-8 text: line 1 has a broken byte"),
        (gzip.compress(CSV * 10, mtime=0)[:-9], "The file is not whole gzip"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(FileRefused) as refusal:
        rows(content)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


def test_a_file_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concepts.file_reader.MOST_BYTES", 3 * 2**20)
    with pytest.raises(FileRefused, match="The file holds more than 3 MB; split it"):
        rows(gzip.compress(CSV + bytes(8 * 2**20), mtime=0))


def test_too_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concepts.file_reader.MOST_ROWS", 2000)
    content = CSV + b"".join(b"%d,name %d,1\n" % (i % 256, i) for i in range(2001))
    with pytest.raises(FileRefused, match="more than 2,000 rows"):
        rows(content)


# -- writing
FULL = [
    Entry(0, 0, "family", 0.9, 1.0, 1, "kin"),
    Entry(0, 0, "=cmd|' /C calc'!A0", 0.5, 1.0, 1, ""),
    Entry(0, 3, 'żółć, "quoted"\u202e', None, 0.5, -1, ""),
    Entry(0, 9, "'=not a formula", 0.25, 1.0, 1, "", "gpt-4o-mini", "np_max-act"),
]


def held(content: str, facts: Facts = FACTS) -> list[tuple[Any, ...]]:
    found = rows(content.encode(), facts)
    return [(e.feature, e.name, e.score, e.weight, e.sign, e.by, e.method) for e in found if isinstance(e, Entry)]


def test_our_own_lines_lose_nothing() -> None:
    assert held("".join(write("jsonl", FULL, FACTS))) == [
        (e.feature, e.name, e.score, e.weight, e.sign, e.by, e.method) for e in FULL
    ]
    assert losses("jsonl", Held(1, 1, 1, 1, 1, 1)) == []


def test_each_format_loses_only_what_it_says() -> None:
    assert [e[:2] for e in held("".join(write("csv", FULL, FACTS)))] == [(e.feature, e.name) for e in FULL]
    assert [e[:2] for e in held("".join(write("mi_crow_lists", FULL, FACTS)))] == [(e.feature, e.name) for e in FULL]
    assert [e[:2] for e in held("".join(write("mi_crow", FULL, FACTS)))] == [
        (0, "family"),
        *((e.feature, e.name) for e in FULL[2:]),
    ]
    explained = held("".join(write("neuronpedia", FULL, FACTS)))
    assert [(*e[:3], *e[5:]) for e in explained] == [(e.feature, e.name, e.score, e.by, e.method) for e in FULL]


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


def test_no_cell_of_a_csv_is_a_formula() -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'=1", "''+1", "plain", "'quoted'", "a=1"]
    written = "".join(write("csv", [Entry(0, i, text, 1.0) for i, text in enumerate(texts)], FACTS))
    cells = [row[1] for row in csv.reader(io.StringIO(written))][1:]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"] and cells[7:] == texts[7:]
    assert [e[1] for e in held(written)] == [" ".join(text.split()) for text in texts]


# -- preview and import
@pytest.fixture
def dictionary(user_of: Any) -> ConceptDictionary:
    sae = a_trained_sae(neuronpedia_id=FACTS.neuronpedia_id)
    return ConceptDictionary.objects.create(sae=sae, name="kin", owner=user_of("researcher"))


def sent(client: Any, path: str, content: bytes, name: str = "names.csv", **data: Any) -> Any:
    return client.post(path, {"file": SimpleUploadedFile(name, content), "accept": "on"} | data)


def into(dictionary: ConceptDictionary) -> str:
    return reverse("concepts:dictionary_import", args=[dictionary.pk])


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
    from concepts import import_views

    monkeypatch.setattr(import_views, "AT_ONCE", 2)
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
