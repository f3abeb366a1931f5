"""The first account of a new instance."""

from __future__ import annotations

import io
import re

import pytest
from django.contrib.auth import get_user_model

from saehub.jobs.management.commands.up import Command
from tests.conftest import make_user

pytestmark = pytest.mark.django_db


def test_the_first_account_is_made_once_and_says_its_password() -> None:
    said = io.StringIO()
    Command(stdout=said).first_admin()
    Command(stdout=said).first_admin()
    user = get_user_model().objects.get(is_superuser=True)
    [found] = re.findall(r"First account: (\S+), password (\S+) ", said.getvalue())
    assert found[0] == user.username == "admin" and user.check_password(found[1])
    assert [group.name for group in user.groups.all()] == ["admin"]


def test_a_person_who_is_named_admin_is_left_as_they_are() -> None:
    make_user("admin", "viewer")
    Command(stdout=io.StringIO()).first_admin()
    assert get_user_model().objects.get(is_superuser=True).username == "admin2"
    assert not get_user_model().objects.get(username="admin").is_staff
