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


def boxes(x: Tensor, box: list[int]) -> TensorDescriptor:
    """A contiguous tensor whose boxes the copy engine moves, laid out as the products read them."""
    layout = gl.NVMMASharedLayout.get_default_for(box, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def key_boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """(B, S, G, D) in boxes of ``rows`` keys of one head."""
    return boxes(x.flatten(2).flatten(0, 1), [rows, x.shape[3]])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # compiled only
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
