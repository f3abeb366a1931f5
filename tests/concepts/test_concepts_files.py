"""Files of labels and concepts: every shape that is read, the rows that are refused, and what each format loses."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from concepts.file_reader import read
from concepts.file_writer import Held, losses, write
from concepts.interchange import Entry, Facts, FileRefused, Refused

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


def test_notes_may_hold_ends_of_lines_that_json_does_not_know() -> None:
    line = json.dumps({"feature": 5, "name": "family", "notes": "one\u2028two"}, ensure_ascii=False)
    [row] = rows(line.encode())
    assert isinstance(row, Entry) and row.notes == "one\u2028two"


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


def test_no_cell_of_a_csv_is_a_formula() -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'=1", "''+1", "plain", "'quoted'", "a=1"]
    written = "".join(write("csv", [Entry(0, i, text, 1.0) for i, text in enumerate(texts)], FACTS))
    cells = [row[1] for row in csv.reader(io.StringIO(written))][1:]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"] and cells[7:] == texts[7:]
    assert [e[1] for e in held(written)] == [" ".join(text.split()) for text in texts]
