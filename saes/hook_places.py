"""Where in a language model a hook point lies, read off its name: which site, which layer."""

from __future__ import annotations

import re

STACKS = ("blocks", "layers", "model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers")
BLOCK = re.compile(rf"^(?:{'|'.join(re.escape(name) for name in STACKS)})\.(\d{{1,4}})(?:\.|$)(.*)$")
SITES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "": "resid_post",  # the output of a whole block, by its module's path
    "hook_mlp_out": "mlp_out",
    "mlp": "mlp_out",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_in": "mlp_in",
    "ln2.hook_normalized": "mlp_in",
    "hook_attn_out": "attn_out",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attn.hook_z": "hook_z",
    "self_attn.o_proj": "hook_z",
}


def place_of(hook_name: str, architecture: str = "", hook_name_out: str = "") -> tuple[str, int | None]:
    """(site, layer) of an SAE by the names of its hook points; "" and None where they do not say.

    An SAE that predicts another place than it reads is filed under "transcoder", whichever places those are.
    """
    found = BLOCK.match(hook_name)
    layer = int(found[1]) if found else None
    if "crosscoder" in architecture:
        return "crosscoder", None
    if architecture == "clt":
        return architecture, layer
    if "transcoder" in architecture or (hook_name_out and hook_name_out != hook_name):
        return "transcoder", layer
    if found:
        return SITES.get(found[2], ""), layer
    return ("embed" if hook_name in ("hook_embed", "embed_tokens", "model.embed_tokens") else ""), None
