"""The steering forms: SAEs, a prompt, edits, and how to generate; a generation at several strengths."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import transaction

from inference.choices import Able, ConfigField, Select, fault_of
from inference.models import Generation, Mode, Sweep
from saes.models import SAE, LanguageModel

CHARACTERS_A_TOKEN = 4  # a prompt longer than this many characters for every token of the context is refused unread
MAX_NEW_TOKENS = 4096  # as inference.numerics.generate
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
    config = ConfigField()
    advanced = ["max_new_tokens", "temperature", "seed"]

    class Meta:
        model = Generation
        fields = (
            "sae", "prompt", "instruction", "config", "chat", "scope", "scope_from", "max_new_tokens", "temperature", "seed",
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
        config: Any = self.fields["config"]
        config.offer(kwargs.get("initial") or {})
        config.help_text = "Its edits are made beside those above, and kept with the generation."
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
        if (config := data.get("config")) is not None and (reason := fault_of(config, model)):
            self.add_error("config", reason)
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


@transaction.atomic
def start_generation(form: GenerationForm, edits: list[dict[str, Any]], user: Any) -> Generation:
    """Save the row, with the edits of its concept config beside these, and queue its job."""
    row: Generation = form.save(commit=False)
    row.model, row.owner, row.edits = form.cleaned_data["sae"].model, user, edits
    row.use_config(form.cleaned_data.get("config"))
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
    return any(edit["mode"] != Mode.ABLATE for edit in edits)
