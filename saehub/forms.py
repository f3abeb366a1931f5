"""The house's form markup: `{{ form }}` and `{{ field.as_field_group }}` render with templates/forms/."""

from django.forms.renderers import TemplatesSetting


class HouseRenderer(TemplatesSetting):
    form_template_name = "forms/form.html"
    field_template_name = "forms/field.html"
