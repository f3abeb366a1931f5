"""Settings that others published, to begin with: each says where it is from and what it sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """`values` are fields of the run's form; `source` says whose they are, `differs` what this trainer does otherwise."""

    key: str
    title: str
    source: str
    url: str
    values: dict[str, Any] = field(default_factory=dict)
    differs: str = ""


PRESETS = {
    preset.key: preset
    for preset in (
        Preset(
            "gao-topk",
            "TopK as in Gao et al. 2024",
            "Scaling and evaluating sparse autoencoders (OpenAI)",
            "https://arxiv.org/abs/2406.04093",
            {"architecture": "topk", "k": [32], "aux_coefficient": 1 / 32, "dead_after_tokens": 10_000_000},
            "The learning rate is this trainer's own: 1e-3 / √(features / 16,384).",
        ),
        Preset(
            "batchtopk",
            "BatchTopK as in Bussmann et al. 2024",
            "BatchTopK Sparse Autoencoders",
            "https://arxiv.org/abs/2412.06410",
            {"architecture": "batchtopk", "k": [32], "batch_size": 4096, "lr": 3e-4, "aux_coefficient": 1 / 32},
        ),
        Preset(
            "matryoshka",
            "Matryoshka BatchTopK as in Bussmann et al. 2025",
            "Learning Multi-Level Features with Matryoshka Sparse Autoencoders",
            "https://arxiv.org/abs/2503.17547",
            {"architecture": "batchtopk", "k": [32], "matryoshka_widths": "256, 512, 1024, 2048", "lr": 3e-4},
            "The widths are fixed here, not drawn anew for each batch.",
        ),
        Preset(
            "gemma-scope",
            "JumpReLU as in Gemma Scope",
            "Gemma Scope: Open Sparse Autoencoders Everywhere All At Once on Gemma 2 (Google DeepMind)",
            "https://arxiv.org/abs/2408.05147",
            {"architecture": "jumprelu", "batch_size": 4096, "lr": 7e-5},
            "Their penalty's weight belongs to inputs of mean norm 1 and is left at this trainer's default.",
        ),
        Preset(
            "sae-lens-standard",
            "ReLU with an L1 penalty, SAELens' defaults",
            "sae-lens 6 (LanguageModelSAERunnerConfig, StandardTrainingSAEConfig)",
            "https://github.com/decoderesearch/SAELens",
            {
                "architecture": "standard", "l1_coefficient": [1.0], "batch_size": 4096, "lr": 3e-4, "lr_warmup": 0.0,
                "lr_decay": 0.0, "l1_warmup": 0.0,
            },
        ),
        Preset(
            "sparsify",
            "TopK, sparsify's defaults",
            "eai-sparsify 1.3 (TrainConfig, SparseCoderConfig)",
            "https://github.com/EleutherAI/sparsify",
            {"architecture": "topk", "k": [32], "aux_coefficient": 0.0, "dead_after_tokens": 10_000_000},
            "32 features for each dimension there; the width is left to the form.",
        ),
    )
}  # fmt: skip
