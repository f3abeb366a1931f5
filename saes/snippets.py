"""How to load an SAE in Python: with us, with SAELens, with the Hub's own client, whichever fits where it is from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saes.models import SAE

FOR_LOADING = (
    "repo_id", "repo_path", "model_name", "hook_name", "hook_name_out", "k", "norm_scaling_factor",
    "normalize_activations", "apply_b_dec_to_input", "architecture", "layer",
)  # fmt: skip


@dataclass(frozen=True)
class Snippet:
    title: str
    code: str


def snippets(sae: SAE) -> list[Snippet]:
    """Lines of Python that load this SAE, for each way that works as it stands."""
    found = []
    if sae.ready:
        found.append(Snippet("Here, with SAEHub", _ours(repr(str(sae.files)), sae)))
    if sae.ready and sae.format == "saelens":
        code = f"from sae_lens import SAE\n\nsae = SAE.load_from_disk({str(sae.files)!r})"
        found.append(Snippet("Here, with SAELens 6 and later", code))
    if sae.release and sae.sae_id:
        code = f"from sae_lens import SAE\n\nsae = SAE.from_pretrained({sae.release.name!r}, {sae.sae_id!r})"
        found.append(Snippet("Anywhere, with SAELens", code))
    if sae.repo_id:
        found.append(Snippet("Anywhere, from the Hub", _from_hub(sae)))
    return found


def _facts(sae: SAE) -> dict[str, Any]:
    return {name: sae.facts[name] for name in FOR_LOADING if name in sae.facts}


def _ours(path: str, sae: SAE, facts: dict[str, Any] | None = None) -> str:
    facts = _facts(sae) if facts is None else facts
    given = f", facts={facts!r}" if facts else ""
    place = f" at {' '.join(sae.hook_name.split())}" if sae.hook_name else ""  # a comment stays on its line
    sizes = f"x (n, {sae.d_in}){place} -> (n, {sae.d_sae})" if sae.d_in and sae.d_sae else f"x{place}"
    return (
        "from saes.numerics.formats import load_sae\n\n"
        f"sae = load_sae({path}{given})\n"
        f"acts = sae.encode(x)        # {sizes}\n"
        "x_hat = sae.decode(acts, x)"
    )


def _from_hub(sae: SAE) -> str:
    revision = f", revision={sae.revision!r}" if sae.revision else ""
    where = f"folder + {'/' + sae.repo_path!r}" if sae.repo_path not in ("", ".") else "folder"
    patterns = f", allow_patterns=[{sae.repo_path + '*'!r}]" if sae.repo_path not in ("", ".") else ""
    facts = {"repo_id": sae.repo_id, **_facts(sae)}
    return (
        "from huggingface_hub import snapshot_download\n"
        f"folder = snapshot_download({sae.repo_id!r}{revision}{patterns})\n\n" + _ours(where, sae, facts)
    )
