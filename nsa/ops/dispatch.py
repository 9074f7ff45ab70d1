"""Checks that all operators share, and the selection of an implementation."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from nsa.ops.geometry import share_gradient

_Function = TypeVar("_Function", bound=Callable)

BACKENDS = ("auto", "triton", "torch", "naive")


def check_backend(backend: str) -> None:
    """Raise ValueError unless it is the name of one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def resolve_backend(backend: str, *tensors: Tensor, heads: bool = True, kernels: bool = True) -> str:
    """The implementation to run: ``naive`` (reference), ``torch`` (fallback with linear memory) or ``triton``.

    ``auto`` takes the kernels if ``tensors`` are on a GPU (or the meta device, for plans) and the kernels support them.
    ``heads``: whether their last dimension is a head dimension, which attention kernels load as a whole. ``kernels``:
    whether the operator has kernels.

    Raises:
        ValueError: unknown name, or ``triton`` for tensors that the kernels cannot handle.
    """
    check_backend(backend)
    if not kernels:
        if backend == "triton":
            raise ValueError("backend='triton': there is no kernel for this yet; use 'auto' or 'torch'")
        return "torch" if backend == "auto" else backend
    if backend == "triton" and (obstacle := _kernel_obstacle(*tensors, heads=heads)):
        raise ValueError(f"backend='triton': {obstacle}; or use 'auto' or 'torch'")
    if backend == "auto":
        return "triton" if _on_gpu(*tensors) and _kernel_obstacle(*tensors, heads=heads) is None else "torch"
    return backend


def _on_gpu(*tensors: Tensor) -> bool:
    return all(x.is_cuda or x.is_meta for x in tensors)


def _kernel_obstacle(*tensors: Tensor, heads: bool) -> str | None:
    # Triton exists on Linux only, and takes a second to import.
    try:
        from nsa.ops.kernels.hardware import why_not
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return why_not(*tensors, heads=heads)


def autocasts(*names: str) -> Callable[[_Function], _Function]:
    """A decorator for an operator: under `torch.autocast` it computes like torch's matrix products.

    The arguments ``names`` (tensors, or pairs of them) are cast to autocast's dtype, and their gradients come back in
    their own. Values that are a view of the keys stay one. Within the operator autocast is off: what it computes in
    fp32 stays in fp32.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        first_name = next(iter(signature.parameters))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            device = (args[0] if args else kwargs[first_name]).device.type
            if not _autocast_enabled(device):
                return function(*args, **kwargs)
            dtype, given = torch.get_autocast_dtype(device), signature.bind(*args, **kwargs)
            arguments = given.arguments
            together = {"k", "v"} <= arguments.keys() & set(names) and share_gradient(arguments["v"], arguments["k"])
            for name in names:
                if name in arguments:
                    arguments[name] = _cast(arguments[name], dtype)
            if together:
                arguments["v"] = arguments["k"][..., : arguments["v"].shape[-1]]
            with without_autocast(device):
                return function(*given.args, **given.kwargs)

        return cast(_Function, call)

    return decorate


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Where torch.autocast is on, it is off in this context."""
    return torch.autocast(device_type, enabled=False) if _autocast_enabled(device_type) else nullcontext()


def _autocast_enabled(device_type: str) -> bool:
    """The meta device has no autocast, and may not be asked."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def differentiable_once(backward: _Function) -> _Function:
    """A decorator for the ``backward`` of an autograd.Function: its gradients have no derivative, and to ask raises.

    torch's `once_differentiable` raises only where nothing else is asked for: `torch.autograd.grad` passes over it.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        depends_on = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        given = [x for x in results if x is not None]
        marked = iter(_NoDerivative.apply(len(given), *given, *depends_on))
        return tuple(None if x is None else next(marked) for x in results)

    return cast(_Function, call)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:number])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("this operator has no second derivative; backend='naive' has one, in quadratic memory")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(part, dtype) for part in value)
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1  # fp8 stays as it is
    return value.to(dtype) if floats else value


def check_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, offset: int | None = None) -> None:
    """Raise ValueError unless the shapes of q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) are consistent.

    ``offset``: position of the first query; None: the queries are the last T of the S positions of the keys.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k, v must be (batch, tokens, heads, width); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    types = {x.dtype for x in (q, k, v)}
    if not all(x.is_floating_point() for x in (q, k, v)) or (torch.float64 in types and len(types) > 1):
        raise ValueError(f"q, k, v must be floating-point, in one type; got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must share batch, tokens and heads")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must share batch and head width")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads ({q.shape[2]}) must be a multiple of key/value heads ({k.shape[2]})")
    check_packing(q, cu_seqlens, k.shape[1] if offset is None else offset + q.shape[1])


def check_packing(q: Tensor, cu_seqlens: Tensor | None, tokens: int) -> None:
    """Raise ValueError unless ``cu_seqlens`` (N+1,) int32 are document boundaries in ``tokens`` tokens, and B is 1."""
    if cu_seqlens is None:
        return
    if q.shape[0] != 1:
        raise ValueError(f"packed documents (cu_seqlens) need batch 1, got {q.shape[0]}: concatenate the sequences")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (N+1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    # On a GPU, reading the values would wait for the device.
    if cu_seqlens.device.type == "cpu":
        inner_ok = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if not inner_ok or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens:
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens ({tokens})")


def check_positions(q: Tensor, k: Tensor) -> int:
    """The position of the first query: the T queries are the last of the S positions of the keys.

    Raises:
        ValueError: fewer keys than queries.
    """
    offset = k.shape[1] - q.shape[1]
    if offset < 0:
        raise ValueError(f"need at least as many keys as queries, got {k.shape[1]} keys for {q.shape[1]} queries")
    return offset


def check_places(positions: Tensor, queries: int, keys: int) -> None:
    """Raise ValueError unless ``positions`` (T,) int32 are places of T = ``queries`` tokens among ``keys``, rising."""
    if positions.shape != (queries,) or positions.dtype != torch.int32:
        raise ValueError(f"positions must be ({queries},) int32, got {tuple(positions.shape)} {positions.dtype}")
    # On a GPU, reading the values would wait for the device.
    if positions.device.type == "cpu" and queries:
        inside = int(positions[0]) >= 0 and int(positions[-1]) < keys
        if not inside or not bool((positions[1:] > positions[:-1]).all()):
            raise ValueError(f"positions must rise, from 0 to at most {keys - 1}, the last key's")


def check_listed(name: str, listed: Tensor, there: int) -> None:
    """Raise ValueError unless ``listed`` are int32 or int64 numbers below ``there``, or -1, which is none.

    On a GPU the values are not read: that would wait for the device.
    """
    if listed.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {listed.dtype}")
    if listed.device.type == "cpu" and listed.numel() and not torch.compiler.is_compiling():
        lowest, highest = (int(x) for x in listed.aminmax())
        if lowest < -1 or highest >= there:
            raise ValueError(f"{name} must be from 0 to {there - 1}, or -1 for none; got {lowest} to {highest}")


def check_compression(length: int, stride: int, block_size: int | None = None) -> None:
    """Raise ValueError unless d | l, and d | l' and l <= l' (NSA, arXiv 2502.11089, Eq. 9)."""
    if length < 1 or stride < 1 or length % stride:
        raise ValueError(f"length ({length}) must be a positive multiple of stride ({stride})")
    if block_size is not None and (block_size % stride or block_size < length):
        raise ValueError(
            f"block_size ({block_size}) must be a multiple of stride ({stride}) and at least length ({length})"
        )


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """``scale``, or the usual ``head_dim ** -0.5``."""
    return head_dim**-0.5 if scale is None else scale


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; everything else accumulates in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
