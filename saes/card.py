"""The model card that goes with an SAE: what it is, what was measured and how, where it is from, how it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from saes.metrics import grouped
from saes.models import SAE
from saes.sharing import AS_IS, FORMATS

LOADERS = {  # how the tool of a format reads the folder that `folder` names
    "saelens": 'from sae_lens import SAE\n\nsae = SAE.load_from_disk("{folder}")',
    "sparsify": 'from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_disk("{folder}")',
    "dictionary_learning": (
        'from dictionary_learning.utils import load_dictionary\n\nsae, config = load_dictionary("{folder}", device="cpu")'
    ),
    "mistudio_community": 'from sae_lens import SAE\n\nsae = SAE.load_from_disk("{folder}")',
}


def model_card(
    sae: SAE, form: str, *, licence: str = "", repo_id: str = "", path: str = "", proof: Mapping[str, Any] | None = None
) -> str:
    """Markdown with the Hub's metadata in front.

    form: a key of `saes.sharing.FORMATS`. repo_id, path: where it will be, for the lines that load it from there.
    proof: of the files beside the card against the SAE here (`saes.adopt.proof_of`). What is not known is left out.
    """
    parts = (
        f"# {_plain(sae.name)}",
        _sentence(sae),
        _table("What it is", ("", ""), _facts(sae, form)),
        _measured(sae),
        _table("Where it is from", ("", ""), _origin(sae, licence)),
        _proved(form, proof or {}),
        _loading(sae, form, repo_id, path),
        f"## Notes\n\n{_plain(sae.notes)}" if sae.notes else "",
    )
    return _front(sae, form, licence) + "\n\n".join(part for part in parts if part) + "\n"


def _front(sae: SAE, form: str, licence: str) -> str:
    read_by_saelens = form in ("saelens", "mistudio_community") or (form == AS_IS and sae.format == "saelens")
    base = sae.model.location if sae.model and sae.model.source == "hub" else sae.model_name
    said: dict[str, Any] = {
        "license": licence,
        "library_name": "saelens" if read_by_saelens else "",
        "base_model": base if base.count("/") == 1 else "",
        "tags": ["sparse-autoencoder", "interpretability", "saehub"],
    }
    return "---\n" + yaml.safe_dump({key: value for key, value in said.items() if value}, sort_keys=False) + "---\n\n"


def _sentence(sae: SAE) -> str:
    kind = (sae.config.get("metadata") or {}).get("not_an_autoencoder") or ""
    where = f" at `{sae.hook_name}`" if sae.hook_name else ""
    model = f" of {_plain(sae.model_name)}" if sae.model_name else ""
    width = f" with {sae.d_sae:,} features" if sae.d_sae else ""
    what = f"A sparse autoencoder ({sae.architecture}){width} on the activations{where}{model}."
    return f"{what} {_plain(kind)}".strip()


def _facts(sae: SAE, form: str) -> list[tuple[str, Any]]:
    hook = sae.model.hook(sae.hook_name) if sae.model and sae.hook_name else None
    module = f"{hook['module']} ({'input' if hook.get('side') == 'in' else 'output'})" if hook else ""
    return [
        ("language model", sae.model_name),
        ("its revision", sae.model.revision if sae.model else ""),
        ("hook point", sae.hook_name),
        ("module in transformers", module),
        ("predicts", sae.hook_name_out if sae.hook_name_out != sae.hook_name else ""),
        ("architecture", sae.architecture),
        ("k", sae.k),
        ("d_in", sae.d_in),
        ("d_sae", sae.d_sae),
        ("d_out", sae.config.get("d_out") if sae.config.get("d_out") != sae.d_in else None),
        ("normalisation of the input", sae.config.get("normalize_activations")),
        ("stored as", sae.config.get("dtype")),
        ("format", FORMATS[form] if form != AS_IS else sae.format),
    ]


def _measured(sae: SAE) -> str:
    rows = [
        (metric.label, f"{metric.value:.6g}" if metric.value is not None else "not measured", metric.formula,
         f"{metric.n:,}", metric.data, f"`{metric.id}`")
        for _, group in grouped(sae.metrics)
        for metric in group
    ]  # fmt: skip
    table = _rows("Measured with SAEHub", ("metric", "value", "definition", "n", "data", "id"), rows)
    published = [
        (name, f"{value:g}")
        for name, value in (("L0", sae.published_l0), ("explained variance", sae.published_variance))
        if value is not None
    ]
    return "\n\n".join(part for part in (table, _table("As it was published", ("", ""), published)) if part)


def _origin(sae: SAE, licence: str) -> list[tuple[str, Any]]:
    run = getattr(sae, "run", None)
    capture = run.capture if run else None
    return [
        ("licence", licence or "not stated"),
        ("trained", f"with SAEHub, run “{run.name}”, {run.created_at:%Y-%m-%d}" if run else ""),
        ("on the corpus", f"{capture.corpus.name} (SHA-256 {capture.corpus.sha256})" if capture else ""),
        ("tokens in training", f"{run.tokens:,}" if run and run.tokens else ""),
        ("published in", f"{sae.repo_id}, {sae.repo_path}" if sae.repo_id else ""),
        ("at the commit", sae.revision if sae.repo_id else ""),
        ("release", f"{sae.release.name}, {sae.sae_id}" if sae.release else ""),
        ("Neuronpedia", sae.neuronpedia_id),
        ("SHA-256 of its weights there", sae.sha256),
        *((f"said by a person: {name}", value) for name, value in sae.facts.items() if name != "server_path"),
    ]


def _proved(form: str, proof: Mapping[str, Any]) -> str:
    if not proof:
        return ""
    return (
        "## These files and the SAE they were written from\n\n"
        f"Both gave the same active features on {proof['n']} seeded inputs (mean L0 {proof['mean_l0']:.4g}); the largest "
        f"difference was {proof['max_abs_acts']:.3g} of codes and {proof['max_abs_x_hat']:.3g} of reconstructions "
        f"(`{proof['definition']}`)."
    )


def _loading(sae: SAE, form: str, repo_id: str, path: str) -> str:
    form = sae.format if form == AS_IS else form
    ways = []
    if repo_id and path and form in ("saelens", "mistudio_community"):
        ways.append(f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo_id}", "{path}")')
    elif form in LOADERS:
        fetch = (
            f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo_id}")\n'
            if repo_id
            else ""
        )
        folder = ("{folder}" + (f"/{path}" if path else "")) if repo_id else "this-folder"
        code = LOADERS[form].replace('"{folder}"', f'f"{folder}"' if repo_id else f'"{folder}"')
        ways.append(fetch + code)
    ways.append('from saes.numerics.formats import load_sae  # SAEHub\n\nsae = load_sae("this-folder")')
    blocks = "\n\n".join(f"```python\n{code}\n```" for code in ways)
    return f"## How to load it\n\n{blocks}"


def _table(title: str, head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    return _rows(title, head, [(name, value) for name, value in rows if value not in (None, "")])


def _rows(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *rows]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(_cell(one) for one in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """A value that stays in its cell, whatever is in it."""
    return _plain(str(value)).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """Text of people and files, without what would be markup on the Hub's page."""
    return text.replace("<", "&lt;").replace("\r", "").strip()
