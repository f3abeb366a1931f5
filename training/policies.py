"""Under which token policy an SAE is used: what it was trained with, as far as anything says it. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from saes.models import SAE
from training.models import Corpus
from training.preview import can_chat

USUAL_CONTEXT = 128


@dataclass(frozen=True)
class Policy:
    """How text becomes contexts, and which activations count; `source` says where that is known from."""

    context_length: int
    prepend_bos: bool
    store_special: bool
    source: str
    packed: bool = True
    chat_template: bool = False
    plain_chats: bool = False
    roles: tuple[str, ...] = ()

    def __str__(self) -> str:
        bos = "with BOS" if self.prepend_bos else "without BOS"
        special = "special tokens counted" if self.store_special else "special tokens left out"
        filled = "" if self.packed else ", one document each"
        chat = ", through the chat template" if self.chat_template else ""
        chat = ", messages joined plainly" if self.plain_chats else chat
        roles = f", only tokens of {' and '.join(self.roles)}" if self.roles else ""
        return f"contexts of {self.context_length:,} tokens {bos}{filled}{chat}{roles}, {special} ({self.source})"


def policy_of(sae: SAE) -> Policy:
    """The policy of an SAE: of the capture its run was on, else what its config says, else the usual; within what its
    model can take."""
    run = getattr(sae, "run", None)
    if run is not None and run.capture is not None:
        capture = run.capture
        found = Policy(
            capture.context_length,
            capture.prepend_bos,
            capture.store_special,
            "as in the capture it was trained on",
            capture.packed,
            capture.chat_template,
            capture.plain_chats,
            tuple(capture.roles),
        )
    else:
        found = _of_config(sae.config)
    longest = sae.model.context_length if sae.model else None
    return replace(
        found,
        context_length=min(found.context_length, longest or found.context_length),
        prepend_bos=found.prepend_bos and (sae.model is None or sae.model.has_bos),
    )


def policy_on(sae: SAE, corpus: Corpus) -> Policy:
    """The policy of an SAE on a corpus. Where it says nothing of conversations and the corpus holds them, they go through
    the model's chat template, or are joined plainly when it has none; of texts, joining plainly and roles say nothing."""
    found = policy_of(sae)
    if not corpus.chats:
        return replace(found, plain_chats=False, roles=())
    if found.chat_template or found.plain_chats:
        return found
    template = bool(sae.model and can_chat(sae.model))
    return replace(found, chat_template=template, plain_chats=not template)


def _of_config(config: dict[str, Any]) -> Policy:
    said = config | (config.get("metadata") or {})
    length = said.get("context_size")
    bos, special = said.get("prepend_bos", True) is not False, said.get("exclude_special_tokens") is False
    if isinstance(length, int) and length >= 2:
        return Policy(length, bos, special, "as its config says")
    return Policy(USUAL_CONTEXT, bos, special, "its config does not say; the usual")
