"""The form of an evaluation: an SAE's figures on held-out contexts of a capture, or on a corpus of choice."""

from __future__ import annotations

from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from saes.abilities import is_transcoder, why_not
from saes.models import SAE
from training.models import Capture, Corpus, Evaluation
from training.policies import policy_of


class EvaluationForm(forms.Form):
    """Held-out contexts of a capture, or a corpus that the model is run over; one of the two."""

    capture = forms.ModelChoiceField(
        Capture.objects.none(),
        required=False,
        empty_label="none",
        label="Held-out contexts of a capture",
        help_text="Finished captures that hold what the SAE reads",
    )
    corpus = forms.ModelChoiceField(
        Corpus.objects.none(),
        required=False,
        empty_label="none",
        label="Or a corpus",
        help_text="The model is run over its text; nothing is stored. Conversations go through the chat template, or are joined "
        "plainly where the model has none, unless the SAE was trained otherwise",
    )
    max_tokens = forms.IntegerField(
        min_value=1, max_value=100_000_000, initial=100_000, required=False, label="Tokens of the corpus, at most"
    )
    max_contexts = forms.IntegerField(
        min_value=1,
        max_value=100_000,
        initial=64,
        required=False,
        label="Contexts for CE and KL",
        help_text="Each is run through the model four times",
    )

    def __init__(self, sae: SAE, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sae = sae
        capture, corpus = self.fields["capture"], self.fields["corpus"]
        capture.queryset = fitting_captures(sae)  # type: ignore[attr-defined]
        corpus.queryset = Corpus.objects.ready()  # type: ignore[attr-defined]
        self.missing = f"Choose a capture that holds {_held(sae)} of {sae.model_name}, or a corpus."
        capture.error_messages["invalid_choice"] = self.missing
        corpus.error_messages["invalid_choice"] = "Choose a corpus that has been read."
        self.policy = policy_of(sae)

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if self.errors:
            return data
        if not data.get("capture") and not data.get("corpus"):
            self.add_error("capture", self.missing)
        elif data.get("capture") and data.get("corpus"):
            self.add_error("corpus", "Choose a capture or a corpus, not both: each makes an evaluation of its own.")
        elif reason := why_not(self.sae, "evaluate"):
            raise ValidationError(f"It cannot be evaluated: {reason}")
        return data

    def make(self, user: Any) -> Evaluation:
        data = self.cleaned_data
        source = data["capture"] or data["corpus"]
        row = Evaluation.objects.create(
            name=f"{self.sae.name} on {source.name}"[:120],
            owner=user,
            sae=self.sae,
            capture=data["capture"],
            corpus=data["corpus"],
            max_tokens=data["max_tokens"] if data["corpus"] else None,
            max_contexts=data["max_contexts"] or 64,
        )
        row.start(user)
        return row


def fitting_captures(sae: SAE) -> Any:
    """Finished captures of the SAE's model that hold what it reads, and what it predicts if that is elsewhere."""
    hooks = [sae.hook_name, *([sae.hook_name_out] if is_transcoder(sae) and sae.hook_name_out else [])]
    rows = Capture.objects.ready().select_related("model")
    return rows.filter(model=sae.model, stored=True, hook_names__contains=hooks)


def _held(sae: SAE) -> str:
    return f"{sae.hook_name} and {sae.hook_name_out}" if is_transcoder(sae) else sae.hook_name
