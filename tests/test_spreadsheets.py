"""Cells that a spreadsheet would compute."""

import pytest

from saehub.spreadsheets import as_written, csv_lines, neutralised


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\t=1", "\rx", " =1", "'=1", "''@x"])
def test_what_begins_like_a_formula_gets_an_apostrophe_that_comes_off_again(text: str) -> None:
    assert neutralised(text) == f"'{text}"
    assert as_written(neutralised(text)) == text


@pytest.mark.parametrize("text", ["a=1", "", " ", "'", "'tis", "3-1"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert neutralised(text) == text and as_written(text) == text


def test_lines_are_those_of_the_csv_module_and_made_one_at_a_time() -> None:
    rows = iter([(1, 'a "word", or two', None), (2, "a\nline", 0.5)])
    lines = csv_lines(("id", "text", "value"), rows)
    assert next(lines) == "id,text,value\r\n"
    assert next(lines) == '1,"a ""word"", or two",\r\n'
    assert next(rows) == (2, "a\nline", 0.5), "nothing is read ahead"
