"""How figures are written: plain functions, the filters on top of them, token text."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import numpy as np
import pytest
from django.template import Context, Engine

from saehub import figures


def render(source: str, **context: object) -> str:
    engine = Engine(builtins=["saehub.figures"])
    return engine.from_string(source).render(Context(context))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (4608, "4,608"), (9999, "9,999"), (12_345, "12.3k"), (99_950, "100k"), (999_950, "1.00M"),
        (1_460_000, "1.46M"), (-12_345, "−12.3k"), (2.5e9, "2.50G"), (0.5, "0.5"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_count(value: float, text: str) -> None:
    assert figures.count_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (512, "512 B"), (21_300_000, "21.3 MB"), (1_830_000_000, "1.83 GB"), (999_999, "1.00 MB")],
)
def test_bytes(value: float, text: str) -> None:
    assert figures.bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.22441, 3, "0.224"), (18.42, 3, "18.4"), (1.0, 3, "1.00"), (9.996, 3, "10.0"), (0.9996, 3, "1.00"),
        (6.1e-4, 3, "6.1e-4"), (-6.1e-4, 3, "−6.1e-4"), (20312.4, 3, "20,312"), (-0.8812, 2, "−0.88"), (0.0, 3, "0"),
        (32, 3, "32"), (np.int64(61), 4, "61"), (1e12, 3, "1e12"),
    ],
)  # fmt: skip
def test_significant_digits(value: float, digits: int, text: str) -> None:
    assert figures.fig_text(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 %"), (1, "100 %"), (0.73, "73 %"), (0.0131, "1.3 %"), (0.0042, "0.42 %"), (0.0999, "10 %"),
        (0.9996, "99.96 %"), (0.99999, "99.99 %"), (1e-5, "0.0010 %"), (-0.25, "−25 %"),
    ],
)  # fmt: skip
def test_percent_reaches_100_only_at_the_whole(value: float, text: str) -> None:
    assert figures.percent_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.24, "240 ms"), (3.2, "3.2 s"), (5, "5 s"), (9.97, "10 s"), (44, "44 s"), (59.7, "1 min"),
        (200, "3 min 20 s"), (7512, "2 h 5 min"), (3600, "1 h"), (273_600, "3 d 4 h"), (-44, "−44 s"),
        (timedelta(minutes=3), "3 min"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert figures.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12_412.7, "tokens", "12.4k tokens/s"), (31.2e6, "bytes", "31.2 MB/s"), (0.052, "steps", "3.1 steps/min"),
        (3.24, "steps", "3.24 steps/s"), (None, "steps", "–"),
    ],
)  # fmt: skip
def test_rate(value: float | None, unit: str, text: str) -> None:
    assert figures.rate_text(value, unit) == text


def test_amount_counts_whole_things_exactly() -> None:
    assert figures.amount_text(714, "steps") == "714 steps"
    assert figures.amount_text(1_460_000, "tokens") == "1.46M tokens"
    assert figures.amount_text(1.2e9, "bytes") == "1.20 GB"


def test_what_is_not_known_is_a_dash_and_not_a_zero() -> None:
    texts = (figures.count_text, figures.bytes_text, figures.fig_text, figures.percent_text, figures.duration_text)
    for text in (*texts, figures.signed_text, figures.exact_text):
        assert {text(value) for value in (None, "", float("nan"))} == {"–"}


def test_filters_give_the_exact_value_where_rounding_hid_something() -> None:
    assert render("{{ n|count }}", n=12_345) == '<data value="12345" title="12,345">12.3k</data>'
    assert render("{{ n|count }}", n=4608) == "4,608"
    assert render("{{ n|percent }}", n=0.00421) == '<data value="0.00421" title="0.421 %">0.42 %</data>'
    assert render("{{ n|signed }}", n=np.float32(1.5)) == '<data value="1.5" title="1.5">+1.50</data>'
    assert render("{{ n|count|striptags }} {{ n|exact }}", n=12_345) == "12.3k 12,345"
    assert render("{{ nowhere|fig }}{{ nowhere|ago }}{{ nowhere|duration }}") == "–––"


def test_times_are_relative_with_the_absolute_beside() -> None:
    now = datetime(2026, 11, 22, 0, 26, 41, tzinfo=UTC)
    for seconds, text in (
        (0.4, "just now"),
        (44, "44 s ago"),
        (250, "4 min ago"),
        (90_000, "1 d ago"),
        (-7300, "in 2 h"),
    ):
        assert figures.ago_text(now - timedelta(seconds=seconds), now) == text
    shown = render("{{ at|moment }}", at=now)
    assert 'datetime="2026-11-22T00:26:41+00:00"' in shown and "22 Nov 2026, 00:26<" in shown


def test_chip_has_a_word_beside_its_colour() -> None:
    assert render("{{ state|chip }}", state="failed") == '<span class="chip bad">failed</span>'
    assert render("{{ state|chip:word }}", state="running", word="<b>") == '<span class="chip run">&lt;b&gt;</span>'


# -- token text
class Spans(HTMLParser):
    """Text and highlighted spans of a piece of token text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.spans, self.tags = "", [], set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "span":
            self.spans.append({key: value or "" for key, value in attrs})

    def handle_data(self, data: str) -> None:
        self.text += data


def test_token_spans_keep_the_text_and_mark_what_is_active() -> None:
    tokens = ["If", " the", " <b>", "Error", "&", " is"]
    found = Spans(figures.token_spans(tokens, [0, 0.2, 0, 18.4, 0, -9.2], 18.4, peak=3))
    assert found.text == "".join(tokens) and found.tags == {"span"}
    assert [span["class"] for span in found.spans] == ["t a2", "t a20 peak", "t a14 neg"]
    assert [span["data-v"] for span in found.spans] == ["0.200", "18.4", "−9.20"]
    assert [span["tabindex"] for span in found.spans] == ["-1", "0", "-1"]


def test_whitespace_bytes_and_direction_marks_are_visible_and_text_stays_text() -> None:
    shown = figures.token_markup("a\n\tb<0xE2>\u202ec\r<")
    assert Spans(shown).text == "a\n\tbE2202Ec0D<"
    assert re.findall(r'<i class="(\w+)"', shown) == ["nl", "tab", "byte", "byte", "byte"]
    assert "style=" not in shown
    assert render("{{ t|token }}", t=" raised ") == '<code class="tok" dir="auto">␣raised␣</code>'
    assert "␣␣<" in render("{{ t|token }}", t="  ")
    assert "⍽␣<" in render("{{ t|token }}", t="\xa0 "), "a no-break space can be seen"


def test_levels_follow_the_square_root_and_end_at_the_scale() -> None:
    shares = np.linspace(0.001, 1, 200)
    levels = [figures.level(share, 1) for share in shares]
    assert levels == sorted(levels) and (levels[0], levels[-1]) == (1, figures.LEVELS)
    assert figures.level(0.25, 1) == figures.LEVELS / 2
    assert figures.level(99, 1) == figures.LEVELS and figures.level(1, 0) == figures.LEVELS


def test_every_level_has_its_rule_in_the_style_sheet() -> None:
    css = (figures.__file__.rsplit("/", 2)[0]) + "/static/css/pages.css"
    with open(css, encoding="utf-8") as file:
        rules = set(re.findall(r"\.(a\d+) \{ --s", file.read()))
    assert rules == {f"a{step}" for step in range(1, figures.LEVELS + 1)}


def test_a_silent_peak_and_special_tokens() -> None:
    shown = figures.token_spans(["<bos>", "x"], np.zeros(2, np.float32), 1.0, peak=1, special=np.array([True, False]))
    assert shown.startswith('<i class="ctl">&lt;bos&gt;</i><span class="t peak" data-v="0"')


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens, 3 activations"):
        figures.token_spans(["a", "b"], [1, 2, 3], 1)


def test_template_tags() -> None:
    shown = render("{% token_text t a 2 1 %}{% token_legend 2.0 True %}", t=["a", "b"], a=[0, 2])
    assert shown.startswith('<span class="tokens " dir="auto">a<span class="t a20 peak"')
    assert re.findall(r">([^<>]+)</span>", shown)[-5:] == ["−2.00", "−1.00", "0", "1.00", "2.00"]
