"""Operations go through the same forms as the pages: what a request gives is laid over what the form begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django import forms
from django.utils.datastructures import MultiValueDict

from saehub.accounts.api_access import Problem


def laid_over(form: forms.BaseForm, given: Mapping[str, Any]) -> MultiValueDict[str, Any]:
    """What a browser would send of an unbound form in which `given` was filled in; None leaves a field as it begins.

    Raises Problem 422 for a name the form does not have.
    """
    strange = [name for name in given if name not in form.fields]
    if strange:
        told = f"There is no {strange[0]}; known are {', '.join(form.fields)}."
        raise Problem(422, told, errors={name: [f"There is no {name}."] for name in strange})
    data: MultiValueDict[str, Any] = MultiValueDict()
    for name, field in form.fields.items():
        value = given.get(name)
        if value is None:
            value = form.get_initial_for_field(field, name)
        if isinstance(value, list | tuple):
            data.setlist(name, list(value))
        elif isinstance(value, bool) and isinstance(field, forms.ChoiceField):
            data[name] = _choice(field, value)
        elif value is not None and value is not False:
            data[name] = value
    return data


def _choice(field: forms.ChoiceField, value: bool) -> str:
    """Which of a field's choices says yes, or no."""
    words = ("1", "yes") if value else ("0", "no")
    return next((word for word in words if field.valid_value(word)), str(value))


def refuse(form: Any, names: Mapping[str, str] | None = None) -> None:
    """Raise Problem 422 with the errors of a form that is not valid. names: field -> what the request calls it."""
    if form.is_valid():
        return
    errors = {(names or {}).get(name, name): [str(error) for error in found] for name, found in form.errors.items()}
    name, said = next(iter(errors.items()))
    first = said[0] if said[0].endswith(".") else f"{said[0]}."
    raise Problem(422, first if name == "__all__" else f"{name}: {first}", errors=errors)
