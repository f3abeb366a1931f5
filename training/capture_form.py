"""The form of a capture. Torch-free: the job checks again what only the model can tell."""

from __future__ import annotations

from typing import Any

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.urls import reverse_lazy

from saehub.typed import whole_number
from saes.fields import NewRow, server_path
from saes.models import LanguageModel
from saes.uploads import refuse_links
from training.estimates import CaptureEstimate, estimate_capture
from training.hook_points import HookPointsWidget, resolved, usual_hook
from training.models import Capture, Corpus
from training.preview import Policy, can_chat, preview


class RolesInput(forms.TextInput):
    """A line of names; a request may also give them as a list."""

    def value_from_datadict(self, data: Any, files: Any, name: str) -> str:
        given = data.getlist(name) if hasattr(data, "getlist") else [data.get(name) or ""]
        return ", ".join(map(str, given))

    def format_value(self, value: Any) -> str | None:
        return ", ".join(value) if isinstance(value, list | tuple) else value


class RolesField(forms.CharField):
    """Names with commas between them, as a list without repetitions."""

    widget = RolesInput

    def clean(self, value: Any) -> Any:
        return list(dict.fromkeys(part for part in str(super().clean(value)).replace(",", " ").split()))


class CaptureForm(NewRow):
    """What to run a model on, where to look into it, and what to keep."""

    model = forms.ModelChoiceField(LanguageModel.objects.none(), empty_label="Choose a model", label="Language model")
    hook_names = forms.Field(widget=HookPointsWidget, label="Hook points")
    corpus = forms.ModelChoiceField(Corpus.objects.none(), empty_label="Choose a corpus", label="Corpus")
    max_tokens = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=2**31 - 1,
        label="Tokens at most",
        help_text="The whole corpus when empty",
    )
    context_length = forms.IntegerField(min_value=2, max_value=131_072, initial=128, label="Context length, tokens")
    prepend_bos = forms.BooleanField(
        required=False, initial=True, label="BOS before every context", help_text="Left out for a model without one"
    )
    store_special = forms.BooleanField(
        required=False,
        label="Store special tokens too",
        help_text="BOS is an attention sink: its activations are tens of times larger and would rule the training",
    )
    dtype = forms.ChoiceField(choices=Capture.Storage.choices, initial=Capture.Storage.FP32, label="Stored as")
    packed = forms.TypedChoiceField(
        required=False,
        choices=[("1", "Packed: filled from one document after the other"), ("0", "Padded: one document in each")],
        coerce=lambda value: value != "0",
        empty_value=True,  # type: ignore[arg-type]
        initial="1",
        label="Contexts",
        help_text="Padding is never stored",
    )
    chat_template = forms.BooleanField(
        required=False,
        label="Through the chat template",
        help_text="A conversation goes through the model's own whole; a text becomes a user's message",
    )
    plain_chats = forms.BooleanField(
        required=False,
        label="Join messages plainly",
        help_text="Conversations only: each message as “role: content”, an empty line between",
    )
    roles = RolesField(
        required=False,
        max_length=400,
        label="Only tokens of these roles",
        help_text="Conversations only: such as assistant, or user, assistant. The model reads all; empty keeps all",
    )
    compute_dtype = forms.ChoiceField(
        required=False,
        choices=Capture.Compute.choices,
        initial=Capture.Compute.FP32,
        label="The model runs in",
        help_text="How far bfloat16 is from float32 is measured and shown",
    )
    max_norm_ratio = forms.FloatField(
        required=False,
        min_value=1.5,
        max_value=10**6,
        label="Largest norm, times the median",
        help_text="Tokens above it, such as attention sinks, are left out. 10 is usual; nothing is left out when empty",
    )
    stored = forms.TypedChoiceField(
        required=False,
        choices=[
            ("1", "Stored: computed once, read by every run"),
            ("0", "Streamed: nothing is kept, every run computes them again"),
        ],
        coerce=lambda value: value != "0",
        empty_value=True,  # type: ignore[arg-type]
        initial="1",
        label="Activations",
    )
    parts = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=64,
        initial=1,
        label="Parts",
        help_text="Jobs that share the work, on as many workers as there are",
    )
    location = forms.CharField(
        required=False,
        max_length=400,
        label="Read a mi_crow run instead",
        help_text="Path of the run's folder on the server: its activations are read, the model does not run",
    )
    advanced = [
        "name", "context_length", "prepend_bos", "store_special", "dtype", "packed", "chat_template", "plain_chats",
        "roles", "compute_dtype", "max_norm_ratio", "stored", "parts", "location",
    ]  # fmt: skip

    class Meta:
        model = Capture
        fields = (
            "model", "hook_names", "corpus", "max_tokens", "name", "context_length", "prepend_bos", "store_special",
            "dtype", "packed", "chat_template", "plain_chats", "roles", "compute_dtype", "max_norm_ratio", "stored", "parts",
            "location",
        )  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fields: Any = self.fields
        fields["model"].queryset = LanguageModel.objects.ready()
        fields["corpus"].queryset = Corpus.objects.ready()
        fields["model"].widget.attrs |= {
            "hx-get": reverse_lazy("training:capture_create"), "hx-target": "#hooks", "hx-swap": "outerHTML",
        }  # fmt: skip
        fields["hook_names"].error_messages["required"] = "Choose at least one hook point."
        chosen = self._model()
        fields["hook_names"].widget.model = chosen
        if not self.is_bound and fields["corpus"].queryset.count() == 1:
            self.initial.setdefault("corpus", fields["corpus"].queryset.get().pk)
        if chosen and not self.is_bound:
            corpus = fields["corpus"].queryset.filter(pk=self.initial.get("corpus"), chats=True).first()
            self.initial.setdefault("chat_template", bool(corpus and can_chat(chosen)))
            self.initial.setdefault("hook_names", [usual_hook(chosen)])
            self.initial.setdefault("model", chosen.pk)

    def _model(self) -> LanguageModel | None:
        """The model that is chosen in the form so far, or the only one there is."""
        pk = whole_number((self.data if self.is_bound else self.initial).get("model"))
        models = LanguageModel.objects.ready()
        if pk is not None:
            return models.filter(pk=pk).first()
        return models.first() if not self.is_bound and models.count() == 1 else None

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        model: Any = data.get("model")
        if model and data.get("hook_names"):
            try:
                data["hook_names"] = resolved(model, data["hook_names"])
            except ValidationError as error:
                self.add_error("hook_names", error)
        longest = model.context_length if model else None
        if longest and (data.get("context_length") or 0) > longest:
            self.add_error("context_length", f"{model.name} reads at most {longest:,} tokens at once.")
        data["prepend_bos"] = bool(data.get("prepend_bos") and model and model.has_bos)
        data["compute_dtype"] = data.get("compute_dtype") or Capture.Compute.FP32
        data["parts"] = 1 if data.get("location") else data.get("parts") or 1
        if model and data.get("chat_template") and not can_chat(model):
            self.add_error("chat_template", f"The tokenizer of {model.name} has no chat template.")
        if data.get("corpus"):
            self._check_chats(data)
            self._check_roles(data)
        if data.get("location"):
            self._check_store(data)
        if model and data.get("corpus"):
            self._check_size(data)
            self.check_name(lambda: f"{data['corpus'].name} · {model.name}")
        return data

    def _check_store(self, data: dict[str, Any]) -> None:
        """A run of mi_crow under a folder that pages may read; its job looks at every file of it."""
        try:
            path = server_path(data["location"].strip(), settings.IMPORT_DIRS)
            refuse_links(path, settings.IMPORT_DIRS)
            if not any(path.glob("batch_*/metadata.json")) and not any(path.glob("runs/*/batch_*/metadata.json")):
                raise ValidationError(f"{path.name} is not a mi_crow run: it has no batch_0/metadata.json.")
        except ValidationError as error:
            self.add_error("location", error)
        else:
            data["location"], data["stored"], data["max_tokens"] = str(path), True, None

    def _check_chats(self, data: dict[str, Any]) -> None:
        """How conversations become text is said, never guessed; of texts, joining messages says nothing."""
        corpus = data["corpus"]
        if not corpus.chats:
            data["plain_chats"] = False
        elif data.get("location"):
            self.add_error("corpus", f"{corpus.name} holds conversations; mi_crow runs are made from texts.")
        elif data.get("chat_template") and data.get("plain_chats"):
            self.add_error("plain_chats", "Conversations go through the chat template or are joined plainly, not both.")
        elif not (data.get("chat_template") or data.get("plain_chats") or "chat_template" in self.errors):
            told = f"{corpus.name} holds conversations: put them through the chat template, or join their messages plainly."
            self.add_error("chat_template", told)

    def _check_roles(self, data: dict[str, Any]) -> None:
        """Roles are those of the corpus, and its conversations' tokens can be told apart by them."""
        corpus, roles = data["corpus"], data.get("roles") or []
        if not roles or "roles" in self.errors:
            return
        if not corpus.chats:
            self.add_error("roles", f"{corpus.name} holds texts, which have no roles; leave this empty.")
            return
        there = corpus.sampled.roles
        unknown = [role for role in roles if role not in there]
        if unknown and (corpus.source != Corpus.Source.HUB and corpus.sampled.all_shapes):
            told = f"No conversation of {corpus.name} has a message of {unknown[0]}; its roles are {', '.join(there)}."
            self.add_error("roles", told)
        elif data.get("model") and not ({"chat_template", "plain_chats"} & self.errors.keys()):
            shown = preview(data["model"], corpus.sampled, Policy.of(data))
            if shown and shown.fault:
                self.add_error("roles", shown.fault)

    def _check_size(self, data: dict[str, Any]) -> None:
        estimate = estimate_capture(data)
        if estimate is None or data.get("location"):
            return
        if estimate.tokens is None:
            self.add_error(
                "max_tokens", f"{data['corpus'].name} is a stream whose length was not counted; set a limit."
            )
        elif not estimate.fits:
            self.add_error(
                "max_tokens",
                f"This needs about {(estimate.bytes or 0) / 1e9:.1f} GB and the disk has {estimate.free / 1e9:.1f} GB "
                "to spare; capture fewer tokens or hook points, or store bfloat16.",
            )

    def estimate(self) -> CaptureEstimate | None:
        """What the form as it stands would cost; fields with errors count as empty."""
        if self.is_bound:
            self.is_valid()
            return estimate_capture(self.cleaned_data)
        data = {name: self.get_initial_for_field(field, name) for name, field in self.fields.items()}
        chosen = Corpus.objects.ready().filter(pk=data["corpus"]).first() if data["corpus"] else None
        return estimate_capture(data | {"model": self._model(), "corpus": chosen})
