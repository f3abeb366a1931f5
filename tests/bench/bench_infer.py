"""What reading and steering cost on top of the model: python tests/bench/bench_infer.py MODEL_DIR SAE_DIR HOOK_NAME

Everything is measured in turns in the same run, medians of the turns; only the ratios mean something on a shared machine.
"""

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from inference.numerics.generate import generate
from inference.numerics.infer import Reader, infer, read
from inference.numerics.steer import Edit, Steering
from saes.numerics.formats import load_sae
from saes.numerics.lm import hooked, load_lm

TOKENS, NEW, ROUNDS = 128, 16, 5


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.inference_mode()
def main(model: str, sae_path: str, hook_name: str) -> None:
    lm, sae = load_lm(model), load_sae(sae_path)
    ids = torch.randint(10, lm.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    x = lm.activations(ids, [hook_name])[hook_name][0]
    steering = [Steering(sae, hook_name, [Edit(7, "clamp", 5.0)])]
    prompt = "The best way to spend a Sunday is"

    def read_along(x: Any) -> None:
        read(sae, x[0])

    def forward_read() -> None:
        with hooked(lm, {hook_name: read_along}):
            lm.model(input_ids=ids, use_cache=False)

    calls: dict[str, Callable[[], Any]] = {
        "plain forward": lambda: lm.model(input_ids=ids, use_cache=False),
        "SAE's own encode": lambda: sae.encode_sparse(x),
        "forward read by the SAE": forward_read,
        "the same with next tokens": lambda: infer(lm, [Reader(sae, hook_name)], ids[0].tolist(), likely=10),
        "plain generation": lambda: generate(lm, prompt, max_new_tokens=NEW),
        "generation with one edit": lambda: generate(lm, prompt, max_new_tokens=NEW, steering=steering),
        "generation with one edit, add": lambda: generate(
            lm, prompt, max_new_tokens=NEW, steering=[Steering(sae, hook_name, [Edit(7, "add", 5.0)])]
        ),
    }
    lm.model.generation_config.eos_token_id = None
    rounds = [{name: timed(call) for name, call in calls.items()} for _ in range(ROUNDS + 1)][1:]
    ms = {name: 1000 * median(one[name] for one in rounds) for name in calls}
    for name, value in ms.items():
        print(f"{name:32} {value:8.1f} ms")
    ratio = median(r["forward read by the SAE"] / (r["plain forward"] + r["SAE's own encode"]) for r in rounds)
    print(f"read / (plain forward + encode)  {ratio:8.2f}")
    for name in ("generation with one edit", "generation with one edit, add"):
        print(f"{name} / plain {median(r[name] / r['plain generation'] for r in rounds):8.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
