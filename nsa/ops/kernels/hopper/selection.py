"""Block importance and the best blocks on Hopper: as nsa/ops/kernels/selection.py, which explains the method.

The scores of two heads are under way at a time: those of the second run on while the probabilities of the first are
added up. What follows once for all heads of a group (mask, weights, insertion) is laid out with a row in two threads,
so that its reductions stay within them.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa.ops.kernels.hopper import boxes
from nsa.ops.kernels.launch import INTEGERS, LOG2_E, tile_sizes

SMALLEST = gl.constexpr(-0x7FFFFFFFFFFFFFFF)
TILE = 64  # queries


@gluon.jit
def _fetch(q_desc, q_ring, ready, row, turn, total, group, HEADS: gl.constexpr, D: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """Start the copy of the ``turn``-th head in order, if it is one of ``total``."""
    slot = turn % STAGES
    mbarrier.expect(ready.index(slot), q_desc.block_type.nbytes, pred=turn < total)
    column = (group * HEADS + turn % HEADS) * D
    tma.async_copy_global_to_shared(q_desc, [row, column], ready.index(slot), q_ring.index(slot), turn < total)


@gluon.jit
def _scores(q_ring, ready, k_smem, turn, BQ: gl.constexpr, KEYS: gl.constexpr, layout: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    slot = turn % STAGES
    mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
    none = gl.zeros([BQ, KEYS], gl.float32, layout)
    return warpgroup_mma(q_ring.index(slot), k_smem.permute([1, 0]), none, use_acc=False, is_async=True)


@gluon.jit
def _base(Lse, row, head, ok):
    lse = gl.load(Lse + row + head, mask=ok, other=float("-inf"))
    return gl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@gluon.jit
def _insert(best, candidates):
    """As `nsa.ops.kernels.selection._insert`."""
    rows: gl.constexpr = gl.SliceLayout(1, best.type.layout)
    top, low = gl.convert_layout(gl.max(candidates, 1), rows), gl.min(best, 1)
    while gl.max((top > low).to(gl.int32), 0) > 0:
        better = (top > low)[:, None]
        best = gl.where(better & (best == low[:, None]), top[:, None], best)
        passed = gl.convert_layout(top, gl.SliceLayout(1, candidates.type.layout))
        candidates = gl.where(candidates == passed[:, None], SMALLEST, candidates)
        top, low = gl.convert_layout(gl.max(candidates, 1), rows), gl.min(best, 1)
    return best


@gluon.jit(do_not_specialize=INTEGERS)
def select_kernel(q_desc, K, Lse, First, Last, Local, TileStart, TileEnd, Out, num_tokens, num_keys, num_tiles,
                  num_blocks, num_initial, num_local, block_size, scale_log2, GROUPS: gl.constexpr,
                  HEADS: gl.constexpr, D: gl.constexpr, RATIO: gl.constexpr, UNITS: gl.constexpr, N: gl.constexpr,
                  BQ: gl.constexpr, KEYS: gl.constexpr, RATIO2: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Out (B, T, G, num_blocks) int32, unsorted, of the tokens TileStart .. TileEnd - 1 of one document."""
    BJ: gl.constexpr = KEYS // RATIO2
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    j_layout: gl.constexpr = gl.BlockedLayout([1, BJ // 2], [16, 2], [4, 1], [1, 0])
    n_layout: gl.constexpr = gl.BlockedLayout([1, N // 2], [16, 2], [4, 1], [1, 0])
    k_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    slots = gl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - gl.program_id(0) // slots
    batch, group = gl.program_id(0) % slots // GROUPS, gl.program_id(0) % slots % GROUPS
    start, stop = gl.load(TileStart + tile), gl.load(TileEnd + tile)
    if start < stop:
        k_smem = gl.allocate_shared_memory(dtype, [KEYS, D], gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype))
        q_ring = gl.allocate_shared_memory(dtype, [STAGES, BQ, D], q_desc.layout)
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)

        token = start + gl.arange(0, BQ, s_row)
        ok = token < stop
        key0 = gl.load(First + start)
        seen = gl.load(Last + token, mask=ok, other=0) - key0
        most_seen = gl.load(Last + stop - 1) - key0
        most_own = gl.load(Local + stop - 1) // block_size
        own = start + gl.arange(0, BQ, gl.SliceLayout(1, j_layout))
        own = gl.load(Local + own, mask=own < stop, other=0) // block_size
        q_row = (batch.to(gl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS
        box_row = batch * num_tokens + start
        total = gl.minimum(gl.cdiv(most_seen, BJ * RATIO), gl.cdiv(most_own + 1, BJ)) * HEADS
        for i in gl.static_range(STAGES):
            _fetch(q_desc, q_ring, ready, box_row, i, total, group, HEADS, D, STAGES)

        part = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))  # key m of every block, then key m + 1 of every block
        m = part // BJ
        own_weight = gl.where(m < RATIO, gl.minimum(UNITS, RATIO - m), 0).to(gl.float32)
        next_weight = gl.where(m < RATIO, gl.maximum(0, m + UNITS - RATIO), 0).to(gl.float32)
        slot_n = gl.arange(0, N, gl.SliceLayout(0, n_layout))
        # Negative: free, each different. Beyond num_blocks: never to be replaced.
        best = gl.where(slot_n < num_blocks, -1 - slot_n.to(gl.int64), 0x7FFFFFFFFFFFFFFF)
        best = gl.zeros([BQ, N], gl.int64, n_layout) + best[None, :]
        carry = gl.zeros([BQ], gl.float32, gl.SliceLayout(1, j_layout))
        turn = 0
        for j0 in range(0, most_own + 1, BJ):
            p = gl.zeros([BQ, KEYS], gl.float32, s_layout)
            if j0 * RATIO < most_seen:
                k_part = gl.arange(0, KEYS, gl.SliceLayout(1, k_layout))
                key = (j0 + k_part % BJ) * RATIO + k_part // BJ
                k_ok = (k_part // BJ < RATIO) & (key < most_seen)
                k_row = (batch.to(gl.int64) * num_keys + key0 + key) * GROUPS + group
                column = gl.arange(0, D, gl.SliceLayout(0, k_layout))
                k = gl.load(K + k_row[:, None] * D + column[None, :], mask=k_ok[:, None], other=0.0)
                k_smem.store(k)
                fence_async_shared()
                for head in range(0, HEADS, 2):
                    one = _scores(q_ring, ready, k_smem, turn, BQ, KEYS, s_layout, STAGES)
                    if HEADS > 1:
                        two = _scores(q_ring, ready, k_smem, turn + 1, BQ, KEYS, s_layout, STAGES)
                    base = _base(Lse, q_row, head, ok)
                    one = warpgroup_mma_wait(1 if HEADS > 1 else 0, deps=(one,))
                    # Keys that the query does not see may overflow to inf here; they are dropped below.
                    p += gl.exp2(one * scale_log2 - base[:, None])
                    _fetch(q_desc, q_ring, ready, box_row, turn + STAGES, total, group, HEADS, D, STAGES)
                    if HEADS > 1:
                        base = _base(Lse, q_row, head + 1, ok)
                        two = warpgroup_mma_wait(0, deps=(two,))
                        p += gl.exp2(two * scale_log2 - base[:, None])
                        _fetch(q_desc, q_ring, ready, box_row, turn + 1 + STAGES, total, group, HEADS, D, STAGES)
                    turn += 2 if HEADS > 1 else 1
            key = (j0 + part % BJ) * RATIO + m
            p = gl.where(key[None, :] < seen[:, None], p, 0.0)
            here = gl.convert_layout(gl.sum((p * own_weight[None, :]).reshape([BQ, RATIO2, BJ]), 1), j_layout)
            j = gl.arange(0, BJ, gl.SliceLayout(0, j_layout))
            if UNITS > 1:
                after = gl.convert_layout(gl.sum((p * next_weight[None, :]).reshape([BQ, RATIO2, BJ]), 1), j_layout)
                shifted = gl.zeros([BQ, BJ], gl.int32, j_layout) + gl.maximum(j - 1, 0)[None, :]
                before = gl.gather(after, shifted, 1)
                here += gl.where(j[None, :] == 0, carry[:, None], before)
                carry = gl.sum(gl.where(j[None, :] == BJ - 1, after, 0.0), 1)
            j += j0
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


def select(
    q: Tensor, k: Tensor, lse: Tensor, runs: tuple[Tensor, Tensor, Tensor], tiles: tuple[Tensor, Tensor], out: Tensor,
    sizes: tuple[int, ...], ratio: int, units: int, scale: float,
) -> None:  # fmt: skip
    """`select_kernel` into out (B, T, G, num_blocks); ``runs``: First, Last, Local; ``tiles``: of TILE tokens."""
    (batch, tokens, heads, width), groups = q.shape, k.shape[2]
    tile, options = tile_sizes("hopper_select", q, k, k)
    n = max(2, triton.next_power_of_2(out.shape[3]))
    select_kernel[(len(tiles[0]) * batch * groups,)](
        boxes(q, [batch * tokens, heads * width], [TILE, width]), k, lse, *runs, *tiles, out, tokens, k.shape[1],
        len(tiles[0]), *sizes, scale * LOG2_E, GROUPS=groups, HEADS=heads // groups, D=width, RATIO=ratio, UNITS=units,
        N=n, BQ=TILE, RATIO2=triton.next_power_of_2(ratio),
        **tile, **options,
    )  # fmt: skip
