"""Block importance and the best blocks on Hopper: as nsa/ops/kernels/selection.py, which explains the method.

Two computing warpgroups take turns with the chunks of compressed keys and hand the importances of a chunk's blocks to a
third one, which keeps the best; a copying warp brings each head's queries once for both. Shared, because the queries
pass by for each chunk: with one chunk to a program they came from device memory every time, and that was the limit.
A warpgroup halves its chunk, so that the products of one half are under way during the exponentials of the other. The
third one has a row in two threads, so that its reductions stay within them.
"""

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

from nsa.ops.kernels.hopper import bring, multiprocessors, parts, rings, scores, slot_of, span, used_parts
from nsa.ops.kernels.launch import INTEGERS, LOG2_E, tile_sizes

SMALLEST = gl.constexpr(-0x7FFFFFFFFFFFFFFF)
LARGEST = gl.constexpr(0x7FFFFFFFFFFFFFFF)
TILE = 64  # queries


@gluon.jit
def _tile(index, runs, sizes, GROUPS: gl.constexpr, RATIO: gl.constexpr, BJ: gl.constexpr):
    """(batch, group, first token, end, first key, keys seen, chunks, chunks of which some key is seen)."""
    First, Last, Local, TileStart, TileEnd = runs
    _, _, num_tiles, slots, block_size = sizes
    tile, slot = num_tiles - 1 - index // slots, index % slots  # the last tiles see most: they go first
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
def _copy(q_descs, q_ring, ready, free, runs, sizes, GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
          RATIO: gl.constexpr, BJ: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    num_tokens, _, num_tiles, slots, _ = sizes
    turn = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, start, _, _, _, _, scored = _tile(index, runs, sizes, GROUPS, RATIO, BJ)
        for i in range(gl.cdiv(scored, 2) * HEADS):
            slot, phase = turn % STAGES, (turn // STAGES) & 1
            mbarrier.wait(free.index(slot), phase ^ 1)
            row, column = batch * num_tokens + start, (group * HEADS + i % HEADS) * D
            bring(q_descs, (row,), column, ready, q_ring, slot)
            turn += 1


@gluon.jit
def _place(column, KEYS: gl.constexpr, BJ: gl.constexpr):
    """(block, key of the block) of a column of a chunk: each half has key 0 of all its blocks, then key 1, .."""
    half, within = column // (KEYS // 2), column % (KEYS // 2)
    return half * (BJ // 2) + within % (BJ // 2), within // (BJ // 2)


@gluon.jit
def _fetch_columns(K, k_smem, key_row, block0, most_seen, group, column0, GROUPS: gl.constexpr, D: gl.constexpr,
                   RATIO: gl.constexpr, KEYS: gl.constexpr, BJ: gl.constexpr):  # fmt: skip
    WIDTH: gl.constexpr = k_smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    j, m = _place(gl.arange(0, KEYS, gl.SliceLayout(1, layout)), KEYS, BJ)
    key = gl.minimum((block0 + j) * RATIO + gl.minimum(m, RATIO - 1), most_seen - 1)
    column = column0 + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    at = ((key_row + key) * GROUPS + group)[:, None] * D + column[None, :]
    async_copy.async_copy_global_to_shared(k_smem, K + at)


@gluon.jit
def _fetch_keys(K, k_smem, key_row, block0, most_seen, group, GROUPS: gl.constexpr, D: gl.constexpr,
                RATIO: gl.constexpr, KEYS: gl.constexpr, BJ: gl.constexpr):  # fmt: skip
    """Start the copy of the keys of BJ blocks. A key that is not there is replaced by another."""
    for i in gl.static_range(len(k_smem)):
        _fetch_columns(K, k_smem[i], key_row, block0, most_seen, group, i * k_smem[0].shape[1], GROUPS, D, RATIO, KEYS,
                       BJ)  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def _scores(q_ring, k_half, ready, turn, BQ: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr):
    """Start the products of the ``turn``-th head in order and half a chunk of keys."""
    slot = turn % STAGES
    mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
    return scores(slot_of(q_ring, slot, BQ), k_half, WIDE)


@gluon.jit
def _hand_over(p, own_smem, after_smem, block0, seen, HALF: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr,
               BJ: gl.constexpr):  # fmt: skip
    """Weighted sums over each block's keys: for the block itself, and for the next one."""
    BQ: gl.constexpr = p.shape[0]
    WIDE: gl.constexpr = p.shape[1]
    BLOCKS: gl.constexpr = BJ // 2
    column = gl.arange(0, WIDE, gl.SliceLayout(0, p.type.layout))
    m = column // BLOCKS
    key = (block0 + HALF * BLOCKS + column % BLOCKS) * RATIO + m
    p = gl.where((m < RATIO)[None, :] & (key[None, :] < seen[:, None]), p, 0.0)
    weight = gl.where(m < RATIO, gl.minimum(UNITS, RATIO - m), 0).to(gl.float32)
    own = gl.sum((p * weight[None, :]).reshape([BQ, WIDE // BLOCKS, BLOCKS]), 1)
    own_smem.slice(HALF * BLOCKS, BLOCKS, 1).store(own)
    if UNITS > 1:
        weight = gl.where(m < RATIO, gl.maximum(0, m + UNITS - RATIO), 0).to(gl.float32)
        after = gl.sum((p * weight[None, :]).reshape([BQ, WIDE // BLOCKS, BLOCKS]), 1)
        after_smem.slice(HALF * BLOCKS, BLOCKS, 1).store(after)


@gluon.constexpr_function
def _at_once(heads, most):
    """Heads whose products follow each other without a break: as many as divide all."""
    return max(count for count in range(1, most + 1) if heads % count == 0)


@gluon.jit
def _compute(memory, K, Lse, runs, sizes, scale_log2, PART: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr,
             D: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr, BQ: gl.constexpr, KEYS: gl.constexpr,
             BJ: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The importances of chunks PART, PART + 2, .. of each tile."""
    q_ring, k_ring, base_ring, own_ring, after_ring, ready, free, full, empty = memory
    _, Last, _, _, _ = runs
    num_tokens, num_keys, num_tiles, slots, _ = sizes
    WIDE: gl.constexpr = KEYS // 2
    SPAN: gl.constexpr = span(HEADS)
    AT_ONCE: gl.constexpr = _at_once(HEADS, 4 if len(q_ring) == 1 else 2)  # in two parts, four would spill more
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    row: gl.constexpr = gl.SliceLayout(1, layout)
    h_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [2, 2], [1, 0])
    k_smem = slot_of(k_ring, PART, KEYS)
    # The same memory by heads, as it is written, and by rows, as it is read.
    bases = base_ring._reinterpret(gl.float32, [2, SPAN, BQ], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).index(PART)
    own, after = own_ring.index(PART), after_ring.index(PART)
    turn = 0
    handed_over = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, start, stop, key0, most_seen, _, scored = _tile(index, runs, sizes, GROUPS, RATIO, BJ)
        key_row = batch.to(gl.int64) * num_keys + key0
        if scored > PART:
            _fetch_keys(K, k_smem, key_row, PART * BJ, most_seen, group, GROUPS, D, RATIO, KEYS, BJ)
        token = start + gl.arange(0, BQ, row)
        seen = gl.load(Last + token, mask=token < stop, other=0) - key0
        column = start + gl.arange(0, BQ, gl.SliceLayout(0, h_layout))
        heads = gl.arange(0, SPAN, gl.SliceLayout(1, h_layout))
        at = (batch.to(gl.int64) * num_tokens + column)[None, :] * (GROUPS * HEADS) + (group * HEADS + heads)[:, None]
        there = (column < stop)[None, :] & (heads < HEADS)[:, None]
        lse = gl.load(Lse + at, mask=there, other=float("-inf"))
        bases.store(gl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634))
        for chunk in range(PART, gl.cdiv(scored, 2) * 2, 2):
            if chunk < scored:
                async_copy.wait_group(0)
                fence_async_shared()
                k_left, k_right = [k.slice(0, WIDE) for k in k_smem], [k.slice(WIDE, WIDE) for k in k_smem]
                left = gl.zeros([BQ, WIDE], gl.float32, layout)
                right = gl.zeros([BQ, WIDE], gl.float32, layout)
                for head in range(0, HEADS, AT_ONCE):
                    s = _scores(q_ring, k_left, ready, turn, BQ, WIDE, STAGES)
                    for i in gl.static_range(2 * AT_ONCE):
                        under_way = s
                        if i + 1 < 2 * AT_ONCE:
                            k_next = k_left if i % 2 else k_right
                            s = _scores(q_ring, k_next, ready, turn + i % 2, BQ, WIDE, STAGES)
                        base = base_ring.index(PART * SPAN + head + i // 2).load(row)
                        slot = turn % STAGES
                        # A branch, at a barrier that has been passed: ptxas moves exponentials below a later wait for
                        # products, so that nothing runs beside these, but moves nothing over a branch.
                        mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
                        done = warpgroup_mma_wait(len(q_ring) if i + 1 < 2 * AT_ONCE else 0, deps=(under_way,))
                        # Keys that the query does not see may overflow to inf here; they are dropped below.
                        p = gl.exp2(done * scale_log2 - base[:, None])
                        if i % 2 == 0:
                            left += p
                        else:
                            right += p
                            mbarrier.arrive(free.index(slot), count=1)
                            turn += 1
                if chunk + 2 < scored:
                    _fetch_keys(K, k_smem, key_row, (chunk + 2) * BJ, most_seen, group, GROUPS, D, RATIO, KEYS, BJ)
                mbarrier.wait(empty.index(PART), (handed_over & 1) ^ 1)
                _hand_over(left, own, after, chunk * BJ, seen, 0, RATIO, UNITS, BJ)
                _hand_over(right, own, after, chunk * BJ, seen, 1, RATIO, UNITS, BJ)
                mbarrier.arrive(full.index(PART), count=1)
                handed_over += 1
            else:
                # The other one's last chunk: a slot must not be handed back twice before the other did.
                for _ in range(HEADS):
                    slot = turn % STAGES
                    mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
                    mbarrier.arrive(free.index(slot), count=1)
                    turn += 1


@gluon.jit
def _extreme(x, LARGEST_ONE: gl.constexpr, layout: gl.constexpr):
    """The largest, or else the least, of each row; in pairs: a thread would take its own values in one chain."""
    ROWS: gl.constexpr = x.shape[0]
    for _ in gl.static_range(6):
        if x.shape[1] > 2:
            pairs = x.reshape([ROWS, x.shape[1] // 2, 2])
            x = gl.max(pairs, 2) if LARGEST_ONE else gl.min(pairs, 2)
    return gl.convert_layout(gl.max(x, 1) if LARGEST_ONE else gl.min(x, 1), layout)


@gluon.jit
def _insert(best, candidates):
    """As `nsa.ops.kernels.selection._insert`, two at a time: whether there is more to do is known after a barrier."""
    rows: gl.constexpr = gl.SliceLayout(1, best.type.layout)
    candidate_rows: gl.constexpr = gl.SliceLayout(1, candidates.type.layout)
    top, low = _extreme(candidates, True, rows), _extreme(best, False, rows)
    while gl.max((top > low).to(gl.int32), 0) > 0:
        for _ in gl.static_range(2):
            better = (top > low)[:, None]
            best = gl.where(better & (best == low[:, None]), top[:, None], best)
            passed = gl.convert_layout(top, candidate_rows)
            candidates = gl.where(candidates == passed[:, None], SMALLEST, candidates)
            top, low = _extreme(candidates, True, rows), _extreme(best, False, rows)
    return best


@gluon.jit
def _keep_best(memory, Out, runs, sizes, counts, GROUPS: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr,
               N: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr):  # fmt: skip
    """The best blocks of each tile, of its chunks in order."""
    _, _, _, own_ring, after_ring, _, _, full, empty = memory
    _, _, Local, _, _ = runs
    num_tokens, _, num_tiles, slots, block_size = sizes
    num_blocks, num_initial, num_local = counts
    j_layout: gl.constexpr = gl.BlockedLayout([1, BJ // 2], [16, 2], [4, 1], [1, 0])
    n_layout: gl.constexpr = gl.BlockedLayout([1, N // 2], [16, 2], [4, 1], [1, 0])
    slot_n = gl.arange(0, N, gl.SliceLayout(0, n_layout))
    first_taken = 0  # chunks of the first computing warpgroup, and of the second
    second_taken = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, start, stop, _, _, chunks, scored = _tile(index, runs, sizes, GROUPS, RATIO, BJ)
        own = start + gl.arange(0, BQ, gl.SliceLayout(1, j_layout))
        own = gl.load(Local + own, mask=own < stop, other=0) // block_size
        # Negative: free, each different. Beyond num_blocks: never to be replaced.
        best = gl.where(slot_n < num_blocks, -1 - slot_n.to(gl.int64), LARGEST)
        best = gl.zeros([BQ, N], gl.int64, n_layout) + best[None, :]
        carry = gl.zeros([BQ], gl.float32, gl.SliceLayout(1, j_layout))
        for chunk in range(chunks):
            j = gl.arange(0, BJ, gl.SliceLayout(0, j_layout))
            here = gl.zeros([BQ, BJ], gl.float32, j_layout)
            after = here
            if chunk < scored:
                part = chunk % 2
                mbarrier.wait(full.index(part), gl.where(part == 0, first_taken, second_taken) & 1)
                here = own_ring.index(part).load(j_layout)
                if UNITS > 1:
                    after = after_ring.index(part).load(j_layout)
                mbarrier.arrive(empty.index(part), count=1)
                first_taken += 1 - part
                second_taken += part
            if UNITS > 1:
                shifted = gl.zeros([BQ, BJ], gl.int32, j_layout) + gl.maximum(j - 1, 0)[None, :]
                here += gl.where(j[None, :] == 0, carry[:, None], gl.gather(after, shifted, 1))
                carry = gl.sum(gl.where(j[None, :] == BJ - 1, after, 0.0), 1)
            j += chunk * BJ
            forced = (j[None, :] < num_initial) | (j[None, :] > own[:, None] - num_local)
            here = gl.where(forced, float("inf"), here)
            # Importance is never negative: its bits are ordered as it is; the lower block wins a tie.
            candidate = (here.to(gl.int32, bitcast=True).to(gl.int64) << 32) | (0x7FFFFFFF - j)[None, :].to(gl.int64)
            best = _insert(best, gl.where(j[None, :] <= own[:, None], candidate, SMALLEST))
        chosen = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(gl.int32)
        row = start + gl.arange(0, BQ, gl.SliceLayout(1, n_layout))
        out_row = (batch.to(gl.int64) * num_tokens + row) * GROUPS + group
        gl.store(Out + out_row[:, None] * num_blocks + slot_n[None, :], gl.where(best >= 0, chosen, -1),
                 mask=(row < stop)[:, None] & (slot_n < num_blocks)[None, :])  # fmt: skip


@gluon.jit(do_not_specialize=INTEGERS)
def select_kernel(q_desc, q2_desc, K, Lse, First, Last, Local, TileStart, TileEnd, Out, num_tokens, num_keys, num_tiles,
                  num_slots, num_blocks, num_initial, num_local, block_size, scale_log2, GROUPS: gl.constexpr,
                  HEADS: gl.constexpr, D: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr, N: gl.constexpr,
                  BQ: gl.constexpr, KEYS: gl.constexpr, BJ: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Out (B, T, G, num_blocks) int32, unsorted, of the tokens TileStart .. TileEnd - 1 of one document each."""
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    q_descs = used_parts(q_desc, q2_desc, D)
    q_ring = rings(q_descs, STAGES)
    k_ring = [gl.allocate_shared_memory(q.dtype, [2, KEYS, q.block_shape[1]], q.layout) for q in q_descs]
    base_ring = gl.allocate_shared_memory(gl.float32, [2 * span(HEADS), BQ], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    own_ring = gl.allocate_shared_memory(gl.float32, [2, BQ, BJ], plain)
    after_ring = own_ring
    if UNITS > 1:
        after_ring = gl.allocate_shared_memory(gl.float32, [2, BQ, BJ], plain)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    memory = (q_ring, k_ring, base_ring, own_ring, after_ring, ready, free, full, empty)
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
            (_copy, (q_descs, q_ring, ready, free, runs, sizes, GROUPS, HEADS, D, RATIO, BJ, STAGES)),
        ],
        [4, 4, 1],
        [184, 112, 24],
    )  # fmt: skip


def select(
    q: Tensor, k: Tensor, lse: Tensor, runs: tuple[Tensor, Tensor, Tensor], tiles: tuple[Tensor, Tensor], out: Tensor,
    sizes: tuple[int, ...], ratio: int, units: int, scale: float,
) -> None:  # fmt: skip
    """`select_kernel` into out (B, T, G, num_blocks); ``runs``: First, Last, Local; ``tiles``: of TILE tokens."""
    (batch, tokens, heads, width), groups = q.shape, k.shape[2]
    tile, options = tile_sizes("hopper_select", q, k, k)
    n = max(2, triton.next_power_of_2(out.shape[3]))
    items, slots = len(tiles[0]) * batch * groups, batch * groups
    select_kernel[(min(items, multiprocessors(q.device)),)](
        *parts(q, [batch * tokens, heads * width], [TILE, width]), k, lse, *runs, *tiles, out, tokens, k.shape[1],
        len(tiles[0]), slots, *sizes, scale * LOG2_E, GROUPS=groups, HEADS=heads // groups, D=width, RATIO=ratio,
        UNITS=units, N=n, BQ=TILE, BJ=tile["KEYS"] // triton.next_power_of_2(ratio), **tile, **options,
    )  # fmt: skip
