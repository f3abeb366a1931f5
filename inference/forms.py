"""The steering forms: SAEs, a prompt, edits, and how to generate; a generation at several strengths."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import transaction

from inference.choices import Able, Select
from inference.models import Generation, Sweep
from saes.models import SAE, LanguageModel

MAX_EDITS = 24
CHARACTERS_A_TOKEN = 4  # a prompt longer than this many characters for every token of the context is refused unread
MAX_NEW_TOKENS = 4096  # as inference.numerics.generate
MAX_VALUE = 1e6
MOST_INSTRUCTION = 2000
MOST_FACTORS = 16
MAX_FACTOR = 100.0
FACTORS = "0 0.25 0.5 0.75 1 1.5 2 3"


class GenerationForm(forms.ModelForm):
    """What to generate. The model is the SAE's."""

    sae = forms.ModelChoiceField(
        SAE.objects.none(),
        label="SAE",
        empty_label=None,
        error_messages={
            "required": "Choose the SAE whose features are edited.",
            "invalid_choice": "That SAE cannot be used here: it or its language model is not ready; choose another.",
        },
    )
    prompt = forms.CharField(
        strip=False,
        widget=forms.Textarea(attrs={"rows": 4, "spellcheck": "false"}),
        label="Prompt",
        error_messages={"required": "Write a prompt: the text the model goes on from."},
    )
    instruction = forms.CharField(
        required=False,
        max_length=MOST_INSTRUCTION,
        widget=forms.Textarea(attrs={"rows": 2, "spellcheck": "false", "dir": "auto"}),
        label="The same in words",
        help_text="For a third text: this is put in front of the prompt of the plain model, to compare steering with asking.",
    )
    advanced = ["max_new_tokens", "temperature", "seed"]

    class Meta:
        model = Generation
        fields = (
            "sae", "prompt", "instruction", "chat", "scope", "scope_from", "max_new_tokens", "temperature", "seed",
        )  # fmt: skip
        labels = {
            "chat": "As a chat message",
            "scope": "Where the edits act",
            "scope_from": "First position",
            "max_new_tokens": "Length, tokens at most",
            "temperature": "Temperature (0 takes the likeliest token)",
        }
        help_texts = {
            "chat": "Puts the prompt into the model's chat template, as the user's turn.",
            "scope": "All tokens: those of the prompt too. Generated: only what the model has written itself.",
            "scope_from": "For “from a position on”: counted from 0, BOS included.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.able = Able("steer")
        self.able.fit(self.fields["sae"], Select())
        self.fields["scope_from"].required = False

    def clean_sae(self) -> SAE:
        sae: SAE = self.cleaned_data["sae"]
        if reason := self.able.why_not(sae):
            raise ValidationError(f"{sae.name} cannot steer. {reason}")
        return sae

    def clean_scope_from(self) -> int:
        return self.cleaned_data.get("scope_from") or 0

    def clean_instruction(self) -> str:
        instruction: str = self.cleaned_data["instruction"]
        return instruction.replace("\r\n", "\n")

    def clean_prompt(self) -> str:
        prompt: str = self.cleaned_data["prompt"]
        if not prompt.strip():
            raise ValidationError("Write a prompt: the text the model goes on from.")
        return prompt.replace("\r\n", "\n")  # browsers send line ends this way; the model saw plain ones

    def clean_max_new_tokens(self) -> int:
        value: int = self.cleaned_data["max_new_tokens"]
        if not 1 <= value <= MAX_NEW_TOKENS:
            raise ValidationError(f"Choose a length from 1 to {MAX_NEW_TOKENS:,} tokens.")
        return value

    def clean_temperature(self) -> float:
        value: float = self.cleaned_data["temperature"]
        if not 0 <= value <= 10:
            raise ValidationError("Choose a temperature from 0 to 10.")
        return value

    def clean_seed(self) -> int:
        value: int = self.cleaned_data["seed"]
        if not 0 <= value < 2**63:
            raise ValidationError("Choose a seed from 0 to 9223372036854775807.")
        return value

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        sae = data.get("sae")
        if sae is not None:
            self._check_against(sae.model, data)
        return data

    def _check_against(self, model: LanguageModel, data: dict[str, Any]) -> None:
        if data.get("chat") and not model.has_chat:
            self.add_error("chat", f"{model.name} has no chat template; leave this off to give it the plain text.")
        limit = model.context_length
        if limit is None:
            return
        prompt = data.get("prompt", "")
        if len(prompt) > limit * CHARACTERS_A_TOKEN:
            self.add_error(
                "prompt",
                f"The prompt has {len(prompt):,} characters; {model.name} reads {limit:,} tokens, and at most "
                f"{limit * CHARACTERS_A_TOKEN:,} characters are accepted. Shorten it.",
            )
        if data.get("max_new_tokens", 0) >= limit:
            self.add_error(
                "max_new_tokens", f"{model.name} holds {limit:,} tokens in all, prompt included; choose fewer."
            )


class EditForm(forms.Form):
    """One edit, of the generation's SAE unless it names another. A row without a feature is no edit.

    Text fields: a number field drops what it cannot read, unseen.
    """

    feature = forms.IntegerField(
        min_value=0,
        required=False,
        label="Feature",
        widget=forms.TextInput(attrs={"inputmode": "numeric", "placeholder": "index", "autocomplete": "off"}),
        error_messages={
            "invalid": "Give the feature's index, a whole number.",
            "min_value": "Features are counted from 0.",
        },
    )
    sae = forms.TypedChoiceField(required=False, coerce=int, empty_value=None, label="SAE", widget=Select())
    mode = forms.ChoiceField(choices=Generation.Mode.choices, initial=Generation.Mode.ADD, label="Mode")
    value = forms.FloatField(
        required=False,
        label="Value v",
        widget=forms.TextInput(attrs={"inputmode": "decimal", "placeholder": "v", "autocomplete": "off"}),
        error_messages={"invalid": "The value must be a finite number such as 4.5, not nan or inf."},
    )

    def __init__(self, *args: Any, able: Able, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sae: Any = self.fields["sae"]
        sae.widget.reasons = able.reasons
        sae.choices = [("", "the SAE above"), *able.options()]
        sae.error_messages["invalid_choice"] = "That SAE cannot be used here: choose another."

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        value, ablates = data.get("value"), data.get("mode") == Generation.Mode.ABLATE
        if "feature" in data and data["feature"] is None and value is not None and not self.errors:
            self.add_error("feature", "Which feature? Give its index, or clear this row.")
        if data.get("feature") is not None and value is None and "value" not in self.errors and not ablates:
            self.add_error("value", "Give the value v of this edit.")
        if value is not None and abs(value) > MAX_VALUE:
            self.add_error("value", f"The value must lie between -{MAX_VALUE:,.0f} and {MAX_VALUE:,.0f}.")
        return data

    def edit(self) -> dict[str, Any] | None:
        """{feature, mode, value}, and sae where it has one of its own, of a clean row; or None."""
        data = self.cleaned_data
        if data.get("feature") is None:
            return None
        value = 0.0 if data["mode"] == Generation.Mode.ABLATE else data["value"]
        own = {"sae": data["sae"]} if data.get("sae") else {}
        return own | {"feature": data["feature"], "mode": data["mode"], "value": value}


class EditRows(forms.BaseFormSet):
    """All rows of edits, checked together and against the SAE."""

    able: Able

    def get_form_kwargs(self, index: Any) -> dict[str, Any]:
        return super().get_form_kwargs(index) | {"able": self.able}

    def check_against(self, main: SAE | None) -> None:
        """Add what only the SAEs and the other rows can tell: features out of range or edited twice, SAEs that do not fit
        together."""
        by_id = {sae.pk: sae for sae in self.able.rows}
        seen: set[tuple[int | None, int]] = set()
        for form in self.forms:
            data = getattr(form, "cleaned_data", {})
            feature, own = data.get("feature"), by_id.get(data.get("sae") or 0)
            if feature is None:
                continue
            if own is not None:
                self._check_own(form, own, main)
            sae = own or main
            if sae is not None and feature >= sae.n_features:
                form.add_error(
                    "feature", f"There is no feature {feature}; {sae.name} has features 0 to {sae.n_features - 1}."
                )
            place = (sae.pk if sae else None, feature)
            if place in seen:
                form.add_error("feature", f"Feature {feature} is edited twice; keep one row of it.")
            seen.add(place)

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
        return [edit for form in self.forms if (edit := form.edit())]

    @property
    def n_shown(self) -> int:
        """Rows outside of the fold: those in use or with errors, and one to write in."""
        used = [i for i, form in enumerate(self.forms) if _in_use(form)]
        return max(1, min(MAX_EDITS, used[-1] + 1 if used else 1))


def _in_use(form: forms.BaseForm) -> bool:
    values = (form["feature"].value(), form["value"].value())
    return bool(form.errors) or any(value not in (None, "") for value in values)


EditFormSet = forms.formset_factory(EditForm, formset=EditRows, extra=MAX_EDITS, max_num=MAX_EDITS, validate_max=True)


def prefilled(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Initial rows from values typed into a URL: what makes no sense is left out."""
    rows = []
    for row in values:
        mode = row.get("mode")
        rows.append(row | {"mode": mode if mode in Generation.Mode.values else Generation.Mode.ADD})
    return rows[:MAX_EDITS]


@transaction.atomic
def start_generation(form: GenerationForm, edits: list[dict[str, Any]], user: Any) -> Generation:
    """Save the row and queue its job."""
    row: Generation = form.save(commit=False)
    row.model, row.owner, row.edits = form.cleaned_data["sae"].model, user, edits
    row.name = title_of(row.prompt)
    row.save()
    row.start(user)
    return row


def title_of(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 60 else f"{line[:59].rstrip()}…"


class SweepForm(forms.Form):
    """At which multiples of its strengths a generation is made again."""

    factors = forms.CharField(
        initial=FACTORS,
        max_length=400,
        label="Multiples of the strengths",
        help_text="Numbers with spaces between; 1 is the generation itself, 0 its edits without strength.",
        error_messages={"required": "Give the multiples, such as 0 0.5 1 2."},
    )

    def clean_factors(self) -> list[float]:
        words = self.cleaned_data["factors"].replace(",", " ").replace(";", " ").split()
        try:
            factors = sorted({float(word) for word in words})
        except ValueError:
            raise ValidationError("Give numbers with spaces between, such as 0 0.5 1 2.") from None
        if not all(math.isfinite(factor) and abs(factor) <= MAX_FACTOR for factor in factors):
            raise ValidationError(f"Every multiple must lie between -{MAX_FACTOR:.0f} and {MAX_FACTOR:.0f}.")
        if not 2 <= len(factors) <= MOST_FACTORS:
            raise ValidationError(f"Give from 2 to {MOST_FACTORS} different multiples, not {len(factors)}.")
        return factors

    def begin(self, generation: Generation, user: Any) -> Sweep:
        with transaction.atomic():
            name = f"Strengths of {generation.name}"[:120]
            row = Sweep.objects.create(
                name=name, generation=generation, factors=self.cleaned_data["factors"], owner=user
            )
            row.start(user, title=f"Sweep of generation {generation.pk}")
        return row


def can_sweep(edits: Iterable[dict[str, Any]]) -> bool:
    """Is there an edit that has a strength?"""
    return any(edit["mode"] != Generation.Mode.ABLATE for edit in edits)
