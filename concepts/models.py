"""What features mean: harvested views of an SAE's features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.db import models
from django.urls import reverse

from concepts import featurefile
from saehub.jobs.made import Made
from saes.models import SAE
from training.models import Capture


def captures_of(sae: SAE) -> list[Capture]:
    """Finished captures of the SAE's model that hold its hook point, newest first."""
    captures = Capture.objects.ready().filter(model=sae.model).select_related("model", "corpus")
    return [capture for capture in captures if FeatureView(sae=sae, capture=capture).hook]


@lru_cache(maxsize=8)
def _opened(folder: Path, written: int) -> featurefile.FeatureView:
    """A view stays open between pages: its columns are memory maps, and its summary a few bytes a feature."""
    return featurefile.open_view(folder)


class FeatureView(Made):
    """Top texts and statistics of every feature of an SAE on one capture; one row points at their files."""

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

    @property
    def layer_norm(self) -> float | None:
        """Mean L2 norm of the activations at the hook point, over the tokens captured."""
        return (self.capture.manifest or {}).get("norms", {}).get(self.hook)

    @property
    def hook(self) -> str | None:
        """The name under which the capture holds the SAE's hook point (TransformerLens name or module path)."""
        row = self.sae.model.hook(self.sae.hook_name) if self.sae.model else None
        names = {self.sae.hook_name} | ({row["name"], row["module"]} if row else set())
        return next((name for name in self.capture.hook_names if name in names), None)

    def opened(self) -> featurefile.FeatureView:
        """Its columns. Raises featurefile.ViewError when they are missing, unfinished or damaged."""
        try:
            written = (self.folder / featurefile.FACTS).stat().st_mtime_ns
        except FileNotFoundError:
            return featurefile.open_view(self.folder)  # says what is missing
        return _opened(self.folder, written)


NAME_TOKENS = 3


def name_of(columns: featurefile.FeatureView, feature: int, n: int = NAME_TOKENS) -> list[str]:
    """The feature's first top tokens, which stand for a name until it has a label."""
    ids = columns.summary["top_token_ids"][feature, :n]
    return columns.token_texts(ids[ids >= 0])


@dataclass(frozen=True)
class Known:
    """What makes a steering value readable: the feature's maximum, and the length of its direction in layer norms."""

    feature: int
    name: list[str]
    maximum: float  # 0 when it never fired
    per_norm: float | None  # decoder norm / mean norm of the layer: share of the layer's norm that one unit adds


def known_features(sae: SAE, features: Iterable[int]) -> dict[int, Known]:
    """`Known` of each feature by the SAE's newest view; empty without a view that can be read."""
    view = FeatureView.objects.ready().filter(sae=sae).select_related("capture__model", "sae__model").first()
    if view is None:
        return {}
    try:
        columns = view.opened()
        return {i: _known(view, columns, i) for i in features if 0 <= i < columns.n_features}
    except featurefile.ViewError:
        return {}


def _known(view: FeatureView, columns: featurefile.FeatureView, i: int) -> Known:
    norm = float(columns.column("decoder_norm")[i]) if columns.logit_lens and view.layer_norm else None
    maximum = float(columns.summary["max"][i])
    return Known(i, name_of(columns, i), maximum, norm / view.layer_norm if norm and view.layer_norm else None)
