"""The rows of edits of the steering form: a feature by its number or label, or a concept by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from django import forms

from concepts import compile as compiler
from concepts.models import Concept, ConceptConfig, Label
from inference.choices import Able, Select
from inference.models import Mode, Scope
from saehub.typed import whole_number
from saes.models import SAE

MAX_EDITS = 24
MAX_VALUE = 1e6
LONGEST_TARGET = 300
NUMBER = re.compile(r"[+-]?[\d.,]+([eE][+-]?\d+)?")
SAID = 4  # features of one label that an error names


class EditForm(forms.Form):
    """One edit, of the generation's SAE unless it names another. A row without a feature is no edit.

    Text fields: a number field drops what it cannot read, unseen.
    """

    feature = forms.CharField(
        required=False,
        max_length=LONGEST_TARGET,
        label="Feature",
        widget=forms.TextInput(attrs={"placeholder": "index, label or concept", "autocomplete": "off"}),
    )
    sae = forms.TypedChoiceField(required=False, coerce=int, empty_value=None, label="SAE", widget=Select())
    mode = forms.ChoiceField(choices=Mode.choices, initial=Mode.ADD, label="Mode")
    value = forms.FloatField(
        required=False,
        label="Value v",
        widget=forms.TextInput(attrs={"inputmode": "decimal", "placeholder": "v", "autocomplete": "off"}),
        error_messages={"invalid": "The value must be a finite number such as 4.5, not nan or inf."},
    )
    scope = forms.ChoiceField(
        required=False, choices=[("", "tokens as said above"), *Scope.choices], label="Tokens", initial=""
    )
    first = forms.IntegerField(
        required=False,
        min_value=0,
        label="First position",
        widget=forms.TextInput(attrs={"inputmode": "numeric", "placeholder": "position", "autocomplete": "off"}),
        error_messages={"invalid": "Give the first position, a whole number.", "min_value": "Positions begin with 0."},
    )

    def __init__(self, *args: Any, able: Able, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sae: Any = self.fields["sae"]
        sae.widget.reasons = able.reasons
        sae.choices = [("", "the SAE above"), *able.options()]
        sae.error_messages["invalid_choice"] = "That SAE cannot be used here: choose another."
        self.compiled: list[dict[str, Any]] = []

    def clean_feature(self) -> int | str | None:
        """A number, or the text of a label or concept that `find` looks up."""
        text: str = self.cleaned_data["feature"].strip()
        if not text:
            return None
        if (number := whole_number(text)) is not None:
            return number
        if text.startswith("-") and text[1:].isdecimal():
            raise forms.ValidationError("Features are counted from 0.")
        if NUMBER.fullmatch(text):
            raise forms.ValidationError("Give the feature's index, a whole number, or its label.")
        return text

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        value, ablates = data.get("value"), data.get("mode") == Mode.ABLATE
        if "feature" in data and data["feature"] is None and value is not None and not self.errors:
            self.add_error("feature", "Which feature? Give its index, or clear this row.")
        if data.get("feature") is not None and value is None and "value" not in self.errors and not ablates:
            self.add_error("value", "Give the value v of this edit.")
        if value is not None and abs(value) > MAX_VALUE:
            self.add_error("value", f"The value must lie between -{MAX_VALUE:,.0f} and {MAX_VALUE:,.0f}.")
        return data

    def find(self, sae: SAE) -> None:
        """Make the edits of a clean row: of a feature in range, of the one with this label, or of a concept's members."""
        target = self.cleaned_data["feature"]
        if isinstance(target, int):
            self._take(sae, {"feature": target})
            return
        features = list(_labelled(sae, target)[: SAID + 1])
        if len(features) == 1:
            self._take(sae, {"feature": features[0]})
        elif features:
            several = ", ".join(map(str, features[:SAID])) + (" and more" if len(features) > SAID else "")
            self.add_error("feature", f"Several features are labelled “{target[:60]}” ({several}); give an index.")
        elif concept := concept_of(sae, target):
            self._take(sae, concept.edit(self.cleaned_data.get("mode", Mode.ADD), self._value), concept)
        else:
            self.add_error(
                "feature",
                f"Give the feature's index, a whole number: no label or concept of {sae.name} is “{target[:60]}”.",
            )

    @property
    def _value(self) -> float:
        value = self.cleaned_data.get("value")
        return 0.0 if value is None or self.cleaned_data.get("mode") == Mode.ABLATE else float(value)

    def _take(self, sae: SAE, target: dict[str, Any], concept: Concept | None = None) -> None:
        data = self.cleaned_data
        if "feature" in target and target["feature"] >= sae.n_features:
            self.add_error(
                "feature",
                f"There is no feature {target['feature']}; {sae.name} has features 0 to {sae.n_features - 1}.",
            )
            return
        own = {"sae": data["sae"]} if data.get("sae") else {}
        if data.get("scope"):
            own |= {"scope": data["scope"], "first": data.get("first") or 0}
        if concept is None:
            self.compiled = [own | target | {"mode": data.get("mode"), "value": self._value}]
            return
        try:
            moves = compiler.compile([target])
        except compiler.ConfigError as error:
            self.add_error("feature", str(error))
            return
        if not moves and not self.errors:
            self.add_error("feature", f"{concept.name} at this strength moves no feature; give it another value.")
        named = {"concept": f"{concept.dictionary.name}/{concept.name}", "strength": self._value}
        self.compiled = [own | move | named for move in moves]


def _labelled(sae: SAE, text: str) -> Any:
    """Features whose accepted label is this text, whatever its case."""
    rows = Label.objects.filter(sae=sae, accepted=True, text__iexact=text)
    return rows.order_by("feature").values_list("feature", flat=True)


def concept_of(sae: SAE, text: str) -> Concept | None:
    """The newest concept of the SAE called `name` or `dictionary/name`."""
    rows = Concept.objects.filter(dictionary__sae=sae).select_related("dictionary").order_by("-pk")
    found: Concept | None = rows.filter(name__iexact=text).first()
    dictionary, slash, name = text.partition("/")
    while found is None and slash:  # both names may hold slashes
        found = rows.filter(dictionary__name__iexact=dictionary, name__iexact=name).first()
        more, slash, name = name.partition("/")
        dictionary = f"{dictionary}/{more}"
    return found


class EditRows(forms.BaseFormSet):
    """All rows of edits, checked together and against the SAE."""

    able: Able

    def get_form_kwargs(self, index: Any) -> dict[str, Any]:
        return super().get_form_kwargs(index) | {"able": self.able}

    def check_against(self, main: SAE | None, config: ConceptConfig | None = None) -> None:
        """Find what the rows name and add what only the SAEs, the other rows and the config can tell: features out of range
        or edited twice, SAEs that do not fit together."""
        by_id = {sae.pk: sae for sae in self.able.rows}
        seen: dict[tuple[int, int], str] = {}  # the mode of each feature so far
        taken = {(config.sae_id, i) for i in _features(config)} if config is not None else set()
        for form in self.forms:
            data = getattr(form, "cleaned_data", {})
            own = by_id.get(data.get("sae") or 0)
            if data.get("feature") is None:
                continue
            if own is not None:
                self._check_own(form, own, main)
            sae = own or main
            if sae is None:
                continue
            form.find(sae)
            for edit in form.compiled:
                key, mode, way = (sae.pk, edit["feature"]), edit["mode"], ""
                if key in taken:
                    way = f"by {config} too; keep one of them"
                elif key in seen and {seen[key], mode} != {"add", "scale"}:
                    way = "twice; keep one row of it, or a scale and an add"
                if way:
                    form.add_error("feature", f"Feature {edit['feature']} is edited {way}.")
                    break
                seen[key] = "both" if key in seen else mode
        if len(seen.keys() | taken) > compiler.MOST_FEATURES and self.forms:
            self.forms[0].add_error("feature", f"At most {compiler.MOST_FEATURES:,} features are edited at once.")

    def _check_own(self, form: forms.Form, own: SAE, main: SAE | None) -> None:
        if reason := self.able.why_not(own):
            form.add_error("sae", f"{own.name} cannot steer. {reason}")
        elif main is not None and own.model_id != main.model_id and own.model and main.model:
            form.add_error(
                "sae", f"{own.name} is of {own.model.name}, not of {main.model.name}; one generation has one model."
            )
        elif main is not None and own.pk == main.pk:
            form.cleaned_data["sae"] = None

    def edits(self) -> list[dict[str, Any]]:
        """[{feature, mode, value}] of clean rows that `check_against` has seen."""
        return [edit for form in self.forms for edit in form.compiled]

    @property
    def n_shown(self) -> int:
        """Rows outside of the fold: those in use or with errors, and one to write in."""
        used = [i for i, form in enumerate(self.forms) if _in_use(form)]
        return max(1, min(MAX_EDITS, used[-1] + 1 if used else 1))


def _features(config: ConceptConfig) -> list[int]:
    try:
        return [edit["feature"] for edit in config.compiled()]
    except compiler.ConfigError:
        return []  # the form says so at the config itself


def _in_use(form: forms.BaseForm) -> bool:
    values = (form["feature"].value(), form["value"].value())
    return bool(form.errors) or any(value not in (None, "") for value in values)


EditFormSet = forms.formset_factory(EditForm, formset=EditRows, extra=MAX_EDITS, max_num=MAX_EDITS, validate_max=True)


def prefilled(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Initial rows from values typed into a URL, or from the edits of a row: what makes no sense is left out.

    What a concept config asked for comes from the config again, and the members of a concept are one row.
    """
    rows: list[dict[str, Any]] = []
    concepts: set[tuple[Any, ...]] = set()
    for row in values:
        if "config" in row:
            continue
        mode = row.get("mode")
        row = row | {"mode": mode if mode in Mode.values else Mode.ADD}
        if "concept" in row:
            row = row | {"feature": row["concept"], "value": row["strength"]}
            key = tuple(row.get(name) for name in ("concept", "mode", "strength", "sae", "scope", "first"))
            if key in concepts:
                continue
            concepts.add(key)
        rows.append(row)
    return rows[:MAX_EDITS]
