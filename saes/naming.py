"""What the published names of SAEs say about them before any file is read: layer, site, hook point, width.

Each format has its convention; where the names do not say something, it stays empty or None. A width read here is nominal:
only the files' own shapes prove it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from saes.gemma_scope import parse, width_of


@dataclass(frozen=True)
class Named:
    """What a name says; "" and None are what it does not say."""

    site: str = ""
    layer: int | None = None
    hook_name: str = ""
    hook_name_out: str = ""
    architecture: str = ""
    d_sae: int | None = None
    k: int | None = None
    l0: float | None = None
    model_name: str = ""


SITES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "hook_z",
    "hook_z": "hook_z",
    "hook_embed": "embed",
}
# Name in sae-lens' directory -> name in our table of formats. No name there means SAELens' own files, of any generation.
FORMAT_OF = {
    None: "saelens",
    "sae_lens": "saelens",
    "gemma_2": "gemma_scope_1",
    "gemma_2_transcoder": "gemma_scope_1_transcoder",
    "gemma_3": "gemma_scope_2",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1_distill",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
    "qwen_scope": "qwen_scope",
    "goodfire": "goodfire",
    "deepseek_r1": "deepseek_r1",
    "connor_rob_hook_z": "connor_rob_hook_z",
    "mwhanna_transcoder": "mwhanna_transcoder",
    "mntss_clt_layer_transcoder": "mntss_clt",
    "temporal": "temporal",
}
# Of formats whose files all hold one kind of SAE.
ARCHITECTURE_OF = {
    "llama_scope": "jumprelu",
    "llama_scope_r1_distill": "jumprelu",
    "qwen_scope": "topk",
    "goodfire": "standard",
    "deepseek_r1": "standard",
    "connor_rob_hook_z": "standard",
    "temporal": "temporal",
    "mntss_clt": "transcoder",
}
TL_HOOK = re.compile(
    r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_mid|hook_resid_post|hook_mlp_out|hook_attn_out|attn\.hook_z|hook_z)"
)
LAYER = re.compile(r"(?:^|[/_.-])(?:layers?|L|l)[_.]?(\d+)(?=$|[/_.\-A-Za-z])")
LLAMA_SCOPE = re.compile(r"L(\d+)(R|A|M|TC)(?:-(\d+)x)?$")
LLAMA_SITES = {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out"}
LLAMA_D_IN = 4096  # of Llama 3.1 8B, which all of Llama Scope is for
WIDTHS = (  # the first that is found counts
    (re.compile(r"2pow(\d+)"), lambda text: 2 ** int(text)),
    (re.compile(r"(?:^|[_-])(?:w(?:idth)?|v5|res|mlp|att|transcoder)[_-]?(\d+[km])(?=$|[/_-])", re.I), width_of),
    (re.compile(r"[/_]ds(\d{4,7})(?=$|_)"), int),
    (re.compile(r"_(\d{4,6})(?=$|[/:_.])"), int),
)


def named(format: str, repo_id: str, path: str, sae_id: str = "", neuronpedia_id: str = "") -> Named:
    """What the names of one SAE say under the conventions of its format."""
    if format.startswith("gemma_scope"):
        return _gemma_scope(repo_id, path)
    if format.startswith("llama_scope"):
        return _llama_scope(format, path, neuronpedia_id)
    texts = (path, sae_id, repo_id, neuronpedia_id)
    layer = next((int(found[1]) for text in texts if (found := TL_HOOK.search(text) or LAYER.search(text))), None)
    site, hook, out = _hook(format, layer, texts)
    widths = () if format == "mntss_clt" else texts  # its names count the features of all layers together
    return Named(
        site=site,
        layer=layer,
        hook_name=hook,
        hook_name_out=out,
        architecture=_architecture(format, path),
        d_sae=_width(*widths),
        k=_k(format, repo_id),
    )


def _gemma_scope(repo_id: str, path: str) -> Named:
    found = parse(repo_id, path)
    if found is None:
        return Named()
    return Named(
        site=found.site,
        layer=found.layer,
        hook_name=found.hook_name,
        hook_name_out=found.hook_name_out,
        architecture=found.architecture,
        d_sae=None if found.site == "clt" else found.d_sae,  # its names count the features of all layers together
        l0=found.l0,
        model_name=found.model_name,
    )


def _llama_scope(format: str, path: str, neuronpedia_id: str) -> Named:
    found = LLAMA_SCOPE.search(PurePosixPath(path).name)
    if not found:
        return Named(architecture=ARCHITECTURE_OF[format])
    hook = LLAMA_SITES.get(found[2], "")
    return Named(
        site=SITES.get(hook, "transcoder"),
        layer=int(found[1]),
        hook_name=f"blocks.{found[1]}.{hook}" if hook else "",
        architecture=ARCHITECTURE_OF[format],
        d_sae=LLAMA_D_IN * int(found[3]) if found[3] else _width(neuronpedia_id),
    )


def _hook(format: str, layer: int | None, texts: tuple[str, ...]) -> tuple[str, str, str]:
    """Site, hook point read, hook point written."""
    said = next((found for text in texts if (found := TL_HOOK.search(text))), None)
    if format == "connor_rob_hook_z" and layer is not None:
        return "hook_z", f"blocks.{layer}.attn.hook_z", ""
    if said:
        point = "attn.hook_z" if said[2] == "hook_z" else said[2]
        return SITES[point], f"blocks.{said[1]}.{point}", ""
    if layer is None:
        return "", "", ""
    if format == "mwhanna_transcoder":
        return "transcoder", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"
    if format == "mntss_clt":
        return "clt", f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"
    if format in ("qwen_scope", "goodfire", "deepseek_r1") or any("resid_post" in text for text in texts):
        return "resid_post", f"blocks.{layer}.hook_resid_post", ""
    return "", "", ""


def _architecture(format: str, path: str) -> str:
    if format == "dictionary_learning":
        words = {
            "_topk_": "topk",
            "_vanilla_": "standard",
            "_standard_": "standard",
            "_panneal_": "standard",
            "_gated_": "gated",
        }
        return next((name for word, name in words.items() if word in path.lower()), "")
    return ARCHITECTURE_OF.get(format, "")


def _width(*texts: str) -> int | None:
    found = (int(number(match[1])) for pattern, number in WIDTHS for text in texts if (match := pattern.search(text)))
    return next((width for width in found if width >= 1024 and width % 256 == 0), None)  # not a date, not a step


def _k(format: str, repo_id: str) -> int | None:
    found = re.search(r"-L0_(\d+)$", repo_id) if format == "qwen_scope" else None
    return int(found[1]) if found else None
