"""Triton 3.7's interpreter without habits that take most of its time, none of which changes a value; and with bounds:

- A store outside of the tensors of its launch is an error. Else it ends in other memory, and mostly unseen.
- Each call of a device function replaces the builtins that its file sees again: here the first of a launch does.
- A reduction whose function it does not know visits entry by entry; it is the same, in the same order, by slices.
- Each tensor makes its type and the constants of its shape anew: here those of an equal type serve again.
"""

import math
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

_replaced: set[int] = set()  # the globals of files whose builtins this launch has replaced
_bounds: list[tuple[int, int]] = []  # first address of each tensor's storage in this launch, and that behind it
_launch = interpreter.GridExecutor.__call__
_store = interpreter.InterpreterBuilder.create_masked_store


def _launch_afresh(self, *args, **kwargs):
    _replaced.clear()
    storages = [tensor.untyped_storage() for tensor in _tensors((args, kwargs))]
    _bounds[:] = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}
    return _launch(self, *args, **kwargs)


def _tensors(given):
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, TensorDescriptor):
        yield given.base
    elif isinstance(given, tuple | list | dict):
        for part in given.values() if isinstance(given, dict) else given:
            yield from _tensors(part)


def _store_within(self, pointers, value, mask, *options):
    at = pointers.data[mask.data.astype(bool)].astype(np.int64)
    within = np.zeros(at.shape, bool)
    for first, end in _bounds:
        within |= (at >= first) & (at <= end - value.data.dtype.itemsize)
    assert within.all(), f"{(~within).sum()} of {within.size} stored outside of the tensors"
    return _store(self, pointers, value, mask, *options)


def _call_device_function(self, *args, **kwargs):
    if id(self.fn.__globals__) not in _replaced:
        interpreter._patch_lang(self.fn)
        _replaced.add(id(self.fn.__globals__))
    return self.rewrite()(*args, **kwargs)


def _reduce_by_slices(self, inputs):
    if self.axis is None:
        raise NotImplementedError("give the axis of the reduction")

    def slices(index):
        found = []
        for tensor in inputs:
            data = np.take(tensor.handle.data, index, self.axis)
            block = tl.block_type(tensor.dtype, list(data.shape)) if data.shape else tensor.dtype
            found.append(tl.core.tensor(interpreter.TensorHandle(np.atleast_1d(data), tensor.dtype), block))
        return found

    if self.combine_fn.fn.__name__ == "_add_two":  # as the interpreter itself sums
        sums = (np.sum(x.handle.data, self.axis, keepdims=self.keep_dims, dtype=x.handle.data.dtype) for x in inputs)
        return [self.to_tensor(s, x.dtype) for s, x in zip(sums, inputs, strict=True)]
    total = slices(0)
    for index in range(1, inputs[0].handle.data.shape[self.axis]):
        combined = self.combine_fn.fn(*total, *slices(index))
        total = combined if isinstance(combined, tuple) else (combined,)
    scalar = inputs[0].handle.data.ndim == 1
    return [
        self.to_tensor(
            np.expand_dims(part.handle.data.reshape(()) if scalar else part.handle.data, self.axis)
            if self.keep_dims
            else (part.handle.data.item() if scalar else part.handle.data),
            tensor.dtype,
        )
        for part, tensor in zip(total, inputs, strict=True)
    ]


_types: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}  # attributes, by id of the element's type and shape
_np_types: dict[str, np.dtype] = {}
_make_type, _np_type = tl.core.block_type.__init__, interpreter._get_np_dtype


def _type_as_before(self, element_ty, shape):
    key = id(element_ty), tuple([size.value if isinstance(size, tl.core.constexpr) else size for size in shape])
    if key not in _types:
        _make_type(self, element_ty, shape)
        _types[key] = dict(vars(self))  # which keeps the element's type, and so its id
    vars(self).update(_types[key])


def _tensor_of_known_shape(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    known = vars(type).get("constants")
    if known is None:
        shape = [tl.core.constexpr(size) for size in (type.shape if type.is_block() else ())]
        known = type.constants = tl.core.tuple(shape), tl.core.constexpr(math.prod(size.value for size in shape))
        if type.is_block():
            _types[id(type.element_ty), tuple([size.value for size in shape])]["constants"] = known
    self.shape, self.numel = known


def _np_type_as_before(type):
    element = type.element_ty if isinstance(type, tl.core.block_type) else type
    name = "pointer" if isinstance(element, tl.core.pointer_type) else element.name
    if name not in _np_types:
        _np_types[name] = _np_type(element)
    return _np_types[name]


def install() -> None:
    tl.core.block_type.__init__ = _type_as_before
    tl.core.tensor.__init__ = _tensor_of_known_shape
    interpreter._get_np_dtype = _np_type_as_before
    interpreter.GridExecutor.__call__ = _launch_afresh
    interpreter.InterpreterBuilder.create_masked_store = _store_within
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.ReduceOps.generic_reduce = _reduce_by_slices
