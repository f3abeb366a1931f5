"""What can be done with an SAE, and when it cannot, why: one sentence for a disabled button. Without torch."""

from __future__ import annotations

from saes.models import SAE, LanguageModel

# Action -> what an SAE must be for it. `place`: its hook point exists in a model that is here. `one`: it reads one place.
# `rows`: its codes depend on one position alone. `own`: what it gives back belongs where it reads. `goal`: there is
# something to compare that with.
NEEDS = {
    "steer": ("place", "one", "rows", "own"),
    "evaluate": ("place", "one", "rows", "goal"),
    "harvest": ("place", "one", "rows"),
    "read": ("place", "one"),
}
SEQUENCES = ("temporal",)
SEVERAL_PLACES = ("crosscoder", "causal_crosscoder", "clt")


def why_not(sae: SAE, action: str) -> str:
    """Why `action` ("steer", "evaluate", "harvest", "read") is not possible with this SAE; "" when it is."""
    if not sae.ready:
        return "It is being brought here." if sae.busy else "Its files are not on this machine; download it first."
    needs = NEEDS[action]
    return (
        ("one" in needs and _of_one_place(sae))
        or ("rows" in needs and _of_rows(sae))
        or ("own" in needs and _of_own_place(sae))
        or ("goal" in needs and _of_goal(sae))
        or ("place" in needs and _of_model(sae))
        or ""
    )


def abilities(sae: SAE) -> dict[str, str]:
    """{action: why not}, "" where it is possible."""
    return {action: why_not(sae, action) for action in NEEDS}


def is_transcoder(sae: SAE) -> bool:
    d_out = sae.config.get("d_out")
    elsewhere = bool(sae.hook_name_out) and sae.hook_name_out != sae.hook_name
    return "transcoder" in sae.architecture or elsewhere or bool(d_out and sae.d_in and d_out != sae.d_in)


def _of_one_place(sae: SAE) -> str:
    if sae.architecture not in SEVERAL_PLACES:
        return ""
    kind = "crosscoder" if "crosscoder" in sae.architecture else "cross-layer transcoder"
    return f"A {kind} reads or writes several places of the model at once, which is not possible here yet."


def _of_rows(sae: SAE) -> str:
    if sae.architecture in SEQUENCES or sae.config.get("row_by_row") is False:
        return "Its codes depend on whole sequences, and activations are held token by token here."
    return ""


def _of_own_place(sae: SAE) -> str:
    if is_transcoder(sae):
        goal = sae.hook_name_out or "another place"
        return (
            f"A transcoder predicts {goal} from {sae.hook_name or 'what it reads'}; it reconstructs nothing of its own."
        )
    if sae.config.get("reconstructs") is False:
        return "It is not an autoencoder: what it gives back does not belong where it reads."
    return ""


def _of_goal(sae: SAE) -> str:
    if not is_transcoder(sae):
        return _of_own_place(sae)
    if not sae.hook_name_out:
        return "Nothing says which hook point this transcoder predicts, so there is nothing to compare its output with."
    return no_goal(sae, sae.model) if sae.model and sae.model.ready else ""


def no_goal(sae: SAE, model: LanguageModel) -> str:
    """Why this model does not have what a transcoder predicts; "" where it does."""
    hook = model.hook(sae.hook_name_out)
    d_out = sae.config.get("d_out") or sae.d_in
    if hook is None:
        return f"{model.name} has no hook point {sae.hook_name_out}, which this transcoder predicts."
    if hook["d"] != d_out:
        return f"It predicts vectors of {d_out} numbers, but {sae.hook_name_out} gives {hook['d']}."
    return ""


def _of_model(sae: SAE) -> str:
    model = sae.model
    if model is None:
        return f"{sae.model_name or 'Its language model'} is not among the models here; add it first."
    if not model.ready:
        return f"{model.name} is not ready yet."
    if not sae.hook_name:
        return "Nothing says at which hook point it reads."
    return no_place(sae, model)


def no_place(sae: SAE, model: LanguageModel) -> str:
    """Why this model does not have what an SAE reads, or has it in another width; "" where it does."""
    hook = model.hook(sae.hook_name)
    if hook is None:
        return f"{model.name} has no hook point {sae.hook_name}."
    if hook["d"] != sae.d_in:
        return f"It reads vectors of {sae.d_in} numbers, but {sae.hook_name} of {model.name} gives {hook['d']}."
    return ""
