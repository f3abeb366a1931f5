from __future__ import annotations

from datetime import timedelta

from django import forms
from django.utils import timezone

from saehub.accounts.models import APIToken


class TokenForm(forms.Form):
    name = forms.CharField(max_length=80, label="What it is for", help_text="A script, a notebook, a machine")
    scope = forms.ChoiceField(choices=APIToken.Scope.choices, label="What it may do")
    days = forms.IntegerField(min_value=1, max_value=366, initial=90, label="Valid for, in days")

    def make(self, owner: object) -> str:
        """The new token's secret, to be shown once."""
        data = self.cleaned_data
        until = timezone.now() + timedelta(days=data["days"])
        return APIToken.make(owner, data["name"], data["scope"], until)[1]
