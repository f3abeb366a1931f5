"""Which files of a repository belong to an SAE, from their names alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from saes.layouts import entries, wanted_files

SCOPE_2 = [
    "resid_post/layer_13_width_16k_l0_small/params.safetensors",
    "resid_post/layer_13_width_16k_l0_small/config.json",
    "resid_post/layer_13_width_16k_l0_small/examples.safetensors",
    "clt/width_16k_l0_big/config.json",
    "clt/width_16k_l0_big/params_layer_2.safetensors",
    "clt/width_16k_l0_big/params_layer_10.safetensors",
]
SPARSIFY = [
    "README.md", "config.json", "optimizer.pt", "lr_scheduler.pt", "state.pt",
    "layers.3/cfg.json", "layers.3/sae.safetensors", "layers.10/cfg.json", "layers.10/sae.safetensors",
]  # fmt: skip
CROSSCODER = [
    "crosscoder/layer_5_9_12_15_width_65k_l0_medium/config.json",
    *(f"crosscoder/layer_5_9_12_15_width_65k_l0_medium/params_layer_{n}.safetensors" for n in range(4)),
]
CLT = ["config.yaml", *(f"W_{side}_{n}.safetensors" for side in ("enc", "dec") for n in range(12))]


@pytest.mark.parametrize(
    ("names", "format", "entry", "wanted"),
    [
        (SPARSIFY, "sparsify", "layers.3", ["config.json", "layers.3/cfg.json", "layers.3/sae.safetensors"]),
        (SCOPE_2, "gemma_scope_2", "resid_post/layer_13_width_16k_l0_small", [SCOPE_2[1], SCOPE_2[0]]),
        (SCOPE_2, "gemma_scope_2", "clt/width_16k_l0_big/params_layer_2", [SCOPE_2[3], SCOPE_2[4]]),
        (SCOPE_2, "gemma_scope_2", SCOPE_2[5], [SCOPE_2[3], SCOPE_2[5]]),
        (SCOPE_2 + CROSSCODER, "gemma_scope_2", "crosscoder/layer_5_9_12_15_width_65k_l0_medium", CROSSCODER),
        (CLT, "mntss_clt", "1", ["W_dec_1.safetensors", "W_enc_1.safetensors", "config.yaml"]),
        (CLT, "mntss_clt", "W_enc_11.safetensors", ["W_dec_11.safetensors", "W_enc_11.safetensors", "config.yaml"]),
        (
            ["layer_12/width_16k/average_l0_82/params.npz", "layer_12/width_16k/average_l0_22/params.npz"],
            "gemma_scope_1_transcoder",
            "layer_12/width_16k/average_l0_82/params.npz",
            ["layer_12/width_16k/average_l0_82/params.npz"],
        ),
        (
            ["x/cfg.json", "x/sae_weights.safetensors", "x/trainer_state.pt", "x/activations_store_state.safetensors"],
            "saelens_training",
            "x",
            ["x/cfg.json", "x/sae_weights.safetensors"],
        ),
        (
            ["x/cfg.json", "x/sae_weights.safetensors.index.json", "x/a-1.safetensors", "x/a-2.safetensors", "b.safetensors"],
            "saelens",
            "x",
            ["x/a-1.safetensors", "x/a-2.safetensors", "x/cfg.json", "x/sae_weights.safetensors.index.json"],
        ),
        (
            ["L1R-8x/hyperparams.json", "L1R-8x/checkpoints/final.safetensors", "L1R-8x/lm_config.json"],
            "llama_scope",
            "L1R-8x/checkpoints/final.safetensors",
            ["L1R-8x/checkpoints/final.safetensors", "L1R-8x/hyperparams.json"],
        ),
        (
            ["t/config.json", "t/ae.pt", "t/checkpoints/ae_100.pt", "t/checkpoints/ae_200.pt"],
            "dictionary_learning",
            "t/checkpoints/ae_100.pt",
            ["t/checkpoints/ae_100.pt", "t/config.json"],
        ),
        (
            ["a_v9.pt", "a_v9_cfg.json", "b_v9.pt", "b_v9_cfg.json"],
            "connor_rob_hook_z",
            "a_v9",
            ["a_v9.pt", "a_v9_cfg.json"],
        ),
        (
            ["config.json", "layer1.sae.pt", "layer11.sae.pt"],
            "qwen_scope",
            "layer1.sae.pt",
            ["config.json", "layer1.sae.pt"],
        ),
        (["v5_layer_0.pt/cfg.json", "v5_layer_0.pt/sae_weights.safetensors"], "saelens_legacy", "v5_layer_0.pt/",
         ["v5_layer_0.pt/cfg.json", "v5_layer_0.pt/sae_weights.safetensors"]),
        (["cfg.json", "sae_weights.safetensors"], "saelens", ".", ["cfg.json", "sae_weights.safetensors"]),
    ],
)  # fmt: skip
def test_an_sae_is_its_weights_and_configs_and_nothing_else(names, format, entry, wanted):
    assert wanted_files(format, entry, names) == wanted
    assert wanted_files("", entry, names) == wanted, "the names tell the format as well"


def test_an_sae_that_is_not_there_has_no_files():
    assert wanted_files("sparsify", "layers.4", SPARSIFY) == []
    assert wanted_files("", "layers.4", SPARSIFY) == []
    assert wanted_files("", "", ["model.safetensors", "config.json", "tokenizer.json"]) == []


def test_a_folder_of_several_is_none_of_them():
    assert wanted_files("mntss_clt", "", CLT) == wanted_files("", "", CLT) == []


def test_all_that_a_repository_holds_in_natural_order():
    assert entries(SPARSIFY) == [("layers.3", "sparsify"), ("layers.10", "sparsify")]
    assert entries(SCOPE_2) == [
        ("clt/width_16k_l0_big/params_layer_2.safetensors", "gemma_scope_2"),
        ("clt/width_16k_l0_big/params_layer_10.safetensors", "gemma_scope_2"),
        ("resid_post/layer_13_width_16k_l0_small", "gemma_scope_2"),
    ]
    assert entries(CROSSCODER) == [("crosscoder/layer_5_9_12_15_width_65k_l0_medium", "gemma_scope_2")], (
        "not each layer"
    )
    assert entries(["L1R/hyperparams.json", "L1R/checkpoints/final.safetensors"]) == [("L1R", "llama_scope")]
    assert len(entries(CLT)) == 12


def test_names_with_digits_that_are_no_numbers_are_sorted_too():
    names = [
        f"{part}/{file}" for part in ("a1²3", "a1", "a10", "a2") for file in ("cfg.json", "sae_weights.safetensors")
    ]
    assert [entry for entry, _ in entries(names)] == ["a1", "a1²3", "a2", "a10"]


def test_names_that_tell_formats_of_the_same_files_apart():
    r1 = [
        "800M-Slimpajama-0-OpenR1-Math-220k/L5R/config.json",
        "800M-Slimpajama-0-OpenR1-Math-220k/L5R/sae_weights.safetensors",
    ]
    assert entries(r1) == [(r1[0].rpartition("/")[0], "llama_scope_r1_distill")]
    assert entries(["DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"]) == [
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "deepseek_r1")
    ]
    assert entries(["Llama-3.3-70B-Instruct-SAE-l50.pt"]) == [("Llama-3.3-70B-Instruct-SAE-l50.pt", "goodfire")]


def test_a_torch_file_is_guessed_at_only_where_nothing_else_is():
    assert entries(["notes.txt", "concepts.pt"]) == [("concepts.pt", "mi_crow")]
    assert entries([*SPARSIFY, "concepts.pt"]) == entries(SPARSIFY)


def test_every_sae_of_a_long_listing_is_found():
    names = [f"layer_{n}/width_16k/average_l0_{m}/params.npz" for n in range(200) for m in range(200)]
    assert len(entries(names)) == 40_000


def test_the_web_process_can_use_it():
    code = "import sys, saes.layouts; print(sorted({'torch', 'django', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
