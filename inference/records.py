"""A generation as something to take along: a JSON record of all that decided it, and the Python that does it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inference.models import Generation, Scope
from saes.models import SAE


def record(row: Generation) -> dict[str, Any]:
    """Everything that was asked for and came out, in JSON types."""
    return {
        "generation": row.pk,
        "made": row.created_at.isoformat(),
        "by": row.owner.get_username() if row.owner else None,
        "state": row.state,
        "model": {"name": row.model.name, "location": row.model.location, "revision": row.model.revision or None},
        "saes": [_sae(sae) for sae in row.edited_saes().values()],
        "prompt": row.prompt,
        "chat": row.chat,
        "edits": row.edit_rows(),
        "concept_config": row.config_fact or None,
        "scope": row.scope,
        "scope_from": row.scope_from,
        "instruction": row.instruction,
        "max_new_tokens": row.max_new_tokens,
        "temperature": row.temperature,
        "seed": row.seed,
        "policy": row.policy,
        "versions": row.versions,
        "seconds": row.seconds,
        "baseline": row.baseline,
        "steered": row.steered,
        "prompted": row.prompted,
    }


def _sae(sae: SAE) -> dict[str, Any]:
    return {"id": sae.pk, "name": sae.name, "hook_name": sae.hook_name, "sha256": sae.sha256}


def as_python(row: Generation) -> str:
    """A script that generates the texts again with the functions this site uses."""
    settings = f"max_new_tokens={row.max_new_tokens}, temperature={row.temperature!r}, seed={row.seed}"
    saes = row.edited_saes() if row.edits else {}
    lines = [
        "from inference.numerics.generate import generate",
        *(
            ["from inference.numerics.steer import Edit, Steering", "from saes.numerics.formats import load_sae"]
            if saes
            else []
        ),
        "from saes.numerics.lm import load_lm",
        "",
        f"lm = load_lm({row.model.load_from!r}, revision={row.model.revision or None!r})",
        f"prompt = {_given(row, row.prompt)!r}",
        f"baseline = generate(lm, prompt, {settings})",
    ]
    if saes:
        lines += ["steering = [", *(line for lines_ in _groups(row, saes) for line in lines_)]
        lines += ["]", f"steered = generate(lm, prompt, steering=steering, {settings})", "print(steered.text)"]
    lines += ["print(baseline.text)"]
    if row.instruction:
        lines += [f"prompted = generate(lm, {_given(row, row.prompt_only)!r}, {settings})", "print(prompted.text)"]
    return "\n".join(lines) + "\n"


def _given(row: Generation, text: str) -> Any:
    return [{"role": "user", "content": text}] if row.chat else text


def _groups(row: Generation, saes: Mapping[int, SAE]) -> Iterator[list[str]]:
    """The lines of the edits of each SAE at each choice of tokens."""
    groups: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for edit in row.edit_rows():
        groups.setdefault((edit["sae"], edit["scope"], edit["first"]), []).append(edit)
    for (pk, scope, first), edits in groups.items():
        if (sae := saes.get(pk)) is None:
            continue
        facts = f", facts={sae.facts!r}" if sae.facts else ""
        yield [
            "    Steering(",
            f"        load_sae({str(sae.files)!r}{facts}),",
            f"        {sae.hook_name!r},",
            "        [",
            *(f"            Edit({e['feature']}, {e['mode']!r}, {e['value']!r}),  # {e['formula']}" for e in edits),
            "        ],",
            f"        scope={scope!r}{f', first={first}' if scope == Scope.FROM else ''},",
            "    ),",
        ]
