"""The forms of the playground: a text for some SAEs, and a corpus of texts for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import transaction

from inference.choices import Able, ConfigField, SelectMultiple, fault_of
from inference.forms import CHARACTERS_A_TOKEN, MAX_NEW_TOKENS, title_of
from inference.models import Inference, PromptBatch, Steered
from saehub.accounts.access import allowed
from saehub.plain import REFUSED, storable
from saes.fields import unused_name
from saes.models import SAE, LanguageModel
from training.forms import CorpusForm
from training.models import Corpus

MAX_SAES = 8
MOST_SEARCHED = 64  # SAEs that read one text when features are looked for
MOST_CHARACTERS = 200_000  # of a text for a model that sets no limit of its own
MOST_TOP = 10_000
MOST_NEXT = 100
DEFAULTED = ("top_next", "new_tokens", "temperature", "seed", "top_features")  # what is not said takes the default


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
        self.able = Able("read")
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
            if isinstance(row, Steered):
                row.use_config(self.cleaned_data.get("config"))
            row.save()
            row.saes.set(self.cleaned_data["saes"])
            row.start(user)
        return row


class TextsField(forms.CharField):
    """Texts, one a line; or as a JSON list, where a text has several lines. The clean value is a list."""

    def prepare_value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        by_line = not any("\n" in text or text.startswith("[") for text in value)
        return "\n".join(value) if by_line else json.dumps(value, ensure_ascii=False)

    def to_python(self, value: Any) -> list[str]:  # type: ignore[override]
        text = (value or "").replace("\r\n", "\n")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not storable(found):
            raise ValidationError(REFUSED)
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return found
        return [line for line in text.split("\n") if line.strip()]


class InferenceForm(ReadersForm):
    """A text to read."""

    prompt = forms.CharField(
        strip=False,
        widget=forms.Textarea(attrs={"rows": 4, "spellcheck": "false", "dir": "auto"}),
        label="Text",
        error_messages={"required": "Write the text to read."},
    )
    more_prompts = TextsField(
        required=False,
        strip=False,
        widget=forms.Textarea(attrs={"rows": 2, "spellcheck": "false", "dir": "auto"}),
        label="More texts, one a line",
        help_text="Each is read on its own, beside the first.",
    )
    config = ConfigField()
    advanced = [
        "chat", "prepend_bos", "probabilities", "top_next", "new_tokens", "config", "temperature", "seed",
        "save_top_texts", "top_features",
    ]  # fmt: skip

    class Meta:
        model = Inference
        fields = (
            "prompt", "more_prompts", "saes", "chat", "prepend_bos", "probabilities", "top_next", "new_tokens", "config",
            "temperature", "seed", "save_top_texts", "top_features",
        )  # fmt: skip
        labels = {
            "chat": "As a chat message",
            "prepend_bos": "Begin with BOS",
            "probabilities": "Likeliest next tokens",
            "top_next": "How many next tokens",
            "new_tokens": "Tokens to write first",
            "temperature": "Temperature (0 takes the likeliest token)",
            "save_top_texts": "Save top_texts.json",
            "top_features": "Features named of every prompt and token",
        }
        help_texts = {
            "chat": "Puts the text into the model's chat template, as the user's turn.",
            "prepend_bos": "As captures do, so that codes agree with those of harvested features.",
            "probabilities": "The likeliest tokens after every token, with their logits.",
            "top_next": "",
            "new_tokens": "The model goes on from the text before it is read, continuation included; 0 reads the text as it is.",
            "save_top_texts": "A file for every SAE: the texts on which each feature fires most, and what fires on each token.",
            "top_features": "In that file and in answers to scripts.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.fields["config"]
        config.offer(kwargs.get("initial") or {})
        config.help_text = "Steers what the model writes; the text is always read by the plain model."
        for name in DEFAULTED:
            self.fields[name].required = False

    def _number(self, name: str, least: float, most: float, what: str) -> Any:
        """Nothing typed means the default."""
        value = self.cleaned_data[name]
        if value is None:
            return getattr(Inference(), name)
        if not least <= value <= most:  # NaN compares false
            raise ValidationError(f"Choose {what} from {least:,} to {most:,}.")
        return value

    def clean_top_next(self) -> int:
        found: int = self._number("top_next", 1, MOST_NEXT, "a number")
        return found

    def clean_new_tokens(self) -> int:
        found: int = self._number("new_tokens", 0, MAX_NEW_TOKENS, "a length")
        return found

    def clean_temperature(self) -> float:
        found: float = self._number("temperature", 0, 10, "a temperature")
        return found

    def clean_seed(self) -> int:
        found: int = self._number("seed", 0, 2**63 - 1, "a seed")
        return found

    def clean_top_features(self) -> int:
        found: int = self._number("top_features", 1, MOST_TOP, "a number")
        return found

    def clean_more_prompts(self) -> list[str]:
        given: list[str] = self.cleaned_data["more_prompts"]
        if not all(text.strip() for text in given):
            raise ValidationError("More texts must be a list of texts, none of them empty.")
        if len(given) >= Inference.MOST_PROMPTS:
            raise ValidationError(
                f"At most {Inference.MOST_PROMPTS} prompts are read at once; read more as a batch of prompts."
            )
        return [text.replace("\r\n", "\n") for text in given]

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
        for name, text in [
            ("prompt", data.get("prompt", "")),
            *(("more_prompts", t) for t in data.get("more_prompts", [])),
        ]:
            if too_long := self._too_long(model, text, data.get("new_tokens", 0)):
                self.add_error(name, too_long)
                break
        self._check_config(model, data)
        return data

    def _too_long(self, model: LanguageModel, text: str, new_tokens: int) -> str:
        n, limit = len(text), model.context_length
        most = limit * CHARACTERS_A_TOKEN if limit else MOST_CHARACTERS
        if n > most:
            reads = f"reads {limit:,} tokens" if limit else "sets no limit itself"
            return (
                f"The text has {n:,} characters; {model.name} {reads}, and at most {most:,} characters are accepted. "
                "Shorten it, or read it as a batch of prompts."
            )
        if limit and new_tokens >= limit:
            return f"{model.name} holds {limit:,} tokens in all, prompt included; ask for fewer new ones."
        return ""

    def _check_config(self, model: LanguageModel, data: dict[str, Any]) -> None:
        config = data.get("config")
        if config is None:
            return
        if reason := fault_of(config, model):
            self.add_error("config", reason)
        elif not data.get("new_tokens"):
            self.add_error("config", "A config steers what the model writes: ask for tokens to write first.")

    def begin(self, user: Any) -> Inference:
        row: Inference = self.start(user, title_of(self.cleaned_data["prompt"]))
        return row


class ContrastForm(forms.Form):
    """Two sets of texts to tell apart."""

    first = TextsField(
        strip=False,
        widget=forms.Textarea(attrs={"rows": 5, "spellcheck": "false", "dir": "auto", "data-key": "t"}),
        label="Texts, one a line",
        error_messages={"required": "Write at least one text."},
    )
    second = TextsField(
        strip=False,
        widget=forms.Textarea(attrs={"rows": 5, "spellcheck": "false", "dir": "auto"}),
        label="Against these, one a line",
        error_messages={"required": "Write at least one text to hold the others against."},
    )

    @property
    def texts(self) -> list[str]:
        return [*self.cleaned_data["first"], *self.cleaned_data["second"]]

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if not self.errors and len(self.texts) > Inference.MOST_PROMPTS:
            raise ValidationError(
                f"At most {Inference.MOST_PROMPTS} texts are read at once, and these are {len(self.texts)}."
            )
        return data


class PromptBatchForm(ReadersForm):
    """Prompts that are read one by one: of a file, which becomes a corpus, or of a corpus that is here."""

    file = forms.FileField(
        required=False,
        label="File of prompts",
        help_text="JSON Lines, CSV or Parquet with a prompt a row, or text with two empty lines between prompts. It is kept "
        "as a corpus.",
        error_messages={"empty": "The file is empty; choose a file with text."},
    )
    corpus = forms.ModelChoiceField(
        Corpus.objects.none(),
        required=False,
        label="Or a corpus",
        empty_label="none",
        help_text="Each of its documents is one prompt.",
        error_messages={"invalid_choice": "That corpus is not ready; choose another."},
    )
    text_field = forms.CharField(
        required=False,
        max_length=80,
        label="Field with the prompt",
        help_text='Of a file: its column or key; "text" when left empty.',
    )
    advanced = ["text_field", "top", "max_prompts", "prepend_bos"]

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
            "max_prompts": "All of them when left empty.",
            "prepend_bos": "As captures do, so that codes agree with those of harvested features.",
        }

    field_order = ("file", "corpus", "saes")

    def __init__(self, *args: Any, user: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        corpus: Any = self.fields["corpus"]
        corpus.queryset = Corpus.objects.ready()
        self.user = user
        self.new_corpus: CorpusForm | None = None
        if user is None or not allowed(user, "training.add_corpus"):
            del self.fields["file"], self.fields["text_field"]
            corpus.required, corpus.empty_label, corpus.label = True, None, "Corpus"
            corpus.error_messages["required"] = "Choose a corpus."
            self.advanced = [name for name in self.advanced if name != "text_field"]

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

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        corpus, model = data.get("corpus"), self.model_of
        if corpus and corpus.chats and model and not model.has_chat:
            told = f"{corpus.name} holds conversations, and {model.name} has no chat template to read them through."
            self.add_error("corpus", told)
        if "file" not in self.fields or {"file", "corpus"} & set(self.errors):
            return data
        if data.get("file") and data.get("corpus"):
            self.add_error("corpus", "Choose a file or a corpus, not both.")
        elif data.get("file"):
            self._check_file(data)
        elif not data.get("corpus"):
            self.add_error("file", "Choose a file of prompts, or a corpus.")
        return data

    def _check_file(self, data: dict[str, Any]) -> None:
        """As the page of corpora checks what is uploaded there."""
        name = unused_name(Corpus, Path(data["file"].name).stem[:100] or "prompts")
        given = {"source": Corpus.Source.UPLOAD, "name": name, "text_field": data.get("text_field", "")}
        self.new_corpus = CorpusForm(given, {"file": data["file"]}, user=self.user)
        for errors in self.new_corpus.errors.values():
            self.add_error("file", list(errors))

    def begin(self, user: Any) -> PromptBatch:
        with transaction.atomic():
            if self.new_corpus is not None:
                self.instance.corpus = self.new_corpus.make()
            names = ", ".join(sae.name for sae in self.cleaned_data["saes"])
            row: PromptBatch = self.start(user, f"{self.instance.corpus.name} by {names}"[:120])
        return row
