"""Attention to selected blocks on Hopper, forward: computing warpgroups share the blocks of their tokens.

Neighbouring tokens choose much the same blocks, but not all the same. A copying warp brings the union of a tile's
blocks, each once, into a ring; a warpgroup computes those that some of its own tokens (64 rows) chose, and lets the
others pass. So two or three times (PARTS) as many tokens share a load as share a product. Rows that did not choose a
block get +inf as their maximum or LSE, as in nsa/ops/kernels/selected.py.
"""

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
from nsa.ops.kernels.launch import INTEGERS, LOG2_E


@gluon.jit
def _tile(index, Counts, num_tiles, slots, GROUPS: gl.constexpr, WIDTH: gl.constexpr):
    """(batch, group, tile, first entry of its list, number of entries)."""
    tile, slot = num_tiles - 1 - index // slots, index % slots
    row = slot.to(gl.int64) * num_tiles + tile
    return slot // GROUPS, slot % GROUPS, tile, row * WIDTH, gl.load(Counts + row * 2 + 1)


@gluon.jit
def _copy(q_descs, k_descs, v_desc, memory, Starts, Counts, num_keys, num_tiles, slots, GROUPS: gl.constexpr,
          HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
          QUEUE: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    q_smem, k_ring, v_ring, q_ready, q_free, ready, free = memory
    TOKENS: gl.constexpr = 64 // span(HEADS)
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, tile, entry, count = _tile(index, Counts, num_tiles, slots, GROUPS, WIDTH)
        next_start = gl.load(Starts + entry)
        for part in gl.static_range(PARTS):
            box = (batch, (PARTS * tile + part) * TOKENS, group * HEADS)
            place = part * QUEUE + turn % QUEUE
            mbarrier.wait(q_free.index(place), ((turn // QUEUE) & 1) ^ 1)
            bring(q_descs, box, 0, q_ready, q_smem, place)
        for i in range(count):
            slot, phase = step % STAGES, (step // STAGES) & 1
            at = batch * num_keys + next_start
            next_start = gl.load(Starts + entry + gl.minimum(i + 1, count - 1))
            mbarrier.wait(free.index(slot), phase ^ 1)
            bring(k_descs, (at,), group * D, ready, k_ring, slot, v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [at, group * DV], ready.index(slot), v_ring.index(slot))
            step += 1
        turn += 1


@gluon.jit
def _own_rows(batch, group, tile, num_tokens, Position, PART: gl.constexpr, PARTS: gl.constexpr, GROUPS: gl.constexpr,
              HEADS: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """(place in the tile, row of Q, whether there is one, position of its token, position of the first) of 64 rows."""
    TOKENS: gl.constexpr = 64 // span(HEADS)
    row = gl.arange(0, 64, layout)
    place = PART * TOKENS + row // span(HEADS)
    token = PARTS * tile * TOKENS + place
    q_row, ok = head_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)
    first = gl.load(Position + gl.minimum((PARTS * tile + PART) * TOKENS, num_tokens - 1))
    return place, q_row, ok, gl.load(Position + token, mask=ok, other=0), first


@gluon.jit
def _members(bits, PART: gl.constexpr, HEADS: gl.constexpr):
    """The bits of one part's tokens, nonzero if some of them chose the block."""
    TOKENS: gl.constexpr = 64 // span(HEADS)
    return (bits >> (PART * TOKENS)) & ((1 << TOKENS) - 1)


@gluon.jit
def _scores(q, k, start, position, first_position, BN: gl.constexpr, layout: gl.constexpr):
    """Masked scores (64, BN) of one block."""
    s = warpgroup_mma_wait(0, deps=(scores(q, k, BN),))
    if start + BN - 1 > first_position:
        key = start + gl.arange(0, BN, gl.SliceLayout(0, layout))
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    return s


@gluon.jit
def _forward_part(memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles, slots, scale_log2,
                  PART: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
                  WIDTH: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
                  PARTS: gl.constexpr):  # fmt: skip
    q_smem, k_ring, v_ring, q_ready, q_free, ready, free = memory
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = q_smem[0].dtype
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, tile, entry, count = _tile(index, Counts, num_tiles, slots, GROUPS, WIDTH)
        place, q_row, ok, position, first_position = _own_rows(
            batch, group, tile, num_tokens, Position, PART, PARTS, GROUPS, HEADS, s_row
        )  # fmt: skip
        next_start, next_bits = gl.load(Starts + entry), gl.load(Members + entry)
        queued = PART * QUEUE + turn % QUEUE
        mbarrier.wait(q_ready.index(queued), (turn // QUEUE) & 1)
        q = slot_of(q_smem, queued, 64)
        if QUEUE > 1 and turn > 0:  # what the tile before has left in its queries' place is on its way
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(PART * QUEUE + (turn - 1) % QUEUE), count=1)
        acc = gl.zeros([64, DV], gl.float32, o_layout)
        peak = gl.full([64], float("-inf"), gl.float32, s_row)
        total = gl.zeros([64], gl.float32, s_row)
        for i in range(count):
            slot, phase = step % STAGES, (step // STAGES) & 1
            start, bits = next_start, next_bits
            after = entry + gl.minimum(i + 1, count - 1)
            next_start, next_bits = gl.load(Starts + after), gl.load(Members + after)
            # Also for a block that is let pass: the slot must not be handed back twice before the other parts did.
            mbarrier.wait(ready.index(slot), phase)
            if _members(bits, PART, HEADS) != 0:
                s = _scores(q, slot_of(k_ring, slot, BN), start, position, first_position, BN, s_layout)
                member = ((bits >> place.to(gl.int64)) & 1) != 0
                new_peak = gl.where(member, gl.maximum(peak, gl.max(s, 1) * scale_log2), peak)
                p = gl.exp2(s * scale_log2 - gl.where(member, new_peak, float("inf"))[:, None])
                shrink = gl.where(member, gl.exp2(peak - new_peak), 1.0)
                total = total * shrink + gl.sum(p, 1)
                acc = acc * gl.convert_layout(shrink, o_row)[:, None]
                left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
                acc = warpgroup_mma(left, v_ring.index(slot), acc)
                peak = new_peak
            mbarrier.arrive(free.index(slot), count=1)
            step += 1
        gl.store(Lse + q_row, (peak + gl.log2(total)) * 0.6931471805599453, mask=ok)
        acc = acc * gl.convert_layout(1.0 / gl.where(total == 0, 1.0, total), o_row)[:, None]
        at = (batch, (PARTS * tile + PART) * (64 // span(HEADS)), group * HEADS)
        store_rows(o_desc, Out, q_smem[0].index(queued), acc.to(dtype), at, q_row, ok, HEADS)
        if QUEUE == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(queued), count=1)
        turn += 1
    tma.store_wait(0)


@gluon.jit
def _memory(q_descs, k_descs, v_desc, STAGES: gl.constexpr, QUEUE: gl.constexpr, PARTS: gl.constexpr):
    """Queries of QUEUE tiles, that of each part side by side; a ring of STAGES keys and values."""
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem, k_ring = rings(q_descs, PARTS * QUEUE), rings(k_descs, STAGES)
    (v_ring,) = rings((v_desc,), STAGES)
    q_ready = gl.allocate_shared_memory(gl.int64, [PARTS * QUEUE, 1], bars)
    q_free = gl.allocate_shared_memory(gl.int64, [PARTS * QUEUE, 1], bars)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(PARTS * QUEUE):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=PARTS)
    return q_smem, k_ring, v_ring, q_ready, q_free, ready, free


@gluon.jit(do_not_specialize=INTEGERS)
def forward_kernel(q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc, Out, Lse, Starts, Members, Counts, Position,
                   num_tokens, num_keys, num_tiles, num_slots, scale_log2, GROUPS: gl.constexpr, HEADS: gl.constexpr,
                   D: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
                   QUEUE: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """out, lse of tiles of 64 PARTS (2 or 3) rows; lists as from selected.union_kernel for their tokens."""
    q_descs, k_descs = used_parts(q_desc, q2_desc, D), used_parts(k_desc, k2_desc, D)
    memory = _memory(q_descs, k_descs, v_desc, STAGES, QUEUE, PARTS)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_forward_part, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                                 num_slots, scale_log2, 0, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_forward_part, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                                 num_slots, scale_log2, 1, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_copy, (q_descs, k_descs, v_desc, memory, Starts, Counts, num_keys, num_tiles, num_slots, GROUPS,
                         HEADS, D, DV, WIDTH, STAGES, QUEUE, PARTS)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_forward_part, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                                 num_slots, scale_log2, 0, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_forward_part, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                                 num_slots, scale_log2, 1, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_forward_part, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                                 num_slots, scale_log2, 2, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_copy, (q_descs, k_descs, v_desc, memory, Starts, Counts, num_keys, num_tiles, num_slots, GROUPS,
                         HEADS, D, DV, WIDTH, STAGES, QUEUE, PARTS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


Lists = tuple[Tensor, Tensor, Tensor, int]  # Starts, Members, Counts, tiles: of 64 PARTS rows each


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, position: Tensor, scale: float, out: Tensor, lse: Tensor,
    tile: dict[str, int], options: dict[str, int],
) -> None:  # fmt: skip
    """Into out (B, T, H, Dv), lse (B, T, H)."""
    (batch, tokens, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    heads //= groups
    rows, slots, tiles = span(heads), batch * groups, lists[3]
    forward_kernel[(min(tiles * slots, multiprocessors(q.device)),)](
        *parts(q, list(q.shape), [1, 64 // rows, rows, width]), *key_parts(k, 64), key_boxes(v, 64),
        boxes(out, list(out.shape), [1, 64 // rows, rows, v.shape[3]]), out, lse,
        *lists[:3], position, tokens, keys, tiles, slots, scale * LOG2_E, GROUPS=groups, HEADS=heads, D=width,
        DV=v.shape[3], BN=64, WIDTH=lists[0].shape[3], **tile, **options,
    )  # fmt: skip
