"""Forms of configs of edits, and configs as files."""

from __future__ import annotations

import json
from typing import Any

from django import forms

from concepts import compile as compiler
from concepts import interchange
from concepts.concept_forms import asked
from concepts.interchange import RowRefused, clean_name
from concepts.models import Concept, ConceptConfig
from saehub.plain import REFUSED, storable
from saes.models import SAE

MAX_ROWS = 16  # of a config's form; a JSON file may hold more
LONGEST_JSON = 2 * 2**20


class ConfigForm(forms.Form):
    name = forms.CharField(max_length=120, label="Name", widget=forms.TextInput(attrs={"autocomplete": "off"}))
    note = forms.CharField(max_length=300, required=False, label="What is different in this version")

    def clean_name(self) -> str:
        return asked(clean_name, self.cleaned_data["name"], 120)


class ConfigEditForm(forms.Form):
    """One edit of a config. A row that names nothing is no edit."""

    target = forms.CharField(
        required=False,
        max_length=700,
        label="Feature or concept",
        widget=forms.TextInput(
            attrs={"list": "targets", "autocomplete": "off", "placeholder": "number, or a concept's name"}
        ),
    )
    mode = forms.ChoiceField(
        choices=[
            ("add", "add: z' = z + v"),
            ("scale", "scale: z' = z * v"),
            ("clamp", "clamp: z' = v"),
            ("ablate", "ablate: z' = 0"),
            ("cap", "cap: z' = min(z, v)"),
        ],
        label="Mode",
    )
    value = forms.FloatField(
        required=False,
        label="Value v",
        widget=forms.TextInput(attrs={"inputmode": "decimal", "autocomplete": "off", "placeholder": "v"}),
        error_messages={"invalid": "The value must be a finite number such as 4.5, not nan or inf."},
    )

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        value, mode = data.get("value"), data.get("mode")
        if data.get("target") and value is None and mode != "ablate" and "value" not in self.errors:
            self.add_error("value", "Give the value v of this edit.")
        if value is not None and abs(value) > compiler.LARGEST:
            self.add_error("value", f"The value must lie between -{compiler.LARGEST:,.0f} and {compiler.LARGEST:,.0f}.")
        if value is not None and not data.get("target") and "target" not in self.errors:
            self.add_error("target", "Of what? Give a feature's number or a concept's name, or clear this row.")
        return data


class ConfigRows(forms.BaseFormSet):
    """All edits, read against the SAE and checked together."""

    def edits(self, sae: SAE) -> list[dict[str, Any]]:
        """The edits as configs hold them; errors go to their rows, and then the answer is not to be used."""
        found = []
        for form in self.forms:
            target = getattr(form, "cleaned_data", {}).get("target")
            if not target or form.errors:
                continue
            try:
                value = 0.0 if form.cleaned_data["mode"] == "ablate" else form.cleaned_data["value"]
                found.append(edit_of(sae, target, form.cleaned_data["mode"], value))
            except (RowRefused, compiler.ConfigError) as refusal:
                form.add_error("target", str(refusal))
        return found

    @property
    def n_shown(self) -> int:
        used = [
            i for i, form in enumerate(self.forms) if form.errors or form["target"].value() or form["value"].value()
        ]
        return max(3, min(MAX_ROWS, used[-1] + 2 if used else 1))


ConfigFormSet = forms.formset_factory(
    ConfigEditForm, formset=ConfigRows, extra=MAX_ROWS, max_num=MAX_ROWS, validate_max=True
)


def edit_of(sae: SAE, target: str, mode: str, value: float) -> dict[str, Any]:
    """An edit of a feature, by its number, or of a concept, by its name or by dictionary/name. Raises RowRefused."""
    target = target.strip()
    if target.lstrip("-").isdecimal():
        return {"feature": interchange.feature(target, sae.n_features), "mode": mode, "value": value}
    named = Concept.objects.filter(dictionary__sae=sae).select_related("dictionary")
    found = list(named.filter(name=target)[:2])
    if not found:
        found = [c for c in _with_dictionary(named, target) if f"{c.dictionary.name}/{c.name}" == target][:2]
    if not found:
        raise RowRefused(f'There is no concept "{interchange.shown(target)}" over the features of {sae.name}.')
    if len(found) > 1:
        raise RowRefused(f'Several dictionaries have a concept "{interchange.shown(target)}"; write dictionary/name.')
    return found[0].edit(mode, value)


def _with_dictionary(named: Any, target: str) -> list[Concept]:
    names = [target[i + 1 :] for i, letter in enumerate(target) if letter == "/"]
    return list(named.filter(name__in=names)) if names else []


def target_of(edit: dict[str, Any]) -> str:
    """What a row of the form says for an edit."""
    if "feature" in edit:
        return str(edit["feature"])
    return f"{edit['dictionary']}/{edit['concept']}" if edit.get("dictionary") else str(edit["concept"])


class ConfigJSONForm(forms.Form):
    """A config as JSON: ours, or mi_crow's weights and bias."""

    text = forms.CharField(
        strip=False,
        label="JSON",
        max_length=LONGEST_JSON,
        widget=forms.Textarea(attrs={"rows": 8, "spellcheck": "false"}),
        error_messages={"required": "Paste a config."},
    )
    ones = forms.ChoiceField(
        required=False,
        choices=[
            ("", "it is not, or I do not know"),
            ("no", "leave the ones out: features not listed stay as they are"),
            ("yes", "as mi_crow computes it: add 1 to every feature"),
        ],
        label='Where its "bias" is empty',
        help_text="mi_crow takes an empty bias for ones, so such a file adds 1 to every feature of the SAE.",
    )

    def __init__(self, sae: SAE, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sae = sae
        self.edits: list[dict[str, Any]] = []
        self.named = ""

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        if "text" not in data or "ones" not in data:
            return data
        ones = {"": None, "no": False, "yes": True}[data["ones"]]
        try:
            self.named, self.edits = read_config(data["text"], self.sae, ones)
            compiler.compile(self.edits)
        except (RowRefused, compiler.ConfigError) as refusal:
            self.add_error("ones" if str(refusal) == compiler.ONES_ASKED else "text", str(refusal))
        return data


def read_config(text: str, sae: SAE, ones: bool | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Name ("" when not said) and edits of a config file, of ours or mi_crow's. Raises RowRefused, compiler.ConfigError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise RowRefused("This is not JSON.") from None
    if not storable(content):
        raise RowRefused(REFUSED)
    if not isinstance(content, dict):
        raise RowRefused("A config is a JSON object with edits, or with weights and bias.")
    if not isinstance(content.get("edits"), list):
        if not any(isinstance(content.get(key), dict) for key in ("weights", "edits", "bias")):
            raise RowRefused('A config has "edits", or "weights" and "bias" as mi_crow writes them.')
        return "", compiler.of_mi_crow(content, sae.n_features, ones)
    size = content.get("n_features")
    if size is not None and size != sae.n_features:
        told = interchange.shown(size)
        raise RowRefused(f"The config is for an SAE of {told} features; {sae.name} has {sae.n_features:,}.")
    name = clean_name(content["name"], 120) if content.get("name") else ""
    return name, [_read_edit(edit, sae) for edit in content["edits"]]


def _read_edit(edit: Any, sae: SAE) -> dict[str, Any]:
    if not isinstance(edit, dict) or edit.get("mode") not in compiler.MODES:
        raise RowRefused(f"Every edit needs a feature or a concept and a mode, one of {', '.join(compiler.MODES)}.")
    mode = edit["mode"]
    value = 0.0 if mode == "ablate" else compiler.number_of(edit.get("value"), "The value of an edit")
    if "feature" in edit:
        return {"feature": interchange.feature(edit["feature"], sae.n_features), "mode": mode, "value": value}
    members = edit.get("members")
    if not isinstance(members, list):
        target = target_of({"concept": edit.get("concept"), "dictionary": edit.get("dictionary")})
        return edit_of(sae, f"{target}", mode, value)
    told = {"concept": clean_name(edit.get("concept")), "dictionary": str(edit.get("dictionary") or "")[:120]}
    return told | {"members": [_read_member(member, sae) for member in members], "mode": mode, "value": value}


def _read_member(member: Any, sae: SAE) -> dict[str, Any]:
    if not isinstance(member, dict) or member.get("sign", 1) not in (1, -1) or isinstance(member.get("sign"), bool):
        raise RowRefused("A member needs a feature, a weight from 0 and a sign, 1 or -1.")
    weight = compiler.number_of(member.get("weight", 1.0), "The weight of a member")
    if weight < 0:
        raise RowRefused("The weight of a member is negative; give a weight from 0 and the sign -1.")
    return {
        "feature": interchange.feature(member.get("feature"), sae.n_features), "weight": weight,
        "sign": int(member.get("sign", 1)),
    }  # fmt: skip


def as_json(config: ConceptConfig) -> dict[str, Any]:
    """A version as our own file."""
    return {
        "name": config.name, "version": config.number, "sae": config.sae.name, "n_features": config.sae.n_features,
        "note": config.note, "edits": config.edits, "compiled": config.compiled(),
    }  # fmt: skip
