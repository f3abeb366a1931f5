"""The peer of bench_infer.py, run by the interpreter that has sae-lens: reads one name a line, answers with its seconds.

HookedSAETransformer of the sizes given, random weights, and a TopK SAE of sae-lens on its residual stream.
"""

import json
import sys
import time
from typing import Any

import torch
from sae_lens import HookedSAETransformer, TopKSAE, TopKSAEConfig
from transformer_lens import HookedTransformerConfig


@torch.inference_mode()
def main(sizes: dict[str, int]) -> None:
    config = HookedTransformerConfig(
        n_layers=sizes["layers"], d_model=sizes["d"], n_ctx=1024, d_head=sizes["d"] // sizes["heads"],
        n_heads=sizes["heads"], d_mlp=4 * sizes["d"], d_vocab=sizes["vocab"], act_fn="gelu_new",
        normalization_type="LN", device="cpu", seed=0,
    )  # fmt: skip
    model = HookedSAETransformer(config)
    hook = f"blocks.{sizes['layer']}.hook_resid_post"
    sae = TopKSAE(TopKSAEConfig(d_in=sizes["d"], d_sae=sizes["d_sae"], k=sizes["k"], device="cpu"))
    sae.cfg.metadata.hook_name = hook
    sae.use_error_term = True
    ids = torch.randint(10, sizes["vocab"], (1, sizes["tokens"]), generator=torch.Generator().manual_seed(0))
    prompt = ids[:, :8]
    x: Any = model.run_with_cache(ids, names_filter=hook)[1][hook]

    def edit(acts: Any, hook: Any) -> Any:
        acts[..., 7] = 5.0
        return acts

    def generate(steered: bool) -> None:
        options = {"max_new_tokens": sizes["new"], "do_sample": False, "stop_at_eos": False, "verbose": False}
        if not steered:
            model.generate(prompt, **options)
            return
        with model.saes(saes=[sae]), model.hooks([(f"{hook}.hook_sae_acts_post", edit)]):
            model.generate(prompt, **options)

    calls = {
        "plain forward": lambda: model(ids),
        "encode": lambda: sae.encode(x),
        "forward with the SAE": lambda: model.run_with_cache_with_saes(
            ids, saes=[sae], names_filter=f"{hook}.hook_sae_acts_post"
        ),
        "plain generation": lambda: generate(False),
        "generation with one edit": lambda: generate(True),
    }
    clock = time.process_time if sizes["busy"] else time.perf_counter
    for line in sys.stdin:
        began = clock()
        calls[line.strip()]()
        print(clock() - began, flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1 if given["busy"] else 2)
    main(given)
