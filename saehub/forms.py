"""The house's form markup: `{{ form }}` and `{{ field.as_field_group }}` render with templates/forms/."""

from __future__ import annotations

from typing import Any

from django.forms.renderers import TemplatesSetting


class HouseRenderer(TemplatesSetting):
    """Fields that a form names in `advanced` are folded, and unfold by themselves when one of them has an error."""

    form_template_name = "forms/form.html"
    field_template_name = "forms/field.html"

    def render(self, template_name: str, context: dict[str, Any], request: Any = None) -> str:
        if template_name == self.form_template_name:
            context = context | self._split(context)
        return super().render(template_name, context, request)

    @staticmethod
    def _split(context: dict[str, Any]) -> dict[str, Any]:
        names = getattr(context["form"], "advanced", ())
        folded = [pair for pair in context["fields"] if pair[0].name in names]
        return {
            "first": [pair for pair in context["fields"] if pair[0].name not in names],
            "folded": folded,
            "folded_errors": any(errors for _, errors in folded),
        }
