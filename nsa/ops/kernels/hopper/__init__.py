"""The operators for Hopper's warpgroups, in Gluon: asynchronous products and copies are placed by hand.

Triton's own pipelining lets one program's softmax hide behind another's products only; here a program's own products
run on meanwhile. Same runs and lists as in the portable kernels (nsa/ops/kernels), same results. Served are 16-bit
types, heads of 64 or 128, and groups of a power of two heads, or whose heads fill at least five eighths of one of up to
16 (`nsa.ops.kernels.launch.warpgroups`); forward and in selection also keys of 192 (values of 128): boxes of theirs are
in two parts, 128 columns and 64.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.ops.kernels.launch import split_width

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def boxes(x: Tensor, shape: list[int], box: list[int]) -> TensorDescriptor:
    """A contiguous tensor, seen as ``shape``, in boxes that the copy engine lays out as the products read them."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return TensorDescriptor(x, shape, strides, box, _layout(tuple(box), x.dtype))


def parts(x: Tensor, shape: list[int], box: list[int]) -> list[TensorDescriptor]:
    """`boxes` of a head's columns up to a power of two, and of the rest (if there is none, of the same once more)."""
    first, rest = split_width(box[-1])
    return [boxes(x, shape, [*box[:-1], width]) for width in (first, rest or first)]


def key_boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """(B, S, G, D) in boxes of ``rows`` keys of one head."""
    return boxes(x, *_key_shape(x, rows))


def key_parts(x: Tensor, rows: int) -> list[TensorDescriptor]:
    """`parts` of (B, S, G, D) in boxes of ``rows`` keys of one head."""
    return parts(x, *_key_shape(x, rows))


def _key_shape(x: Tensor, rows: int) -> tuple[list[int], list[int]]:
    batch, keys, groups, width = x.shape
    return [batch * keys, groups * width], [rows, width]


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[dtype])


@gluon.constexpr_function
def span(heads):
    """Rows that a token takes: its heads, up to a power of two. What else the copy engine brings into them, heads of
    the next group or zeros, is computed and dropped."""
    return triton.next_power_of_2(heads)


@gluon.jit
def head_rows(batch, token, group, row, num_tokens, GROUPS: gl.constexpr, HEADS: gl.constexpr):
    """(row of (B, T, H), whether there is one) of rows ``row`` of a tile, of tokens ``token``."""
    head = row % span(HEADS)
    ok = token < num_tokens
    if span(HEADS) > HEADS:
        ok = ok & (head < HEADS)
    return (batch.to(gl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + head, ok


@gluon.jit
def store_rows(desc, Out, memory, value, at, row, ok, HEADS: gl.constexpr):
    """64 rows of a tile, (64, W), to (B, T, H, W), from (batch, token, head) ``at`` on, by way of ``memory``, which is
    free once they have been read: `tma.store_wait`. If some are idle, to ``row`` where ``ok`` (from `head_rows`)."""
    WIDTH: gl.constexpr = value.shape[1]
    if span(HEADS) == HEADS:
        memory.reshape([64, WIDTH]).store(value)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, at + (0,), memory)
    else:
        layout: gl.constexpr = value.type.layout
        column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
        place = gl.convert_layout(row, gl.SliceLayout(1, layout))[:, None] * WIDTH + column[None, :]
        gl.store(Out + place, value, mask=gl.convert_layout(ok, gl.SliceLayout(1, layout))[:, None])


@gluon.jit
def used_parts(first, rest, D: gl.constexpr):
    """The descriptors from `parts` that D columns take: one or two."""
    if first.block_shape[-1] == D:
        return (first,)
    else:
        return first, rest


@gluon.jit
def rings(descs, COUNT: gl.constexpr):
    """Shared memory for COUNT boxes of each part."""
    return [gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_shape, desc.layout) for desc in descs]


@gluon.jit
def bring(descs, at, column, ready, memory, slot, MORE: gl.constexpr = 0):
    """Start the copies of a box's parts to a slot, whose barrier expects their bytes, and MORE that follow."""
    mbarrier.expect(ready.index(slot), _bytes(descs) + MORE)
    for i in gl.static_range(len(descs)):
        tma.async_copy_global_to_shared(descs[i], at + (column,), ready.index(slot), memory[i].index(slot))
        column += descs[i].block_shape[-1]


@gluon.constexpr_function
def _bytes(descs):
    return sum(desc.block_type.nbytes for desc in descs)


@gluon.jit
def slot_of(memory, slot, ROWS: gl.constexpr):
    """(ROWS, its columns) of each part."""
    return [ring.index(slot).reshape([ROWS, ring.shape[-1]]) for ring in memory]


@gluon.jit
def scores(q, k, N: gl.constexpr):
    """Start Q K^T (64, N): a product, one group of asynchronous ones to wait for, for each part of the columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    none = gl.zeros([64, N], gl.float32, layout)
    s = warpgroup_mma(q[0], k[0].permute([1, 0]), none, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(q)):
        s = warpgroup_mma(q[i], k[i].permute([1, 0]), s, is_async=True)
    return s


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # compiled only
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
