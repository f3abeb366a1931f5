"""The forms of the playground: a text for some SAEs, and a corpus of texts for them."""

from __future__ import annotations

from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import transaction

from inference.choices import Able, SelectMultiple
from inference.forms import CHARACTERS_A_TOKEN, title_of
from inference.models import Inference, PromptBatch
from saes.models import SAE, LanguageModel
from training.models import Corpus

MAX_SAES = 8
MOST_SEARCHED = 64  # SAEs that read one text when features are looked for
MOST_CHARACTERS = 200_000  # of a text for a model that sets no limit of its own
MOST_TOP = 10_000


class ReadersForm(forms.ModelForm):
    """The SAEs that read, all of one model."""

    saes = forms.ModelMultipleChoiceField(
        SAE.objects.none(),
        label="SAEs",
        help_text="One or several of the same model. Hold Ctrl to choose more than one.",
        error_messages={
            "required": "Choose at least one SAE.",
            "invalid_choice": "SAE %(value)s cannot be used here: it or its language model is not ready; choose another.",
            "invalid_pk_value": "“%(pk)s” is no SAE; choose one of the list.",
        },
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.able = Able("harvest")
        self.most = MAX_SAES
        self.able.fit(self.fields["saes"], SelectMultiple(attrs={"size": min(6, max(2, len(self.able.rows)))}))

    def clean_saes(self) -> Any:
        saes = list(self.cleaned_data["saes"].select_related("model"))
        for sae in saes:
            if reason := self.able.why_not(sae):
                raise ValidationError(f"{sae.name} cannot read a text here. {reason}")
        if len({sae.model_id for sae in saes}) > 1:
            raise ValidationError("Choose SAEs of one model: a text is read by one model at a time.")
        if len(saes) > self.most:
            raise ValidationError(f"Choose at most {self.most} SAEs at a time.")
        return saes

    @property
    def model_of(self) -> LanguageModel | None:
        saes = self.cleaned_data.get("saes")
        return saes[0].model if saes else None

    def start(self, user: Any, name: str) -> Any:
        with transaction.atomic():
            row = self.save(commit=False)
            row.model, row.owner, row.name = self.model_of, user, name
            row.save()
            row.saes.set(self.cleaned_data["saes"])
            row.start(user)
        return row


class InferenceForm(ReadersForm):
    """A text to read."""

    prompt = forms.CharField(
        strip=False,
        widget=forms.Textarea(attrs={"rows": 4, "spellcheck": "false", "dir": "auto"}),
        label="Text",
        error_messages={"required": "Write the text to read."},
    )
    advanced = ["chat", "prepend_bos", "probabilities"]

    class Meta:
        model = Inference
        fields = ("prompt", "saes", "chat", "prepend_bos", "probabilities")
        labels = {
            "chat": "As a chat message",
            "prepend_bos": "Begin with BOS",
            "probabilities": "Likeliest next tokens",
        }
        help_texts = {
            "chat": "Puts the text into the model's chat template, as the user's turn.",
            "prepend_bos": "As captures do, so that codes agree with those of harvested features.",
            "probabilities": "The ten likeliest tokens after every token, with their logits.",
        }

    def clean_prompt(self) -> str:
        prompt: str = self.cleaned_data["prompt"]
        if not prompt.strip():
            raise ValidationError("Write the text to read.")
        return prompt.replace("\r\n", "\n")

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        model = self.model_of
        if model is None:
            return data
        if data.get("chat") and not model.has_chat:
            self.add_error("chat", f"{model.name} has no chat template; leave this off to give it the plain text.")
        n, limit = len(data.get("prompt", "")), model.context_length
        most = limit * CHARACTERS_A_TOKEN if limit else MOST_CHARACTERS
        if n > most:
            reads = f"reads {limit:,} tokens" if limit else "sets no limit itself"
            self.add_error(
                "prompt",
                f"The text has {n:,} characters; {model.name} {reads}, and at most {most:,} characters are accepted. "
                "Shorten it, or read it as a batch of prompts.",
            )
        return data

    def begin(self, user: Any) -> Inference:
        row: Inference = self.start(user, title_of(self.cleaned_data["prompt"]))
        return row


class PromptBatchForm(ReadersForm):
    """A corpus whose texts are read one by one."""

    corpus = forms.ModelChoiceField(
        Corpus.objects.none(),
        label="Corpus",
        empty_label=None,
        help_text="Each of its documents is one prompt.",
        error_messages={"required": "Choose a corpus.", "invalid_choice": "That corpus is not ready; choose another."},
    )

    class Meta:
        model = PromptBatch
        fields = ("corpus", "saes", "top", "max_prompts", "prepend_bos")
        labels = {
            "top": "Features kept of every token",
            "max_prompts": "Prompts at most",
            "prepend_bos": "Begin every prompt with BOS",
        }
        help_texts = {
            "top": "The strongest; 0 keeps all that fire.",
            "max_prompts": "All of the corpus when left empty.",
            "prepend_bos": "As captures do, so that codes agree with those of harvested features.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        corpus: Any = self.fields["corpus"]
        corpus.queryset = Corpus.objects.ready()

    def clean_top(self) -> int:
        value: int = self.cleaned_data["top"]
        if value > MOST_TOP:
            raise ValidationError(f"Choose from 0 (all) to {MOST_TOP:,}.")
        return value

    def clean_max_prompts(self) -> int | None:
        value: int | None = self.cleaned_data["max_prompts"]
        if value == 0:
            raise ValidationError("Choose at least one prompt, or leave it empty for all.")
        return value

    def begin(self, user: Any) -> PromptBatch:
        corpus = self.cleaned_data["corpus"]
        row: PromptBatch = self.start(
            user, f"{corpus.name} by {', '.join(s.name for s in self.cleaned_data['saes'])}"[:120]
        )
        return row
