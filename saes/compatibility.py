"""Does an SAE fit a language model that is here? What is known of both is compared; nothing is loaded.

Three answers, each with its reasons: it fits; it may, with care (something is not known, or was different in training); it
does not. An SAE of another model is never said to fit, however well its widths agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from saes.abilities import SEVERAL_PLACES, is_transcoder, no_goal, no_place
from saes.hook_places import place_of
from saes.model_names import means
from saes.models import SAE, LanguageModel

FITS, CARE, NO = "fits", "care", "no"
WORDS = {FITS: "fits", CARE: "with care", NO: "does not fit"}
LEVELS = (FITS, CARE, NO)
# Endings by which versions of one model differ: of the same shape, with other weights.
VERSION = re.compile(r"[-_](?:it|instruct|chat|base|pt|v\d+(?:\.\d+)*)$")
RMS_NORM = ("Llama", "Gemma", "Qwen", "Mistral", "Mixtral", "Phi3", "Olmo2")  # no mean is taken off in them
CENTRED = ("embed", "resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")
INSIDE = {
    "layer_norm": "each input is scaled by its own deviation",
    "constant_norm_rescale": "each input is scaled to one norm",
    "constant_scalar_rescale": "inputs are scaled by a constant",
}


@dataclass(frozen=True)
class Reason:
    """One thing that was compared: `about` is what, `text` a sentence."""

    level: str
    about: str
    text: str


@dataclass(frozen=True)
class Fit:
    """How one model stands to an SAE. `named`: it is the one that the SAE says it is of."""

    model: LanguageModel
    named: bool
    reasons: list[Reason]

    @property
    def level(self) -> str:
        return max((reason.level for reason in self.reasons), key=LEVELS.index)

    @property
    def word(self) -> str:
        return WORDS[self.level]


def fits(sae: SAE) -> list[Fit]:
    """Every model here beside the SAE: its own first, then from those that fit to those that do not. One query."""
    models = LanguageModel.objects.ready().order_by("name")
    found = [Fit(model, _named(sae, model), list(_reasons(sae, model))) for model in models]
    return sorted(found, key=lambda fit: (not fit.named, LEVELS.index(fit.level)))


def _reasons(sae: SAE, model: LanguageModel) -> Iterator[Reason]:
    yield _of_name(sae, model)
    yield from _of_place(sae, model)
    yield from _of_preprocessing(sae, model)


# ------------------------------------------------------------------------------------------------------- which model


def _said(sae: SAE) -> dict[str, Any]:
    """What its config says, wherever its format keeps it."""
    metadata = sae.config.get("metadata")
    return {**sae.config, **(metadata if isinstance(metadata, dict) else {})}


def _names(sae: SAE) -> list[str]:
    said = _said(sae)
    given = (sae.model_name, said.get("model_name"), said.get("hf_model_name"))
    return [name for name in given if isinstance(name, str) and name]


def _named(sae: SAE, model: LanguageModel) -> bool:
    return sae.model_id == model.pk or any(means(name, model) for name in _names(sae))


def _of_name(sae: SAE, model: LanguageModel) -> Reason:
    names = _names(sae)
    if _named(sae, model):
        return Reason(FITS, "model", f"It is of {names[0] if names else model.name}.")
    if not names:
        return Reason(CARE, "model", "Nothing says which model it is of.")
    if any(_family(name) == _family(other) for name in names for other in (model.name, model.location)):
        return Reason(CARE, "model", f"It is of {names[0]}; this is another version, whose activations differ.")
    return Reason(NO, "model", f"It is of {names[0]}, and what its features mean there they do not mean elsewhere.")


def _family(name: str) -> str:
    short = name.rpartition("/")[2].lower()
    while (shorter := VERSION.sub("", short)) != short:
        short = shorter
    return short


# ------------------------------------------------------------------------------------------------------- which place


def _of_place(sae: SAE, model: LanguageModel) -> Iterator[Reason]:
    if sae.architecture in SEVERAL_PLACES:
        yield _of_places(sae, model)
        return
    hook = model.hook(sae.hook_name) if sae.hook_name else None
    if not sae.hook_name:
        yield Reason(CARE, "hook point", "Nothing says at which hook point it reads.")
    elif hook is not None and sae.d_in is None:
        yield Reason(
            CARE, "width", f"Its width is not known until its config is read; {sae.hook_name} gives {hook['d']}."
        )
    elif fault := no_place(sae, model):
        yield Reason(NO, "hook point" if hook is None else "width", fault)
    else:
        yield Reason(
            FITS, "hook point", f"{sae.hook_name} gives vectors of {sae.d_in} numbers, which is what it reads."
        )
    if is_transcoder(sae) and sae.hook_name_out and sae.d_in is not None and (fault := no_goal(sae, model)):
        yield Reason(NO, "prediction", fault)


def _of_places(sae: SAE, model: LanguageModel) -> Reason:
    points = [name for name in _said(sae).get("hook_points") or [] if isinstance(name, str)]
    missing = [name for name in points if model.hook(name) is None]
    if missing:
        return Reason(
            NO, "hook points", f"{model.name} has no hook point {missing[0]}, one of those it reads or writes."
        )
    if not points:
        return Reason(CARE, "hook points", "It reads or writes several places, and nothing says which.")
    return Reason(FITS, "hook points", f"All {len(points)} places it reads or writes are there.")


# ------------------------------------------------------------------------------------------------------- what came before


def _of_preprocessing(sae: SAE, model: LanguageModel) -> Iterator[Reason]:
    said = _said(sae)
    yield from _of_bos(said, model)
    yield from _of_loading(sae, said, model)
    scaled = said.get("normalize_activations")
    if scaled == "expected_average_only_in":
        text = "Its inputs were scaled in training by a factor that its files do not hold (expected_average_only_in)."
        yield Reason(
            CARE, "scale", f"{text} Where L0 is far from the published one, give norm_scaling_factor on import."
        )
    elif scaled in INSIDE:
        yield Reason(FITS, "scale", f"{scaled}: {INSIDE[scaled]}, inside of the SAE.")
    length = said.get("context_size")
    if isinstance(length, int) and model.context_length and length > model.context_length:
        text = f"It was trained on contexts of {length:,} tokens; this model takes {model.context_length:,}."
        yield Reason(CARE, "context", text)


def _of_bos(said: dict[str, Any], model: LanguageModel) -> Iterator[Reason]:
    before = said.get("prepend_bos")
    if before is True and not model.has_bos:
        yield Reason(CARE, "tokenizer", "It was trained with BOS before each context; this model's tokenizer has none.")
    elif isinstance(before, bool):
        yield Reason(FITS, "tokenizer", f"It was trained with{'' if before else 'out'} BOS before each context.")


def _of_loading(sae: SAE, said: dict[str, Any], model: LanguageModel) -> Iterator[Reason]:
    """What TransformerLens was told to do to the model's weights: only where it changes what this SAE reads.

    Source: transformer_lens' ProcessWeights. Centring happens in models with LayerNorm alone. Folding value biases moves
    them from the heads' outputs to the block's. Folding a norm (fold_ln) changes nothing that has a hook point.
    """
    told = said.get("model_from_pretrained_kwargs")
    told = told if isinstance(told, dict) else {}
    site = place_of(sae.hook_name)[0] or sae.site
    if told.get("center_writing_weights") is True and site in CENTRED and not model.architecture.startswith(RMS_NORM):
        yield _changed("center_writing_weights", "the mean over its numbers was taken off each vector")
    if told.get("fold_value_biases") is True and site == "hook_z":
        yield _changed("fold_value_biases", "value biases, where the model has any, were not in what it read")


def _changed(flag: str, text: str) -> Reason:
    return Reason(
        CARE, "preprocessing", f"TransformerLens' {flag} was on in training: {text}; here the model is as published."
    )
