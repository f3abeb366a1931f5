"""Which language model a name means: an SAE's files, the catalogue and the models of this instance each spell it their way."""

from __future__ import annotations

from pathlib import Path

from saes.models import SAE, LanguageModel


def matching_model(*names: str) -> LanguageModel | None:
    """The language model here that one of these names means: by location, by name, or by the last part of its location."""
    rows = list(LanguageModel.objects.only("pk", "name", "location", "ready_at"))
    rows.sort(key=lambda row: (row.ready_at is None, row.pk))
    for name in filter(None, names):
        for place in range(3):
            found = [row for row in rows if _same(name, _spellings(row)[place])]
            if found:
                return found[0]
    return None


def link_waiting(model: LanguageModel) -> int:
    """Give a new model the SAEs that were here before it and name it; returns how many."""
    waiting = SAE.objects.ready().filter(model=None).exclude(model_name="")
    names = waiting.order_by().values_list("model_name", flat=True).distinct()
    meant = [name for name in names if means(name, model)]
    return int(waiting.filter(model_name__in=meant).update(model=model))


def means(name: str, model: LanguageModel) -> bool:
    """Whether a name means this model."""
    return any(_same(name, spelling) for spelling in _spellings(model))


def _spellings(row: LanguageModel) -> tuple[str, str, str]:
    return row.location, row.name, Path(row.location).name


def _same(wanted: str, found: str) -> bool:
    """Hub ids and TransformerLens names of one model differ in the organisation, in case and in gpt2's suffix."""
    if "/" in wanted and "/" in found and not found.startswith("/"):
        return wanted.lower() == found.lower()
    short = [name.rpartition("/")[2].lower().replace("_", "-").removesuffix("-small") for name in (wanted, found)]
    return short[0] == short[1] != ""
