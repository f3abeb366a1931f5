"""API tokens, answers kept for idempotency keys, and users' tokens for the Hub. Users and groups are Django's own."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import models
from django.utils import timezone

PREFIX = "sae_"


class APIToken(models.Model):
    """A key for scripts: shown once, kept as a SHA-256 digest, limited by scope and date.

    The digest needs no salt or stretching: the secret is 32 random bytes, not something a person chose.
    """

    class Scope(models.TextChoices):
        READ = "read", "read: look at everything you may look at"
        WRITE = "write", "write: also start, change and delete what you may"

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_tokens")
    name = models.CharField(max_length=80)
    scope = models.CharField(max_length=10, choices=Scope.choices, default=Scope.READ)
    start = models.CharField(max_length=12, editable=False, help_text="The first letters, to tell tokens apart.")
    digest = models.CharField(max_length=64, unique=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    used_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        ordering = ("-pk",)
        permissions = [("act_for_others", "Can change and cancel what others own"), ("use_admin", "Can use the admin")]

    def __str__(self) -> str:
        return f"{self.name} ({self.start}…)"

    @classmethod
    def make(cls, owner: Any, name: str, scope: str, expires_at: datetime) -> tuple[APIToken, str]:
        """A new token and its secret, which is not stored anywhere."""
        secret = PREFIX + secrets.token_urlsafe(32)
        row = cls.objects.create(
            owner=owner, name=name, scope=scope, start=secret[:10], digest=_digest(secret), expires_at=expires_at
        )
        return row, secret

    @classmethod
    def find(cls, secret: str) -> APIToken | None:
        """The living token of `secret`, marked as used; None for a wrong, expired or disabled one."""
        now = timezone.now()
        row = cls.objects.select_related("owner").filter(digest=_digest(secret), expires_at__gt=now).first()
        if row is None or not row.owner.is_active:
            return None
        cls.objects.filter(pk=row.pk).update(used_at=now)
        return row

    @property
    def expired(self) -> bool:
        return self.expires_at <= timezone.now()

    def covers(self, permission: str) -> bool:
        return self.scope == self.Scope.WRITE or permission == "login" or ".view_" in permission


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class KeptAnswer(models.Model):
    """What a request with an `Idempotency-Key` was answered; written in the transaction that did what it asked for."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    key = models.CharField(max_length=200)
    digest = models.CharField(max_length=64, help_text="Of the request: the same key with another one is refused")
    status = models.PositiveSmallIntegerField(default=0)
    body = models.JSONField(null=True)
    expires_at = models.DateTimeField(db_index=True)

    class Meta:
        ordering = ("-pk",)
        constraints = [models.UniqueConstraint(fields=["owner", "key"], name="one_answer_of_a_key")]

    def __str__(self) -> str:
        return self.key


class HubToken(models.Model):
    """A user's token for the Hugging Face Hub. It is sealed and opened in `saehub.accounts.hub_tokens` alone."""

    owner = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="hub_token")
    sealed = models.TextField(editable=False, help_text="Encrypted with a key derived from SECRET_KEY")
    ending = models.CharField(max_length=4, editable=False, help_text="The last letters, to tell tokens apart")
    account = models.CharField(max_length=120, blank=True, editable=False, help_text="Whose it is, as the Hub said")
    set_at = models.DateTimeField(editable=False)
    checked_at = models.DateTimeField(null=True, editable=False, help_text="When the Hub last knew it")

    class Meta:
        ordering = ("owner__username",)

    def __str__(self) -> str:
        return f"Hub token …{self.ending}"


class Change(models.Model):
    """A request that changed something: who sent it, what it asked for, and on which way it came."""

    class Way(models.TextChoices):
        PAGE = "page", "page"
        API = "api", "API"
        ADMIN = "admin", "administration"

    at = models.DateTimeField(default=timezone.now, db_index=True)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    name = models.CharField(max_length=150, help_text="Of the user, kept when the account is deleted")
    way = models.CharField(max_length=10, choices=Way.choices)
    token = models.CharField(max_length=100, blank=True, help_text="Name of the API token")
    method = models.CharField(max_length=10, help_text="POST, PUT, PATCH or DELETE")
    what = models.CharField(max_length=100, help_text="Name of the view or operation, as in the code")
    path = models.CharField(max_length=300, help_text="Its address, which names the row, without what was sent")

    class Meta:
        ordering = ("-pk",)
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.name}: {self.method} {self.path}"
