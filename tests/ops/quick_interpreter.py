"""Triton 3.6's interpreter without two habits that take half of its time. Neither changes a value.

- Each call of a device function replaces the builtins that its file sees again: here the first of a launch does.
- A reduction whose function it does not know visits entry by entry; it is the same, in the same order, by slices.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_replaced: set[int] = set()  # the globals of files whose builtins this launch has replaced
_launch = interpreter.GridExecutor.__call__


def _launch_afresh(self, *args, **kwargs):
    _replaced.clear()
    return _launch(self, *args, **kwargs)


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


def install() -> None:
    interpreter.GridExecutor.__call__ = _launch_afresh
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.ReduceOps.generic_reduce = _reduce_by_slices
