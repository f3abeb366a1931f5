"""A generation as something to take along: a JSON record of all that decided it, and the Python that does it again."""

from __future__ import annotations

from typing import Any

from inference.models import Generation
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
        lines += ["steering = ["]
        for pk, sae in saes.items():
            lines += _steering(row, pk, sae)
        lines += ["]", f"steered = generate(lm, prompt, steering=steering, {settings})", "print(steered.text)"]
    lines += ["print(baseline.text)"]
    if row.instruction:
        lines += [f"prompted = generate(lm, {_given(row, row.prompt_only)!r}, {settings})", "print(prompted.text)"]
    return "\n".join(lines) + "\n"


def _given(row: Generation, text: str) -> Any:
    return [{"role": "user", "content": text}] if row.chat else text


def _steering(row: Generation, pk: int, sae: SAE) -> list[str]:
    """The lines of one SAE's edits; none for an SAE without."""
    edits = [edit for edit in row.edit_rows() if edit["sae"] == pk]
    if not edits:
        return []
    facts = f", facts={sae.facts!r}" if sae.facts else ""
    first = f", first={row.scope_from}" if row.scope == Generation.Scope.FROM else ""
    return [
        "    Steering(",
        f"        load_sae({str(sae.files)!r}{facts}),",
        f"        {sae.hook_name!r},",
        "        [",
        *(f"            Edit({e['feature']}, {e['mode']!r}, {e['value']!r}),  # {e['formula']}" for e in edits),
        "        ],",
        f"        scope={row.scope!r}{first},",
        "    ),",
    ]
