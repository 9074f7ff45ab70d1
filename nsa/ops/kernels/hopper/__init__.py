"""The operators for Hopper in Gluon, in which we schedule asynchronous products (wgmma) and TMA transfers ourselves.

With Triton's pipelining, the softmax of one program overlaps only with the products of another. Here it also overlaps
with the products of its own program. The kernels get the same ranges and lists as the Triton kernels
(nsa/ops/kernels), and compute the same.

They support 16-bit types and head dimensions 64 and 128. The number of heads of a group is a power of two, or fills at
least five eighths of a power of two up to 16 (`nsa.ops.kernels.hardware.warpgroups`). The forward pass and selection
also support keys of 192 columns (with values of 128). Such keys are loaded in two parts: 128 columns, and 64.

Words used in this folder: a kernel has computing warpgroups of 64 rows each, and mostly a producer warp that only loads
tiles by TMA. Tiles pass through shared memory in pipeline stages. Every stage has two mbarriers: `ready` completes when
TMA has filled the stage, `free` when the warpgroups have read it. Persistent kernels start one program on each
multiprocessor, which takes one tile after the other.

Shapes in the comments: BN keys, D columns of keys (DV of values), 64 rows of a warpgroup.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.ops.kernels.hardware import split_width

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS = gl.constexpr(64)  # of a warpgroup: wgmma multiplies 64 rows


def box_descriptor(x: Tensor, shape: list[int], box: list[int]) -> TensorDescriptor:
    """TMA descriptor of a contiguous tensor, seen as ``shape``, in boxes laid out as wgmma reads them."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return TensorDescriptor(x, shape, strides, box, _layout(tuple(box), x.dtype))


def part_descriptors(x: Tensor, shape: list[int], box: list[int]) -> list[TensorDescriptor]:
    """`box_descriptor` of both parts of a head's columns. Without a second part, the first one twice."""
    first, rest = split_width(box[-1])
    return [box_descriptor(x, shape, [*box[:-1], width]) for width in (first, rest or first)]


def key_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """`box_descriptor` of (B, S, G, D) in boxes of ``rows`` keys of one head."""
    return box_descriptor(x, *_key_shape(x, rows))


def key_part_descriptors(x: Tensor, rows: int) -> list[TensorDescriptor]:
    """`part_descriptors` of (B, S, G, D) in boxes of ``rows`` keys of one head."""
    return part_descriptors(x, *_key_shape(x, rows))


def _key_shape(x: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Shape and box of keys."""
    batch, keys, groups, width = x.shape
    return [batch * keys, groups * width], [rows, width]


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[dtype])


@gluon.constexpr_function
def rows_per_token(heads):
    """Rows that a token takes in a tile: the heads of its group, up to a power of two.

    Rows beyond the heads are idle. TMA fills them with heads of the next group, or with zeros. What is computed from
    them is dropped.
    """
    return triton.next_power_of_2(heads)


@gluon.constexpr_function
def tokens_per_warpgroup(heads):
    """Tokens in the 64 rows of a warpgroup."""
    return ROWS.value // triton.next_power_of_2(heads)


@gluon.constexpr_function
def accumulator_layout(rows, columns):
    """Registers of a wgmma accumulator (rows, columns): each warp holds 16 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[rows // 16, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def left_operand_layout(accumulator):
    """Registers of the left-hand operand of a product with this accumulator layout, in 16-bit types."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator, k_width=2)


@gluon.jit
def query_rows(batch, token, group, row, num_tokens, GROUPS: gl.constexpr, HEADS: gl.constexpr):
    """int64 rows of a (B, T, H, ..) tensor for rows ``row`` of a tile, and whether they exist and are not idle."""
    head = row % rows_per_token(HEADS)  # [64]
    ok = token < num_tokens  # [64]
    if rows_per_token(HEADS) > HEADS:
        ok = ok & (head < HEADS)
    return (batch.to(gl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + head, ok


@gluon.jit
def store_rows(desc, Out, memory, value, at, row, ok, HEADS: gl.constexpr):
    """Store the 64 rows of a warpgroup, ``value`` (64, W), to Out (B, T, H, W).

    Without idle rows they go through ``memory`` by TMA, to (batch, token, head) ``at``. The memory is free after
    `tma.store_wait`. With idle rows, the others are stored one by one to ``row`` where ``ok`` (from `query_rows`).
    """
    WIDTH: gl.constexpr = value.shape[1]
    if rows_per_token(HEADS) == HEADS:
        memory.reshape([ROWS, WIDTH]).store(value)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, at + (0,), memory)
    else:
        layout: gl.constexpr = value.type.layout
        column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))  # [W]
        offset = gl.convert_layout(row, gl.SliceLayout(1, layout))[:, None] * WIDTH + column[None, :]  # [64, W]
        gl.store(Out + offset, value, mask=gl.convert_layout(ok, gl.SliceLayout(1, layout))[:, None])


@gluon.jit
def used_parts(first, rest, D: gl.constexpr):
    """Those descriptors of `part_descriptors` that D columns need: one or two."""
    if first.block_shape[-1] == D:
        return (first,)
    else:
        return first, rest


@gluon.jit
def allocate_stages(descs, COUNT: gl.constexpr):
    """Shared memory for COUNT stages, each one box of every part."""
    return [gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_shape, desc.layout) for desc in descs]


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr):
    """COUNT mbarriers, not yet initialized."""
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@gluon.jit
def stage_and_phase(step, STAGES: gl.constexpr):
    """The pipeline stage of the ``step``-th tile of a program, and the phase of that stage's mbarriers."""
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def load_box(descs, at, column, ready, memory, stage, MORE: gl.constexpr = 0):
    """Start the TMA loads of a box's parts into a stage, from ``at`` and ``column`` on.

    The stage's mbarrier expects their bytes, and MORE bytes of loads that the caller starts.
    """
    mbarrier.expect(ready.index(stage), _bytes(descs) + MORE)
    for i in gl.static_range(len(descs)):
        tma.async_copy_global_to_shared(descs[i], at + (column,), ready.index(stage), memory[i].index(stage))
        column += descs[i].block_shape[-1]


@gluon.constexpr_function
def _bytes(descs):
    return sum(desc.block_type.nbytes for desc in descs)


@gluon.jit
def tiles_of_stage(memory, stage, COUNT: gl.constexpr):
    """A stage's tiles (COUNT, columns), one for each part."""
    return [ring.index(stage).reshape([COUNT, ring.shape[-1]]) for ring in memory]


@gluon.jit
def start_scores(q, k, BN: gl.constexpr):
    """Start S = Q K^T (64, BN). Each part of the columns is one asynchronous product, and one group to wait for."""
    none = gl.zeros([ROWS, BN], gl.float32, accumulator_layout(ROWS, BN))
    s = warpgroup_mma(q[0], k[0].permute([1, 0]), none, use_acc=False, is_async=True)  # [64, BN]
    for i in gl.static_range(1, len(q)):
        s = warpgroup_mma(q[i], k[i].permute([1, 0]), s, is_async=True)
    return s


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The programs of a persistent kernel: one for each multiprocessor."""
    if device.type != "cuda":  # compiled only
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
