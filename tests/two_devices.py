"""A second device without the hardware: tensors that say they are on a GPU, compute on the CPU, and refuse to be mixed with
tensors of the CPU, as a GPU does.

It shows that code moves what it must move, and that nothing but the device differs: results are those of the CPU, to the
bit. It says nothing of a GPU's kernels, of its speed or of autocast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
TAKE_BOTH = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnGpu(Tensor):
    """A tensor of the second device; `held` is the real one."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # missing from torch's annotations
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CPU,  # C++ asks the device's driver otherwise
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def _take(self, value: "OnGpu") -> None:
        self.held = value.held

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    data = property(lambda self: OnGpu(self.held.detach()), _take)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _Operations():
            return func(*args, **(kwargs or {}))


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: OnGpu) -> Tensor:
        return x.held.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return OnGpu(grad)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGpu(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: OnGpu) -> Tensor:  # type: ignore[override]
        return grad.held


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on this device."""
    kind = torch.device(device).type
    if kind == x.device.type:
        return x
    found: Tensor = (_ToCpu if kind == "cpu" else _ToGpu).apply(x)  # type: ignore[no-untyped-call]
    return found


class _Calls(TorchFunctionMode):
    """What Python code says of devices: .to, .cpu, numpy, tensors made of lists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return moved(func(*args, **kwargs | {"device": None}), kwargs["device"])
        if func is Tensor.to:
            return self._to(func, *args, **kwargs)
        if func is Tensor.cpu:
            return moved(args[0], CPU)
        if func is Tensor.numpy and isinstance(args[0], OnGpu):
            raise TypeError("A tensor of the GPU is no numpy array.")
        if func is Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].held.tolist()
        return func(*args, **kwargs)

    @staticmethod
    def _to(to: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        places = [one.device if isinstance(one, Tensor) else one for one in given if _is_place(one)]
        dtypes = [
            one.dtype if isinstance(one, Tensor) else one for one in given if isinstance(one, torch.dtype | Tensor)
        ]
        x = to(x, dtypes[0]) if dtypes else x
        return moved(x, places[0]) if places else x


def _is_place(given: Any) -> bool:
    return isinstance(given, str | torch.device | Tensor)


class _Operations(TorchDispatchMode):
    """Every operation: on the held tensors, refused where they are of two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        on_gpu = any(isinstance(one, OnGpu) for one in given)
        if on_gpu and func not in TAKE_BOTH and (strange := _strangers(func, args, given)):
            raise RuntimeError(f"{func} was given tensors of two devices; on the CPU are {strange}.")
        device = GPU if on_gpu else CPU
        if kwargs.get("device") is not None:
            device = GPU if on_gpu else torch.device(kwargs["device"])
            kwargs["device"] = CPU
        if func is aten.copy_.default:
            device = args[0].device
        made = func(*tree_map_only(OnGpu, _held, args), **tree_map_only(OnGpu, _held, kwargs))
        known = {
            id(_held(one)): one for one in given
        }  # what an operation in place gives back is the tensor it was given

        def named(one: Tensor) -> Tensor:
            return known.get(id(one)) if id(one) in known else OnGpu(one) if device.type == "cuda" else one

        return tree_map_only(Tensor, named, made)


def _held(one: Tensor) -> Tensor:
    return one.held if isinstance(one, OnGpu) else one


def _strangers(func: Any, args: Any, given: list[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of the tensors of the CPU that a GPU would refuse: it takes single numbers, and indices of its own rows."""
    own_rows = func in INDEXING and isinstance(args[0], OnGpu)
    return [
        tuple(one.shape)
        for one in given
        if not isinstance(one, OnGpu) and one.dim() and not (own_rows and one.dtype in (torch.int64, torch.bool))
    ]


@contextmanager
def two_devices() -> Iterator[str]:
    """Within this block "cuda", which is given, is the second device."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # as torch's own FakeTensorMode does
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            patch.object(torch.cuda, "_lazy_init", lambda: None),
            patch.object(torch.cuda, "max_memory_allocated", lambda device=None: 0),
            patch.object(torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode)),
            _Calls(),
            _Operations(),
        ):
            yield "cuda"
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
