"""Where activations are read and changed: hook points of transformers models, by the names of the field.

A hook point has a TransformerLens name ("blocks.9.hook_resid_post"), but is one side of one module of the transformers
model ("model.layers.9", "out"). FAMILIES says which, per architecture.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:  # importing it takes seconds, which a job that loads no model need not wait
    from transformers import PreTrainedModel

Side = Literal["in", "out"]
Hook = Callable[[Tensor], Tensor | None]


class LMError(ValueError):
    """A language model that cannot be had, or cannot do what is asked. The message is one sentence for a person."""


class UnknownHookPoint(LMError):
    """A hook point's name that this model does not have."""


@dataclass(frozen=True)
class HookPoint:
    """One side of one module: `name` as people write it, `module` its path in the transformers model, `d` its width.

    `side` "in" is the module's first input, "out" its output (of a tuple the first). `layer` is None outside of blocks.
    """

    name: str
    module: str
    side: Side
    d: int
    layer: int | None


class Place(NamedTuple):
    """A hook point within a block: TransformerLens name, module path below the block ("" is the block), side."""

    name: str
    module: str
    side: Side


def _places(
    attention: str, z: str, pre_mlp_norm: str, mlp_out: str, *, after_attention: str = "", after_mlp: str = ""
) -> tuple[Place, ...]:
    """The places of a block in the order in which they come to pass.

    `after_attention` and `after_mlp`: norms that come between the sub-layer and the residual stream (Gemma 2 and 3),
    whose outputs TransformerLens calls attn_out and mlp_out.
    """
    return (
        Place("hook_resid_pre", "", "in"),
        Place("attn.hook_z", f"{attention}.{z}", "in"),
        Place("hook_attn_out", after_attention or attention, "out"),
        Place("hook_resid_mid", pre_mlp_norm, "in"),
        Place("mlp.hook_in", "mlp", "in"),
        Place("mlp.hook_post", f"mlp.{mlp_out}", "in"),
        Place("hook_mlp_out", after_mlp or "mlp", "out"),
        Place("hook_resid_post", "", "out"),
    )


_GPT2 = _places("attn", "c_proj", "ln_2", "c_proj")
_GPT_NEOX = _places("attention", "dense", "post_attention_layernorm", "dense_4h_to_h")
_LLAMA = _places("self_attn", "o_proj", "post_attention_layernorm", "down_proj")
_GEMMA2 = _places(
    "self_attn",
    "o_proj",
    "pre_feedforward_layernorm",
    "down_proj",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
# Other models keep what holds for every residual stack: the input and the output of a block.
_ANY = (_GPT2[0], _GPT2[-1])

FAMILIES: dict[str, tuple[Place, ...]] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _GEMMA2),
}


def hook_points(model: PreTrainedModel) -> list[HookPoint]:
    """Every named hook point of a model, in the order of a forward pass. Works on the meta device too.

    Raises LMError when the model has no stack of decoder blocks.
    """
    d_model = text_config(model).hidden_size
    blocks_path, blocks = decoder_blocks(model)
    points = []
    embedding = module_path(model, model.get_input_embeddings())
    if embedding:
        points.append(HookPoint("hook_embed", embedding, "out", d_model, None))
    for layer, block in enumerate(blocks):
        for place in _family(model):
            if place.module and not _has(block, place.module):
                continue  # e.g. the MLP of a mixture of experts has no single down projection
            path = f"{blocks_path}.{layer}" + (f".{place.module}" if place.module else "")
            d = _width(model.get_submodule(path), place.side) or d_model
            points.append(HookPoint(f"blocks.{layer}.{place.name}", path, place.side, d, layer))
    return points


def resolve(model: PreTrainedModel, points: list[HookPoint], name: str) -> HookPoint:
    """The hook point of a name: TransformerLens ("blocks.9.hook_resid_post") or a module path.

    Module paths may be whole ("model.layers.9.mlp") or start at the decoder, as sparsify writes them ("layers.9",
    "h.3.mlp"), and may end in ".input" or ".output" (the default). A place that has a TransformerLens name is returned
    under it. Raises UnknownHookPoint with the range of layers or the nearest names.
    """
    for point in points:
        if point.name == name:
            return point
    path, side = _split_side(name)
    for full in _candidates(model, path):
        if _has(model, full):
            return _module_point(model, points, full, side, name)
    raise UnknownHookPoint(_unknown(model, points, name))


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and modules of the decoder's blocks: the longest list of modules in it. Raises LMError if there is none."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    n_layers = text_config(model).num_hidden_layers
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            prefix = module_path(model, decoder)
            return ".".join(part for part in (prefix, name) if part), module
    raise LMError(f"A {type(model).__name__} has no list of {n_layers} decoder blocks, so nothing can be hooked in it.")


def text_config(model: PreTrainedModel) -> Any:
    """The part of a model's config that describes its language model."""
    return model.config.get_text_config()


def module_path(model: nn.Module, wanted: nn.Module) -> str:
    """The path of a module inside a model; "" for the model itself or a module that is not in it."""
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _family(model: PreTrainedModel) -> tuple[Place, ...]:
    places = FAMILIES.get(model.config.model_type, _ANY)
    if getattr(model.config, "use_parallel_residual", False):  # Pythia: attention and MLP both read the block's input
        places = tuple(place for place in places if place.name != "hook_resid_mid")
    return places


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _width(module: nn.Module, side: Side) -> int | None:
    """The width of one side of a module, where its weights tell it."""
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, Conv1D):  # GPT-2's linear layer: weight (in, out)
        return int(module.weight.shape[0 if side == "in" else 1])
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if side == "out" else None
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 1 else None


def _split_side(name: str) -> tuple[str, Side]:
    if name.endswith(".input"):
        return name.removesuffix(".input"), "in"
    return name.removesuffix(".output"), "out"


def _candidates(model: PreTrainedModel, path: str) -> tuple[str, ...]:
    """The path as it is, and as a path below the decoder ("layers.9" -> "model.layers.9")."""
    if not path:
        return ()
    return path, f"{decoder_blocks(model)[0].rpartition('.')[0]}.{path}"


def _module_point(model: PreTrainedModel, points: list[HookPoint], path: str, side: Side, name: str) -> HookPoint:
    for point in points:
        if (point.module, point.side) == (path, side):
            return point
    module = model.get_submodule(path)
    d = _width(module, side)
    if d is None and any(point.module == path and point.layer is not None for point in points):
        d = text_config(model).hidden_size  # an attention or MLP module as a whole
    if d is None:
        raise UnknownHookPoint(
            f"{name!r:.80} is a {type(module).__name__}, whose {side}put cannot be hooked; "
            "name a block, an attention or MLP module, a norm or a linear layer."
        )
    layer = re.search(r"\.(\d+)(?:\.|$)", path)
    return HookPoint(f"{path}.{side}put", path, side, d, int(layer[1]) if layer else None)


def _unknown(model: PreTrainedModel, points: list[HookPoint], name: str) -> str:
    n_layers = len(decoder_blocks(model)[1])
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if layer and int(layer[1]) >= n_layers:
        return f"There is no layer {layer[1]:.20} for {name!r:.80}: this model's layers are 0 to {n_layers - 1}."
    near = difflib.get_close_matches(name[:80], [point.name for point in points], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the names are like {points[-1].name}."
    return f"This model has no hook point {name!r:.80}; {hint}"


# Functions by (module, side), for the calling context only. Every thread starts with an empty context, so two requests
# that run one model at the same time never meet each other's hooks.
_active: ContextVar[Mapping[tuple[nn.Module, Side], tuple[Hook, ...]]] = ContextVar(
    "active_hooks", default=MappingProxyType({})
)
_installing = threading.Lock()


@contextmanager
def hooked_modules(model: nn.Module, fns: Mapping[HookPoint, Hook]) -> Iterator[None]:
    """Within this block, and for this context only, pass the activations of hook points through functions.

    fn(x (b, t, d)) returns the tensor to go on with, of the same shape, or None to leave x as it is. Nested blocks
    apply one after the other, outer first.
    """
    active = dict(_active.get())
    for point, fn in fns.items():
        module = model.get_submodule(point.module)
        _install(module, point.side)
        active[module, point.side] = (*active.get((module, point.side), ()), fn)
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


def _install(module: nn.Module, side: Side) -> None:
    """Give a module its dispatcher, once and for good: it does nothing outside `hooked_modules`.

    It is never removed, because another thread may be walking through the module's hooks at that moment.
    """
    mark = f"_dispatches_{side}"
    with _installing:
        if getattr(module, mark, False):
            return
        if side == "out":
            module.register_forward_hook(_on_output)
        else:
            module.register_forward_pre_hook(_on_input, with_kwargs=True)
        setattr(module, mark, True)


def _on_output(module: nn.Module, args: Any, output: Any) -> Any:
    fns = _active.get().get((module, "out"))
    if not fns:
        return None
    if isinstance(output, tuple):
        return (_apply(fns, output[0]), *output[1:])
    return _apply(fns, output)


def _on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fns = _active.get().get((module, "in"))
    if not fns:
        return None
    if args:
        return (_apply(fns, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _apply(fns, kwargs["hidden_states"])}


def _apply(fns: tuple[Hook, ...], x: Tensor) -> Tensor:
    for fn in fns:
        y = fn(x)
        if y is None:
            continue
        if y.shape != x.shape:
            raise LMError(f"A hook returned a tensor of shape {tuple(y.shape)} in place of one of {tuple(x.shape)}.")
        x = y.to(x.dtype)
    return x
