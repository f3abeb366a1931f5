"""What the page of a text shows of its codes: the tokens as a ribbon, one token, the strongest features, the grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.http import QueryDict
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe

from concepts.models import Known, Label, known_features
from inference.codes import CodesFile, Fires, Next, Strong
from inference.models import Inference
from inference.neurons import open_files
from saehub.figures import fig_text, level, token_markup
from saehub.spreadsheets import csv_lines, neutralised
from saehub.typed import whole_number

FEATURES = 15  # of the text, and of a token
GRID_FEATURES = 12
GRID_TOKENS = 48
JSON_FEATURES = 50  # of every token; the CSV has all
CSV_HEADER = ("text", "sae", "token_index", "token", "special", "feature", "value")


@dataclass(frozen=True)
class Choice:
    """What is looked at: a text, the number-th SAE, a token and a feature (None where nothing fires)."""

    text: int
    number: int
    token: int
    feature: int | None


@dataclass(frozen=True)
class Row:
    """A feature in a table: its value here, and that as a share of the largest it reached in its largest view."""

    feature: int
    value: float
    known: Known | None
    strong: Strong | None = None
    label: str = ""  # the accepted one

    @property
    def share(self) -> float | None:
        return self.value / self.known.maximum if self.known and self.known.maximum else None


@dataclass(frozen=True)
class Cell:
    token: int
    value: float
    css: str


@dataclass(frozen=True)
class Grid:
    """Features by tokens; colours at each feature's own maximum in the text."""

    tokens: list[tuple[int, str]]
    rows: list[tuple[Row, list[Cell]]]
    first: int
    last: int


class Reading:
    """One choice of what to look at in a finished text."""

    def __init__(self, row: Inference, query: QueryDict) -> None:
        self.row = row
        self.text = _number(query.get("text"), len(row.prompts)) or 0
        self.file = CodesFile(row.text_folder(self.text))
        self.n_prompt = row.outputs[self.text]["n_prompt_tokens"]
        self.number = next((i for i, fact in enumerate(row.facts) if str(fact["sae"]) == query.get("sae")), 0)
        self.fires: Fires = self.file.sae(self.number)
        self.strongest = self.fires.strongest(FEATURES)
        self.choice = self._chosen(query)
        shown = {one.feature for one in self.strongest} | {feature for feature, _ in self.at_token}
        shown |= set() if self.choice.feature is None else {self.choice.feature}
        sae = next((sae for sae in row.saes.all() if sae.pk == self.fact["sae"]), None)
        self.known: dict[int, Known] = known_features(sae, shown) if sae else {}
        self.labels: dict[int, str] = Label.objects.accepted_of(sae, shown) if sae else {}

    def _chosen(self, query: QueryDict) -> Choice:
        feature = _number(query.get("feature"), self.fact["d_sae"])
        token = _number(query.get("token"), len(self.file))
        if feature is None and self.strongest:
            feature = self.strongest[0].feature
        if token is None:
            token = next((one.token for one in self.strongest if one.feature == feature), len(self.file) - 1)
        return Choice(self.text, self.number, token, feature)

    @property
    def fact(self) -> dict[str, Any]:
        fact: dict[str, Any] = self.row.facts[self.number]
        return fact

    @property
    def at_token(self) -> list[tuple[int, float]]:
        return self.fires.at(self.choice.token, FEATURES)

    @property
    def token_rows(self) -> list[Row]:
        return [
            Row(feature, value, self.known.get(feature), label=self.labels.get(feature, ""))
            for feature, value in self.at_token
        ]

    @property
    def text_rows(self) -> list[Row]:
        return [
            Row(one.feature, one.maximum, self.known.get(one.feature), one, self.labels.get(one.feature, ""))
            for one in self.strongest
        ]

    @property
    def n_tokens(self) -> int:
        return len(self.file)

    @property
    def n_at_token(self) -> int:
        return self.fires.count(self.choice.token)

    @property
    def token(self) -> str:
        return self.file.tokens[self.choice.token]

    @property
    def likely(self) -> list[Next]:
        return self.file.likely(self.choice.token)

    @property
    def logprob(self) -> float | None:
        return None if self.file.logprobs is None else _finite(self.file.logprobs[self.choice.token])

    @property
    def perplexity(self) -> float | None:
        """exp of the mean -log p of all tokens but the first."""
        known = None if self.file.logprobs is None else self.file.logprobs[1:]
        return math.exp(min(-float(known.mean()), 700)) if known is not None and len(known) else None

    @property
    def chosen_label(self) -> str:
        return self.labels.get(-1 if self.choice.feature is None else self.choice.feature, "")

    @property
    def chosen_known(self) -> Known | None:
        return self.known.get(self.choice.feature) if self.choice.feature is not None else None

    @property
    def maximum(self) -> float:
        """Of the chosen feature, over the tokens that count."""
        values = abs(self.along[~self.file.special])
        return float(values.max()) if len(values) else 0.0

    @property
    def along(self) -> Any:
        return self.fires.along(-1 if self.choice.feature is None else self.choice.feature)

    def ribbon(self) -> SafeString:
        """Every token as a link to itself, coloured by the chosen feature."""
        values, maximum = self.along.tolist(), self.maximum
        parts = (self._link(i, value, maximum) for i, value in enumerate(values))
        return format_html_join("", "{}", ((part,) for part in parts))

    def _link(self, i: int, value: float, maximum: float) -> SafeString:
        text = self.file.tokens[i]
        shown = format_html('<i class="ctl">{}</i>', text) if self.file.special[i] else mark_safe(token_markup(text))
        here = i == self.choice.token
        said = mark_safe(' aria-current="true"') if here else ""
        if not text.strip():  # what is read aloud of a line break or a space
            said += format_html(' aria-label="token {}, white space"', i)
        return format_html(
            '<a class="t{}{}" href="{}"{} tabindex="{}" data-v="{}">{}</a>',
            css_of(value, maximum), (" here" if here else "") + (" new" if i >= self.n_prompt else ""), self.link(token=i), said, 0 if here else -1,
            fig_text(value) if value else "0", shown,
        )  # fmt: skip

    def link(self, **changes: Any) -> str:
        """This page with another token, feature or SAE."""
        kept: dict[str, Any] = {"sae": self.fact["sae"], "token": self.choice.token, "feature": self.choice.feature}
        kept |= {"text": self.text} if self.text else {}
        query = urlencode({name: value for name, value in (kept | changes).items() if value is not None})
        return f"?{query}#reading"

    def grid(self) -> Grid:
        half = GRID_TOKENS // 2
        first = max(0, min(self.choice.token - half, len(self.file) - GRID_TOKENS))
        last = min(len(self.file), first + GRID_TOKENS)
        rows = self.text_rows[:GRID_FEATURES]
        if not rows:
            return Grid([], [], first, last)
        values = self.fires.grid([row.feature for row in rows], first, last).tolist()
        tokens = [(i, self.file.tokens[i]) for i in range(first, last)]
        cells = [
            [Cell(first + i, v, css_of(v, abs(row.value))) for i, v in enumerate(line)]
            for row, line in zip(rows, values, strict=True)
        ]
        return Grid(tokens, list(zip(rows, cells, strict=True)), first, last)


def css_of(value: float, maximum: float) -> str:
    return (f" a{level(value, maximum)}" + (" neg" if value < 0 else "")) if value else ""


def _number(text: str | None, end: int) -> int | None:
    number = whole_number(text)
    return number if number is not None and number < end else None


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------- to take along


def record(row: Inference) -> dict[str, Any]:
    """What was asked and what fires, in JSON types: the strongest features of the texts and of every token."""
    files = open_files(row)
    return {
        "inference": row.pk,
        "made": row.created_at.isoformat(),
        "by": row.owner.get_username() if row.owner else None,
        "model": {"name": row.model.name, "location": row.model.location, "revision": row.model.revision or None},
        "prompt": row.prompt,
        "chat": row.chat,
        "new_tokens": row.new_tokens,
        "temperature": row.temperature,
        "seed": row.seed,
        "edits": row.edit_rows(),
        "concept_config": row.config_fact or None,
        "policy": row.policy,
        "versions": row.versions,
        "seconds": row.seconds,
        **_text_record(row, files[0]),
        "outputs": row.outputs,
        "more_texts": [_text_record(row, file) for file in files[1:]],
    }


def _text_record(row: Inference, file: CodesFile) -> dict[str, Any]:
    logprobs = [None] * len(file) if file.logprobs is None else [_finite(p) for p in file.logprobs.tolist()]
    return {
        "tokens": [
            {
                "token_index": i,
                "id": file.ids[i],
                "text": file.tokens[i],
                "special": bool(file.special[i]),
                "logprob": logprobs[i],
                "next": [vars(one) for one in file.likely(i)],
            }
            for i in range(len(file))
        ],
        "saes": [_sae_record(fact, file.sae(number), len(file)) for number, fact in enumerate(row.facts)],
    }


def _sae_record(fact: dict[str, Any], fires: Fires, n: int) -> dict[str, Any]:
    return fact | {
        "top_features": [vars(one) for one in fires.strongest(JSON_FEATURES)],
        "token_features": [
            {"token_index": i, "n_fires": fires.count(i)}
            | dict(
                zip(("features", "activations"), map(list, zip(*fires.at(i, JSON_FEATURES), strict=True)), strict=False)
            )
            for i in range(n)
        ],
    }


def as_csv(row: Inference) -> Iterator[str]:
    """Every code, line by line. Raises CodesError at once where the files are gone."""
    return csv_lines(CSV_HEADER, _codes(row, open_files(row)))


def _codes(row: Inference, files: Iterable[CodesFile]) -> Iterator[tuple[Any, ...]]:
    for i, file in enumerate(files):
        tokens = [neutralised(text) for text in file.tokens]
        for number, fact in enumerate(row.facts):
            fires = file.sae(number)
            found = zip(fires.positions.tolist(), fires.features.tolist(), fires.values.tolist(), strict=True)
            for position, feature, value in found:
                yield i, fact["sae"], position, tokens[position], int(file.special[position]), feature, f"{value:.9g}"


def as_python(row: Inference, saes: Iterable[Any]) -> str:
    """A script that reads the texts again, as they came out, with the functions this site uses."""
    readers = [
        f"    Reader(load_sae({str(sae.files)!r}{f', facts={sae.facts!r}' if sae.facts else ''}), {sae.hook_name!r}),"
        for sae in saes
    ]
    lines = [
        "from inference.numerics.infer import Reader, infer, text_ids",
        "from saes.numerics.formats import load_sae",
        "from saes.numerics.lm import load_lm",
        "",
        f"lm = load_lm({row.model.load_from!r}, revision={row.model.revision or None!r})",
        "readers = [",
        *readers,
        "]",
        *_texts(row),
        f"    found = infer(lm, readers, ids, likely={row.top_next if row.probabilities else 0})",
        "    for codes in found.codes:",
        "        for i, token in enumerate(found.tokens):",
        "            own = slice(codes.start[i], codes.start[i + 1])",
        "            print(i, repr(token), list(zip(codes.features[own][:5], codes.values[own][:5])))",
    ]
    return "\n".join(lines) + "\n"


def _texts(row: Inference) -> list[str]:
    """The lines that give the ids of every text: from the prompts, or what the model made of them."""
    if row.new_tokens:  # a continuation is read as it was written: the same text may have other tokens
        ids = [file.ids for file in open_files(row)] if row.ready else []
        return [f"for ids in {ids!r}:"]
    prompts: list[Any] = [[{"role": "user", "content": text}] if row.chat else text for text in row.prompts]
    return [f"for prompt in {prompts!r}:", f"    ids, policy = text_ids(lm, prompt, prepend_bos={row.prepend_bos})"]
