"""Forms of labels, dictionaries, concepts and imports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from django import forms
from django.core.exceptions import ValidationError

from concepts import compile as compiler
from concepts import interchange
from concepts.interchange import RowRefused, clean_name, clean_text, number_or_none
from concepts.models import Concept, ConceptDictionary, ConceptState
from saes.models import SAE

T = TypeVar("T")


def asked(read: Callable[..., T], *args: Any) -> T:
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
        return asked(clean_text, self.cleaned_data["notes"], "notes")


class LabelForm(LabelWordsForm):
    """What to call a feature. One field: Enter saves. Confidence and notes where somebody has more to say."""

    text = forms.CharField(
        max_length=interchange.LONGEST_NAME,
        label="Name this feature",
        error_messages={"required": "Write what this feature stands for."},
        widget=forms.TextInput(attrs={"autocomplete": "off", "data-key": "l", "placeholder": "what it stands for"}),
    )

    def clean_text(self) -> str:
        return asked(clean_name, self.cleaned_data["text"])


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
        return asked(clean_name, self.cleaned_data["name"], 120)

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
        name = asked(clean_name, self.cleaned_data["name"])
        others = self.dictionary.concepts.filter(name=name)
        if self.concept is not None:
            others = others.exclude(pk=self.concept.pk)
        if others.exists():
            raise ValidationError(f"{self.dictionary.name} has a concept of this name; choose another name.")
        return name

    def clean_description(self) -> str:
        return asked(clean_text, self.cleaned_data["description"], "description")

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
        name = asked(clean_name, self.cleaned_data["concept"], 2 * interchange.LONGEST_NAME)
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
        return dictionary, asked(clean_name, name)


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
