"""What reading and steering cost on top of the model, and what they cost sae-lens' HookedSAETransformer.

    .venv/bin/python tests/bench/bench_infer.py                       # random weights, beside the peer where it is there
    .venv/bin/python tests/bench/bench_infer.py MODEL_DIR SAE_DIR HOOK_NAME     # a model and an SAE of one's own, no peer
    .venv/bin/python tests/bench/bench_infer.py --busy                # processor time of one thread, for a busy machine

Everything is measured in turns in the same run, medians of the turns; only the ratios mean something on a shared machine.
Goals: reading at most 1.15 x (plain forward + the SAE's own encode), generation with one edit at most 1.10 x plain cached
generation. The peer runs a model of the same sizes in transformer-lens, whose plain forward and generation are its own, so
each is held against itself first. Its interpreter: PEER_PYTHON, else .venv-peers/bin/python.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from inference.numerics.generate import generate
from inference.numerics.infer import Reader, infer, read
from inference.numerics.steer import Edit, Steering
from saes.numerics.architectures import build_sae
from saes.numerics.formats import load_sae
from saes.numerics.lm import LM, hooked, load_lm
from saes.numerics.sae import SAE, SAEConfig

SIZES = {
    "layers": 8,
    "d": 576,
    "heads": 9,
    "vocab": 16384,
    "d_sae": 4608,
    "k": 32,
    "layer": 5,
    "tokens": 128,
    "new": 24,
}
ROUNDS = 5
ROOT = Path(__file__).resolve().parents[2]


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return clock() - began


def tokenizer() -> PreTrainedTokenizerFast:
    """Of as many words as the model has embeddings."""
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["vocab"])}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def made() -> tuple[LM, SAE, str]:
    """A GPT-2 of the sizes above and a TopK SAE on its residual stream, both of random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SIZES["vocab"], n_layer=SIZES["layers"], n_embd=SIZES["d"], n_head=SIZES["heads"], n_positions=1024,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    lm = LM(GPT2LMHeadModel(config).requires_grad_(False), tokenizer(), "random")
    hook_name = f"blocks.{SIZES['layer']}.hook_resid_post"
    return lm, build_sae(SAEConfig("topk", SIZES["d"], SIZES["d_sae"], hook_name=hook_name, k=SIZES["k"])), hook_name


def calls_of(lm: LM, sae: SAE, hook_name: str) -> dict[str, Callable[[], Any]]:
    ids = torch.randint(10, lm.vocab_size, (1, SIZES["tokens"]), generator=torch.Generator().manual_seed(0))
    x = lm.activations(ids, [hook_name])[hook_name][0]
    prompt, new = "w10 w11 w12 w13 w14 w15 w16 w17", SIZES["new"]
    lm.model.generation_config.eos_token_id = None

    def forward_read() -> None:
        with hooked(lm, {hook_name: lambda x: read(sae, x[0]) and None}):
            lm.model(input_ids=ids, use_cache=False)

    def steered(mode: str) -> None:
        generate(lm, prompt, max_new_tokens=new, steering=[Steering(sae, hook_name, [Edit(7, mode, 5.0)])])

    return {
        "plain forward": lambda: lm.model(input_ids=ids, use_cache=False),
        "encode": lambda: sae.encode_sparse(x),
        "forward with the SAE": forward_read,
        "the same with next tokens": lambda: infer(lm, [Reader(sae, hook_name)], ids[0].tolist(), likely=10),
        "plain generation": lambda: generate(lm, prompt, max_new_tokens=new),
        "generation with one edit": lambda: steered("clamp"),
        "generation with one edit, add": lambda: steered("add"),
    }


PEER_CALLS = ("plain forward", "encode", "forward with the SAE", "plain generation", "generation with one edit")


def peer(busy: bool) -> Any:
    """A child that measures what it is asked for, or None without the peer."""
    python = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
    if not python.exists():
        print(f"No peer: {python} is not there (PEER_PYTHON names another).")
        return None
    call = [str(python), str(ROOT / "tests" / "bench" / "peer_infer.py"), json.dumps(SIZES | {"busy": busy})]
    return subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def asked(child: Any, name: str) -> float:
    child.stdin.write(f"{name}\n")
    child.stdin.flush()
    return float(child.stdout.readline())


@torch.inference_mode()
def main(*given: str, busy: bool) -> None:
    torch.set_num_threads(1 if busy else 2)
    clock = time.process_time if busy else time.perf_counter
    lm, sae, hook_name = (load_lm(given[0]), load_sae(given[1]), given[2]) if given else made()
    calls, child = calls_of(lm, sae, hook_name), None if given else peer(busy)
    rounds = []
    for _ in range(ROUNDS + 1):
        one = {name: timed(call, clock) for name, call in calls.items()}
        one |= {f"peer: {name}": asked(child, name) for name in PEER_CALLS} if child else {}
        rounds.append(one)
    report(rounds[1:])
    if child:
        child.stdin.close()
        child.wait()


def report(rounds: list[dict[str, float]]) -> None:
    for name in rounds[0]:
        print(f"{name:48} {1000 * median(one[name] for one in rounds):8.1f} ms")
    for who in ("", "peer: ") if any(name.startswith("peer") for name in rounds[0]) else ("",):
        cost = median(
            r[f"{who}forward with the SAE"] / (r[f"{who}plain forward"] + r[f"{who}encode"]) for r in rounds
        )  # fmt: skip
        print(f"{who + 'forward with the SAE / (plain + encode)':48} {cost:8.2f}")
        for name in ("generation with one edit", "generation with one edit, add"):
            if f"{who}{name}" in rounds[0]:
                print(
                    f"{who + name + ' / plain':48} {median(r[who + name] / r[who + 'plain generation'] for r in rounds):8.2f}"
                )
    for name in PEER_CALLS:
        if f"peer: {name}" in rounds[0]:
            print(f"{'times the peer, ' + name:48} {median(r[f'peer: {name}'] / r[name] for r in rounds):8.2f}")


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if word != "--busy"), busy="--busy" in sys.argv)
