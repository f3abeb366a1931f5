"""A reading in the words of mi_crow's server: outputs, top neurons of every prompt and token, the texts of top_texts.json.

Where that server ranks values before the activation and shows the last token alone, these are codes of all tokens; control
tokens count in no ranking. Read from the files of the reading with numpy, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inference.codes import CodesFile, Fires
from inference.models import Inference

TEXTS_A_NEURON = 5


def response(
    row: Inference, *, token_latents: bool = True, logits: bool = True, probabilities: bool = True
) -> dict[str, Any]:
    """What was asked for and came out, for every SAE. Raises CodesError when the files are gone."""
    files = open_files(row)
    return {
        "outputs": outputs(row, files, logits=logits, probabilities=probabilities),
        "saes": [
            _whose(row, fact)
            | {"top_neurons": top_neurons(row, files, number)}
            | ({"token_latents": latents(row, files, number)} if token_latents else {})
            for number, fact in enumerate(row.facts)
        ],
        "concept_config": row.config_fact or None,
    }


def open_files(row: Inference) -> list[CodesFile]:
    """Of every prompt, in order."""
    return [CodesFile(row.text_folder(number)) for number in range(len(row.prompts))]


def outputs(
    row: Inference, files: Sequence[CodesFile], *, logits: bool = True, probabilities: bool = True
) -> list[dict[str, Any]]:
    """Of every prompt: text (prompt included), tokens, and the likeliest next tokens of each with logit and probability."""
    return [
        {
            "prompt_index": i,
            "prompt": made["prompt"],
            "text": made["text"],
            "completion": made["completion"],
            "tokens": file.tokens,
            "token_ids": file.ids,
            "n_prompt_tokens": made["n_prompt_tokens"],
            "logprobs": None if file.logprobs is None else [_number(p) for p in file.logprobs.tolist()],
            "next_tokens": _next(file) if logits or probabilities else None,
            "logits": _next(file, "logit") if logits else None,
            "probabilities": _next(file, "probability") if probabilities else None,
            "timing_ms": 1000 * made["seconds"],
        }
        for i, (made, file) in enumerate(zip(row.outputs, files, strict=True))
    ]


def _next(file: CodesFile, name: str = "text") -> list[list[Any]] | None:
    """The k likeliest after each token: their texts, logits or probabilities. None where they were not asked for."""
    if file.logprobs is None:
        return None
    return [[getattr(one, name) for one in file.likely(i)] for i in range(len(file))]


def top_neurons(row: Inference, files: Sequence[CodesFile], number: int) -> list[dict[str, Any]]:
    """The strongest features of every prompt, by their largest code in it."""
    found = []
    for i, (prompt, file) in enumerate(zip(row.prompts, files, strict=True)):
        best = file.sae(number).strongest(row.top_features)
        ids, values = [one.feature for one in best], [one.maximum for one in best]
        found.append({"prompt_index": i, "prompt": prompt, "neuron_ids": ids, "activations": values})
    return found


def latents(row: Inference, files: Sequence[CodesFile], number: int) -> list[dict[str, Any]]:
    """The strongest features of every token of every prompt, control tokens included."""
    found = []
    for i, file in enumerate(files):
        fires = file.sae(number)
        tokens = []
        for token in range(len(file)):
            at = fires.at(token, row.top_features)
            ids, values = [feature for feature, _ in at], [value for _, value in at]
            tokens.append({"token_index": token, "neuron_ids": ids, "activations": values})
        found.append({"prompt_index": i, "tokens": tokens})
    return found


def neuron_texts(row: Inference, files: Sequence[CodesFile], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of every feature that fires: the texts on which it fires most, once each, and its statistics over all of them."""
    texts: dict[int, dict[str, dict[str, Any]]] = {}
    stats: dict[int, dict[str, Any]] = {}
    for made, file in zip(row.outputs, files, strict=True):
        for one in _every(file.sae(number)):
            entry = {
                "text": made["text"], "score": one.maximum, "token_idx": one.token, "token_str": file.tokens[one.token]
            }  # fmt: skip
            mine = texts.setdefault(one.feature, {})
            if made["text"] not in mine or abs(entry["score"]) > abs(mine[made["text"]]["score"]):
                mine[made["text"]] = entry
            kept = stats.setdefault(one.feature, {"max": 0.0, "sum": 0.0, "n_fires": 0, "n_texts": 0})
            kept["max"] = max(kept["max"], one.maximum, key=abs)
            kept["sum"] += one.total
            kept["n_fires"] += one.n_fires
            kept["n_texts"] += 1
    ranked = {
        str(feature): sorted(mine.values(), key=lambda entry: -abs(entry["score"]))[:TEXTS_A_NEURON]
        for feature, mine in sorted(texts.items())
    }
    return ranked, {str(feature): stats[feature] for feature in sorted(stats)}


def _every(fires: Fires) -> Any:
    return fires.strongest(len(np.unique(fires.features)))


def top_texts(row: Inference, files: Sequence[CodesFile], number: int) -> dict[str, Any]:
    """top_texts.json of the number-th SAE. Its statistics and token latents are beyond what mi_crow writes."""
    texts, stats = neuron_texts(row, files, number)
    return _whose(row, row.facts[number]) | {
        "prompts": row.prompts,
        "outputs": outputs(row, files, logits=False, probabilities=False),
        "top_neurons": top_neurons(row, files, number),
        "token_latents": latents(row, files, number),
        "neuron_texts": texts,
        "neuron_stats": stats,
        "concept_config": row.config_fact or None,
        "inference": row.pk,
    }


def _whose(row: Inference, fact: dict[str, Any]) -> dict[str, Any]:
    return {"sae_id": fact["sae"], "sae_name": fact["name"], "sha256": fact["sha256"], "layer": fact["hook_name"]}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
