"""A generation as something to take along: a JSON record of all that decided it, and the Python that does it again."""

from __future__ import annotations

from typing import Any

from inference.models import Generation


def record(row: Generation) -> dict[str, Any]:
    """Everything that was asked for and came out, in JSON types."""
    return {
        "generation": row.pk,
        "made": row.created_at.isoformat(),
        "by": row.owner.get_username() if row.owner else None,
        "state": row.state,
        "model": {"name": row.model.name, "location": row.model.location, "revision": row.model.revision or None},
        "sae": _sae(row),
        "prompt": row.prompt,
        "chat": row.chat,
        "edits": row.edit_rows(),
        "scope": row.scope,
        "max_new_tokens": row.max_new_tokens,
        "temperature": row.temperature,
        "seed": row.seed,
        "policy": row.policy,
        "versions": row.versions,
        "seconds": row.seconds,
        "baseline": row.baseline,
        "steered": row.steered,
    }


def _sae(row: Generation) -> dict[str, Any] | None:
    sae = row.sae
    if sae is None:
        return None
    return {"id": sae.pk, "name": sae.name, "hook_name": sae.hook_name, "sha256": sae.sha256}


def as_python(row: Generation) -> str:
    """A script that generates both texts again with the functions this site uses."""
    prompt: Any = [{"role": "user", "content": row.prompt}] if row.chat else row.prompt
    settings = f"max_new_tokens={row.max_new_tokens}, temperature={row.temperature!r}, seed={row.seed}"
    lines = [
        "from inference.numerics.generate import generate",
        "from saes.numerics.lm import load_lm",
        "",
        f"lm = load_lm({row.model.load_from!r}, revision={row.model.revision or None!r})",
        f"prompt = {prompt!r}",
        f"baseline = generate(lm, prompt, {settings})",
    ]
    if row.sae and row.edits:
        lines.insert(1, "from inference.numerics.steer import Edit, Steering")
        lines.insert(2, "from saes.numerics.formats import load_sae")
        lines += [
            f"sae = load_sae({str(row.sae.files)!r})",
            "edits = [",
            *(
                f"    Edit({edit['feature']}, {edit['mode']!r}, {edit['value']!r}),  # {edit['formula']}"
                for edit in row.edit_rows()
            ),
            "]",
            f"steering = [Steering(sae, {row.sae.hook_name!r}, edits, scope={row.scope!r})]",
            f"steered = generate(lm, prompt, steering=steering, {settings})",
            "print(steered.text)",
        ]
    return "\n".join([*lines, "print(baseline.text)"]) + "\n"
