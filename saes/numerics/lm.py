"""A language model to take activations from: any causal model of the transformers library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import torch
from huggingface_hub import errors as hub
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from saehub.causes import chain_of, disk_is_full, memory_ran_out
from saes.numerics import hooks
from saes.numerics.folders import whole_folder
from saes.numerics.hooks import Hook, HookPoint, LMError, UnknownHookPoint

if TYPE_CHECKING:  # importing them takes seconds, which a job that loads no model need not wait
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LM",
    "HookPoint",
    "LMError",
    "UnknownHookPoint",
    "describe_config",
    "hooked",
    "import_gguf",
    "load_lm",
    "pick_device",
]


class LM:
    """A causal language model with its tokenizer and its hook points.

    Attributes: `model`, `tokenizer`, `name`, `revision` (commit on the Hub, or None), `device`, `dtype`, `n_layers`,
    `d_model`, `vocab_size`, `max_context` (longest input in tokens, or None if the model sets no limit).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "", revision: str | None = None
    ) -> None:
        config = hooks.text_config(model)
        self.model = model.train(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_context: int | None = getattr(config, "max_position_embeddings", None)
        self._points = hooks.hook_points(model)
        self._dtype = next(model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def hook_points(self) -> list[HookPoint]:
        """Every named hook point, in the order of a forward pass."""
        return list(self._points)

    def resolve(self, name: str) -> HookPoint:
        """The hook point of a TransformerLens name or a module path; see `hooks.resolve`. Raises UnknownHookPoint."""
        return hooks.resolve(self.model, self._points, name)

    @torch.inference_mode()
    def activations(
        self, input_ids: Tensor, hook_names: Sequence[str], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations (b, t, d) of several hook points for tokens (b, t), in one pass.

        The pass ends as soon as the last of them is seen, so deeper blocks and the LM head are not computed. Keys are
        the names as given. `attention_mask` (b, t) is 1 for real tokens; leave it out when there is no padding.
        Raises UnknownHookPoint, and LMError for tokens the model cannot take.
        """
        points = {name: self.resolve(name) for name in hook_names}
        input_ids = self._checked(input_ids)
        if not points:
            return {}
        wanted = set(points.values())
        seen: dict[HookPoint, Tensor] = {}

        def recorder(point: HookPoint) -> Hook:
            def record(x: Tensor) -> None:
                seen[point] = x
                if len(seen) == len(wanted):
                    raise _AllSeen

            return record

        try:
            with hooks.hooked_modules(self.model, {point: recorder(point) for point in wanted}):
                self.model(input_ids=input_ids, attention_mask=self._to_device(attention_mask), use_cache=False)
        except _AllSeen:
            return {name: seen[point] for name, point in points.items()}
        missing = ", ".join(sorted(point.name for point in wanted - seen.keys()))
        raise LMError(f"{missing} took no part in the forward pass of {self.name or 'this model'}.")

    def _to_device(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device)

    def _checked(self, input_ids: Tensor) -> Tensor:
        """Tokens as int64 on the model's device; refuses what would crash inside (on a GPU, beyond repair)."""
        if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise LMError(f"Tokens must be a non-empty (batch, time) tensor of integers, not {tuple(input_ids.shape)}.")
        if self.max_context is not None and input_ids.shape[1] > self.max_context:
            raise LMError(
                f"The text has {input_ids.shape[1]} tokens, but {self.name or 'this model'} reads at most "
                f"{self.max_context}; shorten it."
            )
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise LMError(
                f"Token {high if low >= 0 else low} is outside this model's vocabulary of {self.vocab_size}; "
                "use the model's own tokenizer."
            )
        return input_ids.to(self.device, torch.int64)


class _AllSeen(Exception):
    """Ends a forward pass once every wanted activation is there; never leaves `LM.activations`."""


@contextmanager
def hooked(lm: LM, fns: Mapping[str, Hook]) -> Iterator[None]:
    """Within this block, pass the activations of hook points through functions: fn(x (b, t, d)) -> x or None.

    Belongs to the calling thread (and context): another thread that runs the same model meanwhile is not touched.
    Raises UnknownHookPoint.
    """
    with hooks.hooked_modules(lm.model, {lm.resolve(name): fn for name, fn in fns.items()}):
        yield


def pick_device() -> torch.device:
    """The fastest device that is here now: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_lm(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    gguf_file: str | None = None,
    token: str | None = None,
) -> LM:
    """Load a causal language model and its tokenizer from a local folder or the Hugging Face Hub.

    `device` None picks one at run time. `dtype` None means float32 on a CPU (half precision is slower or inexact
    there; use autocast for speed) and the file's own dtype elsewhere. Code from the repository is never run.

    Raises LMError: no such folder or repository, gated, offline, no tokenizer, weights missing, out of memory.
    """
    name = checked_source(name_or_path, gguf_file)
    device = torch.device(device) if device is not None else pick_device()
    wanted_dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    options: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": False}
    if not gguf_file and revision and _is_here(name, revision):
        options["local_files_only"] = True
    if gguf_file:
        options["gguf_file"] = gguf_file
    with plain_errors(gguf_file or name):
        config = AutoConfig.from_pretrained(name, **options)
    with plain_errors(gguf_file or name, missing="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    with plain_errors(gguf_file or name):
        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(name, config=config, dtype=wanted_dtype, output_loading_info=True, **options)
        _refuse_incomplete(name, info)
        model = model.to(device).requires_grad_(False)
    return LM(model, tokenizer, name, getattr(config, "_commit_hash", None))


def describe_config(
    name_or_path: str | Path, *, revision: str | None = None, gguf_file: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """What a model is, from its config alone: no weights are read.

    Returns architecture, model_type, n_layers, d_model, vocab_size, max_context, n_parameters, and hook_points as a
    list of {name, module, side, d, layer}. Raises LMError as `load_lm` does.
    """
    name = checked_source(name_or_path, gguf_file)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    with plain_errors(name):
        config = AutoConfig.from_pretrained(name, revision=revision, token=token, trust_remote_code=False, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    text = hooks.text_config(model)
    return {
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "n_layers": text.num_hidden_layers,
        "d_model": text.hidden_size,
        "vocab_size": text.vocab_size,
        "max_context": getattr(text, "max_position_embeddings", None),
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hook_points": [asdict(point) for point in hooks.hook_points(model)],
    }


def import_gguf(gguf_path: str | Path, out_dir: str | Path) -> Path:
    """Convert a GGUF file to an ordinary local model folder (safetensors, tokenizer, chat template); returns it.

    Weights are stored as float32: a dequantised value is scale * q + offset, which bfloat16 would round a second time.
    The folder appears whole or not at all. Raises LMError when the file is not GGUF or transformers does not know its
    architecture, FolderError when the folder already exists or cannot be written.
    """
    source = Path(gguf_path)
    _require_gguf(source)
    with whole_folder(Path(out_dir)) as folder:
        lm = load_lm(source.parent, gguf_file=source.name, device="cpu", dtype=torch.float32)
        # What was read is not quantised any more, but transformers would refuse to save it while it believes so.
        lm.model.hf_quantizer = None
        if hasattr(lm.model.config, "quantization_config"):
            del lm.model.config.quantization_config
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return Path(out_dir)


def _require_gguf(path: Path) -> None:
    if not path.is_file():
        raise LMError(f"There is no file {path}.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LMError(f"{path.name} is not a GGUF file: it does not begin with the letters GGUF.")


def checked_source(name_or_path: str | Path, gguf_file: str | None = None) -> str:
    """A local folder that can be read, or something that can be a Hub id. Raises LMError for anything else."""
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        needed = gguf_file or "config.json"
        if not (path / needed).is_file():
            raise LMError(f"The folder {path} has no {needed}, so it does not hold a transformers model.")
        return str(path)
    if path.exists():
        raise LMError(f"{path} is a file; give the folder it is in (or convert a GGUF file with import_gguf).")
    if isinstance(name_or_path, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise LMError(f"There is no folder {name}, and it is not a Hub id like HuggingFaceTB/SmolLM2-135M.")
    return name


def _is_here(name: str, revision: str) -> bool:
    """Whether the Hub's cache holds a commit's model: then the Hub is not asked for files that cannot have changed, each of
    which would be waited for where it does not answer."""
    if Path(name).is_dir() or not re.fullmatch(r"[0-9a-f]{40}", revision):
        return False

    def held(file: str) -> str | None:
        path = try_to_load_from_cache(name, file, revision=revision)
        return path if isinstance(path, str) else None

    if not held("config.json") or not any(map(held, ("tokenizer.json", "tokenizer.model", "vocab.json"))):
        return False
    if held("model.safetensors"):
        return True
    index = held("model.safetensors.index.json")
    return bool(index) and all(map(held, set(json.loads(Path(str(index)).read_text("utf-8"))["weight_map"].values())))


def _refuse_incomplete(name: str, info: Mapping[str, Any]) -> None:
    """transformers fills weights that a file lacks with random numbers and only warns."""
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(key[0]) for key in info.get("mismatched_keys") or ())
    if missing or mismatched:
        first = (missing + mismatched)[0]
        raise LMError(
            f"{len(missing) + len(mismatched)} weights of {name} are missing or of the wrong shape (first: {first}); "
            "the download is incomplete or the config belongs to another model."
        )


@contextmanager
def plain_errors(name: str, missing: str = "model") -> Iterator[None]:
    """Turn whatever the libraries raise while reading `name` into one LMError with one sentence."""
    try:
        yield
    except LMError:
        raise
    except Exception as error:  # transformers raises nearly every kind there is
        raise LMError(_sentence(name, error, missing)) from error


# What an exception means to a person: the first kind found among it and its causes, or else the first words in their
# texts (transformers tells many things only by a plain ValueError or OSError).
_BY_KIND: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((hub.GatedRepoError,), "{name} is gated: accept its terms on huggingface.co and give an access token."),
    ((hub.RevisionNotFoundError,), "{name} has no such revision (branch, tag or commit) on the Hub."),
    (
        (hub.RepositoryNotFoundError,),
        "There is no repository {name} on the Hub, or it is private and needs an access token.",
    ),
    (
        (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, httpx2.TransportError),
        "{name} is not on this machine and the Hugging Face Hub cannot be reached; "
        "check the network, or give a local folder.",
    ),
)
_BY_CAUSE = (
    (
        memory_ran_out,
        "{name} does not fit into memory; choose a smaller model, a half-precision dtype or another device.",
    ),
    (disk_is_full, "The disk is full, so {name} could not be stored; free some space and try again."),
)
_BY_TEXT = (
    ("trust_remote_code", "{name} needs program code from its own repository, which is not run here."),
    ("Unrecognized configuration class", "{name} is not a causal language model that transformers can load."),
)


def _sentence(name: str, error: Exception, missing: str) -> str:
    causes = list(chain_of(error))
    for kinds, sentence in _BY_KIND:
        if any(isinstance(cause, kinds) for cause in causes):
            return sentence.format(name=name)
    for says, sentence in _BY_CAUSE:
        if any(says(cause) for cause in causes):
            return sentence.format(name=name)
    for words, sentence in _BY_TEXT:
        if any(words in str(cause) for cause in causes):
            return sentence.format(name=name)
    if missing == "tokenizer":
        return f"{name} has no tokenizer that can be read; add its tokenizer files (tokenizer.json)."
    first_line = str(error).strip().partition("\n")[0]
    return f"{name} could not be loaded: {first_line or type(error).__name__}"
