"""Block importance and the best blocks on Hopper, as nsa/ops/kernels/selection.py, which explains the method.

A persistent kernel. Two computing warpgroups alternate over the chunks of compressed keys, and pass the importances of
a chunk's blocks to a third warpgroup, which keeps the best. A producer warp loads each head's queries once for both
computing warpgroups, because every chunk needs all queries. With one chunk per program, the queries came from device
memory for every chunk, which was the bottleneck.

A computing warpgroup divides its chunk in halves, so that the products of one half overlap with the exponentials of the
other. In the third warpgroup two threads hold a row, so that its reductions need no exchange between warps.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from nsa.ops.kernels.device_functions import (
    BEST_CANDIDATE,
    IMPORTANCE_SHIFT,
    LAST_BLOCK,
    LSE_TO_BASE_2,
    NO_CANDIDATE,
)
from nsa.ops.kernels.hardware import INTEGERS, LOG2_E, tile_sizes
from nsa.ops.kernels.hopper import (
    accumulator_layout,
    allocate_barriers,
    allocate_stages,
    load_box,
    multiprocessors,
    part_descriptors,
    rows_per_token,
    stage_and_phase,
    start_scores,
    tiles_of_stage,
    used_parts,
)

TILE = 64  # queries: the rows of a warpgroup
COMPUTING = gl.constexpr(2)  # warpgroups that compute importances
# Heads whose products a computing warpgroup starts without a break, at most. With keys in two parts more would spill.
MOST_HEADS_AT_ONCE = gl.constexpr(4)
MOST_HEADS_AT_ONCE_IN_PARTS = gl.constexpr(2)


class Memory(NamedTuple):
    """Shared memory of a program.

    Attributes:
        q: stages of queries, one head each, for each part of the columns.
        k: one chunk of keys for each computing warpgroup, for each part of the columns.
        base: (2 * rows_per_token, BQ) fp32, the LSEs to base 2 of each computing warpgroup.
        own, after: (2, BQ, BJ) fp32, what each computing warpgroup hands over: the sums for the chunk's blocks, and for
            the blocks that follow them.
        ready, free: mbarriers of q. Both computing warpgroups free a stage.
        full, empty: mbarriers of own and after.
    """

    q: Any
    k: Any
    base: Any
    own: Any
    after: Any
    ready: Any
    free: Any
    full: Any
    empty: Any


@gluon.jit
def _tile(index, runs, sizes, GROUPS: gl.constexpr, RATIO: gl.constexpr, BJ: gl.constexpr):
    """(batch, KV head, first token, end, first key, keys seen, chunks, chunks of which some key is seen)."""
    First, Last, Local, TileStart, TileEnd = runs
    _, _, num_tiles, slots, block_size = sizes
    tile, slot = num_tiles - 1 - index // slots, index % slots  # the last tiles see the most, so they go first
    start, stop = gl.load(TileStart + tile), gl.load(TileEnd + tile)
    some = start < stop
    last = gl.maximum(stop - 1, 0)
    key0 = gl.load(First + start, mask=some, other=0)
    most_seen = gl.maximum(gl.load(Last + last, mask=some, other=0) - key0, 0)
    blocks = gl.where(some, gl.load(Local + last, mask=some, other=0) // block_size + 1, 0)
    chunks = gl.cdiv(blocks, BJ)
    scored = gl.minimum(gl.cdiv(most_seen, BJ * RATIO), chunks)
    return slot // GROUPS, slot % GROUPS, start, stop, key0, most_seen, chunks, scored


@gluon.jit
def _producer(q_descs, memory, runs, sizes, GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
              RATIO: gl.constexpr, BJ: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The producer warp: for each pair of chunks it loads the queries of all heads, one after the other."""
    num_tokens, _, num_tiles, slots, _ = sizes
    step = 0  # heads loaded so far
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, start, _, _, _, _, scored = _tile(index, runs, sizes, GROUPS, RATIO, BJ)
        for i in range(gl.cdiv(scored, COMPUTING) * HEADS):
            stage, phase = stage_and_phase(step, STAGES)
            mbarrier.wait(memory.free.index(stage), phase ^ 1)
            row, column = batch * num_tokens + start, (group * HEADS + i % HEADS) * D
            load_box(q_descs, (row,), column, memory.ready, memory.q, stage)
            step += 1


@gluon.jit
def _block_and_key(column, KEYS: gl.constexpr, BJ: gl.constexpr):
    """(block, key of the block) of a column of a chunk.

    A chunk has two halves. Each has key 0 of all its blocks, then key 1 of all, and so on.
    """
    half, within = column // (KEYS // 2), column % (KEYS // 2)
    return half * (BJ // 2) + within % (BJ // 2), within // (BJ // 2)


@gluon.jit
def _load_key_part(K, k_smem, key_row, block0, most_seen, group, column0, GROUPS: gl.constexpr, D: gl.constexpr,
                   RATIO: gl.constexpr, KEYS: gl.constexpr, BJ: gl.constexpr):  # fmt: skip
    """`_load_keys` of the columns from ``column0`` on that k_smem (KEYS, WIDTH) has room for."""
    WIDTH: gl.constexpr = k_smem.shape[1]
    # A thread copies 8 columns (16 bytes), a warp 256.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    # [KEYS], [KEYS]
    j, m = _block_and_key(gl.arange(0, KEYS, gl.SliceLayout(1, layout)), KEYS, BJ)
    key = gl.minimum((block0 + j) * RATIO + gl.minimum(m, RATIO - 1), most_seen - 1)  # [KEYS]
    column = column0 + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))  # [WIDTH]
    at = ((key_row + key) * GROUPS + group)[:, None] * D + column[None, :]  # [KEYS, WIDTH]
    async_copy.async_copy_global_to_shared(k_smem, K + at)


@gluon.jit
def _load_keys(K, k_smem, key_row, block0, most_seen, group, GROUPS: gl.constexpr, D: gl.constexpr,
               RATIO: gl.constexpr, KEYS: gl.constexpr, BJ: gl.constexpr):  # fmt: skip
    """Start the asynchronous copy of the keys of BJ blocks. In place of a key that does not exist comes another."""
    for i in gl.static_range(len(k_smem)):
        _load_key_part(K, k_smem[i], key_row, block0, most_seen, group, i * k_smem[0].shape[1], GROUPS, D, RATIO, KEYS,
                       BJ)  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def _start_scores(memory, k_half, step, BQ: gl.constexpr, HALF_KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Start the scores (BQ, HALF_KEYS) of the ``step``-th head that was loaded and half a chunk of keys."""
    stage = step % STAGES
    mbarrier.wait(memory.ready.index(stage), (step // STAGES) & 1)
    return start_scores(tiles_of_stage(memory.q, stage, BQ), k_half, HALF_KEYS)


@gluon.jit
def _hand_over(p, own_smem, after_smem, block0, seen, HALF: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr,
               BJ: gl.constexpr):  # fmt: skip
    """Weighted sums of p (BQ, HALF_KEYS) over each block's keys: for the block itself, and for the next one."""
    BQ: gl.constexpr = p.shape[0]
    HALF_KEYS: gl.constexpr = p.shape[1]
    BLOCKS: gl.constexpr = BJ // 2
    column = gl.arange(0, HALF_KEYS, gl.SliceLayout(0, p.type.layout))  # [HALF_KEYS]
    m = column // BLOCKS  # [HALF_KEYS]
    key = (block0 + HALF * BLOCKS + column % BLOCKS) * RATIO + m  # [HALF_KEYS]
    p = gl.where((m < RATIO)[None, :] & (key[None, :] < seen[:, None]), p, 0.0)
    weight = gl.where(m < RATIO, gl.minimum(UNITS, RATIO - m), 0).to(gl.float32)  # [HALF_KEYS]
    own = gl.sum((p * weight[None, :]).reshape([BQ, HALF_KEYS // BLOCKS, BLOCKS]), 1)  # [BQ, BLOCKS]
    own_smem.slice(HALF * BLOCKS, BLOCKS, 1).store(own)
    if UNITS > 1:
        weight = gl.where(m < RATIO, gl.maximum(0, m + UNITS - RATIO), 0).to(gl.float32)
        after = gl.sum((p * weight[None, :]).reshape([BQ, HALF_KEYS // BLOCKS, BLOCKS]), 1)  # [BQ, BLOCKS]
        after_smem.slice(HALF * BLOCKS, BLOCKS, 1).store(after)


@gluon.constexpr_function
def _at_once(heads, most):
    """Heads whose products are started without a break: the largest divisor of ``heads`` up to ``most``."""
    return max(count for count in range(1, most + 1) if heads % count == 0)


@gluon.jit
def _compute(memory, K, Lse, runs, sizes, scale_log2, PART: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr,
             D: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr, BQ: gl.constexpr, KEYS: gl.constexpr,
             BJ: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """A computing warpgroup: the importances of chunks PART, PART + 2, .. of each tile."""
    _, Last, _, _, _ = runs
    num_tokens, num_keys, num_tiles, slots, _ = sizes
    HALF_KEYS: gl.constexpr = KEYS // 2
    HEAD_ROWS: gl.constexpr = rows_per_token(HEADS)
    MOST: gl.constexpr = MOST_HEADS_AT_ONCE if len(memory.q) == 1 else MOST_HEADS_AT_ONCE_IN_PARTS
    AT_ONCE: gl.constexpr = _at_once(HEADS, MOST)
    layout: gl.constexpr = accumulator_layout(BQ, HALF_KEYS)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    h_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [2, 2], [1, 0])
    k_smem = tiles_of_stage(memory.k, PART, KEYS)  # parts of [KEYS, D]
    # The same memory in two views: all heads at once, as it is written, and one row a head, as it is read.
    bases = memory.base._reinterpret(gl.float32, [2, HEAD_ROWS, BQ], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).index(
        PART
    )
    own, after = memory.own.index(PART), memory.after.index(PART)  # [BQ, BJ] each
    step = 0  # heads of all chunks before
    handed_over = 0  # chunks
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, start, stop, key0, most_seen, _, scored = _tile(index, runs, sizes, GROUPS, RATIO, BJ)
        key_row = batch.to(gl.int64) * num_keys + key0
        if scored > PART:
            _load_keys(K, k_smem, key_row, PART * BJ, most_seen, group, GROUPS, D, RATIO, KEYS, BJ)
        token = start + gl.arange(0, BQ, rows)  # [BQ]
        seen = gl.load(Last + token, mask=token < stop, other=0) - key0  # [BQ], how many keys the token sees
        column = start + gl.arange(0, BQ, gl.SliceLayout(0, h_layout))  # [BQ]
        heads = gl.arange(0, HEAD_ROWS, gl.SliceLayout(1, h_layout))  # [HEAD_ROWS]
        # [HEAD_ROWS, BQ]
        at = (batch.to(gl.int64) * num_tokens + column)[None, :] * (GROUPS * HEADS) + (group * HEADS + heads)[:, None]
        ok = (column < stop)[None, :] & (heads < HEADS)[:, None]  # [HEAD_ROWS, BQ]
        lse = gl.load(Lse + at, mask=ok, other=float("-inf"))  # [HEAD_ROWS, BQ]
        bases.store(gl.where(lse == float("-inf"), float("inf"), lse * LSE_TO_BASE_2))
        for chunk in range(PART, gl.cdiv(scored, COMPUTING) * COMPUTING, COMPUTING):
            if chunk < scored:
                async_copy.wait_group(0)
                fence_async_shared()
                k_left = [k.slice(0, HALF_KEYS) for k in k_smem]  # parts of [HALF_KEYS, D]
                k_right = [k.slice(HALF_KEYS, HALF_KEYS) for k in k_smem]  # parts of [HALF_KEYS, D]
                left = gl.zeros([BQ, HALF_KEYS], gl.float32, layout)  # [BQ, HALF_KEYS], sums over heads
                right = gl.zeros([BQ, HALF_KEYS], gl.float32, layout)  # [BQ, HALF_KEYS]
                for head in range(0, HEADS, AT_ONCE):
                    s = _start_scores(memory, k_left, step, BQ, HALF_KEYS, STAGES)  # [BQ, HALF_KEYS]
                    for i in gl.static_range(2 * AT_ONCE):
                        running = s
                        if i + 1 < 2 * AT_ONCE:
                            k_next = k_left if i % 2 else k_right
                            s = _start_scores(memory, k_next, step + i % 2, BQ, HALF_KEYS, STAGES)
                        base = memory.base.index(PART * HEAD_ROWS + head + i // 2).load(rows)  # [BQ]
                        stage = step % STAGES
                        # This mbarrier has completed already. The wait is a branch, over which ptxas does not move
                        # instructions: it would move the exponentials of the product before below the next wait, so
                        # that no product would run beside them.
                        mbarrier.wait(memory.ready.index(stage), (step // STAGES) & 1)
                        done = warpgroup_mma_wait(len(memory.q) if i + 1 < 2 * AT_ONCE else 0, deps=(running,))
                        # Keys that the query does not see may overflow to inf here. They are dropped below.
                        p = gl.exp2(done * scale_log2 - base[:, None])  # [BQ, HALF_KEYS]
                        if i % 2 == 0:
                            left += p
                        else:
                            right += p
                            mbarrier.arrive(memory.free.index(stage), count=1)
                            step += 1
                if chunk + COMPUTING < scored:
                    block0 = (chunk + COMPUTING) * BJ
                    _load_keys(K, k_smem, key_row, block0, most_seen, group, GROUPS, D, RATIO, KEYS, BJ)
                mbarrier.wait(memory.empty.index(PART), (handed_over & 1) ^ 1)
                _hand_over(left, own, after, chunk * BJ, seen, 0, RATIO, UNITS, BJ)
                _hand_over(right, own, after, chunk * BJ, seen, 1, RATIO, UNITS, BJ)
                mbarrier.arrive(memory.full.index(PART), count=1)
                handed_over += 1
            else:
                # The other warpgroup has the last chunk, this one has none. It waits for each stage all the same: it
                # must not free a stage twice before the other did once.
                for _ in range(HEADS):
                    stage = step % STAGES
                    mbarrier.wait(memory.ready.index(stage), (step // STAGES) & 1)
                    mbarrier.arrive(memory.free.index(stage), count=1)
                    step += 1


@gluon.jit
def _extreme(x, LARGEST: gl.constexpr, layout: gl.constexpr):
    """(rows,) the largest, or else the least, of each row of x (rows, columns).

    Pairs are reduced first: a single reduction would take all values of a thread in one chain of instructions.
    """
    ROWS: gl.constexpr = x.shape[0]
    for _ in gl.static_range(6):  # 2^6 halves 64 columns at least to two
        if x.shape[1] > 2:
            pairs = x.reshape([ROWS, x.shape[1] // 2, 2])
            x = gl.max(pairs, 2) if LARGEST else gl.min(pairs, 2)
    return gl.convert_layout(gl.max(x, 1) if LARGEST else gl.min(x, 1), layout)


@gluon.jit
def _insert(best, candidates):
    """The N largest of best (BQ, N) and candidates (BQ, BJ), as in nsa/ops/kernels/selection.py.

    Two rounds run at a time, because it takes a barrier to know whether another one is needed.
    """
    rows: gl.constexpr = gl.SliceLayout(1, best.type.layout)
    candidate_rows: gl.constexpr = gl.SliceLayout(1, candidates.type.layout)
    top, low = _extreme(candidates, True, rows), _extreme(best, False, rows)  # [BQ], [BQ]
    while gl.max((top > low).to(gl.int32), 0) > 0:
        for _ in gl.static_range(2):
            better = (top > low)[:, None]  # [BQ, 1]
            best = gl.where(better & (best == low[:, None]), top[:, None], best)
            taken = gl.convert_layout(top, candidate_rows)  # [BQ]
            candidates = gl.where(candidates == taken[:, None], NO_CANDIDATE, candidates)
            top, low = _extreme(candidates, True, rows), _extreme(best, False, rows)
    return best


@gluon.jit
def _keep_best(memory, Out, runs, sizes, counts, GROUPS: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr,
               N: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr):  # fmt: skip
    """The third warpgroup: it takes the importances of each tile's chunks in order, and keeps the best blocks."""
    _, _, Local, _, _ = runs
    num_tokens, _, num_tiles, slots, block_size = sizes
    num_blocks, num_initial, num_local = counts
    j_layout: gl.constexpr = gl.BlockedLayout([1, BJ // 2], [16, 2], [4, 1], [1, 0])
    n_layout: gl.constexpr = gl.BlockedLayout([1, N // 2], [16, 2], [4, 1], [1, 0])
    slot_n = gl.arange(0, N, gl.SliceLayout(0, n_layout))  # [N]
    first_taken = 0  # chunks of the first computing warpgroup, and of the second
    second_taken = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, start, stop, _, _, chunks, scored = _tile(index, runs, sizes, GROUPS, RATIO, BJ)
        token = start + gl.arange(0, BQ, gl.SliceLayout(1, j_layout))  # [BQ]
        own = gl.load(Local + token, mask=token < stop, other=0) // block_size  # [BQ], the token's own block
        # A free place is negative, and each has a value of its own. Places beyond num_blocks are never to be replaced.
        best = gl.where(slot_n < num_blocks, -1 - slot_n.to(gl.int64), BEST_CANDIDATE)  # [N]
        best = gl.zeros([BQ, N], gl.int64, n_layout) + best[None, :]  # [BQ, N]
        # What the last block of the chunk before gives to the next block.
        carry = gl.zeros([BQ], gl.float32, gl.SliceLayout(1, j_layout))  # [BQ]
        for chunk in range(chunks):
            j = gl.arange(0, BJ, gl.SliceLayout(0, j_layout))  # [BJ]
            importance = gl.zeros([BQ, BJ], gl.float32, j_layout)  # [BQ, BJ]
            after = importance  # [BQ, BJ]
            if chunk < scored:
                part = chunk % COMPUTING
                mbarrier.wait(memory.full.index(part), gl.where(part == 0, first_taken, second_taken) & 1)
                importance = memory.own.index(part).load(j_layout)
                if UNITS > 1:
                    after = memory.after.index(part).load(j_layout)
                mbarrier.arrive(memory.empty.index(part), count=1)
                first_taken += 1 - part
                second_taken += part
            if UNITS > 1:
                shifted = gl.zeros([BQ, BJ], gl.int32, j_layout) + gl.maximum(j - 1, 0)[None, :]  # [BQ, BJ]
                importance += gl.where(j[None, :] == 0, carry[:, None], gl.gather(after, shifted, 1))
                carry = gl.sum(gl.where(j[None, :] == BJ - 1, after, 0.0), 1)
            j += chunk * BJ
            forced = (j[None, :] < num_initial) | (j[None, :] > own[:, None] - num_local)  # [BQ, BJ]
            importance = gl.where(forced, float("inf"), importance)
            candidate = importance.to(gl.int32, bitcast=True).to(gl.int64) << IMPORTANCE_SHIFT  # [BQ, BJ]
            candidate |= (LAST_BLOCK - j)[None, :].to(gl.int64)
            best = _insert(best, gl.where(j[None, :] <= own[:, None], candidate, NO_CANDIDATE))
        chosen = LAST_BLOCK - (best & LAST_BLOCK).to(gl.int32)  # [BQ, N]
        row = start + gl.arange(0, BQ, gl.SliceLayout(1, n_layout))  # [BQ]
        out_row = (batch.to(gl.int64) * num_tokens + row) * GROUPS + group  # [BQ]
        gl.store(Out + out_row[:, None] * num_blocks + slot_n[None, :], gl.where(best >= 0, chosen, -1),
                 mask=(row < stop)[:, None] & (slot_n < num_blocks)[None, :])  # fmt: skip


@gluon.jit(do_not_specialize=INTEGERS)
def select_kernel(q_desc, q2_desc, K, Lse, First, Last, Local, TileStart, TileEnd, Out, num_tokens, num_keys, num_tiles,
                  num_slots, num_blocks, num_initial, num_local, block_size, scale_log2, GROUPS: gl.constexpr,
                  HEADS: gl.constexpr, D: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr, N: gl.constexpr,
                  BQ: gl.constexpr, KEYS: gl.constexpr, BJ: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Out (B, T, G, num_blocks) int32, unsorted, of tiles of tokens TileStart .. TileEnd - 1, each of one document.

    Persistent. Arguments as in `nsa.ops.kernels.selection.select_kernel`; a chunk has KEYS keys of BJ blocks.
    """
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    q_descs = used_parts(q_desc, q2_desc, D)
    q_stages = allocate_stages(q_descs, STAGES)
    k = [gl.allocate_shared_memory(q.dtype, [COMPUTING, KEYS, q.block_shape[1]], q.layout) for q in q_descs]
    base_shape: gl.constexpr = [COMPUTING * rows_per_token(HEADS), BQ]
    base = gl.allocate_shared_memory(gl.float32, base_shape, gl.SwizzledSharedLayout(1, 1, 1, [0]))
    own = gl.allocate_shared_memory(gl.float32, [COMPUTING, BQ, BJ], plain)
    after = own
    if UNITS > 1:
        after = gl.allocate_shared_memory(gl.float32, [COMPUTING, BQ, BJ], plain)
    ready, free = allocate_barriers(STAGES), allocate_barriers(STAGES)
    full, empty = allocate_barriers(COMPUTING), allocate_barriers(COMPUTING)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=COMPUTING)
    for i in gl.static_range(COMPUTING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    memory = Memory(q_stages, k, base, own, after, ready, free, full, empty)
    runs = (First, Last, Local, TileStart, TileEnd)
    sizes = (num_tokens, num_keys, num_tiles, num_slots, block_size)
    counts = (num_blocks, num_initial, num_local)
    gl.warp_specialize(
        [
            (_compute, (memory, K, Lse, runs, sizes, scale_log2, 0, GROUPS, HEADS, D, RATIO, UNITS, BQ, KEYS, BJ,
                        STAGES)),
            (_compute, (memory, K, Lse, runs, sizes, scale_log2, 1, GROUPS, HEADS, D, RATIO, UNITS, BQ, KEYS, BJ,
                        STAGES)),
            (_keep_best, (memory, Out, runs, sizes, counts, GROUPS, RATIO, UNITS, N, BQ, BJ)),
            (_producer, (q_descs, memory, runs, sizes, GROUPS, HEADS, D, RATIO, BJ, STAGES)),
        ],
        [4, 4, 1],  # warps of the second to fourth
        [184, 112, 24],  # their registers for a thread: the most for a computing warpgroup, the fewest for the producer
    )  # fmt: skip


def select(
    q: Tensor, k: Tensor, lse: Tensor, runs: tuple[Tensor, Tensor, Tensor], tiles: tuple[Tensor, Tensor], out: Tensor,
    sizes: tuple[int, ...], ratio: int, units: int, scale: float,
) -> None:  # fmt: skip
    """As `nsa.ops.kernels.selection.select`, into out (B, T, G, num_blocks) int32, but with unsorted rows.

    Args:
        q: (B, T, H, D), k: (B, S, G, D), lse: (B, T, H) fp32; all contiguous.
        runs: first and last key that each query sees, and its position in the document; (T,) int32.
        tiles: start and end of tiles of TILE queries, as from `nsa.ops.kernels.selection.document_tiles`.
        sizes: num_blocks, num_initial, num_local, block_size.
        ratio, units: strides in a selection block, and in a compression block.
    """
    (batch, tokens, heads, width), groups = q.shape, k.shape[2]
    tile, options = tile_sizes("hopper_select", q, k, k)
    n = max(2, triton.next_power_of_2(out.shape[3]))
    items, slots = len(tiles[0]) * batch * groups, batch * groups
    select_kernel[(min(items, multiprocessors(q.device)),)](
        *part_descriptors(q, [batch * tokens, heads * width], [TILE, width]), k, lse, *runs, *tiles, out, tokens,
        k.shape[1], len(tiles[0]), slots, *sizes, scale * LOG2_E, GROUPS=groups, HEADS=heads // groups, D=width,
        RATIO=ratio, UNITS=units, N=n, BQ=TILE, BJ=tile["KEYS"] // triton.next_power_of_2(ratio), **tile, **options,
    )  # fmt: skip
