"""Tensors on another device, on a machine that has none: arithmetic is the CPU's, and to mix devices is an error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "lazy"  # one that torch knows by name, and that needs no library
MIXES = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_")  # may have tensors of the CPU beside others


class Elsewhere(Tensor):
    """A tensor that says it lies on `DEVICE`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=f"{DEVICE}:0", requires_grad=False, **options)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Calls(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What torch makes of Python's numbers and lists before a call is dispatched."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].inner.tolist()
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], tuple):
            index = tuple(torch.tensor(x).to(args[0].device) if isinstance(x, list) else x for x in args[1])
            return function(args[0], index, *args[2:])
        return function(*args, **kwargs)


@contextmanager
def two_devices() -> Iterator[None]:
    """Within: what is made on `DEVICE` is `Elsewhere`. A call with tensors of two devices raises RuntimeError."""
    with _Calls(), _Python(), patch("torch.is_autocast_enabled", lambda device: False):  # it does not know the device
        yield


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    away = any(isinstance(x, Elsewhere) for x in tensors)
    name = function.overloadpacket.__name__
    if away and name not in MIXES and any(x.dim() and not isinstance(x, Elsewhere) for x in tensors):
        raise RuntimeError(f"{function}: tensors of two devices")
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == DEVICE
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = function(*args, **kwargs)
    return tree_map(lambda x: Elsewhere(x) if away and isinstance(x, Tensor) else x, out)


def move(module: nn.Module) -> Callable[[], None]:
    """All parameters and buffers of a module, which computes no gradients. Returns what brings them back."""
    before = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    before.append((tensors, name, tensor))
                    moved = Elsewhere(tensor.detach())
                    tensors[name] = nn.Parameter(moved, requires_grad=False) if tensors is part._parameters else moved

    def back() -> None:
        for tensors, name, tensor in before:
            tensors[name] = tensor

    return back
