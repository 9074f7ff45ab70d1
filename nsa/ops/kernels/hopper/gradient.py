"""dQ on Hopper, of one branch or of all three: a tile of queries meets compressed keys, chosen blocks and window.

Two computing warpgroups of 64 rows and a copying warp, as in `nsa.ops.kernels.hopper.ranges` and `selected`; one ring
of 64 keys and values for all. Each branch alone would load Q and dO, and read and write dQ, once more: here the tile
stays, and dQ in registers, in fp32, until all are done.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.ops.kernels.hopper import boxes, head_rows, key_boxes, multiprocessors, rings, span, store_rows
from nsa.ops.kernels.hopper.ranges import _bring, _mask, _memory, _place, _run
from nsa.ops.kernels.launch import INTEGERS, LOG2_E, tile_sizes


@gluon.jit
def _copy(descs, memory, seen, near, lists, sizes, RUNS: gl.constexpr, LISTED: gl.constexpr,
          GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    q_desc, d_desc, kc_desc, vc_desc, ks_desc, vs_desc, kw_desc, vw_desc = descs
    q_smem, d_smem, _, _, q_ready, q_free, _, _, _, _ = memory
    Starts, _, Counts = lists
    num_tokens, keys_cmp, keys_slc, keys_win, num_tiles, slots = sizes
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, slot, tile, token0 = _place(index, num_tiles, slots, GROUPS, HEADS)
        for half in gl.static_range(2):
            mbarrier.wait(q_free.index(half), (turn & 1) ^ 1)
            mbarrier.expect(q_ready.index(half), q_desc.block_type.nbytes * 2)
            box = [batch, token0 + half * (64 // span(HEADS)), group * HEADS, 0]
            tma.async_copy_global_to_shared(q_desc, box, q_ready.index(half), q_smem[0].index(half))
            tma.async_copy_global_to_shared(d_desc, box, q_ready.index(half), d_smem[0].index(half))
        if RUNS >= 1:
            begin, count = _run(seen, token0, num_tokens, HEADS, BN)
            for j in range(count):
                _bring((kc_desc,), vc_desc, memory, batch * keys_cmp + begin + j * BN, group, step + j, D, STAGES)
            step += count
        if LISTED:
            slot_row = slot.to(gl.int64) * num_tiles + tile
            entry, count = slot_row * WIDTH, gl.load(Counts + slot_row * 2 + 1)
            next_start = gl.load(Starts + entry)
            for j in range(count):
                row = batch * keys_slc + next_start
                next_start = gl.load(Starts + entry + gl.minimum(j + 1, count - 1))
                _bring((ks_desc,), vs_desc, memory, row, group, step + j, D, STAGES)
            step += count
        if RUNS == 2:
            begin, count = _run(near, token0, num_tokens, HEADS, BN)
            for j in range(count):
                _bring((kw_desc,), vw_desc, memory, batch * keys_win + begin + j * BN, group, step + j, D, STAGES)
            step += count
        turn += 1


@gluon.jit
def _products(q, d_out, k, v, BN: gl.constexpr):
    """Start S = Q K^T and dP = dO V^T (64, BN)."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    none = gl.zeros([64, BN], gl.float32, layout)
    s = warpgroup_mma(q, k.permute([1, 0]), none, use_acc=False, is_async=True)
    return s, warpgroup_mma(d_out, v.permute([1, 0]), none, use_acc=False, is_async=True)


@gluon.jit
def _boxes(dq, left, q, d_out, memory, lse, delta, first, last, begin, step, start, stop, scale_log2, D: gl.constexpr,
           BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """dS of boxes start .. stop - 1 of a run; each is added to dq while the next is computed."""
    _, _, k_ring, v_ring, _, _, k_ready, k_free, v_ready, v_free = memory
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    for j in range(start, stop):
        slot, phase = (step + j) % STAGES, ((step + j) // STAGES) & 1
        before = (step + j - 1) % STAGES
        mbarrier.wait(k_ready.index(slot), phase)
        mbarrier.wait(v_ready.index(slot), phase)
        s, dp = _products(q, d_out, k_ring[0].index(slot), v_ring.index(slot), BN)
        dq = warpgroup_mma(left, k_ring[0].index(before), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=(s,))
        if MASKED:
            s = _mask(s, first, last, begin + j * BN, BN)
        p = gl.exp2(s * scale_log2 - lse[:, None])
        mbarrier.wait(k_ready.index(slot), phase)  # passed: ptxas would move exponentials below the next wait
        dp = warpgroup_mma_wait(1, deps=(dp,))
        mbarrier.arrive(v_free.index(slot), count=1)
        ds = p * (dp - delta[:, None])
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(k_free.index(before), count=1)
        left = gl.convert_layout(ds.to(left.dtype), gl.DotOperandLayout(0, q_layout, 2))
    return dq, left


@gluon.jit
def _add_run(dq, q, d_out, memory, lse, delta, runs, token, token0, num_tokens, step, scale_log2, HEADS: gl.constexpr,
             D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """(dq plus that of a run of keys, boxes of it)."""
    _, _, k_ring, v_ring, _, _, k_ready, k_free, v_ready, v_free = memory
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    First, Last = runs
    begin, count = _run(runs, token0, num_tokens, HEADS, BN)
    first = gl.load(First + token, mask=token < num_tokens, other=0)
    last = gl.load(Last + token, mask=token < num_tokens, other=0)
    all_from = gl.load(First + gl.minimum(token0 + 128 // span(HEADS), num_tokens) - 1)
    all_until = gl.load(Last + token0)
    slot, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(k_ready.index(slot), phase)
    mbarrier.wait(v_ready.index(slot), phase)
    s, dp = _products(q, d_out, k_ring[0].index(slot), v_ring.index(slot), BN)
    s = _mask(warpgroup_mma_wait(1, deps=(s,)), first, last, begin, BN)
    p = gl.exp2(s * scale_log2 - lse[:, None])
    dp = warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(v_free.index(slot), count=1)
    left = gl.convert_layout((p * (dp - delta[:, None])).to(q.dtype), gl.DotOperandLayout(0, q_layout, 2))
    full_begin = gl.minimum(gl.maximum(gl.cdiv(all_from - begin, BN), 1), count)
    full_end = gl.minimum(gl.maximum((all_until - begin) // BN, full_begin), count)
    dq, left = _boxes(dq, left, q, d_out, memory, lse, delta, first, last, begin, step, 1, full_begin, scale_log2, D,
                      BN, STAGES, True)  # fmt: skip
    dq, left = _boxes(dq, left, q, d_out, memory, lse, delta, first, last, begin, step, full_begin, full_end,
                      scale_log2, D, BN, STAGES, False)  # fmt: skip
    dq, left = _boxes(dq, left, q, d_out, memory, lse, delta, first, last, begin, step, full_end, count, scale_log2, D,
                      BN, STAGES, True)  # fmt: skip
    slot = (step + count - 1) % STAGES
    dq = warpgroup_mma(left, k_ring[0].index(slot), dq)
    mbarrier.arrive(k_free.index(slot), count=1)
    return dq, count


@gluon.jit
def _add_listed(dq, q, d_out, memory, lse, delta, lists, Position, slot_row, token, token0, num_tokens, step,
                scale_log2, HALF: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
                WIDTH: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """(dq plus that of the tile's chosen blocks, their number)."""
    _, _, k_ring, v_ring, _, _, k_ready, k_free, v_ready, v_free = memory
    Starts, Members, Counts = lists
    TOKENS: gl.constexpr = 64 // span(HEADS)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    place = gl.arange(0, 64, gl.SliceLayout(1, s_layout)) // span(HEADS)
    position = gl.load(Position + token, mask=token < num_tokens, other=0)
    first_position = gl.load(Position + gl.minimum(token0 + HALF * TOKENS, num_tokens - 1))
    entry, count = slot_row * WIDTH, gl.load(Counts + slot_row * 2 + 1)
    next_start, next_bits = gl.load(Starts + entry), gl.load(Members + entry)
    for i in range(count):
        slot, phase = (step + i) % STAGES, ((step + i) // STAGES) & 1
        start, bits = next_start, (next_bits >> (HALF * TOKENS)) & ((1 << TOKENS) - 1)
        after = entry + gl.minimum(i + 1, count - 1)
        next_start, next_bits = gl.load(Starts + after), gl.load(Members + after)
        mbarrier.wait(k_ready.index(slot), phase)
        mbarrier.wait(v_ready.index(slot), phase)
        if bits != 0:
            s, dp = _products(q, d_out, k_ring[0].index(slot), v_ring.index(slot), BN)
            s = warpgroup_mma_wait(1, deps=(s,))
            if start + BN - 1 > first_position:
                key = start + gl.arange(0, BN, gl.SliceLayout(0, s_layout))
                s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
            member = ((bits >> place.to(gl.int64)) & 1) != 0
            p = gl.exp2(s * scale_log2 - gl.where(member, lse, float("inf"))[:, None])
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            dq = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, q_layout, 2)), k_ring[0].index(slot), dq)
        mbarrier.arrive(v_free.index(slot), count=1)
        mbarrier.arrive(k_free.index(slot), count=1)
    return dq, count


@gluon.jit
def _statistics(Lse, Delta, branch: gl.constexpr, q_row, ok, num_rows):
    """LSE in powers of two, +inf where nothing is seen, and delta (64,) of one branch."""
    at = branch * num_rows + q_row
    lse = gl.load(Lse + at, mask=ok, other=float("-inf")) * 1.4426950408889634
    return gl.where(lse == float("-inf"), float("inf"), lse), gl.load(Delta + at, mask=ok, other=0.0)


@gluon.jit
def _half(memory, Lse, Delta, dq_desc, DQ, dq_smem, seen, near, lists, Position, sizes, num_rows, scale_log2, scale,
          HALF: gl.constexpr, RUNS: gl.constexpr, LISTED: gl.constexpr, ADD: gl.constexpr, GROUPS: gl.constexpr,
          HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """Rows 64 HALF .. 64 HALF + 63 of each tile."""
    q_smem, d_smem, _, _, q_ready, q_free, _, _, _, _ = memory
    num_tokens, _, _, _, num_tiles, slots = sizes
    s_row: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_row_layout: gl.constexpr = gl.SliceLayout(1, q_layout)
    dtype: gl.constexpr = q_smem[0].dtype
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, slot, tile, token0 = _place(index, num_tiles, slots, GROUPS, HEADS)
        row = gl.arange(0, 64, s_row)
        token = token0 + HALF * (64 // span(HEADS)) + row // span(HEADS)
        q_row, ok = head_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)
        lse, delta = _statistics(Lse, Delta, 0, q_row, ok, num_rows)
        mbarrier.wait(q_ready.index(HALF), turn & 1)
        q, d_out = q_smem[0].index(HALF).reshape([64, D]), d_smem[0].index(HALF).reshape([64, D])
        dq = gl.zeros([64, D], gl.float32, q_layout)
        if RUNS >= 1:
            dq, count = _add_run(dq, q, d_out, memory, lse, delta, seen, token, token0, num_tokens, step, scale_log2,
                                 HEADS, D, BN, STAGES)  # fmt: skip
            step += count
        if LISTED:
            if RUNS == 2:
                lse, delta = _statistics(Lse, Delta, 1, q_row, ok, num_rows)
            slot_row = slot.to(gl.int64) * num_tiles + tile
            dq, count = _add_listed(dq, q, d_out, memory, lse, delta, lists, Position, slot_row, token, token0,
                                    num_tokens, step, scale_log2, HALF, HEADS, D, BN, WIDTH, STAGES)  # fmt: skip
            step += count
        if RUNS == 2:
            lse, delta = _statistics(Lse, Delta, 2, q_row, ok, num_rows)
            dq, count = _add_run(dq, q, d_out, memory, lse, delta, near, token, token0, num_tokens, step, scale_log2,
                                 HEADS, D, BN, STAGES)  # fmt: skip
            step += count
        mbarrier.arrive(q_free.index(HALF), count=1)
        turn += 1
        dq *= scale
        if ADD:
            column = gl.arange(0, D, gl.SliceLayout(0, q_layout))
            at = DQ + gl.convert_layout(q_row, q_row_layout)[:, None] * D + column[None, :]
            dq += gl.load(at, mask=gl.convert_layout(ok, q_row_layout)[:, None], other=0.0).to(gl.float32)
        tma.store_wait(0)  # of the tile before
        at = (batch, token0 + HALF * (64 // span(HEADS)), group * HEADS)
        store_rows(dq_desc, DQ, dq_smem.index(HALF), dq.to(dtype), at, q_row, ok, HEADS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=(*INTEGERS, "keys_cmp", "keys_slc", "keys_win"))
def query_kernel(q_desc, d_desc, kc_desc, vc_desc, ks_desc, vs_desc, kw_desc, vw_desc, dq_desc, Lse, Delta, DQ,
                 SeenFirst, SeenLast, NearFirst, NearLast, Starts, Members, Counts, Position, num_tokens, keys_cmp,
                 keys_slc, keys_win, num_tiles, num_slots, num_rows, scale_log2, scale, RUNS: gl.constexpr,
                 LISTED: gl.constexpr, ADD: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
                 BN: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """DQ (B, T, H, D) of tiles of 128 rows; added to what is there if ADD.

    RUNS 2 and LISTED: of all three branches; Lse, Delta (3, B, T, H). RUNS 1, or 0 and LISTED: of one, (B, T, H).
    """
    memory = _memory((q_desc,), (kc_desc,), vc_desc, STAGES, 1, True)
    (dq_smem,) = rings((dq_desc,), 2)
    descs = (q_desc, d_desc, kc_desc, vc_desc, ks_desc, vs_desc, kw_desc, vw_desc)
    seen, near, lists = (SeenFirst, SeenLast), (NearFirst, NearLast), (Starts, Members, Counts)
    sizes = (num_tokens, keys_cmp, keys_slc, keys_win, num_tiles, num_slots)
    num_rows = num_rows.to(gl.int64)
    gl.warp_specialize(
        [
            (_half, (memory, Lse, Delta, dq_desc, DQ, dq_smem, seen, near, lists, Position, sizes, num_rows, scale_log2,
                     scale, 0, RUNS, LISTED, ADD, GROUPS, HEADS, D, BN, WIDTH, STAGES)),
            (_half, (memory, Lse, Delta, dq_desc, DQ, dq_smem, seen, near, lists, Position, sizes, num_rows, scale_log2,
                     scale, 1, RUNS, LISTED, ADD, GROUPS, HEADS, D, BN, WIDTH, STAGES)),
            (_copy, (descs, memory, seen, near, lists, sizes, RUNS, LISTED, GROUPS, HEADS, D, BN, WIDTH, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


Lists = tuple[Tensor, Tensor, Tensor, int]  # Starts, Members, Counts, tiles: from selected.unions, of 128 rows each


def query_gradient(
    q: Tensor, kv: list[Tensor], d_out: Tensor, lse: Tensor, delta: Tensor, runs: list[Tensor], lists: Lists | None,
    position: Tensor | None, scale: float, dq: Tensor, add: bool = False,
) -> None:  # fmt: skip
    """Into dq (B, T, H, D), added to what is there if ``add``, of all three branches or of one.

    Args:
        q, d_out: (B, T, H, D). kv: k, v (B, S, G, D) of each branch. lse, delta: (3, B, T, H) or (B, T, H) fp32.
        runs: first and last of the first and of the third branch, or of the only one, or none. lists, with position
        (T,) int32: the blocks of the second branch, or of the only one.
    """
    (batch, tokens, heads, width), groups = q.shape, kv[0].shape[2]
    tile, options = tile_sizes("hopper_query", q, kv[0], kv[1])
    heads //= groups
    rows = span(heads)
    slots, tiles = batch * groups, -(tokens * rows // -128)
    box, unused = [1, 64 // rows, rows, width], lse
    kv = kv * (6 // len(kv))
    query_kernel[(min(tiles * slots, multiprocessors(q.device)),)](
        *(boxes(x, list(x.shape), box) for x in (q, d_out)), *(key_boxes(x, tile["BN"]) for x in kv),
        boxes(dq, list(dq.shape), box), lse, delta, dq, *[*runs, *[unused] * 4][:4],
        *(lists[:3] if lists else [unused] * 3), unused if position is None else position, tokens,
        *(x.shape[1] for x in kv[::2]), tiles, slots, q.shape[:3].numel(), scale * LOG2_E, scale,
        RUNS=len(runs) // 2, LISTED=lists is not None, ADD=add, GROUPS=groups, HEADS=heads, D=width,
        WIDTH=lists[0].shape[3] if lists else 0, **tile, **options,
    )  # fmt: skip
