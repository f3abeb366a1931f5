"""The codes of one text as files: written by the job, read by the pages with numpy memory maps. No torch.

A folder holds `text.json` ({ids, tokens, special, probabilities of next tokens as texts}), and for the j-th SAE
`start_j.npy`, `features_j.npy`, `values_j.npy` as in inference.numerics.infer.Codes; with next tokens also
`likely_ids.npy`, `likely_logits.npy`, `likely_probabilities.npy` (t, k) and `logprobs.npy` (t,).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

TEXT = "text.json"
COLUMNS = ("start", "features", "values")
LIKELY = ("ids", "logits", "probabilities")


class CodesError(ValueError):
    """The files of a text cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class Strong:
    """A feature over a whole text: its largest code and where, on how many tokens it fires, and their sum."""

    feature: int
    maximum: float
    token: int
    n_fires: int
    total: float


@dataclass(frozen=True)
class Next:
    """A token that might follow."""

    id: int
    text: str
    logit: float
    probability: float


class CodesFile:
    """A finished text, read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            text = json.loads((folder / TEXT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CodesError("The files of this text are gone or damaged; run it again.") from error
        self.ids: list[int] = text["ids"]
        self.tokens: list[str] = text["tokens"]
        self.special = np.array(text["special"], dtype=bool)
        self._next_texts: dict[str, str] = text["next"]

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> np.ndarray:
        try:
            return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, ValueError, EOFError) as error:
            raise CodesError("The files of this text are gone or damaged; run it again.") from error

    def sae(self, number: int) -> Fires:
        """The codes of the number-th SAE."""
        start, features, values = (self.column(f"{name}_{number}") for name in COLUMNS)
        return Fires(start, features, values, self.special)

    @cached_property
    def logprobs(self) -> np.ndarray | None:
        """log p of every token given those before it (t,), NaN for the first."""
        return self.column("logprobs") if self._next_texts else None

    def likely(self, token: int) -> list[Next]:
        """The likeliest tokens after position `token`."""
        if not self._next_texts:
            return []
        ids, logits, probabilities = (self.column(f"likely_{name}")[token].tolist() for name in LIKELY)
        return [
            Next(i, self._next_texts[str(i)], logit, p) for i, logit, p in zip(ids, logits, probabilities, strict=True)
        ]


class Fires:
    """What fires of one SAE: see inference.numerics.infer.Codes. Control tokens have codes but count in no summary."""

    def __init__(self, start: np.ndarray, features: np.ndarray, values: np.ndarray, special: np.ndarray) -> None:
        self.start, self.features, self.values, self.special = start, features, values, special

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def positions(self) -> np.ndarray:
        """The token of every code (f,)."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def at(self, token: int, n: int | None = None) -> list[tuple[int, float]]:
        """(feature, value) of a token, largest first."""
        a, b = self.start[token : token + 2].tolist()
        end = b if n is None else min(b, a + n)
        return list(zip(self.features[a:end].tolist(), self.values[a:end].tolist(), strict=True))

    def count(self, token: int) -> int:
        return int(self.start[token + 1] - self.start[token])

    def along(self, feature: int) -> np.ndarray:
        """Values (t,) of one feature, 0 where it does not fire."""
        mine = self.features == feature
        values = np.zeros(len(self.start) - 1, np.float32)
        values[self.positions[mine]] = self.values[mine]
        return values

    def strongest(self, n: int) -> list[Strong]:
        """The features with the largest codes anywhere in the text, control tokens left out."""
        kept = ~self.special[self.positions]
        features, values, positions = self.features[kept], self.values[kept], self.positions[kept]
        if not len(features):
            return []
        found, at, n_fires = np.unique(features, return_inverse=True, return_counts=True)
        total = np.bincount(at, weights=values)
        order = np.lexsort((-np.abs(values), at))  # the largest of every feature comes first
        first = order[np.concatenate([[0], n_fires.cumsum()[:-1]])]
        best = np.argsort(-np.abs(values[first]), kind="stable")[:n]
        return [
            Strong(int(found[i]), float(values[first[i]]), int(positions[first[i]]), int(n_fires[i]), float(total[i]))
            for i in best.tolist()
        ]

    def grid(self, features: Sequence[int], first: int, last: int) -> np.ndarray:
        """Values (features, last - first) of some features over tokens first to last."""
        return np.stack([self.along(feature)[first:last] for feature in features])


def write(folder: Path, found: Any, next_texts: dict[int, str]) -> None:
    """Write an inference.numerics.infer.Inferred. `next_texts`: the texts of the ids in its `likely`."""
    for number, codes in enumerate(found.codes):
        for name in COLUMNS:
            np.save(folder / f"{name}_{number}.npy", getattr(codes, name))
    if found.likely is not None:
        for name in LIKELY:
            np.save(folder / f"likely_{name}.npy", getattr(found.likely, name))
        np.save(folder / "logprobs.npy", found.likely.logprobs)
    text = {"ids": found.ids, "tokens": found.tokens, "special": found.special, "next": next_texts}
    (folder / TEXT).write_text(json.dumps(text), encoding="utf-8")
