"""The house's form markup: `{{ form }}` and `{{ field.as_field_group }}` render with templates/forms/."""

from __future__ import annotations

from typing import Any

from django.forms.renderers import TemplatesSetting


class HouseRenderer(TemplatesSetting):
    form_template_name = "forms/form.html"
    field_template_name = "forms/field.html"

    def render(self, template_name: str, context: dict[str, Any], request: Any = None) -> str:
        """A form's fields named in its `advanced` go under a fold, which opens when one of them has an error."""
        if template_name == self.form_template_name:
            names = getattr(context["form"], "advanced", ())
            folded = [row for row in context["fields"] if row[0].name in names]
            context = context | {
                "first": [row for row in context["fields"] if row[0].name not in names],
                "folded": folded,
                "folded_errors": any(row[0].errors for row in folded),
            }
        return super().render(template_name, context, request)
