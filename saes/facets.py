"""Two texts that the database keeps of every SAE, so that a list of a hundred thousand is counted and searched in a blink.

`facets` joins what one may narrow the list by: one GROUP BY on it counts all facets exactly. `words` is a search vector of
names, ids, paths and tags, whose parts are words of their own: "scope 262k" finds google/gemma-scope-2-1b-pt … width_262k.
"""

from __future__ import annotations

from django.contrib.postgres.search import SearchVectorField
from django.db.models import Func, TextField

# The model's name may come from a foreign file: it stands last, where no separator inside of it can shift the others.
# `tags` is a list written as JSON.
FACET_FIELDS = ("here", "source", "curation", "d_sae", "site", "architecture", "tags", "model_name")
SEPARATOR = "\x1f"


class FacetsText(Func):
    """FACET_FIELDS, joined; `here` is "here" or empty."""

    template = (
        "(CASE WHEN ready_at IS NULL THEN '' ELSE 'here' END || E'\\x1f' || source || E'\\x1f' || curation || E'\\x1f' || "
        "coalesce(d_sae::text, '') || E'\\x1f' || site || E'\\x1f' || architecture || E'\\x1f' || tags::text || "
        "E'\\x1f' || model_name)"
    )
    output_field = TextField()


class WordsVector(Func):
    """Everything but letters and digits parts words."""

    template = (
        "to_tsvector('simple'::regconfig, regexp_replace(name || ' ' || repo_id || ' ' || repo_path || ' ' || model_name || "
        "' ' || hook_name || ' ' || architecture || ' ' || neuronpedia_id || ' ' || aliases::text || ' ' || tags::text || ' ' || left(notes, 20000), "
        "'[^[:alnum:]]+', ' ', 'g'))"
    )
    output_field = SearchVectorField()
