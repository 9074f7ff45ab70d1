"""Attention to selected blocks on Hopper, forward: computing warpgroups share the blocks of their tokens.

Neighbouring tokens select mostly the same blocks. A producer warp loads the union of a tile's blocks, each once. A
warpgroup computes a block if one of its own tokens (64 rows) selected it, and skips it otherwise. So two or three times
(PARTS) as many tokens share a load as share a product. Rows that did not select a block get +inf as their maximum, as
in nsa/ops/kernels/selected.py. The kernel is persistent.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.ops.kernels.device_functions import LSE_TO_NATURAL
from nsa.ops.kernels.hardware import INTEGERS, LOG2_E
from nsa.ops.kernels.hopper import (
    ROWS,
    accumulator_layout,
    allocate_barriers,
    allocate_stages,
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

BLOCK_SIZE = 64  # keys of a selected block: the only size that these kernels serve


class Memory(NamedTuple):
    """Shared memory of a program.

    Attributes:
        q: stages of queries for each part of the columns, those of the first warpgroup first.
        k: stages of keys for each part of the columns.
        v: stages of values.
        q_ready, q_free: mbarriers of q.
        ready, free: mbarriers of k and v, which are loaded and read together. All warpgroups free a stage.
    """

    q: Any
    k: Any
    v: Any
    q_ready: Any
    q_free: Any
    ready: Any
    free: Any


@gluon.jit
def _tile(index, Counts, num_tiles, slots, GROUPS: gl.constexpr, WIDTH: gl.constexpr):
    """(batch, KV head, tile, first entry of its list, number of entries)."""
    tile, slot = num_tiles - 1 - index // slots, index % slots  # the last tiles see the most and go first
    row = slot.to(gl.int64) * num_tiles + tile
    return slot // GROUPS, slot % GROUPS, tile, row * WIDTH, gl.load(Counts + row * 2 + 1)


@gluon.jit
def _producer(q_descs, k_descs, v_desc, memory, Starts, Counts, num_keys, num_tiles, slots, GROUPS: gl.constexpr,
              HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
              QUEUE: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """The producer warp: it loads the queries of each tile, and the keys and values of the blocks in its list."""
    TOKENS: gl.constexpr = tokens_per_warpgroup(HEADS)
    step = 0  # blocks loaded so far
    tiles_done = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, tile, entry, count = _tile(index, Counts, num_tiles, slots, GROUPS, WIDTH)
        next_start = gl.load(Starts + entry)  # loaded one entry ahead
        for part in gl.static_range(PARTS):
            at = (batch, (PARTS * tile + part) * TOKENS, group * HEADS)
            q_stage = part * QUEUE + tiles_done % QUEUE
            mbarrier.wait(memory.q_free.index(q_stage), ((tiles_done // QUEUE) & 1) ^ 1)
            load_box(q_descs, at, 0, memory.q_ready, memory.q, q_stage)
        for i in range(count):
            stage, phase = stage_and_phase(step, STAGES)
            key = batch * num_keys + next_start
            next_start = gl.load(Starts + entry + gl.minimum(i + 1, count - 1))
            mbarrier.wait(memory.free.index(stage), phase ^ 1)
            load_box(k_descs, (key,), group * D, memory.ready, memory.k, stage, v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [key, group * DV], memory.ready.index(stage), memory.v.index(stage))
            step += 1
        tiles_done += 1


@gluon.jit
def _rows_of_part(batch, group, tile, num_tokens, Position, PART: gl.constexpr, PARTS: gl.constexpr,
                  GROUPS: gl.constexpr, HEADS: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """The 64 rows of a warpgroup.

    Returns:
        For each row the number of its token within the tile, the row of Q, whether it exists, and the position of its
        token, all (64,). Then the position of the warpgroup's first token.
    """
    TOKENS: gl.constexpr = tokens_per_warpgroup(HEADS)
    row = gl.arange(0, ROWS, layout)  # [64]
    in_tile = PART * TOKENS + row // rows_per_token(HEADS)  # [64]
    token = PARTS * tile * TOKENS + in_tile  # [64]
    q_row, ok = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [64], [64]
    first = gl.load(Position + gl.minimum((PARTS * tile + PART) * TOKENS, num_tokens - 1))
    return in_tile, q_row, ok, gl.load(Position + token, mask=ok, other=0), first


@gluon.jit
def _members(bits, PART: gl.constexpr, HEADS: gl.constexpr):
    """The bits of a warpgroup's tokens: not 0 if some of them chose the block."""
    TOKENS: gl.constexpr = tokens_per_warpgroup(HEADS)
    return (bits >> (PART * TOKENS)) & ((1 << TOKENS) - 1)


@gluon.jit
def _scores(q, k, start, position, first_position, BN: gl.constexpr, layout: gl.constexpr):
    """Scores (64, BN) of one block, with the causal mask."""
    s = warpgroup_mma_wait(0, deps=(start_scores(q, k, BN),))  # [64, BN]
    if start + BN - 1 > first_position:
        key = start + gl.arange(0, BN, gl.SliceLayout(0, layout))  # [BN]
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    return s


@gluon.jit
def _compute(memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles, slots, scale_log2,
             PART: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
             WIDTH: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """A computing warpgroup, the PART-th of PARTS: its 64 rows of each tile."""
    s_layout: gl.constexpr = accumulator_layout(ROWS, BN)
    o_layout: gl.constexpr = accumulator_layout(ROWS, DV)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = memory.q[0].dtype
    step = 0  # blocks of all tiles before
    tiles_done = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, tile, entry, count = _tile(index, Counts, num_tiles, slots, GROUPS, WIDTH)
        in_tile, q_row, ok, position, first_position = _rows_of_part(
            batch, group, tile, num_tokens, Position, PART, PARTS, GROUPS, HEADS, s_rows
        )  # in_tile, q_row, ok, position: [64]  # fmt: skip
        next_start, next_bits = gl.load(Starts + entry), gl.load(Members + entry)  # loaded one entry ahead
        q_stage = PART * QUEUE + tiles_done % QUEUE
        mbarrier.wait(memory.q_ready.index(q_stage), (tiles_done // QUEUE) & 1)
        q = tiles_of_stage(memory.q, q_stage, ROWS)  # parts of [64, D]
        if QUEUE > 1 and tiles_done > 0:  # the tile before has left its output in the memory of its queries
            tma.store_wait(0)
            mbarrier.arrive(memory.q_free.index(PART * QUEUE + (tiles_done - 1) % QUEUE), count=1)
        acc = gl.zeros([ROWS, DV], gl.float32, o_layout)  # [64, DV]
        row_max = gl.full([ROWS], float("-inf"), gl.float32, s_rows)  # [64], in units of log2
        row_sum = gl.zeros([ROWS], gl.float32, s_rows)  # [64]
        for i in range(count):
            stage, phase = stage_and_phase(step, STAGES)
            start, bits = next_start, next_bits
            after = entry + gl.minimum(i + 1, count - 1)
            next_start, next_bits = gl.load(Starts + after), gl.load(Members + after)
            # Also for a block that is skipped: this warpgroup must not free a stage twice before the others did once.
            mbarrier.wait(memory.ready.index(stage), phase)
            if _members(bits, PART, HEADS) != 0:
                # [64, BN]
                s = _scores(q, tiles_of_stage(memory.k, stage, BN), start, position, first_position, BN, s_layout)
                member = ((bits >> in_tile.to(gl.int64)) & 1) != 0  # [64], whether the row's token chose the block
                new_max = gl.where(member, gl.maximum(row_max, gl.max(s, 1) * scale_log2), row_max)  # [64]
                p = gl.exp2(s * scale_log2 - gl.where(member, new_max, float("inf"))[:, None])  # [64, BN]
                rescale = gl.where(member, gl.exp2(row_max - new_max), 1.0)  # [64]
                row_sum = row_sum * rescale + gl.sum(p, 1)
                acc = acc * gl.convert_layout(rescale, o_rows)[:, None]
                p_operand = gl.convert_layout(p.to(dtype), left_operand_layout(o_layout))  # [64, BN]
                acc = warpgroup_mma(p_operand, memory.v.index(stage), acc)
                row_max = new_max
            mbarrier.arrive(memory.free.index(stage), count=1)
            step += 1

        # Epilogue.
        gl.store(Lse + q_row, (row_max + gl.log2(row_sum)) * LSE_TO_NATURAL, mask=ok)
        acc = acc * gl.convert_layout(1.0 / gl.where(row_sum == 0, 1.0, row_sum), o_rows)[:, None]
        at = (batch, (PARTS * tile + PART) * tokens_per_warpgroup(HEADS), group * HEADS)
        store_rows(o_desc, Out, memory.q[0].index(q_stage), acc.to(dtype), at, q_row, ok, HEADS)
        if QUEUE == 1:
            tma.store_wait(0)
            mbarrier.arrive(memory.q_free.index(q_stage), count=1)
        tiles_done += 1
    tma.store_wait(0)


@gluon.jit
def _allocate_memory(q_descs, k_descs, v_desc, STAGES: gl.constexpr, QUEUE: gl.constexpr, PARTS: gl.constexpr):
    """Memory for the queries of QUEUE tiles, and for STAGES blocks of keys and values."""
    q, k = allocate_stages(q_descs, PARTS * QUEUE), allocate_stages(k_descs, STAGES)
    (v,) = allocate_stages((v_desc,), STAGES)
    q_ready, q_free = allocate_barriers(PARTS * QUEUE), allocate_barriers(PARTS * QUEUE)
    ready, free = allocate_barriers(STAGES), allocate_barriers(STAGES)
    for i in gl.static_range(PARTS * QUEUE):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=PARTS)
    return Memory(q, k, v, q_ready, q_free, ready, free)


@gluon.jit(do_not_specialize=INTEGERS)
def forward_kernel(q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc, Out, Lse, Starts, Members, Counts, Position,
                   num_tokens, num_keys, num_tiles, num_slots, scale_log2, GROUPS: gl.constexpr, HEADS: gl.constexpr,
                   D: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
                   QUEUE: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """out (B, T, H, Dv), lse (B, T, H) of tiles of 64 PARTS (2 or 3) rows; persistent.

    Descriptors as in `nsa.ops.kernels.hopper.ranges.forward_kernel`. Lists as from
    `nsa.ops.kernels.selected.union_kernel`, of the tokens of such tiles.
    """
    q_descs, k_descs = used_parts(q_desc, q2_desc, D), used_parts(k_desc, k2_desc, D)
    memory = _allocate_memory(q_descs, k_descs, v_desc, STAGES, QUEUE, PARTS)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_compute, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                            num_slots, scale_log2, 0, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_compute, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                            num_slots, scale_log2, 1, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_producer, (q_descs, k_descs, v_desc, memory, Starts, Counts, num_keys, num_tiles, num_slots, GROUPS,
                             HEADS, D, DV, WIDTH, STAGES, QUEUE, PARTS)),
            ],
            [4, 1],  # warps of the second and third
            [240, 24],  # their registers for a thread: accumulators and P for the former, the fewest for the latter
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                            num_slots, scale_log2, 0, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_compute, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                            num_slots, scale_log2, 1, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_compute, (memory, o_desc, Out, Lse, Position, Starts, Members, Counts, num_tokens, num_tiles,
                            num_slots, scale_log2, 2, GROUPS, HEADS, DV, BN, WIDTH, STAGES, QUEUE, PARTS)),
                (_producer, (q_descs, k_descs, v_desc, memory, Starts, Counts, num_keys, num_tiles, num_slots, GROUPS,
                             HEADS, D, DV, WIDTH, STAGES, QUEUE, PARTS)),
            ],
            [4, 4, 1],  # warps of the second to fourth
            [160, 160, 24],  # their registers for a thread: three computing warpgroups share what two have above
        )  # fmt: skip


Lists = tuple[Tensor, Tensor, Tensor, int]  # as from `nsa.ops.kernels.selected.unions`, of tiles of 64 PARTS rows


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, position: Tensor, scale: float, out: Tensor, lse: Tensor,
    tile: dict[str, int], options: dict[str, int],
) -> None:  # fmt: skip
    """As `nsa.ops.kernels.selected.forward`, into out (B, T, H, Dv) and lse (B, T, H) fp32.

    Args:
        lists, position: the chosen blocks of each tile and the queries' positions (T,) int32.
        tile, options: tile constants and launch options, as from `nsa.ops.kernels.hardware.tile_sizes`.
    """
    (batch, tokens, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    heads //= groups
    slots, tiles = batch * groups, lists[3]
    box = [1, tokens_per_warpgroup(heads), rows_per_token(heads)]
    forward_kernel[(min(tiles * slots, multiprocessors(q.device)),)](
        *part_descriptors(q, list(q.shape), [*box, width]), *key_part_descriptors(k, BLOCK_SIZE),
        key_descriptor(v, BLOCK_SIZE), box_descriptor(out, list(out.shape), [*box, v.shape[3]]), out, lse,
        *lists[:3], position, tokens, keys, tiles, slots, scale * LOG2_E, GROUPS=groups, HEADS=heads, D=width,
        DV=v.shape[3], BN=BLOCK_SIZE, WIDTH=lists[0].shape[3], **tile, **options,
    )  # fmt: skip
