"""Tiny real transformers models of several families, with random weights large enough to make them differ."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from saes.numerics.architectures import build_sae
from saes.numerics.lm import LM
from saes.numerics.sae import SAE, SAEConfig

D_MODEL = 32
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "gemma3", "qwen3")
RESID = "blocks.1.hook_resid_post"


def tiny_lm(kind: str, tokenizer_dir: Path) -> LM:
    """A model of two layers and width 32 that reads at most 256 tokens, with the tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": D_MODEL, "num_attention_heads": 4}
    llama = layers | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
    config = {
        "llama": lambda: LlamaConfig(**ids, **llama, tie_word_embeddings=True),
        "gemma": lambda: GemmaConfig(**ids, **llama, head_dim=8),
        # windows shorter than the texts of the tests, so that the sliding layer of each slides
        "gemma2": lambda: Gemma2Config(**ids, **llama, head_dim=8, sliding_window=8),
        "gemma3": lambda: Gemma3TextConfig(
            **ids, **llama, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        "qwen3": lambda: Qwen3Config(**ids, **llama, head_dim=8),
        "gpt2": lambda: GPT2Config(**ids, n_layer=2, n_embd=D_MODEL, n_head=4, n_positions=256),
        "gpt_neox": lambda: GPTNeoXConfig(**ids, **layers, intermediate_size=64, max_position_embeddings=256),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))  # norms and biases too, which start as ones and zeros
    return LM(model.requires_grad_(False), tokenizer, f"tiny-{kind}")


def tiny_sae(architecture: str = "topk", d_in: int = D_MODEL, d_sae: int = 96, **options: Any) -> SAE:
    """An SAE with random weights and biases."""
    k = 6 if architecture == "topk" else None
    sae = build_sae(SAEConfig(architecture, d_in, d_sae, hook_name=RESID, k=k, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return sae.requires_grad_(False)


def build_reader(folder: Path) -> Path:
    """A tiny Llama that reads 4,096 tokens and writes nothing but letters, saved as a model folder."""
    from concepts.numerics.token_text import vocabulary_texts
    from tests.conftest import build_tiny_model

    build_tiny_model(folder, max_position_embeddings=4096, tie_word_embeddings=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    letters = torch.tensor([text.strip().isalpha() and text.isascii() for text in vocabulary_texts(tokenizer)])
    with torch.no_grad():
        model.lm_head.weight[~letters] = 0  # the likeliest of many random logits is above it
    model.save_pretrained(folder)
    return folder
