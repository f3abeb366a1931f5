"""A text of one's own on SAEs: the finished reading of it that is there already, or a new one with the harvest's policy.

A reading holds every feature of its SAEs, so the next feature on the same text, the next person who opens the link and the
search over all SAEs share one row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from django.http import HttpRequest

from concepts.models import FeatureView
from inference.infer_forms import MAX_SAES, InferenceForm
from inference.models import Inference
from saehub.typed import row_number
from saes.models import SAE

LONGEST_IN_LINK = 2000  # characters; a longer text is linked by the number of its reading


def asked_text(request: HttpRequest) -> str:
    """The text of `?text=` or of the form, as it would be read."""
    given = request.POST if request.method == "POST" else request.GET
    return str(given.get("text", "")).replace("\0", "").replace("\r\n", "\n")


def asked_reading(request: HttpRequest, saes: Sequence[SAE]) -> Inference | None:
    """The reading of `?reading=`, where all of these SAEs read along."""
    pk = row_number(request.GET.get("reading", ""))
    if not pk:
        return None
    row = Inference.objects.select_related("job", "model").prefetch_related("saes").filter(pk=pk).first()
    return row if row is not None and _serves(row, saes) else None


def reading_of(text: str, saes: Sequence[SAE], prepend_bos: bool, more: Sequence[str] = ()) -> Inference | None:
    """The newest reading of this text by all of these SAEs: a finished one, else one under way, else one that failed.

    more: the texts that were read after it, where they matter.
    """
    if not text or not saes:
        return None
    rows = Inference.objects.select_related("job", "model").prefetch_related("saes")
    rows = rows.filter(model=saes[0].model_id, prompt=text, chat=False, prepend_bos=prepend_bos, new_tokens=0)
    rows = rows.filter(more_prompts=list(more)) if more else rows
    rows = rows.filter(saes__in=[sae.pk for sae in saes]).distinct()
    found = [row for row in rows[:20] if _serves(row, saes)]
    return next((row for row in found if row.ready), None) or next((row for row in found if row.busy), None) or (
        found[0] if found else None
    )  # fmt: skip


def _serves(row: Inference, saes: Sequence[SAE]) -> bool:
    """Whether all of them read it, with the weights they have now."""
    if row.ready:
        read = {fact["sae"]: fact.get("sha256") for fact in row.facts}
        return all(sae.pk in read and read[sae.pk] == sae.sha256 for sae in saes)
    return {sae.pk for sae in saes} <= {sae.pk for sae in row.saes.all()}


def policy_of(view: FeatureView | None) -> bool:
    """Whether a text begins with BOS: as in the harvest it is held against, else as captures do by default."""
    return view.capture.prepend_bos if view is not None else True


def text_form(
    text: str, saes: Sequence[SAE], prepend_bos: bool, *, most: int = MAX_SAES, more: Sequence[str] = ()
) -> InferenceForm:
    """The playground's form, filled: what it refuses is refused here in the same words.

    most: SAEs at a time. more: texts that are read after the first.
    """
    data: dict[str, Any] = {"prompt": text, "saes": [sae.pk for sae in saes], "more_prompts": json.dumps(list(more))}
    form = InferenceForm(data | ({"prepend_bos": "on"} if prepend_bos else {}))
    form.most = most
    return form


def link_to(row: Inference) -> dict[str, Any]:
    """What of a link carries the text."""
    return {"text": row.prompt} if len(row.prompt) <= LONGEST_IN_LINK else {"reading": row.pk}
