"""SAEs to choose from: those that cannot do what is asked are shown with the reason, and cannot be chosen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django import forms
from django.db.models import OuterRef, Subquery

from concepts import compile as compiler
from concepts.models import ConceptConfig
from saes.abilities import why_not
from saes.models import SAE, LanguageModel

MOST = 400  # rows in one list


class _Disabling:
    """A select whose options of `reasons` (value -> why not) are disabled."""

    reasons: dict[Any, str] = {}

    def create_option(self, name: str, value: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        option: dict[str, Any] = super().create_option(name, value, *args, **kwargs)  # type: ignore[misc]
        if self.reasons.get(getattr(value, "value", value)):
            option["attrs"]["disabled"] = True
        return option


class Select(_Disabling, forms.Select):
    pass


class SelectMultiple(_Disabling, forms.SelectMultiple):
    pass


class Able:
    """The ready SAEs with a model here, and for each why it cannot do `action` ("" where it can)."""

    def __init__(self, action: str) -> None:
        rows: Any = SAE.objects.ready().filter(model__ready_at__isnull=False).select_related("model")
        self.queryset = rows
        self.rows: list[SAE] = list(rows[:MOST])
        self.reasons = {sae.pk: why_not(sae, action) for sae in self.rows}
        self.action = action

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def first(self) -> SAE | None:
        """The newest that can."""
        return next((sae for sae in self.rows if not self.reasons[sae.pk]), None)

    def why_not(self, sae: SAE) -> str:
        return self.reasons.get(sae.pk, "") or why_not(sae, self.action)

    def options(self, rows: Iterable[SAE] | None = None) -> list[tuple[Any, str]]:
        """What can be chosen first, the rest after it."""
        rows = self.rows if rows is None else rows
        ordered = sorted(rows, key=lambda sae: (bool(self.reasons.get(sae.pk)), -sae.pk))
        return [(sae.pk, self.label(sae)) for sae in ordered]

    def label(self, sae: SAE) -> str:
        place = f"{sae.name} ({sae.model.name if sae.model else sae.model_name}, {sae.hook_name})"
        reason = self.reasons.get(sae.pk)
        return f"{place}: not possible. {reason}" if reason else place

    def fit(self, field: Any, widget: Any) -> None:
        """Make a model choice field offer these."""
        field.queryset = self.queryset
        field.widget = widget
        widget.reasons = self.reasons
        field.choices = [*([("", field.empty_label)] if getattr(field, "empty_label", None) else []), *self.options()]


class ConfigField(forms.ModelChoiceField):
    """A concept config: the newest version of each, and whichever version a link names."""

    def __init__(self) -> None:
        super().__init__(
            ConceptConfig.objects.all(),
            required=False,
            label="Concept config",
            empty_label="none",
            error_messages={"invalid_choice": "There is no such concept config; choose one of the list."},
        )

    def offer(self, initial: dict[str, Any]) -> None:
        """Any version is accepted; offered are the newest ones of SAEs whose model is here, and the one in `initial`."""
        newest = ConceptConfig.objects.filter(sae=OuterRef("sae"), name=OuterRef("name")).order_by("-number")
        rows = ConceptConfig.objects.filter(pk=Subquery(newest.values("pk")[:1]), sae__model__ready_at__isnull=False)
        offered = list(rows.select_related("sae__model")[:MOST])
        named = initial.get("config")
        named = named if isinstance(named, ConceptConfig) else None
        if named is not None and named not in offered:
            offered.insert(0, named)
        self.choices = [("", self.empty_label), *((row.pk, config_label(row)) for row in offered)]


def config_label(config: ConceptConfig) -> str:
    n = len(config.edits)
    return f"{config.name} v{config.number} ({config.sae.name}, {n} edit{'' if n == 1 else 's'})"


def fault_of(config: ConceptConfig, model: LanguageModel | None) -> str:
    """Why a config cannot steer a generation of this model; "" when it can."""
    if reason := why_not(config.sae, "steer"):
        return f"{config.sae.name}, the SAE of {config}, cannot steer. {reason}"
    if model is not None and config.sae.model_id != model.pk and config.sae.model:
        return f"{config} is of {config.sae.model.name}, not of {model.name}; one generation has one model."
    try:
        config.compiled()
    except compiler.ConfigError as error:
        return f"{config} cannot be used. {error}"
    return ""
