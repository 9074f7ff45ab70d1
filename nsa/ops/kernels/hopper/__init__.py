"""The operators for Hopper's warpgroups, in Gluon: asynchronous products and copies are placed by hand.

Triton's own pipelining lets one program's softmax hide behind another's products only; here a program's own products
run on meanwhile. Same rows, runs and lists as in the portable kernels (nsa/ops/kernels), same results. Served are
16-bit types, heads of 64 or 128, groups of a power of two heads (`nsa.ops.kernels.launch.warpgroups`).
"""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def boxes(x: Tensor, shape: list[int], box: list[int]) -> TensorDescriptor:
    """A contiguous tensor, seen as ``shape``, in boxes that the copy engine lays out as the products read them."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return TensorDescriptor(x, shape, strides, box, _layout(tuple(box), x.dtype))


def key_boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """(B, S, G, D) in boxes of ``rows`` keys of one head."""
    batch, keys, groups, width = x.shape
    return boxes(x, [batch * keys, groups * width], [rows, width])


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[dtype])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # compiled only
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
