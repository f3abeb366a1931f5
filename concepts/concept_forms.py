"""Forms of labels, dictionaries, concepts, imports and configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from django import forms
from django.core.exceptions import ValidationError

from concepts import compile as compiler
from concepts import interchange
from concepts.interchange import RowRefused, clean_name, clean_text, number_or_none
from concepts.models import Concept, ConceptConfig, ConceptDictionary, ConceptState
from saes.models import SAE

MAX_ROWS = 16  # of a config's form; a JSON file may hold more
LONGEST_JSON = 2 * 2**20

T = TypeVar("T")


def _asked(read: Callable[..., T], *args: Any) -> T:
    """What a reader of files makes of it, its refusal as an error of a field."""
    try:
        return read(*args)
    except (RowRefused, compiler.ConfigError) as refusal:
        raise ValidationError(str(refusal)) from refusal


def usable_saes() -> Any:
    """SAEs that are here and whose number of features is known."""
    return SAE.objects.ready().filter(d_sae__gt=0)


class LabelWordsForm(forms.Form):
    """What its author says about a label."""

    confidence = forms.FloatField(
        required=False,
        min_value=0,
        max_value=1,
        label="Confidence, 0 to 1",
        error_messages={
            "invalid": "The confidence must be a number from 0 to 1.",
            "min_value": "The confidence must be a number from 0 to 1.",
            "max_value": "The confidence must be a number from 0 to 1.",
        },
        widget=forms.TextInput(attrs={"inputmode": "decimal", "autocomplete": "off", "class": "index"}),
    )
    notes = forms.CharField(required=False, label="Notes", widget=forms.Textarea(attrs={"rows": 2, "dir": "auto"}))

    def clean_notes(self) -> str:
        return _asked(clean_text, self.cleaned_data["notes"], "notes")


class LabelForm(LabelWordsForm):
    """What to call a feature. One field: Enter saves. Confidence and notes where somebody has more to say."""

    text = forms.CharField(
        max_length=interchange.LONGEST_NAME,
        label="Name this feature",
        error_messages={"required": "Write what this feature stands for."},
        widget=forms.TextInput(attrs={"autocomplete": "off", "data-key": "l", "placeholder": "what it stands for"}),
    )

    def clean_text(self) -> str:
        return _asked(clean_name, self.cleaned_data["text"])


class DictionaryForm(forms.ModelForm):
    class Meta:
        model = ConceptDictionary
        fields = ("sae", "name", "source", "notes")
        labels = {"sae": "SAE", "name": "Name", "source": "Source", "notes": "Notes"}
        widgets = {"notes": forms.Textarea(attrs={"rows": 3})}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sae: Any = self.fields["sae"]
        sae.queryset = usable_saes()
        sae.empty_label = None
        sae.error_messages["invalid_choice"] = "That SAE is not here; choose another one."
        if self.instance.pk:
            del self.fields["sae"]  # its features are those of this SAE

    def clean_name(self) -> str:
        return _asked(clean_name, self.cleaned_data["name"], 120)

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        sae = data.get("sae") or (self.instance.sae if self.instance.pk else None)
        others = ConceptDictionary.objects.filter(sae=sae, name=data.get("name")).exclude(pk=self.instance.pk)
        if sae and others.exists():
            self.add_error("name", f"{sae.name} has a dictionary of this name; choose another name.")
        return data


class ConceptForm(forms.Form):
    """A concept with its members, one a line."""

    name = forms.CharField(label="Name", widget=forms.TextInput(attrs={"autocomplete": "off"}))
    members = forms.CharField(
        required=False,
        label="Features",
        help_text="One a line: the feature's number, its weight (1 when left out; below 0 for the other direction), and how "
        "well the name fits, where that was measured.",
        widget=forms.Textarea(attrs={"rows": 8, "spellcheck": "false", "placeholder": "2117\n310 0.5\n4002 -1 0.83"}),
    )
    description = forms.CharField(required=False, label="Description", widget=forms.Textarea(attrs={"rows": 3}))

    def __init__(
        self, dictionary: ConceptDictionary, *args: Any, concept: Concept | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.dictionary, self.concept = dictionary, concept

    def clean_name(self) -> str:
        name = _asked(clean_name, self.cleaned_data["name"])
        others = self.dictionary.concepts.filter(name=name)
        if self.concept is not None:
            others = others.exclude(pk=self.concept.pk)
        if others.exists():
            raise ValidationError(f"{self.dictionary.name} has a concept of this name; choose another name.")
        return name

    def clean_description(self) -> str:
        return _asked(clean_text, self.cleaned_data["description"], "description")

    def clean_members(self) -> list[list[Any]]:
        found: dict[int, list[Any]] = {}
        for number, line in enumerate(self.cleaned_data["members"].splitlines(), 1):
            words = line.replace(",", " ").split()
            if not words:
                continue
            try:
                member = self._member(words)
            except RowRefused as refusal:
                raise ValidationError(f"Line {number}: {refusal}") from refusal
            if member[0] in found:
                raise ValidationError(f"Line {number}: Feature {member[0]} is there twice; keep one line of it.")
            found[member[0]] = member
        return [found[i] for i in sorted(found)]

    def _member(self, words: list[str]) -> list[Any]:
        if len(words) > 3:
            raise RowRefused("It has more than a feature, a weight and a score.")
        feature = interchange.feature(words[0], self.dictionary.sae.n_features)
        weight = number_or_none(words[1].replace("−", "-"), "weight") if len(words) > 1 else 1.0
        score = number_or_none(words[2], "score") if len(words) > 2 else None
        assert weight is not None
        return [feature, abs(weight), -1 if weight < 0 else 1, score]

    def state(self) -> ConceptState:
        return {"description": self.cleaned_data["description"], "members": self.cleaned_data["members"]}


class MemberForm(forms.Form):
    """One feature into a concept, by name: into one that is there, or a new one."""

    concept = forms.CharField(
        label="Add to a concept",
        error_messages={"required": "Write the concept's name."},
        widget=forms.TextInput(
            attrs={
                "autocomplete": "off",
                "list": "concept-names",
                "data-key": "c",
                "placeholder": "concept, or dictionary/concept",
            }
        ),
    )

    def __init__(self, sae: SAE, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sae = sae

    def clean_concept(self) -> tuple[ConceptDictionary, str]:
        """Its dictionary and name. A name that several dictionaries could mean has to say which."""
        name = _asked(clean_name, self.cleaned_data["concept"], 2 * interchange.LONGEST_NAME)
        dictionaries = list(self.sae.dictionaries.select_related("sae"))
        held = [row.dictionary_id for row in Concept.objects.filter(dictionary__sae=self.sae, name=name)]
        fitting = [(row, name) for row in dictionaries if row.pk in held] or [
            (row, name[len(row.name) + 1 :]) for row in dictionaries if name.startswith(f"{row.name}/")
        ] or [(row, name) for row in dictionaries]  # fmt: skip
        if not fitting:
            raise ValidationError(f"There is no dictionary over the features of {self.sae.name} yet; make one first.")
        if len(fitting) > 1:
            raise ValidationError("Several dictionaries could be meant; write dictionary/concept.")
        dictionary, name = fitting[0]
        return dictionary, _asked(clean_name, name)


def member_lines(concept: Concept) -> str:
    """A concept's members as the form takes them."""
    rows = concept.members.values_list("feature", "weight", "sign", "score")
    return "\n".join(_line(*row) for row in rows)


def _line(feature: int, weight: float, sign: int, score: float | None) -> str:
    if score is not None:
        return f"{feature} {sign * weight!r} {score!r}"
    return f"{feature}" if (weight, sign) == (1, 1) else f"{feature} {sign * weight!r}"


class ImportForm(forms.Form):
    """A file with names of features. Nothing happens before its preview is confirmed."""

    file = forms.FileField(
        label="File",
        max_length=300,
        help_text="CSV (neuron_idx,concept_name,score), concepts.json of mi_crow, explanations of Neuronpedia, or our JSON "
        "lines; gzipped or not. Which of them it is, its content says.",
        error_messages={"required": "Choose a file.", "empty": "The file is empty."},
    )
    accept = forms.BooleanField(
        required=False,
        initial=True,
        label="Accept them where a feature has no accepted label",
        help_text="Of several for one feature, the one with the largest score.",
    )

    def clean_file(self) -> Any:
        file = self.cleaned_data["file"]
        if file.size > interchange.MOST_BYTES:
            raise ValidationError(
                f"The file has {file.size / 2**20:,.0f} MB; at most {interchange.MOST_BYTES // 2**20} MB are read. Split it."
            )
        return file


# ------------------------------------------------------------------------------------------------------------- configs


class ConfigForm(forms.Form):
    name = forms.CharField(max_length=120, label="Name", widget=forms.TextInput(attrs={"autocomplete": "off"}))
    note = forms.CharField(max_length=300, required=False, label="What is different in this version")

    def clean_name(self) -> str:
        return _asked(clean_name, self.cleaned_data["name"], 120)


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
