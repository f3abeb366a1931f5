"""How figures, times and tokens are written on every page: a template library, loaded everywhere as a builtin.

Every filter has a plain function of the same wording behind it (`count_text`, `bytes_text`, ...), for messages, log
lines and chart labels. The filters add the exact value in a title wherever rounding hid something, so they are for
element content; in an attribute or a <title> write `{{ n|count|striptags }}` or use `exact`. None, "" and NaN are all
shown as "–".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from numbers import Integral
from typing import Any

from django import template
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe

register = template.Library()

NOTHING = "–"
WBR = mark_safe("<wbr>")
MINUS = "−"
LEVELS = 20  # steps of the token ramp, classes a1 to a20 of static/css/pages.css

_COUNT_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


# -- names -------------------------------------------------------------------------------------------------------------
@register.filter
def breakable(name: Any) -> SafeString:
    """A path or id that may go on in the next line after a slash or an underscore, and is copied as it is."""
    return format_html_join(
        "", "{}{}", ((part, WBR if part in ("/", "_") else "") for part in re.split("([/_])", str(name)))
    )


# -- numbers -----------------------------------------------------------------------------------------------------------
def _number(value: Any) -> float | None:
    """A finite or infinite number, or None for what is shown as a dash."""
    if value is None or value == "":
        return None
    number = float(value)
    return None if math.isnan(number) else number


def _plain(number: float, decimals: int = 0) -> str:
    """Thousands separators and a real minus sign."""
    if math.isinf(number):
        return "∞" if number > 0 else f"{MINUS}∞"
    text = f"{number:,.{max(decimals, 0)}f}"
    return text.replace("-", MINUS) if text.strip("-0.") else text.lstrip("-")


def _scaled(number: float, units: Sequence[tuple[float, str]], gap: str) -> str:
    """Three significant digits of the largest unit that leaves at least one in front of the point."""
    rounded = float(f"{number:.3g}")
    for size, unit in units:
        if abs(rounded) >= size:
            value = rounded / size
            return _plain(value, 2 - math.floor(math.log10(abs(value)) + 1e-9)) + gap + unit
    return ""


def exact_text(value: Any) -> str:
    """12345 -> "12,345"; fractions keep up to seven significant digits."""
    number = _number(value)
    if number is None:
        return NOTHING
    if math.isinf(number) or number.is_integer():
        return _plain(number)
    return f"{number:,.7g}".replace("-", MINUS, 1) if abs(number) >= 1e-3 else _power(number, 7)


def count_text(value: Any) -> str:
    """4608 -> "4,608", 12345 -> "12.3k", 1.46e6 -> "1.46M"."""
    number = _number(value)
    if number is None or abs(number) < 10_000 or math.isinf(number):
        return exact_text(number)
    return _scaled(number, _COUNT_UNITS, "")


def bytes_text(value: Any) -> str:
    """1830000000 -> "1.83 GB" (decimal units, as disks and the Hub count)."""
    number = _number(value)
    if number is None:
        return NOTHING
    return (_scaled(number, _BYTE_UNITS, " ") if math.isfinite(number) else "") or f"{_plain(number)} B"


def fig_text(value: Any, digits: int = 3) -> str:
    """Significant digits: 0.2244 -> "0.224", 18.42 -> "18.4", 6.1e-4 -> "6.1e-4", 20312.4 -> "20,312"; ints as is."""
    number = _number(value)
    if number is None:
        return NOTHING
    if number == 0 or math.isinf(number) or isinstance(value, Integral):
        return _plain(number)
    rounded = float(f"{number:.{digits}g}")
    if abs(rounded) < 1e-3 or abs(rounded) >= 1e9:
        return _power(number, digits)
    return _plain(rounded if abs(rounded) < 1 else number, digits - 1 - math.floor(math.log10(abs(rounded)) + 1e-9))


def _power(number: float, digits: int) -> str:
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS, 1 if number < 0 else 0)


def signed_text(value: Any, digits: int = 3) -> str:
    """`fig_text` with its sign always printed: "+1.41", "−0.88"."""
    number = _number(value)
    return ("+" if number is not None and number > 0 else "") + fig_text(number, digits)


def percent_text(value: Any) -> str:
    """A share of 1: 0.73 -> "73 %", 0.0131 -> "1.3 %", 0.0042 -> "0.42 %". Only the whole is ever "100 %"."""
    number = _number(value)
    if number is None:
        return NOTHING
    percent = number * 100
    if 99.5 <= percent < 100:
        decimals = 1 if percent < 99.9 else 2
        return f"{math.floor(percent * 10**decimals) / 10**decimals:.{decimals}f} %"
    return f"{_plain(percent) if abs(percent) >= 9.95 else fig_text(percent, 2)} %"


def rate_text(value: Any, unit: str) -> str:
    """Units a second: "12.4k tokens/s", "31.2 MB/s" for bytes; below one in ten seconds, a minute: "3.1 steps/min"."""
    number = _number(value)
    if number is None:
        return NOTHING
    if 0 < number < 0.1 and unit != "bytes":
        return f"{fig_text(number * 60, 2)} {unit}/min"
    return f"{amount_text(round(number) if abs(number) >= 1000 else number, unit)}/s"


def amount_text(value: Any, unit: str) -> str:
    """A count with its unit: "1.46M tokens", "714 steps"; bytes as "31.2 MB"."""
    number = _number(value)
    if number is None or unit == "bytes":
        return bytes_text(number)
    return f"{count_text(number) if abs(number) >= 1000 or number.is_integer() else fig_text(number)} {unit}"


def duration_text(value: Any) -> str:
    """Seconds (or a timedelta): "240 ms", "3.2 s", "44 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"."""
    number = _number(value.total_seconds() if hasattr(value, "total_seconds") else value)
    if number is None or math.isinf(number):
        return NOTHING
    if number < 0:
        return MINUS + duration_text(-number)
    if number < 9.95:
        return f"{number * 1000:.0f} ms" if 0 < number < 0.9995 else f"{number:.1f} s".replace(".0 ", " ")
    return _two_units(round(number))


def _two_units(seconds: int) -> str:
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // smaller
            return f"{seconds // size} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{seconds} s"


def _data(shown: str, value: Any, full: str) -> str | SafeString:
    """The figure with its exact value in the title, when that says more."""
    if shown in (full, NOTHING):
        return shown
    return format_html('<data value="{}" title="{}">{}</data>', value, full, shown)


@register.filter
def exact(value: Any) -> str:
    return exact_text(value)


@register.filter
def count(value: Any) -> str:
    return _data(count_text(value), value, exact_text(value))


@register.filter
def bytesize(value: Any) -> str:
    return _data(bytes_text(value), value, f"{exact_text(value)} B")


@register.filter
def fig(value: Any, digits: int = 3) -> str:
    return _data(fig_text(value, digits), value, exact_text(value))


@register.simple_tag
def figure_rows(rows: Iterable[Sequence[Any]]) -> SafeString:
    """The body of a table of figures: four digits each, the exact value in data-v for the downloads.

    One tag, because a chart has some hundred cells, and they took longer as template nodes than the rest of its page.
    """
    lines = [[("" if v is None else escape(str(v)), escape(fig_text(v, 4))) for v in row] for row in rows]
    cells = ("".join(f'<td class="n" data-v="{exact}">{shown}</td>' for exact, shown in line) for line in lines)
    return mark_safe("\n".join(f"<tr>{line}</tr>" for line in cells))  # every text went through escape


@register.filter
def signed(value: Any, digits: int = 3) -> str:
    return _data(signed_text(value, digits), value, exact_text(value))


@register.filter
def percent(value: Any) -> str:
    number = _number(value)
    return NOTHING if number is None else _data(percent_text(number), number, f"{exact_text(number * 100)} %")


@register.filter
def rate(value: Any, unit: str = "steps") -> str:
    return _data(rate_text(value, unit), value, f"{exact_text(value)} {unit}/s")


@register.filter
def amount(value: Any, unit: str = "steps") -> str:
    return _data(amount_text(value, unit), value, f"{exact_text(value)} {unit}")


@register.filter
def duration(value: Any) -> str:
    return duration_text(value)


# -- times -------------------------------------------------------------------------------------------------------------
def ago_text(then: datetime, now: datetime) -> str:
    """ "just now", "44 s ago", "4 min ago", "in 3 d": one unit is enough for what is past."""
    seconds = (now - then).total_seconds()
    if abs(seconds) < 1:
        return "just now"
    size, unit = next((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")) if abs(seconds) >= s)
    shown = f"{int(abs(seconds) // size)} {unit}"
    return f"{shown} ago" if seconds > 0 else f"in {shown}"


def moment_text(when: datetime) -> str:
    """ "22 Nov 2026, 00:26" in the time zone of the pages."""
    local = timezone.localtime(when)
    return f"{local.day} {local:%b %Y, %H:%M}"


def _time(when: datetime, shown: str, css: str) -> SafeString:
    stamp = when.astimezone(UTC).isoformat(timespec="seconds")
    title = f"{moment_text(when)}:{timezone.localtime(when):%S %Z}"
    return format_html('<time{} datetime="{}" title="{}">{}</time>', css, stamp, title, shown)


@register.filter
def ago(when: datetime | None) -> str:
    """Relative, the absolute time in the title; static/js/live.js keeps it counting."""
    return _time(when, ago_text(when, timezone.now()), mark_safe(" data-ago")) if when else NOTHING


@register.filter
def moment(when: datetime | None) -> str:
    return _time(when, moment_text(when), "") if when else NOTHING


# -- states ------------------------------------------------------------------------------------------------------------
_CHIPS = {
    "queued": "wait", "running": "run", "pending": "wait", "working": "run", "cancelling": "run",
    "done": "ok", "ready": "ok", "finished": "ok", "failed": "bad", "cancelled": "off", "stale": "warn", "paused": "warn",
}  # fmt: skip


@register.filter
def chip(state: str, word: str = "") -> SafeString:
    """State chip: colour, sign (from CSS) and word. `{{ job.state|chip }}` or `{{ job.state|chip:"training" }}`."""
    return format_html('<span class="chip {}">{}</span>', _CHIPS.get(str(state), ""), word or state)


# -- tokens ------------------------------------------------------------------------------------------------------------
_BYTE = re.compile(r"&lt;0x([0-9A-F]{2})&gt;")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NEEDS_MARKS = re.compile(r"[\t\n\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|<0x")


def token_markup(text: str) -> str:
    """Escaped text of a token. Newlines and tabs stay what they are (copying gives the real text), each behind a
    mark drawn by CSS; bytes and control characters, among them those that turn the reading direction, are hex."""
    if not _NEEDS_MARKS.search(text):
        return escape(text)
    shown = _CONTROL.sub(lambda match: f'<i class="byte">{ord(match[0]):02X}</i>', escape(text))
    shown = _BYTE.sub(r'<i class="byte">\1</i>', shown)
    return shown.replace("\n", '<i class="nl">\n</i>').replace("\t", '<i class="tab">\t</i>')


def level(activation: float, scale_max: float) -> int:
    """Step 1..LEVELS of the ramp, linear in the square root so that weak activations can still be told apart."""
    if scale_max <= 0:
        return LEVELS
    return min(LEVELS, max(1, round(LEVELS * math.sqrt(abs(activation) / scale_max))))


def token_spans(
    tokens: Sequence[str],
    activations: Any,
    scale_max: float,
    peak: int | None = None,
    special: Sequence[bool] | None = None,
) -> SafeString:
    """Highlighted tokens as safe HTML, one `<span class="t a1..a20">` per active token (and "neg" below 0).

    tokens (n,) texts; activations (n,) numbers or array, 0 where the feature is silent; scale_max: the activation
    drawn at full strength. `peak` is underlined and the snippet's one tab stop (arrow keys go on from it, see
    static/js/tokens.js); `special` (n,) marks control tokens. Raises ValueError when the lengths differ.
    """
    values = activations.tolist() if hasattr(activations, "tolist") else list(activations)
    marks = [False] * len(tokens) if special is None else list(special)
    if not len(tokens) == len(values) == len(marks):
        raise ValueError(f"{len(tokens)} tokens, {len(values)} activations, {len(marks)} marks: they must be as many.")
    spans = []
    for i, (text, value, control) in enumerate(zip(tokens, values, marks, strict=True)):
        shown = f'<i class="ctl">{escape(text)}</i>' if control else token_markup(text)
        if value:
            shown = _active(shown, value, scale_max, i == peak)
        elif i == peak:
            shown = f'<span class="t peak" data-v="0" tabindex="0">{shown}</span>'
        spans.append(shown)
    return mark_safe("".join(spans))  # every text went through html.escape in token_markup or above


def _active(shown: str, value: float, scale_max: float, is_peak: bool) -> str:
    css = f"t a{level(value, scale_max)}" + (" neg" if value < 0 else "") + (" peak" if is_peak else "")
    return f'<span class="{css}" data-v="{fig_text(value)}" tabindex="{0 if is_peak else -1}">{shown}</span>'


@register.simple_tag
def token_text(
    tokens: Sequence[str],
    activations: Any,
    scale_max: float,
    peak: int | None = None,
    special: Sequence[bool] | None = None,
    css: str = "",
) -> SafeString:
    """`{% token_text example.tokens example.activations maximum example.peak example.special %}`; css="lines" keeps
    line breaks."""
    spans = token_spans(tokens, activations, scale_max, peak, special)
    return format_html('<span class="tokens {}" dir="auto">{}</span>', css, spans)


@register.simple_tag
def token_legend(scale_max: float, negative: bool = False) -> SafeString:
    """Legend of the ramp: 0, half and max in figures, and the same downwards for signed values."""
    shares = (-1, -0.5, 0, 0.5, 1) if negative else (0, 0.5, 1)
    steps = ((f"a{level(share, 1)}{' neg' * (share < 0)}" if share else "", share * scale_max) for share in shares)
    return format_html(
        '<span class="legend">{}</span>',
        format_html_join("", '<span class="t {}">{}</span>', ((css, fig_text(value)) for css, value in steps)),
    )


@register.filter
def token(text: str) -> SafeString:
    """One token on its own, as in a list of logits: spaces around it as ␣, no-break spaces ⍽, newline ↵, tab →."""
    text = text.replace("\xa0", "⍽")
    core = text.strip(" ")
    lead, trail = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    marked = "␣" * (lead if core else len(text)) + core + "␣" * (trail if core else 0)
    return mark_safe(f'<code class="tok" dir="auto">{token_markup(marked)}</code>')  # token_markup escapes
