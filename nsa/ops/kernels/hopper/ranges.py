"""Attention to ranges of keys on Hopper, forward: a persistent kernel of two computing warpgroups and a producer warp.

A warpgroup starts the scores of the next tile of keys before the softmax and the second product of this one, so they
overlap (FlashAttention-3, arXiv 2407.08608, section 3.2). If shared memory holds the queries of two tiles (QUEUE), the
warpgroup also starts the first scores of its next tile before the epilogue of this one. The epilogue writes the output
into the memory of the tile's queries, from where TMA stores it.
"""

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
    load_box,
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
    WARPGROUPS,
    allocate_memory,
    end_of_tile,
    keys_of_tile,
    load_keys,
    load_keys_and_values,
    mask_scores,
    tile_of,
    token_of_warpgroup,
    tokens_per_tile,
)

SMALLEST_DEPTH = gl.constexpr(16)  # keys: wgmma multiplies 16 at a time


@gluon.jit
def _tile(index, First, Last, num_tokens, num_tiles, slots, GROUPS: gl.constexpr, HEADS: gl.constexpr,
          BN: gl.constexpr):  # fmt: skip
    """(batch, KV head, first token, first key, tiles of keys) of the ``index``-th tile."""
    batch, group, _, _, token0 = tile_of(index, num_tiles, slots, GROUPS, HEADS)
    begin, count = keys_of_tile((First, Last), token0, num_tokens, HEADS, BN)
    return batch, group, token0, begin, count


@gluon.jit
def _tile_and_ranges(index, First, Last, num_tokens, num_tiles, slots, WARPGROUP: gl.constexpr, GROUPS: gl.constexpr,
                     HEADS: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """`_tile`, and the range of keys (64,) that each row of one warpgroup sees."""
    batch, group, token0, begin, count = _tile(index, First, Last, num_tokens, num_tiles, slots, GROUPS, HEADS, BN)
    first_token = token_of_warpgroup(token0, WARPGROUP, HEADS)
    token = first_token + gl.arange(0, ROWS, layout) // rows_per_token(HEADS)  # [64]
    first = gl.load(First + token, mask=token < num_tokens, other=0)  # [64]
    last = gl.load(Last + token, mask=token < num_tokens, other=0)  # [64]
    return batch, group, token0, begin, count, first, last


@gluon.jit
def load_queries(q_descs, memory, batch, group, token0, tiles_done, HEADS: gl.constexpr, QUEUE: gl.constexpr):
    for warpgroup in gl.static_range(WARPGROUPS):
        stage = warpgroup * QUEUE + tiles_done % QUEUE
        mbarrier.wait(memory.q_free.index(stage), ((tiles_done // QUEUE) & 1) ^ 1)
        at = (batch, token_of_warpgroup(token0, warpgroup, HEADS), group * HEADS)
        load_box(q_descs, at, 0, memory.q_ready, memory.q, stage)


@gluon.jit
def _producer(q_descs, k_descs, v_desc, memory, First, Last, num_tokens, num_keys, num_tiles, slots,
              GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
              QUEUE: gl.constexpr):  # fmt: skip
    """The producer warp: it loads the queries of each tile, and its keys and values."""
    step = 0  # tiles of keys loaded so far
    tiles_done = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, token0, begin, count = _tile(index, First, Last, num_tokens, num_tiles, slots, GROUPS, HEADS, BN)
        load_queries(q_descs, memory, batch, group, token0, tiles_done, HEADS, QUEUE)
        for j in range(count):
            row = batch * num_keys + begin + j * BN
            load_keys_and_values(k_descs, v_desc, memory, row, group, step, D, STAGES)
            step += 1
        tiles_done += 1
    if QUEUE > 1:  # the warpgroups start the scores of one more tile, and drop them
        end = num_tiles * slots - 1
        batch, group, token0, begin, count = _tile(end, First, Last, num_tokens, num_tiles, slots, GROUPS, HEADS, BN)
        load_queries(q_descs, memory, batch, group, token0, tiles_done, HEADS, QUEUE)
        load_keys(k_descs, memory, batch * num_keys + begin, group, step, D, STAGES)


@gluon.jit
def softmax_step(s, row_max, row_sum, scale_log2, MASKED: gl.constexpr):
    """A step of the online softmax over scores s (64, N).

    Returns:
        p (64, N), the new maximum and sum (64,), and the factor (64,) of what was summed before.
    """
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)  # [64]
    base = new_max  # [64]
    if MASKED:  # a row that has seen nothing: exp2(-inf - 0) = 0, where -inf - -inf would be NaN
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(s * scale_log2 - base[:, None])  # [64, N]
    rescale = gl.exp2(row_max - base)  # [64]
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _step(acc, p_before, row_max, row_sum, q, memory, first, last, begin, step, j, scale_log2, DV: gl.constexpr,
          BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, N: gl.constexpr):  # fmt: skip
    """Take in the first N keys of the ``j``-th tile, while P V of the tile before is added to acc.

    ``p_before`` (64, BN) is P of the tile before. Returned is P (64, N) of this one, not yet in acc.
    """
    o_layout: gl.constexpr = accumulator_layout(ROWS, DV)
    stage, phase = stage_and_phase(step + j, STAGES)
    before, before_phase = stage_and_phase(step + j - 1, STAGES)
    mbarrier.wait(memory.k_ready.index(stage), phase)
    s = start_scores(q, [k.index(stage).slice(0, N) for k in memory.k], N)  # [64, N]
    mbarrier.wait(memory.v_ready.index(before), before_phase)
    acc = warpgroup_mma(p_before, memory.v.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(memory.k_free.index(stage), count=1)
    if MASKED:
        s = mask_scores(s, first, last, begin + j * BN, N)
    p, row_max, row_sum, rescale = softmax_step(s, row_max, row_sum, scale_log2, MASKED)  # [64, N], [64], [64], [64]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(memory.v_free.index(before), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
    return acc, gl.convert_layout(p.to(p_before.dtype), left_operand_layout(o_layout)), row_max, row_sum


@gluon.jit
def _loop(acc, p, row_max, row_sum, q, memory, first, last, begin, step, start, stop, scale_log2, DV: gl.constexpr,
          BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """`_step` for tiles ``start .. stop - 1`` of keys."""
    for j in range(start, stop):
        acc, p, row_max, row_sum = _step(acc, p, row_max, row_sum, q, memory, first, last, begin, step, j, scale_log2,
                                         DV, BN, STAGES, MASKED, BN)  # fmt: skip
    return acc, p, row_max, row_sum


@gluon.jit
def _finish(acc, p, row_max, row_sum, q, memory, first, last, begin, step, j, count, scale_log2, DV: gl.constexpr,
            BN: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr):  # fmt: skip
    """Add the last P V to acc. If a tile of keys is left (j < count), take in its first TAIL keys before."""
    tail_rows: gl.constexpr = gl.SliceLayout(1, accumulator_layout(ROWS, TAIL))
    stage, phase = stage_and_phase(step + count - 1, STAGES)
    if j < count:
        acc, tail_p, tail_max, tail_sum = _step(
            acc, p, gl.convert_layout(row_max, tail_rows), gl.convert_layout(row_sum, tail_rows), q, memory,
            gl.convert_layout(first, tail_rows), gl.convert_layout(last, tail_rows), begin, step, j, scale_log2, DV,
            BN, STAGES, True, TAIL,
        )  # tail_p: [64, TAIL]  # fmt: skip
        row_max = gl.convert_layout(tail_max, row_max.type.layout)
        row_sum = gl.convert_layout(tail_sum, row_max.type.layout)
        mbarrier.wait(memory.v_ready.index(stage), phase)
        acc = warpgroup_mma(tail_p, memory.v.index(stage).slice(0, TAIL), acc)
    else:
        mbarrier.wait(memory.v_ready.index(stage), phase)
        acc = warpgroup_mma(p, memory.v.index(stage), acc)
    mbarrier.arrive(memory.v_free.index(stage), count=1)
    return acc, row_max, row_sum


@gluon.jit
def first_scores(memory, tiles_done, step, WARPGROUP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
                  QUEUE: gl.constexpr):  # fmt: skip
    """Start the scores (64, BN) of a tile's first keys, once queries and keys are there."""
    q_stage, stage = WARPGROUP * QUEUE + tiles_done % QUEUE, step % STAGES
    mbarrier.wait(memory.q_ready.index(q_stage), (tiles_done // QUEUE) & 1)
    mbarrier.wait(memory.k_ready.index(stage), (step // STAGES) & 1)
    return start_scores(tiles_of_stage(memory.q, q_stage, ROWS), tiles_of_stage(memory.k, stage, BN), BN)


@gluon.jit
def _compute(memory, o_desc, Out, Lse, First, Last, num_tokens, num_tiles, slots, scale_log2, WARPGROUP: gl.constexpr,
             GROUPS: gl.constexpr, HEADS: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
             QUEUE: gl.constexpr):  # fmt: skip
    """A computing warpgroup: its 64 rows of each tile."""
    s_layout: gl.constexpr = accumulator_layout(ROWS, BN)
    o_layout: gl.constexpr = accumulator_layout(ROWS, DV)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = memory.q[0].dtype
    TAIL: gl.constexpr = max(SMALLEST_DEPTH, tokens_per_tile(HEADS))
    step = 0  # tiles of keys of all tiles before
    tiles_done = 0
    index = gl.program_id(0)
    batch, group, token0, begin, count, first, last = _tile_and_ranges(
        index, First, Last, num_tokens, num_tiles, slots, WARPGROUP, GROUPS, HEADS, BN, s_rows
    )  # first, last: [64]  # fmt: skip
    if QUEUE > 1:
        s = first_scores(memory, tiles_done, step, WARPGROUP, BN, STAGES, QUEUE)  # [64, BN]
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        # What the next tile needs to know is loaded while this one is computed.
        after = gl.minimum(index + gl.num_programs(0), num_tiles * slots - 1)
        # All rows see keys all_from .. all_until - 1. (Triton 3.6 and 3.7 take the three for constants if the loop
        # carries them like the rest.)
        all_from = gl.load(First + end_of_tile(token0, num_tokens, HEADS) - 1)
        all_until = gl.load(Last + token0)
        until = gl.load(Last + end_of_tile(token0, num_tokens, HEADS) - 1)
        tile_after = _tile_and_ranges(
            after, First, Last, num_tokens, num_tiles, slots, WARPGROUP, GROUPS, HEADS, BN, s_rows
        )  # fmt: skip
        if QUEUE == 1:
            s = first_scores(memory, tiles_done, step, WARPGROUP, BN, STAGES, QUEUE)  # [64, BN]
        q_stage = WARPGROUP * QUEUE + tiles_done % QUEUE
        q = tiles_of_stage(memory.q, q_stage, ROWS)  # parts of [64, D]
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(memory.k_free.index(step % STAGES), count=1)
        none = gl.full([ROWS], float("-inf"), gl.float32, s_rows)  # [64]
        masked = mask_scores(s, first, last, begin, BN)  # [64, BN]
        # [64, BN], [64], [64], [64]
        p, row_max, row_sum, _rescale = softmax_step(
            masked, none, gl.zeros([ROWS], gl.float32, s_rows), scale_log2, True
        )
        p_operand = gl.convert_layout(p.to(dtype), left_operand_layout(o_layout))  # [64, BN]
        acc = gl.zeros([ROWS, DV], gl.float32, o_layout)  # [64, DV]
        if QUEUE > 1 and tiles_done > 0:  # the tile before has left its output in the memory of its queries
            tma.store_wait(0)
            mbarrier.arrive(memory.q_free.index(WARPGROUP * QUEUE + (tiles_done - 1) % QUEUE), count=1)
        # The first tile of keys is done. A window of 512 and the tokens of a tile end little after a whole number of
        # tiles of keys: if at most TAIL keys are left for the last tile, `_finish` takes in only those.
        has_tail = (count > 1) & (until - begin - (count - 1) * BN <= TAIL)
        stop = gl.where(has_tail, count - 1, count)
        full_begin = gl.minimum(gl.maximum(gl.cdiv(all_from - begin, BN), 1), stop)
        full_end = gl.minimum(gl.maximum((all_until - begin) // BN, full_begin), stop)
        acc, p_operand, row_max, row_sum = _loop(acc, p_operand, row_max, row_sum, q, memory, first, last, begin, step,
                                                 1, full_begin, scale_log2, DV, BN, STAGES, True)  # fmt: skip
        acc, p_operand, row_max, row_sum = _loop(acc, p_operand, row_max, row_sum, q, memory, first, last, begin, step,
                                                 full_begin, full_end, scale_log2, DV, BN, STAGES, False)  # fmt: skip
        acc, p_operand, row_max, row_sum = _loop(acc, p_operand, row_max, row_sum, q, memory, first, last, begin, step,
                                                 full_end, stop, scale_log2, DV, BN, STAGES, True)  # fmt: skip
        acc, row_max, row_sum = _finish(acc, p_operand, row_max, row_sum, q, memory, first, last, begin, step, stop,
                                        count, scale_log2, DV, BN, STAGES, TAIL)  # fmt: skip
        step += count
        tiles_done += 1
        if QUEUE > 1:
            s = first_scores(memory, tiles_done, step, WARPGROUP, BN, STAGES, QUEUE)

        # Epilogue.
        row = gl.arange(0, ROWS, s_rows)  # [64]
        token = token_of_warpgroup(token0, WARPGROUP, HEADS) + row // rows_per_token(HEADS)  # [64]
        out_row, ok = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [64], [64]
        gl.store(Lse + out_row, (row_max + gl.log2(row_sum)) * LSE_TO_NATURAL, mask=ok)
        acc = acc * gl.convert_layout(1.0 / gl.where(row_sum == 0, 1.0, row_sum), o_rows)[:, None]
        at = (batch, token_of_warpgroup(token0, WARPGROUP, HEADS), group * HEADS)
        store_rows(o_desc, Out, memory.q[0].index(q_stage), acc.to(dtype), at, out_row, ok, HEADS)
        if QUEUE == 1:
            tma.store_wait(0)
            mbarrier.arrive(memory.q_free.index(q_stage), count=1)
        batch, group, token0, begin, count, first, last = tile_after
    if QUEUE > 1:
        warpgroup_mma_wait(0, deps=(s,))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def forward_kernel(q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc, Out, Lse, First, Last, num_tokens, num_keys,
                   num_tiles, num_slots, scale_log2, GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
                   DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr):  # fmt: skip
    """out (B, T, H, Dv), lse (B, T, H) of tiles of 128 rows; persistent.

    Descriptors: q (B, T, H, D) in boxes of 64 rows; k, v (B * S, G * D or Dv) in boxes of BN keys. q and k are in two
    parts, as from `part_descriptors`.
    """
    q_descs, k_descs = used_parts(q_desc, q2_desc, D), used_parts(k_desc, k2_desc, D)
    memory = allocate_memory(q_descs, k_descs, v_desc, STAGES, QUEUE, False)
    gl.warp_specialize(
        [
            (_compute, (memory, o_desc, Out, Lse, First, Last, num_tokens, num_tiles, num_slots, scale_log2, 0, GROUPS,
                        HEADS, DV, BN, STAGES, QUEUE)),
            (_compute, (memory, o_desc, Out, Lse, First, Last, num_tokens, num_tiles, num_slots, scale_log2, 1, GROUPS,
                        HEADS, DV, BN, STAGES, QUEUE)),
            (_producer, (q_descs, k_descs, v_desc, memory, First, Last, num_tokens, num_keys, num_tiles, num_slots,
                         GROUPS, HEADS, D, BN, STAGES, QUEUE)),
        ],
        [4, 1],  # warps of the second and third
        [240, 24],  # their registers for a thread: accumulators and P for the former, the fewest for the latter
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float, out: Tensor, lse: Tensor
) -> None:
    """As `nsa.ops.kernels.ranges.forward`, into out (B, T, H, Dv) and lse (B, T, H) fp32."""
    tile, options = tile_sizes("hopper_forward", q, k, v)
    (batch, tokens, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    heads //= groups
    tiles, slots = triton.cdiv(tokens, tokens_per_tile(heads)), batch * groups
    box = [1, tokens_per_warpgroup(heads), rows_per_token(heads)]
    forward_kernel[(min(tiles * slots, multiprocessors(q.device)),)](
        *part_descriptors(q, list(q.shape), [*box, width]), *key_part_descriptors(k, tile["BN"]),
        key_descriptor(v, tile["BN"]), box_descriptor(out, list(out.shape), [*box, v.shape[3]]), out, lse, first, last,
        tokens, keys, tiles, slots, scale * LOG2_E, GROUPS=groups, HEADS=heads, D=width, DV=v.shape[3], **tile,
        **options,
    )  # fmt: skip
