"""Forms of the feature pages: what to harvest, and which features to list."""

from __future__ import annotations

from typing import Any

from django import forms

from concepts.featurefile import SORT_KEYS
from concepts.models import FeatureView, captures_of
from saes.abilities import why_not
from saes.models import SAE
from training.models import Capture

PAGE_SIZES = (25, 50)
ORDERS = (*SORT_KEYS, "token", "label")


class HarvestForm(forms.Form):
    """The capture whose tokens are searched for top texts."""

    capture = forms.ModelChoiceField(Capture.objects.none(), empty_label=None, label="Capture")

    def __init__(self, sae: SAE, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sae = sae
        self.captures = captures_of(sae)
        field: Any = self.fields["capture"]
        field.queryset = Capture.objects.filter(pk__in=[capture.pk for capture in self.captures])
        field.error_messages = {
            "required": "Choose the capture to search for top texts.",
            "invalid_choice": f"That capture does not hold {sae.hook_name} of {sae.model_name}; choose another one.",
        }
        run = getattr(sae, "run", None)
        self.initial.setdefault("capture", run.capture_id if run else None)

    def clean_capture(self) -> Capture:
        capture: Capture = self.cleaned_data["capture"]
        hook = FeatureView(sae=self.sae, capture=capture).hook
        d = capture.d_in(hook) if hook else None
        if d is not None and d != self.sae.d_in:
            raise forms.ValidationError(
                f"This SAE reads vectors of {self.sae.d_in} numbers, but {hook} of {capture.model.name} gives {d}; "
                "choose the capture of the model it was trained on."
            )
        if reason := why_not(self.sae, "harvest"):
            raise forms.ValidationError(f"Its features cannot be harvested: {reason}")
        return capture

    def view(self, user: Any) -> FeatureView:
        """The view this SAE has on that capture, or a new one: harvesting again replaces what is there."""
        capture = self.cleaned_data["capture"]
        found = FeatureView.objects.filter(sae=self.sae, capture=capture).select_related("job").first()
        name = f"{self.sae.name} on {capture.name}"[:120]
        return found or FeatureView.objects.create(sae=self.sae, capture=capture, name=name, owner=user)


def _bound(label: str, most: float | None = None) -> forms.FloatField:
    """One end of a range; the label is read aloud, the pair's legend is seen."""
    widget = forms.NumberInput(attrs={"step": "any", "aria-label": label})
    return forms.FloatField(required=False, min_value=0, max_value=most, label=label, widget=widget)


class FeatureFilterForm(forms.Form):
    """Which features of a view are listed, in which order. Lives in the URL; what cannot be used is left out."""

    state = forms.ChoiceField(
        choices=[("", "all"), ("alive", "alive"), ("dead", "dead")], required=False, label="State"
    )
    named = forms.ChoiceField(
        choices=[("", "all"), ("named", "named"), ("unnamed", "not named")], required=False, label="Label"
    )
    label = forms.CharField(max_length=100, required=False, label="Label holds")
    token = forms.CharField(max_length=60, required=False, strip=False, label="Top token holds")
    raises = forms.CharField(max_length=60, required=False, strip=False, label="Raises a token that holds")
    density_low = _bound("Density at least, %", 100)
    density_high = _bound("Density at most, %", 100)
    max_low = _bound("Maximum at least")
    max_high = _bound("Maximum at most")
    sort = forms.ChoiceField(
        choices=[(sign + key, key) for key in ORDERS for sign in ("-", "")],
        required=False,
        widget=forms.HiddenInput,
    )
    size = forms.TypedChoiceField(
        choices=[(n, n) for n in PAGE_SIZES],
        coerce=int,
        required=False,
        widget=forms.HiddenInput,
    )

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        for name, words in (("density", "density"), ("max", "maximum")):
            low, high = data.get(f"{name}_low"), data.get(f"{name}_high")
            if low is not None and high is not None and low > high:
                self.add_error(f"{name}_high", f"The largest {words} is below the smallest.")
        return data

    @property
    def page_size(self) -> int:
        return int(self.cleaned_data.get("size") or PAGE_SIZES[0])

    @property
    def order(self) -> tuple[str, bool]:
        """Sort key and whether descending."""
        sort = self.cleaned_data.get("sort") or "feature"
        return sort.lstrip("-"), sort.startswith("-")

    def filters(self) -> dict[str, Any]:
        """What `featurefile.FeatureView.sorted` is given."""
        data = self.cleaned_data
        wanted: dict[str, Any] = {}
        if data.get("state"):
            wanted["alive"] = data["state"] == "alive"
        for name in ("token", "raises"):
            if data.get(name):
                wanted[name] = data[name]
        for name, unit in (("density", 100), ("max", 1)):
            low, high = data.get(f"{name}_low"), data.get(f"{name}_high")
            if low is not None or high is not None:
                wanted[name] = (low if low is None else low / unit, high if high is None else high / unit)
        return wanted
