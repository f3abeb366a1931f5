"""Choosing hook points in a form: a table of layers by places, and a line for names typed by hand."""

from __future__ import annotations

import difflib
import re
from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from saes.models import LanguageModel


def usual_hook(model: LanguageModel) -> str:
    """The residual stream after a layer a third of the way up, where features are neither of spelling nor of output."""
    name = f"blocks.{round(0.3 * (model.n_layers or 1))}.hook_resid_post"
    return name if model.hook(name) or not model.hook_points else model.hook_points[-1]["name"]


def unknown_hook(model: LanguageModel, name: str) -> str:
    """What is wrong with a name that the model does not have, in one sentence."""
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if layer and int(layer[1]) >= (model.n_layers or 0):
        return (
            f"There is no layer {layer[1]} for {name}: the layers of {model.name} are 0 to {(model.n_layers or 1) - 1}."
        )
    near = difflib.get_close_matches(name, [row["name"] for row in model.hook_points], n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the names are like {usual_hook(model)}."
    return f"{model.name} has no hook point {name}; {hint}"


def resolved(model: LanguageModel, names: list[str]) -> list[str]:
    """The TransformerLens names of what was chosen, in the order of a forward pass. Raises ValidationError."""
    rows = []
    for name in names:
        row = model.hook(name)
        if row is None:
            raise ValidationError(unknown_hook(model, name))
        rows.append(row["name"])
    return [row["name"] for row in model.hook_points if row["name"] in rows]


def matrix(model: LanguageModel, chosen: list[str]) -> dict[str, Any]:
    """Hook points as a table: `places` its columns, `rows` a layer each; a cell is a hook point or None."""
    places: list[str] = []
    layers: dict[Any, dict[str, dict[str, Any]]] = {}
    for point in model.hook_points:
        place = re.sub(r"^blocks\.\d+\.(hook_)?", "", point["name"])
        if place not in places:
            places.append(place)
        layers.setdefault(point["layer"], {})[place] = point | {"chosen": point["name"] in chosen}
    inner = [place for place in places if any(place in row for layer, row in layers.items() if layer is not None)]
    return {
        "places": inner,
        "rows": [(layer, [row.get(place) for place in inner]) for layer, row in layers.items() if layer is not None],
        "outside": list(layers.get(None, {}).values()),
    }


class HookPointsWidget(forms.Widget):
    """Check boxes, and a line `<name>_typed` beside them. `model` is set by the form; without one it is empty."""

    template_name = "training/capture_create.html#hooks"
    use_fieldset = True
    model: LanguageModel | None = None

    def get_context(self, name: str, value: Any, attrs: dict[str, Any] | None) -> dict[str, Any]:
        context = super().get_context(name, value, attrs)
        chosen = list(value or ())
        known = {row["name"] for row in self.model.hook_points} if self.model else set()
        context["widget"] |= {
            "model": self.model,
            "table": matrix(self.model, chosen) if self.model else None,
            "chosen": [self.model.hook(hook) for hook in chosen if hook in known] if self.model else [],
            "typed": " ".join(hook for hook in chosen if hook not in known),
            "wrong": "aria-invalid" in context["widget"]["attrs"],
        }
        return context

    def value_from_datadict(self, data: Any, files: Any, name: str) -> list[str]:
        checked = data.getlist(name) if hasattr(data, "getlist") else list(data.get(name) or ())
        typed = str(data.get(f"{name}_typed") or "").replace(",", " ").split()
        return list(dict.fromkeys([*checked, *typed]))

    def value_omitted_from_data(self, data: Any, files: Any, name: str) -> bool:
        return name not in data and f"{name}_typed" not in data
