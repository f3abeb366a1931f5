"""The form that asks a language model to name features."""

from __future__ import annotations

from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import transaction

from concepts.explanations import (
    MOST_FEATURES,
    Explanation,
    as_ranges,
    expected_seconds,
    from_ranges,
    tokens_a_feature,
    unnamed,
)
from concepts.models import FeatureView
from saes.models import LanguageModel


class ExplainForm(forms.ModelForm):
    """Which features of a view, which language model, and how the names are tested."""

    features = forms.CharField(
        max_length=20_000,
        label="Features",
        help_text=f"Numbers and ranges such as 3, 7-9; at most {MOST_FEATURES:,} at once.",
        widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false"}),
        error_messages={"required": "Write at least one feature number."},
    )
    model = forms.ModelChoiceField(
        LanguageModel.objects.none(),
        empty_label=None,
        label="Language model that names them",
        help_text="Any model that is here; the larger it is, the better the names.",
        error_messages={"invalid_choice": "That language model is not ready; choose another."},
    )
    only_unnamed = forms.BooleanField(
        required=False, initial=True, label="Leave out features that have an accepted name"
    )
    advanced = ("n_shown", "n_tested", "accept_from")

    class Meta:
        model = Explanation
        fields = ("model", "n_shown", "n_tested", "accept_from")
        labels = {
            "n_shown": "Top texts that it sees of a feature",
            "n_tested": "Texts of either kind in the test",
            "accept_from": "Accept names from this score on",
        }
        help_texts = {
            "n_tested": "As many on which the feature fires as on which it does not; 0 makes no test.",
            "accept_from": "0.5 is chance. Only where a feature has no accepted name; left empty, none is accepted.",
        }

    field_order = ("features", "model", "only_unnamed")

    def __init__(self, view: FeatureView, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.view = view
        self.instance.view = view
        field: Any = self.fields["model"]
        field.queryset = LanguageModel.objects.ready()
        self.initial.setdefault("model", view.sae.model_id)

    def clean_features(self) -> list[int]:
        try:
            return from_ranges(self.cleaned_data["features"], self.view.sae.n_features)
        except ValueError as error:
            raise ValidationError(str(error)) from error

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if data.get("n_tested") == 0 and data.get("accept_from") is not None:
            self.add_error("accept_from", "Without a test there is no score to accept names by; leave this empty.")
        if data.get("n_tested") == 1:
            self.add_error("n_tested", "A test needs at least 2 texts of either kind, or 0 for none.")
        if data.get("features") and data.get("only_unnamed"):
            data["features"] = unnamed(self.view.sae, data["features"])
            if not data["features"]:
                self.add_error("features", "All of these features have an accepted name already.")
        return data

    def estimate(self) -> dict[str, Any] | None:
        """What it costs, of a form that was checked; None while something in it is wrong."""
        data = self.cleaned_data
        if self.errors or not data.get("features"):
            return None
        n, shown, tested = len(data["features"]), data["n_shown"], data["n_tested"]
        like = expected_seconds(data["model"], n, shown, tested)
        return {
            "n": n,
            "tokens": n * tokens_a_feature(shown, tested),
            "seconds": like and like[0],
            "like": like and like[1],
        }

    def begin(self, user: Any) -> Explanation:
        """The row and its job."""
        row: Explanation = self.instance
        with transaction.atomic():
            row.features, row.owner = self.cleaned_data["features"], user
            row.name = f"{as_ranges(row.features)} of {self.view.sae.name}"[:120]
            row.save()
            n = len(row.features)
            row.start(user, title=f"Name {n:,} feature{'s' * (n != 1)} of {self.view.sae.name}")
        return row
