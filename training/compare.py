"""Two to six SAEs side by side: on which data, which figures, and which of them is best where that can be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saehub import charts
from saehub.figures import count_text
from saehub.spreadsheets import neutralised
from saehub.typed import whole_number
from saes.metrics import GROUPS
from saes.models import SAE
from training.models import Evaluation

MOST = 6
NEWEST = "newest"
HIGHER = ("explained_variance", "explained_variance_per_dimension", "explained_variance_centred", "cosine",
          "alive_fraction", "ce_recovered", "ce_recovered_mean", "kl_recovered")  # fmt: skip
LOWER = ("fvu", "ce_increase", "ce_with_sae", "kl", "dead_features")


@dataclass(frozen=True)
class Side:
    """One SAE and the evaluation that is shown of it, if there is one."""

    sae: SAE
    evaluation: Evaluation | None
    letter: str

    @property
    def metrics(self) -> dict[str, Any]:
        return self.evaluation.metrics if self.evaluation else {}

    def value(self, name: str) -> float | None:
        value: float | None = self.metrics.get(name, {}).get("value")
        return value

    @property
    def label(self) -> str:
        """Short enough for a chart, and no two alike."""
        name = self.sae.name if len(self.sae.name) <= 28 else f"{self.sae.name[:27]}…"
        return f"{self.letter} {name}"


@dataclass(frozen=True)
class Data:
    """Data that some of the SAEs were measured on; `n` of them."""

    key: str
    name: str
    n: int


@dataclass(frozen=True)
class Row:
    """One line of the table: a value for each side, and which are the best; else `why_none` is."""

    label: str
    id: str
    formula: str
    values: Sequence[tuple[float | None, bool]]
    why_none: str = ""


def data_key(row: Evaluation) -> str:
    """The same for evaluations whose numbers can be compared: one capture's held-out contexts, or one corpus read under
    one policy to the same length."""
    found = row.metrics.get("l0", {})
    return f"c{row.capture_id}" if row.capture_id else f"t{row.corpus_id}-{row.max_tokens or 0}-{found.get('data', '')}"


def sides_of(saes: Sequence[SAE], wanted: str = "") -> tuple[list[Side], list[Data], str]:
    """(sides, the data to choose from, the key of the data shown: "" where each shows its newest).

    Data that all were measured on comes first; without it, and unless asked for, each shows its newest evaluation.
    """
    rows = Evaluation.objects.ready().filter(sae__in=saes).select_related("capture", "corpus").order_by("pk")
    newest: dict[int, Evaluation] = {}
    by_data: dict[str, dict[int, Evaluation]] = {}
    for row in rows:
        newest[row.sae_id] = row
        by_data.setdefault(data_key(row), {})[row.sae_id] = row
    options = [
        Data(key, str(next(iter(found.values())).source), len(found))
        for key, found in sorted(
            by_data.items(), key=lambda item: (-len(item[1]), -max(r.pk for r in item[1].values()))
        )
    ]
    if wanted not in by_data and wanted != NEWEST:
        wanted = options[0].key if options and options[0].n == len(saes) else ""
    shown = by_data.get(wanted, newest)
    wanted = "" if wanted == NEWEST else wanted
    return [Side(sae, shown.get(sae.pk), letter) for sae, letter in zip(saes, "ABCDEF", strict=False)], options, wanted


def differing(sides: Sequence[Side]) -> str:
    """Why the figures cannot be held against each other as they stand; "" when they can."""
    measured = [side for side in sides if side.evaluation]
    if len({data_key(side.evaluation) for side in measured if side.evaluation}) > 1:
        return "They were measured on different data, so that a difference need not be one of the SAEs."
    if len({(side.sae.model_id or side.sae.model_name, side.sae.hook_name) for side in sides}) > 1:
        return "They read different hook points or models; explained variance and CE then mean something else for each."
    missing = [side.letter for side in sides if not side.evaluation]
    if missing and len(measured) > 1:
        return (
            f"{listed(missing)} {'was' if len(missing) == 1 else 'were'} not measured on this, and might be the best."
        )
    return ""


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def table(sides: Sequence[Side]) -> list[tuple[str, list[Row]]]:
    """The metrics in their groups; those that nobody measured are left out. Nothing is best on different data."""
    comparable = not differing(sides)
    groups = []
    for title, names in GROUPS.items():
        rows = [
            _row(name, label, sides, comparable)
            for name, label in names.items()
            if any(name in s.metrics for s in sides)
        ]
        if rows:
            groups.append((title, rows))
    return groups


def _row(name: str, label: str, sides: Sequence[Side], comparable: bool) -> Row:
    values = [side.value(name) for side in sides]
    known = [value for value in values if value is not None]
    best, why_none = None, ""
    if comparable and len(known) > 1 and name in (*HIGHER, *LOWER):
        why_none = _why_none(name, sides)
        if not why_none and len(set(known)) > 1:
            best = max(known) if name in HIGHER else min(known)
    formula = next((side.metrics[name].get("formula", "") for side in sides if name in side.metrics), "")
    return Row(label, name, formula, [(value, value is not None and value == best) for value in values], why_none)


def _why_none(name: str, sides: Sequence[Side]) -> str:
    """Why no value of a metric can be called the best of the sides', measured on the same data; "" where one can."""
    missing = [side.letter for side in sides if side.value(name) is None]
    if missing:
        return f"not measured for {listed(missing)}"
    found = [side.metrics[name] for side in sides]
    if len({(one.get("definition"), one.get("formula")) for one in found}) > 1:
        return "by different definitions"
    if len({(one.get("n"), one.get("data")) for one in found}) > 1:
        return f"on different tokens: {', '.join(count_text(one.get('n')) for one in found)}"
    return ""


def plots(sides: Sequence[Side]) -> list[charts.Chart]:
    """L0 against explained variance and against the CE recovered, and the feature densities over each other."""
    made = []
    for name, words in (("explained_variance", "explained variance"), ("ce_recovered", "CE loss recovered")):
        points = [
            (x, y, side.letter, side.label)
            for side in sides
            if (x := side.value("l0")) is not None and (y := side.value(name)) is not None
        ]
        if points:
            made.append(
                charts.scatter(
                    points,
                    title=f"L0 and {words}",
                    x_title="L0, features per token",
                    y_title=words,
                    n=_counts(sides, name),
                    size=(520, 300),
                )
            )
    found = {side.label: bins for side in sides if (bins := side.value("density_histogram"))}
    if found:
        made.append(charts.densities(found, n=_counts(sides, "density_histogram"), size=(520, 300)))  # type: ignore[arg-type]
    return made


def _counts(sides: Sequence[Side], name: str) -> str:
    counts = sorted({side.metrics[name]["n"] for side in sides if name in side.metrics})
    ends = [count_text(counts[0]), count_text(counts[-1])]
    return f"{ends[0] if len(counts) == 1 else ' to '.join(ends)} tokens of each"


def neighbours(saes: Sequence[SAE]) -> list[SAE]:
    """SAEs that were measured here and could be added: those of the same hook point first."""
    if not saes or len(saes) >= MOST:
        return []
    first = saes[0]
    rows = SAE.objects.filter(l0__isnull=False, model=first.model).exclude(pk__in=[sae.pk for sae in saes])
    return sorted(rows.order_by("-pk")[:50], key=lambda sae: sae.hook_name != first.hook_name)[:12]


def csv_rows(sides: Sequence[Side]) -> tuple[list[str], list[list[Any]]]:
    """The table for a spreadsheet, (head, rows): exact values, and on what each was measured."""
    head = ["metric", "definition", *(neutralised(side.sae.name) for side in sides)]
    facts = [
        [word, "", *(neutralised(str(getattr(side.sae, name))) for side in sides)]
        for word, name in (
            ("id", "pk"),
            ("model", "model_name"),
            ("hook point", "hook_name"),
            ("architecture",) * 2,
            ("d_sae",) * 2,
        )
    ]
    data = [["data", "", *(neutralised(side.metrics.get("l0", {}).get("data", "")) for side in sides)]]
    data += [["tokens", "", *(side.metrics.get("l0", {}).get("n", "") for side in sides)]]
    metrics = [
        [row.id, row.formula, *("" if value is None else value for value, _ in row.values)]
        for _, rows in table(sides)
        for row in rows
    ]
    return head, facts + data + metrics


def wanted_ids(text: str) -> list[int]:
    """The numbers of `?ids=3,5,8`, each once, in their order."""
    words = text.replace(" ", ",").split(",")
    return list(dict.fromkeys(pk for word in words if (pk := whole_number(word)) is not None))
