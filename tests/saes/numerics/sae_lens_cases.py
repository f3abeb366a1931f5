"""The SAEs that SAELens makes for our tests: read by its interpreter and by ours."""

from typing import Any

D_IN, D_SAE, D_OUT, ROWS, K, HEADS = 12, 32, 10, 24, 5, 3
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TEMPORAL = {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 4}

# Folder: architecture and what its config says besides the sizes.
INFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard_layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard_constant_norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "standard_hook_z": ("standard", {"reshape_activations": "hook_z"}),
    "standard_bf16": ("standard", {"dtype": "bfloat16", "apply_b_dec_to_input": False}),
    "gated": ("gated", {}),
    "gated_no_b_dec": ("gated", {"apply_b_dec_to_input": False}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu_fp64": ("jumprelu", {"dtype": "float64"}),
    "topk": ("topk", {"k": K}),
    "topk_rescale": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {"k": K}),
    "matching_pursuit": ("matching_pursuit", {"max_iterations": 6, "residual_threshold": 0.5}),
    "matching_pursuit_free": ("matching_pursuit", {"residual_threshold": 0.0, "apply_b_dec_to_input": False}),
    "temporal": ("temporal", TEMPORAL),
    "temporal_untied": ("temporal", TEMPORAL | {"tied_weights": False, "sae_diff_type": "relu", "n_attn_layers": 2}),
    "temporal_scaled": (
        "temporal",
        TEMPORAL | {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.3},
    ),
} | {name: (name, {"d_out": D_OUT, "apply_b_dec_to_input": False}) for name in TRANSCODERS}

TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "training_standard": ("standard", {}),
    "training_topk": ("topk", {"k": K}),
    "training_batchtopk": ("batchtopk", {"k": 4.5}),
    "training_batchtopk_plain": ("batchtopk", {"k": 4.0, "rescale_acts_by_decoder_norm": False}),
    "training_matryoshka": ("matryoshka_batchtopk", {"k": 4.0, "matryoshka_widths": [8, D_SAE]}),
    "scaled_standard": ("standard", {"normalize_activations": "expected_average_only_in"}),
    "scaled_batchtopk": ("batchtopk", {"k": 4.0, "normalize_activations": "expected_average_only_in"}),
    "whitened_standard": ("standard", {"normalize_activations": "covariance_whitening"}),
    "whitened_jumprelu": (
        "jumprelu",
        {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False},
    ),
    "whitened_gated": ("gated", {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False}),
    "whitened_topk": ("topk", {"k": K, "normalize_activations": "covariance_whitening"}),
}
