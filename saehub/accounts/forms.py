"""Forms of the account page: API tokens and the token for the Hub."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.utils import timezone

from saehub.accounts import hub_tokens
from saehub.accounts.models import APIToken, HubToken


class TokenForm(forms.Form):
    name = forms.CharField(max_length=80, label="What it is for", help_text="A script, a notebook, a machine")
    scope = forms.ChoiceField(choices=APIToken.Scope.choices, label="What it may do")
    days = forms.IntegerField(min_value=1, max_value=366, initial=90, label="Valid for, in days")

    def make(self, owner: object) -> str:
        """The new token's secret, to be shown once."""
        data = self.cleaned_data
        until = timezone.now() + timedelta(days=data["days"])
        return APIToken.make(owner, data["name"], data["scope"], until)[1]


class HubTokenForm(forms.Form):
    """A token for the Hub. It is asked about there first; one that the Hub does not know is not kept."""

    token = forms.CharField(
        max_length=200,
        label="Hub token",
        help_text="Make one with read access under Settings, Access Tokens on the Hub.",
        widget=forms.PasswordInput(attrs={"autocomplete": "off", "spellcheck": "false"}),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.account = self.unchecked = ""

    def clean_token(self) -> str:
        token = str(self.cleaned_data["token"])
        if not hub_tokens.SHAPE.fullmatch(token):
            raise forms.ValidationError("A token is letters and digits without spaces, such as hf_….")
        try:
            self.account = hub_tokens.whose(token)
        except hub_tokens.WrongToken as error:
            raise forms.ValidationError(str(error)) from None
        except hub_tokens.HubTokenError as error:
            self.unchecked = str(error)  # kept all the same: the Hub may be away for a while
        return token

    def save(self, owner: Any) -> HubToken:
        row = hub_tokens.save(owner, self.cleaned_data["token"])
        if self.account:
            row.account, row.checked_at = self.account, timezone.now()
            row.save(update_fields=["account", "checked_at"])
        return row
