"""What features mean: harvested views of an SAE's features."""

from __future__ import annotations

from typing import Any

from django.db import models
from django.urls import reverse

from saehub.jobs.made import Made
from saes.models import SAE
from training.models import Capture


class FeatureView(Made):
    """Top texts and statistics of every feature of an SAE on one capture; the columns are files, one row points at them."""

    KIND = "harvest"
    FOLDER = "views"

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="views")
    capture = models.ForeignKey(Capture, on_delete=models.PROTECT, related_name="views")
    k = models.PositiveIntegerField(default=20, help_text="Top contexts kept per feature")
    n_tokens = models.BigIntegerField(null=True, editable=False)
    alive = models.PositiveIntegerField(null=True, editable=False)
    dead = models.PositiveIntegerField(null=True, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("concepts:feature_list", args=[self.sae_id])

    def start(self, user: Any, *, title: str = "") -> Any:
        from saehub.jobs.models import enqueue

        self.job = enqueue("harvest", user, title=title or f"Harvest {self.sae.name}", sae=self.sae_id, view=self.pk)
        self.save(update_fields=["job"])
        return self.job
