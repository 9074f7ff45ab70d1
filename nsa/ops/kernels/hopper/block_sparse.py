"""Attention to lists of blocks and to columns on Hopper, forward: the kernel over ranges with other keys.

A step is 128 keys: 128 columns, or two listed blocks of 64. The producer warp loads columns as one box. It loads the
two blocks as boxes of (64 keys, 64 columns of a head), each into its place of the stage. Only the steps of columns and
the last ones of a list need a mask. The schedule is that of nsa/ops/kernels/hopper/ranges.py.
"""

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.ops.kernels.device_functions import LSE_TO_NATURAL
from nsa.ops.kernels.hardware import INTEGERS, LOG2_E, tile_sizes
from nsa.ops.kernels.hopper import (
    ROWS,
    accumulator_layout,
    box_descriptor,
    key_descriptor,
    key_part_descriptors,
    left_operand_layout,
    multiprocessors,
    part_descriptors,
    query_rows,
    rows_per_token,
    stage_and_phase,
    start_scores,
    store_rows,
    tiles_of_stage,
    tokens_per_warpgroup,
    used_parts,
)
from nsa.ops.kernels.hopper.query_tiles import (
    allocate_memory,
    load_keys,
    load_keys_and_values,
    tile_of,
    token_of_warpgroup,
    tokens_per_tile,
)
from nsa.ops.kernels.hopper.ranges import first_scores, load_queries, softmax_step

HALF = gl.constexpr(64)  # keys, and columns of a head, of one box of a listed block
BOTH = gl.constexpr(128)  # keys of a step
# Integers of `forward_kernel` beside INTEGERS that differ between calls.
SIZES = ("slots", "num_rows", "num_listed", "num_columns", "tile_size", "block_size", "offset", "num_masked")
NEVER = gl.constexpr(0x7FFFFFFF)  # a position after every query


@gluon.jit
def _list_of_tile(index, Counts, ColumnCounts, num_tiles, slots, num_rows, tile_size, LISTS: gl.constexpr,
                  HEADS: gl.constexpr, SPLITS: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """The ``index``-th tile.

    Returns:
        batch, number of the list in its sequence, slot, first token, row of the lists, listed parts of 64 keys,
        columns.
    """
    batch, number, slot, _, token0 = tile_of(index, num_tiles, slots, LISTS, HEADS)
    row = slot * num_rows + token0 // tile_size
    count = gl.load(Counts + row) * SPLITS
    columns = count * 0
    if COLUMNS:
        columns = gl.load(ColumnCounts + row)
    return batch, number, slot, token0, row, count, columns


@gluon.jit
def _steps(count, columns):
    """(steps of columns, all steps): at least one."""
    before = gl.cdiv(columns, BOTH)
    return before, gl.maximum(before + gl.cdiv(count, 2), 1)


@gluon.jit
def _start(Blocks, part, count, block_size, SPLITS: gl.constexpr):
    """First key of the ``part``-th listed part of 64 keys; beyond the last part that of the last, or 0 if none is."""
    part = gl.maximum(gl.minimum(part, count - 1), 0)
    return gl.load(Blocks + part // SPLITS, mask=count > 0, other=0) * block_size + part % SPLITS * HALF


@gluon.jit
def _load_parts(desc, memory, ready, free, row, row2, column, step, STAGES: gl.constexpr):
    """Load 64 keys from ``row`` on and 64 from ``row2`` on, from ``column`` on, into a stage, once it is free."""
    stage, phase = stage_and_phase(step, STAGES)
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), _bytes(memory))
    for i in gl.static_range(len(memory)):
        to = memory[i].index(stage)
        for j in gl.static_range(memory[i].shape[-1] // HALF):
            # Memory has HALF columns of all keys side by side, so that each box is whole in it.
            upper = to.slice(0, HALF, dim=0).slice(j * HALF, HALF, dim=1)
            lower = to.slice(HALF, HALF, dim=0).slice(j * HALF, HALF, dim=1)
            tma.async_copy_global_to_shared(desc, [row, column], ready.index(stage), upper)
            tma.async_copy_global_to_shared(desc, [row2, column], ready.index(stage), lower)
            column += HALF


@gluon.constexpr_function
def _bytes(memory):
    return sum(ring.shape[-1] * ring.shape[-2] * 2 for ring in memory)


@gluon.jit
def _producer(q_descs, k_descs, v_desc, k_part, v_part, memory, Blocks, Counts, ColumnCounts, num_keys, num_tiles,
              slots, num_rows, num_listed, num_columns, tile_size, block_size, SHARE: gl.constexpr,
              LISTS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
              QUEUE: gl.constexpr, SPLITS: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """The producer warp: it loads the queries of each tile, its columns and its blocks."""
    step = 0  # steps loaded so far
    tiles_done = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, number, slot, token0, row, count, columns = _list_of_tile(
            index, Counts, ColumnCounts, num_tiles, slots, num_rows, tile_size, LISTS, HEADS, SPLITS, COLUMNS
        )  # fmt: skip
        before, total = _steps(count, columns)
        listed = Blocks + row.to(gl.int64) * num_listed
        load_queries(q_descs, memory, batch, number, token0, tiles_done, HEADS, QUEUE)
        if COLUMNS:
            for j in range(before):
                load_keys_and_values(k_descs, v_desc, memory, slot * num_columns + j * BOTH, 0, step, D, STAGES)
                step += 1
        first, second = _start(listed, 0, count, block_size, SPLITS), _start(listed, 1, count, block_size, SPLITS)
        for j in range(total - before):
            key, key2 = batch * num_keys + first, batch * num_keys + second
            first = _start(listed, 2 * j + 2, count, block_size, SPLITS)  # one step ahead
            second = _start(listed, 2 * j + 3, count, block_size, SPLITS)
            group = number // SHARE
            _load_parts(k_part, memory.k, memory.k_ready, memory.k_free, key, key2, group * D, step, STAGES)
            _load_parts(v_part, (memory.v,), memory.v_ready, memory.v_free, key, key2, group * DV, step, STAGES)
            step += 1
        tiles_done += 1
    if QUEUE > 1:  # the warpgroups start the scores of one more tile, and drop them
        batch, number, _, _, token0 = tile_of(num_tiles * slots - 1, num_tiles, slots, LISTS, HEADS)
        load_queries(q_descs, memory, batch, number, token0, tiles_done, HEADS, QUEUE)
        load_keys(k_descs, memory, 0, 0, step, D, STAGES)


@gluon.jit
def _column_keys(Keys, j, columns, layout: gl.constexpr):
    """Positions (128,) of the columns of step ``j``."""
    column = j * BOTH + gl.arange(0, BOTH, layout)  # [128]
    return gl.load(Keys + column, mask=column < columns, other=NEVER)


@gluon.jit
def _block_keys(Blocks, j, count, block_size, SPLITS: gl.constexpr, layout: gl.constexpr):
    """Positions (128,) of the keys of the ``j``-th pair of listed parts."""
    key = gl.arange(0, BOTH, layout)  # [128]
    part = 2 * j + key // HALF  # [128]
    block = gl.load(Blocks + part // SPLITS, mask=part < count, other=0)  # [128]
    return gl.where(part < count, block * block_size + part % SPLITS * HALF + key % HALF, NEVER)


@gluon.jit
def _step(acc, p_before, row_max, row_sum, q, memory, position, Blocks, Keys, step, j, before, count, columns,
          block_size, scale_log2, DV: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, MASKED: gl.constexpr,
          COLUMNS: gl.constexpr):  # fmt: skip
    """Take in the keys of step ``j``, while P V of the step before is added to acc: `ranges._step` with other masks.

    COLUMNS: it is a step of columns.
    """
    o_layout: gl.constexpr = accumulator_layout(ROWS, DV)
    s_layout: gl.constexpr = accumulator_layout(ROWS, BOTH)
    stage, phase = stage_and_phase(step + j, STAGES)
    last, last_phase = stage_and_phase(step + j - 1, STAGES)
    mbarrier.wait(memory.k_ready.index(stage), phase)
    s = start_scores(q, tiles_of_stage(memory.k, stage, BOTH), BOTH)  # [64, 128]
    mbarrier.wait(memory.v_ready.index(last), last_phase)
    acc = warpgroup_mma(p_before, memory.v.index(last), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(memory.k_free.index(stage), count=1)
    if MASKED:
        key_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
        if COLUMNS:
            key = _column_keys(Keys, j, columns, key_layout)  # [128]
        else:
            key = _block_keys(Blocks, j - before, count, block_size, SPLITS, key_layout)  # [128]
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    p, row_max, row_sum, rescale = softmax_step(s, row_max, row_sum, scale_log2, MASKED)  # [64, 128], [64], ..
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(memory.v_free.index(last), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
    return acc, gl.convert_layout(p.to(p_before.dtype), left_operand_layout(o_layout)), row_max, row_sum


@gluon.jit
def _loop(acc, p, row_max, row_sum, q, memory, position, Blocks, Keys, step, start, stop, before, count, columns,
          block_size, scale_log2, DV: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, MASKED: gl.constexpr,
          COLUMNS: gl.constexpr):  # fmt: skip
    """`_step` for steps ``start .. stop - 1``."""
    for j in range(start, stop):
        acc, p, row_max, row_sum = _step(acc, p, row_max, row_sum, q, memory, position, Blocks, Keys, step, j, before,
                                         count, columns, block_size, scale_log2, DV, STAGES, SPLITS, MASKED,
                                         COLUMNS)  # fmt: skip
    return acc, p, row_max, row_sum


@gluon.jit
def _compute(memory, o_desc, Out, Lse, Blocks, Counts, Keys, ColumnCounts, num_tokens, num_tiles, slots, num_rows,
             num_listed, num_columns, tile_size, block_size, offset, num_masked, scale_log2, WARPGROUP: gl.constexpr,
             LISTS: gl.constexpr, HEADS: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
             SPLITS: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """A computing warpgroup: its 64 rows of each tile."""
    s_layout: gl.constexpr = accumulator_layout(ROWS, BOTH)
    o_layout: gl.constexpr = accumulator_layout(ROWS, DV)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    key_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = memory.q[0].dtype
    step = 0  # steps of all tiles before
    tiles_done = 0
    if QUEUE > 1:
        s = first_scores(memory, tiles_done, step, WARPGROUP, BOTH, STAGES, QUEUE)  # [64, 128]
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, number, _, token0, list_row, count, columns = _list_of_tile(
            index, Counts, ColumnCounts, num_tiles, slots, num_rows, tile_size, LISTS, HEADS, SPLITS, COLUMNS
        )  # fmt: skip
        before, total = _steps(count, columns)
        listed = Blocks + list_row.to(gl.int64) * num_listed
        keys = Keys + list_row.to(gl.int64) * num_columns
        row = gl.arange(0, ROWS, s_rows)  # [64]
        token = token_of_warpgroup(token0, WARPGROUP, HEADS) + row // rows_per_token(HEADS)  # [64]
        position = offset + token  # [64]
        if QUEUE == 1:
            s = first_scores(memory, tiles_done, step, WARPGROUP, BOTH, STAGES, QUEUE)  # [64, 128]
        q_stage = WARPGROUP * QUEUE + tiles_done % QUEUE
        q = tiles_of_stage(memory.q, q_stage, ROWS)  # parts of [64, D]
        key = _block_keys(listed, 0, count, block_size, SPLITS, key_layout)  # [128]
        if COLUMNS:
            first_column = _column_keys(keys, 0, columns, key_layout)  # [128]
            key = gl.where(before > 0, first_column, key)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(memory.k_free.index(step % STAGES), count=1)
        none = gl.full([ROWS], float("-inf"), gl.float32, s_rows)  # [64]
        masked = gl.where(key[None, :] <= position[:, None], s, float("-inf"))  # [64, 128]
        # [64, 128], [64], [64], [64]
        p, row_max, row_sum, _rescale = softmax_step(
            masked, none, gl.zeros([ROWS], gl.float32, s_rows), scale_log2, True
        )  # fmt: skip
        p_operand = gl.convert_layout(p.to(dtype), left_operand_layout(o_layout))  # [64, 128]
        acc = gl.zeros([ROWS, DV], gl.float32, o_layout)  # [64, DV]
        if QUEUE > 1 and tiles_done > 0:  # the tile before has left its output in the memory of its queries
            tma.store_wait(0)
            mbarrier.arrive(memory.q_free.index(WARPGROUP * QUEUE + (tiles_done - 1) % QUEUE), count=1)
        # The first step is done.
        full_begin = gl.maximum(before, 1)
        full_end = gl.minimum(gl.maximum(before + gl.maximum(count - num_masked, 0) // 2, full_begin), total)
        if COLUMNS:
            acc, p_operand, row_max, row_sum = _loop(
                acc, p_operand, row_max, row_sum, q, memory, position, listed, keys, step, 1, before, before, count,
                columns, block_size, scale_log2, DV, STAGES, SPLITS, True, True,
            )  # fmt: skip
        acc, p_operand, row_max, row_sum = _loop(
            acc, p_operand, row_max, row_sum, q, memory, position, listed, keys, step, full_begin, full_end, before,
            count, columns, block_size, scale_log2, DV, STAGES, SPLITS, False, False,
        )  # fmt: skip
        acc, p_operand, row_max, row_sum = _loop(
            acc, p_operand, row_max, row_sum, q, memory, position, listed, keys, step, full_end, total, before, count,
            columns, block_size, scale_log2, DV, STAGES, SPLITS, True, False,
        )  # fmt: skip
        step += total
        last, last_phase = stage_and_phase(step - 1, STAGES)
        mbarrier.wait(memory.v_ready.index(last), last_phase)
        acc = warpgroup_mma(p_operand, memory.v.index(last), acc)
        mbarrier.arrive(memory.v_free.index(last), count=1)
        tiles_done += 1
        if QUEUE > 1:
            s = first_scores(memory, tiles_done, step, WARPGROUP, BOTH, STAGES, QUEUE)

        # Epilogue.
        out_row, ok = query_rows(batch, token, number, row, num_tokens, LISTS, HEADS)  # [64], [64]
        gl.store(Lse + out_row, (row_max + gl.log2(row_sum)) * LSE_TO_NATURAL, mask=ok)
        acc = acc * gl.convert_layout(1.0 / gl.where(row_sum == 0, 1.0, row_sum), o_rows)[:, None]
        at = (batch, token_of_warpgroup(token0, WARPGROUP, HEADS), number * HEADS)
        store_rows(o_desc, Out, memory.q[0].index(q_stage), acc.to(dtype), at, out_row, ok, HEADS)
        if QUEUE == 1:
            tma.store_wait(0)
            mbarrier.arrive(memory.q_free.index(q_stage), count=1)
    if QUEUE > 1:
        warpgroup_mma_wait(0, deps=(s,))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[*INTEGERS, *SIZES])
def forward_kernel(q_desc, q2_desc, k_desc, k2_desc, v_desc, k_part, v_part, o_desc, Out, Lse, Blocks, Counts, Keys,
                   ColumnCounts, num_tokens, num_keys, num_tiles, slots, num_rows, num_listed, num_columns, tile_size,
                   block_size, offset, num_masked, scale_log2, SHARE: gl.constexpr, LISTS: gl.constexpr,
                   HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
                   SPLITS: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """out (B, T, H, Dv), lse (B, T, H) of tiles of 128 rows; persistent.

    Descriptors: q (B, T, H, D) in boxes of 64 rows, in two parts; keys and values of columns (B * N * C, D or Dv) in
    boxes of 128 keys, the keys in two parts; ``k_part``, ``v_part``: k, v (B * S, G * D or Dv) in boxes of 64 keys and
    64 columns of a head. Other arguments as in `nsa.ops.kernels.block_sparse.forward_kernel`; SPLITS: parts of 64 keys
    of a block.
    """
    q_descs, k_descs = used_parts(q_desc, q2_desc, D), used_parts(k_desc, k2_desc, D)
    memory = allocate_memory(q_descs, k_descs, v_desc, STAGES, QUEUE, False)
    gl.warp_specialize(
        [
            (_compute, (memory, o_desc, Out, Lse, Blocks, Counts, Keys, ColumnCounts, num_tokens, num_tiles, slots,
                        num_rows, num_listed, num_columns, tile_size, block_size, offset, num_masked, scale_log2, 0,
                        LISTS, HEADS, DV, STAGES, QUEUE, SPLITS, COLUMNS)),
            (_compute, (memory, o_desc, Out, Lse, Blocks, Counts, Keys, ColumnCounts, num_tokens, num_tiles, slots,
                        num_rows, num_listed, num_columns, tile_size, block_size, offset, num_masked, scale_log2, 1,
                        LISTS, HEADS, DV, STAGES, QUEUE, SPLITS, COLUMNS)),
            (_producer, (q_descs, k_descs, v_desc, k_part, v_part, memory, Blocks, Counts, ColumnCounts, num_keys,
                         num_tiles, slots, num_rows, num_listed, num_columns, tile_size, block_size, SHARE,
                         LISTS, HEADS, D, DV, STAGES, QUEUE, SPLITS, COLUMNS)),
        ],
        [4, 1],  # warps of the second and third
        [240, 24],  # their registers for a thread: accumulators and P for the former, the fewest for the latter
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, beside: Any, tile_size: int, block_size: int,
    num_masked: int, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """As `nsa.ops.kernels.block_sparse.forward`, into out (B, T, H, Dv) and lse (B, T, H) fp32.

    Args:
        beside: `nsa.ops.kernels.block_sparse.Columns`; None: there are none.
        num_masked: as from `nsa.ops.kernels.block_sparse.masked_steps`, for steps of 64 keys.
    """
    tile, options = tile_sizes("hopper_forward", q, k, v)
    assert tile.pop("BN") == BOTH.value, "the kernel takes 128 keys at a time"
    (batch, tokens, heads, width), (keys, groups), lists = q.shape, k.shape[1:3], blocks.shape[1]
    share, splits = heads // lists, block_size // HALF.value
    tiles, slots, offset = triton.cdiv(tokens, tokens_per_tile(share)), batch * lists, keys - tokens
    box = [1, tokens_per_warpgroup(share), rows_per_token(share)]
    flat = [(x, [batch * keys, groups * x.shape[3]]) for x in (k, v)]
    near_k, near_v = (k, v) if beside is None else (beside.k, beside.v)
    column_keys, column_counts, columns = (
        (counts, counts, 0) if beside is None else (beside.keys, beside.counts, beside.number)
    )
    forward_kernel[(min(tiles * slots, multiprocessors(q.device)),)](
        *part_descriptors(q, list(q.shape), [*box, width]), *key_part_descriptors(near_k, BOTH.value),
        key_descriptor(near_v, BOTH.value), *(box_descriptor(x, shape, [HALF.value] * 2) for x, shape in flat),
        box_descriptor(out, list(out.shape), [*box, v.shape[3]]), out, lse, blocks, counts, column_keys, column_counts,
        tokens, keys, tiles, slots, blocks.shape[2], blocks.shape[3], columns, tile_size, block_size, offset,
        num_masked, scale * LOG2_E, SHARE=lists // groups, LISTS=lists,
        HEADS=share, D=width, DV=v.shape[3], SPLITS=splits, COLUMNS=beside is not None, **tile, **options,
    )  # fmt: skip
