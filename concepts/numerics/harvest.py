"""Top texts and statistics of every feature of an SAE over a capture, in one pass over its activations.

The work is an external group-by. The capture is encoded once, in order, and every code above 0 is written to a scratch
file of its block of features. Then each block is read back, grouped by feature with one radix sort, and all of it is
computed exactly: no feature keeps a running heap, and there is no Python loop over tokens or features. Memory holds one
chunk of activations or one block of codes (about code_files.BLOCK_CODES of them; a block that grew larger is split first) whatever
the length of the capture; the scratch takes 16 bytes a code and 4 a token, and is removed at the end.

What was encoded is noted from time to time. A harvest of the same SAE and capture into the same folder that was
killed goes on from there; one that was cancelled, or failed, leaves nothing.

Definitions, for feature i over the n stored tokens of the chosen split:
  fires              tokens with code z_i > 0;  density = fires / n
  top contexts       the k contexts with the largest peak (largest z_i in the context); equal peaks: the earlier context
  histogram          fires in 50 equal bins from 0 to the feature's maximum
  interval j of m    contexts with their peak in (j/m, (j+1)/m] of the maximum, bin edges as the histogram's; a seeded
                     random sample of them, independent of the top contexts, so one context may appear in both
  fire together      features by the correlation of firing, over evenly spaced tokens (together.py)
  top tokens         token ids by the sum of z_i over all n tokens, with the number of fires on each
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from concepts.featurefile import FACTS, HISTOGRAM_BINS, VERSION
from concepts.numerics.code_files import SCRATCH, Encoding, HarvestError, compiled, noted, parts
from concepts.numerics.feature_columns import Columns, collect
from concepts.numerics.together import SAMPLE, write_companions
from concepts.numerics.token_text import vocabulary_texts
from saehub.causes import disk_is_full
from saes.numerics.sae import SAE
from training.numerics.shards import Capture, Split, write_json
from training.numerics.tokens import special_ids

SAMPLED = 2**16  # weights that tell one SAE from another
COLLECT_SHARE = 1 / 8  # of the progress bar, for the work after encoding

Progress = Callable[[int, int | None, str], None]

DEFINITIONS = {
    "density": "tokens with activation > 0 / tokens tested",
    "mean": "mean activation over the tokens on which the feature fires",
    "top": "contexts with the largest activation, one example a context",
    "interval": "random sample of the contexts whose largest activation lies in the interval",
    "together": "correlation of the indicators of firing, over evenly spaced tokens; pairs that met on fewer than 3 left out",
    "top_tokens": "tokens by summed activation over all tokens tested",
}


def harvest(
    sae: SAE,
    capture: Capture,
    hook: str,
    out_dir: str | Path,
    *,
    k: int = 20,
    intervals: int = 5,
    per_interval: int = 5,
    split: Split = "all",
    tokenizer: Any = None,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress = lambda done, total, step: None,
) -> dict[str, Any]:
    """Write a view of every feature to `out_dir` (concepts.featurefile reads it) and return its summary.

    k: top contexts of each feature. intervals, per_interval: activation intervals and sampled contexts in each.
    tokenizer: gives the token texts; without it tokens are shown by number. limit: stop after that many tokens, at the end
    of a chunk; the view is then `partial`. A view already at `out_dir` is replaced
    when the new one is complete; whatever `progress` or the disk raises leaves it as it was.
    Raises HarvestError when SAE and capture do not fit, a number is out of range, or the scratch does not fit the disk.
    """
    _check(sae, capture, hook, split, k, intervals, per_interval)
    began = time.perf_counter()
    whole = capture.split_rows(split)
    n_rows = min(whole, limit or whole)
    total = n_rows + max(1, int(n_rows * COLLECT_SHARE))
    settings = {"k": k, "intervals": intervals, "per_interval": per_interval, "seed": seed}
    source = {"sae": fingerprint(sae), "capture": capture.manifest["run_id"], "hook": hook, "split": split}
    with _folder(Path(out_dir), source | settings | {"rows": n_rows}) as folder:
        encoding = Encoding(sae, capture, hook, split, folder, n_rows)
        blocks = encoding.run(lambda done: progress(done, total, "encoding tokens"))
        n_rows = encoding.done
        tokens = _tokens(capture, folder)
        encode_seconds = time.perf_counter() - began
        with ExitStack() as files:
            columns = Columns(folder, files)
            rng = np.random.default_rng(seed)
            for block in parts(blocks, folder):
                collect(block, tokens, columns, k, intervals, per_interval, rng)
                share = block.end / sae.config.d_sae
                progress(n_rows + int((total - n_rows) * share), total, "collecting examples")
            columns.finish()
        companions = write_companions(folder, sae.config.d_sae, compiled())
        (folder / SAMPLE).unlink()
        _write_contexts(folder, tokens, capture.documents())
        _write_vocabulary(folder, vocabulary_texts(tokenizer) if tokenizer is not None else [])
        seconds = time.perf_counter() - began
        for file in folder.glob("codes-*"):
            file.unlink()
        (folder / "tokens.npy").unlink()
        (folder / SCRATCH).unlink()
        speed = {"seconds": seconds, "encode_seconds": encode_seconds, "tokens_per_second": n_rows / seconds}
        summary = _summary(folder, n_rows) | speed | {"partial": n_rows < whole, "n_tokens_whole": whole}
        write_json(
            folder / FACTS,
            _facts(sae, capture, hook, split, tokenizer)
            | settings
            | summary
            | {"source": source, "together": companions},
        )
    return summary


def _check(sae: SAE, capture: Capture, hook: str, split: Split, k: int, intervals: int, per_interval: int) -> None:
    if hook not in capture.d:
        raise HarvestError(f"The capture has no hook point {hook}; it has {', '.join(capture.hook_names)}.")
    if sae.config.d_in != capture.d[hook]:
        raise HarvestError(
            f"The SAE reads vectors of {sae.config.d_in} numbers, but the capture holds {capture.d[hook]} at {hook}; "
            "choose the capture of the model and hook point the SAE was trained on."
        )
    if k < 1 or per_interval < 0:
        raise HarvestError("At least 1 top context and at least 0 samples an interval are needed.")
    if intervals < 1 or HISTOGRAM_BINS % intervals:
        raise HarvestError(f"The number of intervals is {intervals}; it must divide {HISTOGRAM_BINS}: 1, 2, 5, 10, ...")
    if not capture.split_rows(split):
        raise HarvestError(f"The capture has no {split.replace('_', '-')} tokens; capture more text.")


def fingerprint(sae: SAE) -> str:
    """The same for the same architecture and weights: config and evenly spaced numbers of every parameter, hashed."""
    found = hashlib.blake2b(repr((type(sae).__name__, sae.config)).encode(), digest_size=16)
    for name, tensor in sorted(sae.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def _folder(out_dir: Path, source: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its place at the end, or vanishes when anything is raised.

    One that a killed harvest of the same source left behind is taken up again.
    """
    folder = out_dir.with_name(out_dir.name + ".tmp")
    old = out_dir.with_name(out_dir.name + ".old")
    if noted(folder).get("source") != source:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / SCRATCH, {"source": source})
    try:
        yield folder
        if out_dir.exists():
            shutil.rmtree(old, ignore_errors=True)
            out_dir.rename(old)  # readers keep their memory maps of the old files
        folder.rename(out_dir)
    except OSError as error:
        if disk_is_full(error):
            raise HarvestError("The disk is full; free some space and harvest again.") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _tokens(capture: Capture, folder: Path) -> np.ndarray:
    """Tokens (contexts, positions) of the capture in one memory-mapped file, so that they need not be held in memory."""
    file = folder / "tokens.npy"
    mapped = np.lib.format.open_memmap(file, "w+", np.int32, (capture.n_contexts, capture.context_length))
    for i, shard in enumerate(capture.shards):
        first = int(shard["first_context"])
        mapped[first : first + shard["n_contexts"]] = capture.shard_contexts(i)
    return np.asarray(np.load(file, mmap_mode="c"))  # as an array that compiled loops take; nothing is written to it


def _write_contexts(folder: Path, tokens: np.ndarray, documents: np.ndarray) -> None:
    """Turn counts into starts and keep the token ids of the contexts that examples come from."""
    for name in ("example", "activation"):
        counts = np.load(folder / f"{name}_count.npy")
        np.save(folder / f"{name}_start.npy", np.concatenate([[0], np.cumsum(counts)]))
        (folder / f"{name}_count.npy").unlink()
    number = np.unique(np.load(folder / "example_context.npy"))
    np.save(folder / "context_number.npy", number)
    np.save(folder / "context_document.npy", documents[number])
    np.save(folder / "context_tokens.npy", tokens[number])


def _write_vocabulary(folder: Path, texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    np.save(folder / "vocabulary_start.npy", np.cumsum([0, *map(len, encoded)], dtype=np.int64))
    np.save(folder / "vocabulary_bytes.npy", np.frombuffer(b"".join(encoded), dtype=np.uint8))


def _summary(folder: Path, n_tokens: int) -> dict[str, Any]:
    fired = np.load(folder / "n_fires.npy") > 0
    return {
        "n_features": len(fired),
        "n_tokens": n_tokens,
        "alive": int(fired.sum()),
        "dead": int((~fired).sum()),
        "n_examples": len(np.load(folder / "example_context.npy", mmap_mode="r")),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def _facts(sae: SAE, capture: Capture, hook: str, split: Split, tokenizer: Any) -> dict[str, Any]:
    config, manifest = sae.config, capture.manifest
    return {
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sae": {name: getattr(config, name) for name in ("architecture", "d_in", "d_sae", "hook_name", "model_name")},
        "capture": {key: manifest.get(key) for key in ("run_id", "created", "model", "dataset", "dtype")},
        "policy": manifest["policy"],
        "hook": hook,
        "split": split,
        "special_ids": sorted(special_ids(tokenizer)) if tokenizer is not None else [],
        "definitions": DEFINITIONS,
    }
