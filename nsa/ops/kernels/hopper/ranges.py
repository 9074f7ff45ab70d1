"""Attention to runs of keys on Hopper, forward: two computing warpgroups and a copying warp.

The warpgroups take 64 rows each, a row being a (token, head of the group) or idle, and share a ring of keys and values
that the copying warp fills ahead. Each warpgroup starts the scores of the next keys before it is done with these, whose
softmax and last product hide behind them (FlashAttention-3, arXiv 2407.08608, section 3.2). Where there is room for the
queries of two tiles (QUEUE), it also starts the first scores of the next tile before it writes the output of this one;
that goes by way of its queries' memory to the copy engine.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.ops.kernels.hopper import (
    boxes,
    bring,
    head_rows,
    key_boxes,
    key_parts,
    multiprocessors,
    parts,
    rings,
    scores,
    slot_of,
    span,
    store_rows,
    used_parts,
)
from nsa.ops.kernels.launch import INTEGERS, LOG2_E, tile_sizes


@gluon.jit
def _place(index, num_tiles, slots, GROUPS: gl.constexpr, HEADS: gl.constexpr):
    """(batch, group, slot, tile, first token): the last tiles see most and go first."""
    tile, slot = num_tiles - 1 - index // slots, index % slots
    return slot // GROUPS, slot % GROUPS, slot, tile, tile * (128 // span(HEADS))


@gluon.jit
def _run(runs, token0, num_tokens, HEADS: gl.constexpr, BN: gl.constexpr):
    """(first key that the tile sees, boxes of keys) of a pattern; a box at least."""
    First, Last = runs
    token1 = gl.minimum(token0 + 128 // span(HEADS), num_tokens) - 1
    begin, end = gl.load(First + token0), gl.load(Last + token1)
    return begin, gl.maximum(gl.cdiv(end - begin, BN), 1)


@gluon.jit
def _bring_keys(k_descs, memory, row, group, step, D: gl.constexpr, STAGES: gl.constexpr):
    _, _, k_ring, _, _, _, k_ready, k_free, _, _ = memory
    slot, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(k_free.index(slot), phase ^ 1)
    bring(k_descs, (row,), group * D, k_ready, k_ring, slot)


@gluon.jit
def _bring(k_descs, v_desc, memory, row, group, step, D: gl.constexpr, STAGES: gl.constexpr):
    _bring_keys(k_descs, memory, row, group, step, D, STAGES)
    _, _, _, v_ring, _, _, _, _, v_ready, v_free = memory
    slot, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(v_free.index(slot), phase ^ 1)
    bring((v_desc,), (row,), group * v_desc.block_shape[1], v_ready, (v_ring,), slot)


@gluon.jit
def _tile(index, First, Last, num_tokens, num_tiles, slots, GROUPS: gl.constexpr, HEADS: gl.constexpr,
          BN: gl.constexpr):  # fmt: skip
    """(batch, group, first token, first key, tiles of keys)."""
    batch, group, _, _, token0 = _place(index, num_tiles, slots, GROUPS, HEADS)
    begin, count = _run((First, Last), token0, num_tokens, HEADS, BN)
    return batch, group, token0, begin, count


@gluon.jit
def _rows(index, First, Last, num_tokens, num_tiles, slots, HALF: gl.constexpr, GROUPS: gl.constexpr,
          HEADS: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """`_tile`, and the run of keys (64,) that each row of one half sees."""
    batch, group, token0, begin, count = _tile(index, First, Last, num_tokens, num_tiles, slots, GROUPS, HEADS, BN)
    token = token0 + HALF * (64 // span(HEADS)) + gl.arange(0, 64, layout) // span(HEADS)
    first = gl.load(First + token, mask=token < num_tokens, other=0)
    last = gl.load(Last + token, mask=token < num_tokens, other=0)
    return batch, group, token0, begin, count, first, last


@gluon.jit
def _bring_queries(q_descs, memory, batch, group, token0, turn, HEADS: gl.constexpr, QUEUE: gl.constexpr):
    q_smem, _, _, _, q_ready, q_free, _, _, _, _ = memory
    for half in gl.static_range(2):
        place = half * QUEUE + turn % QUEUE
        mbarrier.wait(q_free.index(place), ((turn // QUEUE) & 1) ^ 1)
        at = (batch, token0 + half * (64 // span(HEADS)), group * HEADS)
        bring(q_descs, at, 0, q_ready, q_smem, place)


@gluon.jit
def _copy(q_descs, k_descs, v_desc, memory, First, Last, num_tokens, num_keys, num_tiles, slots, GROUPS: gl.constexpr,
          HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
          QUEUE: gl.constexpr):  # fmt: skip
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, token0, begin, count = _tile(index, First, Last, num_tokens, num_tiles, slots, GROUPS, HEADS, BN)
        _bring_queries(q_descs, memory, batch, group, token0, turn, HEADS, QUEUE)
        for j in range(count):
            _bring(k_descs, v_desc, memory, batch * num_keys + begin + j * BN, group, step, D, STAGES)
            step += 1
        turn += 1
    if QUEUE > 1:  # one more is begun and dropped
        end = num_tiles * slots - 1
        batch, group, token0, begin, count = _tile(end, First, Last, num_tokens, num_tiles, slots, GROUPS, HEADS, BN)
        _bring_queries(q_descs, memory, batch, group, token0, turn, HEADS, QUEUE)
        _bring_keys(k_descs, memory, batch * num_keys + begin, group, step, D, STAGES)


@gluon.jit
def _softmax(s, peak, total, scale_log2, MASKED: gl.constexpr):
    """(p, new peak, new total, factor of what was summed before) of scores s."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale_log2)
    base = new_peak
    if MASKED:  # a row that has seen nothing: exp2(-inf - 0) = 0, where -inf - -inf would be NaN
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = gl.exp2(s * scale_log2 - base[:, None])
    shrink = gl.exp2(peak - base)
    return p, new_peak, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _mask(s, first, last, key0, BN: gl.constexpr):
    key = key0 + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
    return gl.where((key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]), s, float("-inf"))


@gluon.jit
def _step(acc, left, peak, total, q, memory, first, last, begin, step, j, scale_log2, DV: gl.constexpr,
          BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, N: gl.constexpr):  # fmt: skip
    """P of the first N of the ``j``-th BN keys, while ``left``, that of those before, is added to acc."""
    _, _, k_ring, v_ring, _, _, k_ready, k_free, v_ready, v_free = memory
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    slot, phase = (step + j) % STAGES, ((step + j) // STAGES) & 1
    before, before_phase = (step + j - 1) % STAGES, ((step + j - 1) // STAGES) & 1
    mbarrier.wait(k_ready.index(slot), phase)
    s = scores(q, [k.index(slot).slice(0, N) for k in k_ring], N)
    mbarrier.wait(v_ready.index(before), before_phase)
    acc = warpgroup_mma(left, v_ring.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(slot), count=1)
    if MASKED:
        s = _mask(s, first, last, begin + j * BN, N)
    p, peak, total, shrink = _softmax(s, peak, total, scale_log2, MASKED)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    return acc, gl.convert_layout(p.to(left.dtype), gl.DotOperandLayout(0, o_layout, 2)), peak, total


@gluon.jit
def _loop(acc, left, peak, total, q, memory, first, last, begin, step, start, stop, scale_log2, DV: gl.constexpr,
          BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    for j in range(start, stop):
        acc, left, peak, total = _step(acc, left, peak, total, q, memory, first, last, begin, step, j, scale_log2, DV,
                                       BN, STAGES, MASKED, BN)  # fmt: skip
    return acc, left, peak, total


@gluon.jit
def _finish(acc, left, peak, total, q, memory, first, last, begin, step, j, count, scale_log2, DV: gl.constexpr,
            BN: gl.constexpr, STAGES: gl.constexpr, FEW: gl.constexpr):  # fmt: skip
    """Add ``left``, and before that, if they are not done (j < count), the last keys, FEW at most."""
    _, _, _, v_ring, _, _, _, _, v_ready, v_free = memory
    row: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16]))
    slot, phase = (step + count - 1) % STAGES, ((step + count - 1) // STAGES) & 1
    if j < count:
        acc, few, few_peak, few_total = _step(
            acc, left, gl.convert_layout(peak, row), gl.convert_layout(total, row), q, memory,
            gl.convert_layout(first, row), gl.convert_layout(last, row), begin, step, j, scale_log2, DV, BN, STAGES,
            True, FEW,
        )  # fmt: skip
        peak, total = gl.convert_layout(few_peak, peak.type.layout), gl.convert_layout(few_total, peak.type.layout)
        mbarrier.wait(v_ready.index(slot), phase)
        acc = warpgroup_mma(few, v_ring.index(slot).slice(0, FEW), acc)
    else:
        mbarrier.wait(v_ready.index(slot), phase)
        acc = warpgroup_mma(left, v_ring.index(slot), acc)
    mbarrier.arrive(v_free.index(slot), count=1)
    return acc, peak, total


@gluon.jit
def _first_scores(memory, turn, step, HALF: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
                  QUEUE: gl.constexpr):  # fmt: skip
    """Start those of a tile's first keys."""
    q_smem, _, k_ring, _, q_ready, _, k_ready, _, _, _ = memory
    place, slot = HALF * QUEUE + turn % QUEUE, step % STAGES
    mbarrier.wait(q_ready.index(place), (turn // QUEUE) & 1)
    mbarrier.wait(k_ready.index(slot), (step // STAGES) & 1)
    return scores(slot_of(q_smem, place, 64), slot_of(k_ring, slot, BN), BN)


@gluon.jit
def _compute(memory, o_desc, Out, Lse, First, Last, num_tokens, num_tiles, slots, scale_log2, HALF: gl.constexpr,
             GROUPS: gl.constexpr, HEADS: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
             STAGES: gl.constexpr, QUEUE: gl.constexpr):  # fmt: skip
    """Rows 64 HALF .. 64 HALF + 63 of each tile."""
    q_smem, _, _, _, _, q_free, _, k_free, _, _ = memory
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = q_smem[0].dtype
    FEW: gl.constexpr = max(16, 128 // span(HEADS))
    step = 0
    turn = 0
    index = gl.program_id(0)
    batch, group, token0, begin, count, first, last = _rows(
        index, First, Last, num_tokens, num_tiles, slots, HALF, GROUPS, HEADS, BN, s_row
    )  # fmt: skip
    if QUEUE > 1:
        s = _first_scores(memory, turn, step, HALF, BN, STAGES, QUEUE)
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        # What the next tile is gets loaded while this one is computed.
        after = gl.minimum(index + gl.num_programs(0), num_tiles * slots - 1)
        # These keys are seen by all rows. (Carried over like the rest, Triton 3.6 and 3.7 take them for constant.)
        all_from = gl.load(First + gl.minimum(token0 + 128 // span(HEADS), num_tokens) - 1)
        all_until = gl.load(Last + token0)
        until = gl.load(Last + gl.minimum(token0 + 128 // span(HEADS), num_tokens) - 1)
        tile_after = _rows(after, First, Last, num_tokens, num_tiles, slots, HALF, GROUPS, HEADS, BN, s_row)
        if QUEUE == 1:
            s = _first_scores(memory, turn, step, HALF, BN, STAGES, QUEUE)
        place = HALF * QUEUE + turn % QUEUE
        q = slot_of(q_smem, place, 64)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(step % STAGES), count=1)
        none = gl.full([64], float("-inf"), gl.float32, s_row)
        masked = _mask(s, first, last, begin, BN)
        p, peak, total, _shrink = _softmax(masked, none, gl.zeros([64], gl.float32, s_row), scale_log2, True)
        left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
        acc = gl.zeros([64, DV], gl.float32, o_layout)
        if QUEUE > 1 and turn > 0:  # what the tile before has left in its queries' place is on its way
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(HALF * QUEUE + (turn - 1) % QUEUE), count=1)
        # The first tile of keys is done. A window of 512 and the tokens of a tile end little after a tile of keys.
        few = (count > 1) & (until - begin - (count - 1) * BN <= FEW)
        stop = gl.where(few, count - 1, count)
        full_begin = gl.minimum(gl.maximum(gl.cdiv(all_from - begin, BN), 1), stop)
        full_end = gl.minimum(gl.maximum((all_until - begin) // BN, full_begin), stop)
        acc, left, peak, total = _loop(acc, left, peak, total, q, memory, first, last, begin, step, 1, full_begin,
                                       scale_log2, DV, BN, STAGES, True)  # fmt: skip
        acc, left, peak, total = _loop(acc, left, peak, total, q, memory, first, last, begin, step, full_begin,
                                       full_end, scale_log2, DV, BN, STAGES, False)  # fmt: skip
        acc, left, peak, total = _loop(acc, left, peak, total, q, memory, first, last, begin, step, full_end, stop,
                                       scale_log2, DV, BN, STAGES, True)  # fmt: skip
        acc, peak, total = _finish(acc, left, peak, total, q, memory, first, last, begin, step, stop, count,
                                   scale_log2, DV, BN, STAGES, FEW)  # fmt: skip
        step += count
        turn += 1
        if QUEUE > 1:
            s = _first_scores(memory, turn, step, HALF, BN, STAGES, QUEUE)

        row = gl.arange(0, 64, s_row)
        token = token0 + HALF * (64 // span(HEADS)) + row // span(HEADS)
        out_row, ok = head_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)
        gl.store(Lse + out_row, (peak + gl.log2(total)) * 0.6931471805599453, mask=ok)
        acc = acc * gl.convert_layout(1.0 / gl.where(total == 0, 1.0, total), o_row)[:, None]
        at = (batch, token0 + HALF * (64 // span(HEADS)), group * HEADS)
        store_rows(o_desc, Out, q_smem[0].index(place), acc.to(dtype), at, out_row, ok, HEADS)
        if QUEUE == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(place), count=1)
        batch, group, token0, begin, count, first, last = tile_after
    if QUEUE > 1:
        warpgroup_mma_wait(0, deps=(s,))
    tma.store_wait(0)


@gluon.jit
def _memory(q_descs, k_descs, v_desc, STAGES: gl.constexpr, QUEUE: gl.constexpr, BACKWARD: gl.constexpr):
    """Queries of QUEUE tiles, that of each half side by side; a ring of STAGES keys and values."""
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = rings(q_descs, 2 * QUEUE)
    d_smem = q_smem
    if BACKWARD:
        d_smem = rings(q_descs, 2 * QUEUE)
    k_ring = rings(k_descs, STAGES)
    (v_ring,) = rings((v_desc,), STAGES)
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * QUEUE, 1], bars)
    q_free = gl.allocate_shared_memory(gl.int64, [2 * QUEUE, 1], bars)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(2 * QUEUE):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    return q_smem, d_smem, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free


@gluon.jit(do_not_specialize=INTEGERS)
def forward_kernel(q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc, Out, Lse, First, Last, num_tokens, num_keys,
                   num_tiles, num_slots, scale_log2, GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
                   DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr):  # fmt: skip
    """out (B, T, H, Dv), lse (B, T, H) of tiles of 128 rows, by as many programs as there are multiprocessors.

    Descriptors: q (B, T, H, D) in boxes of 64 rows; k, v (B * S, G * D or Dv) in boxes of BN keys; q, k as `parts`.
    """
    q_descs, k_descs = used_parts(q_desc, q2_desc, D), used_parts(k_desc, k2_desc, D)
    memory = _memory(q_descs, k_descs, v_desc, STAGES, QUEUE, False)
    gl.warp_specialize(
        [
            (_compute, (memory, o_desc, Out, Lse, First, Last, num_tokens, num_tiles, num_slots, scale_log2, 0, GROUPS,
                        HEADS, DV, BN, STAGES, QUEUE)),
            (_compute, (memory, o_desc, Out, Lse, First, Last, num_tokens, num_tiles, num_slots, scale_log2, 1, GROUPS,
                        HEADS, DV, BN, STAGES, QUEUE)),
            (_copy, (q_descs, k_descs, v_desc, memory, First, Last, num_tokens, num_keys, num_tiles, num_slots, GROUPS,
                     HEADS, D, BN, STAGES, QUEUE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float, out: Tensor, lse: Tensor
) -> None:
    """As `nsa.ops.kernels.ranges.forward`, into out (B, T, H, Dv) and lse (B, T, H)."""
    tile, options = tile_sizes("hopper_forward", q, k, v)
    (batch, tokens, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    heads //= groups
    rows = span(heads)
    tiles, slots = triton.cdiv(tokens * rows, 128), batch * groups
    forward_kernel[(min(tiles * slots, multiprocessors(q.device)),)](
        *parts(q, list(q.shape), [1, 64 // rows, rows, width]), *key_parts(k, tile["BN"]), key_boxes(v, tile["BN"]),
        boxes(out, list(out.shape), [1, 64 // rows, rows, v.shape[3]]), out, lse, first, last, tokens, keys, tiles,
        slots, scale * LOG2_E, GROUPS=groups, HEADS=heads, D=width, DV=v.shape[3], **tile, **options,
    )  # fmt: skip
