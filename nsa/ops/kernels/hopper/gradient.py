"""dQ on Hopper, of one branch or of all three, for tiles of queries: compressed keys, selected blocks and the window.

A persistent kernel of two computing warpgroups and a producer warp. All branches use the same pipeline stages of 64
keys and values. Three kernels, one for each branch, would each load Q and dO, and read and write dQ. Here Q and dO are
loaded once, and dQ stays in registers, in fp32, until all branches are done.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.ops.kernels.device_functions import LSE_TO_BASE_2
from nsa.ops.kernels.hardware import INTEGERS, LOG2_E, tile_sizes
from nsa.ops.kernels.hopper import (
    ROWS,
    accumulator_layout,
    allocate_stages,
    box_descriptor,
    key_descriptor,
    left_operand_layout,
    multiprocessors,
    query_rows,
    rows_per_token,
    stage_and_phase,
    store_rows,
    tokens_per_warpgroup,
)
from nsa.ops.kernels.hopper.query_tiles import (
    WARPGROUPS,
    allocate_memory,
    end_of_tile,
    keys_of_tile,
    load_keys_and_values,
    mask_scores,
    tile_of,
    token_of_warpgroup,
    tokens_per_tile,
)


@gluon.jit
def _producer(descs, memory, range0, range1, lists, sizes, RUNS: gl.constexpr, LISTED: gl.constexpr,
              GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """The producer warp: it loads Q and dO of each tile, and the keys and values of all its branches."""
    q_desc, d_desc, kc_desc, vc_desc, ks_desc, vs_desc, kw_desc, vw_desc = descs
    Starts, _, Counts = lists
    num_tokens, keys_cmp, keys_slc, keys_win, num_tiles, slots = sizes
    step = 0  # tiles of keys loaded so far
    tiles_done = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, slot, tile, token0 = tile_of(index, num_tiles, slots, GROUPS, HEADS)
        for half in gl.static_range(WARPGROUPS):
            ready = memory.q_ready.index(half)
            mbarrier.wait(memory.q_free.index(half), (tiles_done & 1) ^ 1)
            mbarrier.expect(ready, q_desc.block_type.nbytes * 2)  # Q and dO
            at = [batch, token_of_warpgroup(token0, half, HEADS), group * HEADS, 0]
            tma.async_copy_global_to_shared(q_desc, at, ready, memory.q[0].index(half))
            tma.async_copy_global_to_shared(d_desc, at, ready, memory.d_out[0].index(half))
        if RUNS >= 1:
            begin, count = keys_of_tile(range0, token0, num_tokens, HEADS, BN)
            for j in range(count):
                row = batch * keys_cmp + begin + j * BN
                load_keys_and_values((kc_desc,), vc_desc, memory, row, group, step + j, D, STAGES)
            step += count
        if LISTED:
            slot_row = slot.to(gl.int64) * num_tiles + tile
            entry, count = slot_row * WIDTH, gl.load(Counts + slot_row * 2 + 1)
            next_start = gl.load(Starts + entry)  # loaded one entry ahead
            for j in range(count):
                row = batch * keys_slc + next_start
                next_start = gl.load(Starts + entry + gl.minimum(j + 1, count - 1))
                load_keys_and_values((ks_desc,), vs_desc, memory, row, group, step + j, D, STAGES)
            step += count
        if RUNS == 2:
            begin, count = keys_of_tile(range1, token0, num_tokens, HEADS, BN)
            for j in range(count):
                row = batch * keys_win + begin + j * BN
                load_keys_and_values((kw_desc,), vw_desc, memory, row, group, step + j, D, STAGES)
            step += count
        tiles_done += 1


@gluon.jit
def _start_products(q, d_out, k, v, BN: gl.constexpr):
    """Start S = Q K^T and dP = dO V^T, both (64, BN)."""
    none = gl.zeros([ROWS, BN], gl.float32, accumulator_layout(ROWS, BN))  # [64, BN]
    s = warpgroup_mma(q, k.permute([1, 0]), none, use_acc=False, is_async=True)
    return s, warpgroup_mma(d_out, v.permute([1, 0]), none, use_acc=False, is_async=True)


@gluon.jit
def _range_loop(dq, ds_before, q, d_out, memory, lse, delta, first, last, begin, step, start, stop, scale_log2,
                D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """dS of tiles ``start .. stop - 1`` of keys. While one is computed, dS K of the tile before is added to dq.

    ``ds_before`` (64, BN) is dS of tile ``start - 1``. Returned is that of the last tile, not yet in dq.
    """
    for j in range(start, stop):
        stage, phase = stage_and_phase(step + j, STAGES)
        before = (step + j - 1) % STAGES
        mbarrier.wait(memory.k_ready.index(stage), phase)
        mbarrier.wait(memory.v_ready.index(stage), phase)
        s, dp = _start_products(q, d_out, memory.k[0].index(stage), memory.v.index(stage), BN)  # [64, BN] each
        dq = warpgroup_mma(ds_before, memory.k[0].index(before), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=(s,))
        if MASKED:
            s = mask_scores(s, first, last, begin + j * BN, BN)
        p = gl.exp2(s * scale_log2 - lse[:, None])  # [64, BN]
        # This mbarrier has completed already. The wait is a branch, over which ptxas does not move instructions: it
        # would move the exponentials below the next wait, so that no product would run beside them.
        mbarrier.wait(memory.k_ready.index(stage), phase)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        mbarrier.arrive(memory.v_free.index(stage), count=1)
        ds = p * (dp - delta[:, None])  # [64, BN]
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(memory.k_free.index(before), count=1)
        ds_before = gl.convert_layout(ds.to(ds_before.dtype), left_operand_layout(accumulator_layout(ROWS, D)))
    return dq, ds_before


@gluon.jit
def _add_range(dq, q, d_out, memory, lse, delta, first_last, token, token0, num_tokens, step, scale_log2,
               HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """(dq plus dS K of a range of keys, tiles of keys that this took)."""
    First, Last = first_last
    begin, count = keys_of_tile(first_last, token0, num_tokens, HEADS, BN)
    first = gl.load(First + token, mask=token < num_tokens, other=0)  # [64]
    last = gl.load(Last + token, mask=token < num_tokens, other=0)  # [64]
    all_from = gl.load(
        First + end_of_tile(token0, num_tokens, HEADS) - 1
    )  # all rows see keys all_from .. all_until - 1
    all_until = gl.load(Last + token0)
    stage, phase = stage_and_phase(step, STAGES)
    mbarrier.wait(memory.k_ready.index(stage), phase)
    mbarrier.wait(memory.v_ready.index(stage), phase)
    s, dp = _start_products(q, d_out, memory.k[0].index(stage), memory.v.index(stage), BN)  # [64, BN] each
    s = mask_scores(warpgroup_mma_wait(1, deps=(s,)), first, last, begin, BN)
    p = gl.exp2(s * scale_log2 - lse[:, None])  # [64, BN]
    dp = warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(memory.v_free.index(stage), count=1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)  # [64, BN]
    ds = gl.convert_layout(ds, left_operand_layout(accumulator_layout(ROWS, D)))
    full_begin = gl.minimum(gl.maximum(gl.cdiv(all_from - begin, BN), 1), count)
    full_end = gl.minimum(gl.maximum((all_until - begin) // BN, full_begin), count)
    dq, ds = _range_loop(dq, ds, q, d_out, memory, lse, delta, first, last, begin, step, 1, full_begin, scale_log2, D,
                         BN, STAGES, True)  # fmt: skip
    dq, ds = _range_loop(dq, ds, q, d_out, memory, lse, delta, first, last, begin, step, full_begin, full_end,
                         scale_log2, D, BN, STAGES, False)  # fmt: skip
    dq, ds = _range_loop(dq, ds, q, d_out, memory, lse, delta, first, last, begin, step, full_end, count, scale_log2,
                         D, BN, STAGES, True)  # fmt: skip
    stage = (step + count - 1) % STAGES
    dq = warpgroup_mma(ds, memory.k[0].index(stage), dq)
    mbarrier.arrive(memory.k_free.index(stage), count=1)
    return dq, count


@gluon.jit
def _add_listed(dq, q, d_out, memory, lse, delta, lists, Position, slot_row, token, token0, num_tokens, step,
                scale_log2, WARPGROUP: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
                WIDTH: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """(dq plus dS K of the tile's chosen blocks, the number of these blocks).

    The warpgroup skips a block that none of its own tokens chose.
    """
    Starts, Members, Counts = lists
    TOKENS: gl.constexpr = tokens_per_warpgroup(HEADS)
    s_layout: gl.constexpr = accumulator_layout(ROWS, BN)
    dq_layout: gl.constexpr = accumulator_layout(ROWS, D)
    in_warpgroup = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout)) // rows_per_token(HEADS)  # [64], number of the token
    position = gl.load(Position + token, mask=token < num_tokens, other=0)  # [64]
    first_position = gl.load(Position + gl.minimum(token0 + WARPGROUP * TOKENS, num_tokens - 1))
    entry, count = slot_row * WIDTH, gl.load(Counts + slot_row * 2 + 1)
    next_start, next_bits = gl.load(Starts + entry), gl.load(Members + entry)  # loaded one entry ahead
    for i in range(count):
        stage, phase = stage_and_phase(step + i, STAGES)
        start, bits = next_start, (next_bits >> (WARPGROUP * TOKENS)) & ((1 << TOKENS) - 1)
        after = entry + gl.minimum(i + 1, count - 1)
        next_start, next_bits = gl.load(Starts + after), gl.load(Members + after)
        mbarrier.wait(memory.k_ready.index(stage), phase)
        mbarrier.wait(memory.v_ready.index(stage), phase)
        if bits != 0:
            k = memory.k[0].index(stage)  # [BN, D]
            s, dp = _start_products(q, d_out, k, memory.v.index(stage), BN)  # [64, BN] each
            s = warpgroup_mma_wait(1, deps=(s,))
            if start + BN - 1 > first_position:
                key = start + gl.arange(0, BN, gl.SliceLayout(0, s_layout))  # [BN]
                s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
            member = ((bits >> in_warpgroup.to(gl.int64)) & 1) != 0  # [64], whether the row's token chose the block
            p = gl.exp2(s * scale_log2 - gl.where(member, lse, float("inf"))[:, None])  # [64, BN]
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = (p * (dp - delta[:, None])).to(q.dtype)  # [64, BN]
            dq = warpgroup_mma(gl.convert_layout(ds, left_operand_layout(dq_layout)), k, dq)
        mbarrier.arrive(memory.v_free.index(stage), count=1)
        mbarrier.arrive(memory.k_free.index(stage), count=1)
    return dq, count


@gluon.jit
def _load_statistics(Lse, Delta, branch: gl.constexpr, q_row, ok, num_rows):
    """The LSE to base 2, +inf where nothing is seen, and delta, both (64,), of one branch."""
    at = branch * num_rows + q_row  # [64]
    lse = gl.load(Lse + at, mask=ok, other=float("-inf")) * LSE_TO_BASE_2  # [64]
    return gl.where(lse == float("-inf"), float("inf"), lse), gl.load(Delta + at, mask=ok, other=0.0)


@gluon.jit
def _compute(memory, Lse, Delta, dq_desc, DQ, dq_smem, range0, range1, lists, Position, sizes, num_rows, scale_log2,
             scale, WARPGROUP: gl.constexpr, RUNS: gl.constexpr, LISTED: gl.constexpr, ADD: gl.constexpr,
             GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """A computing warpgroup: its 64 rows of each tile."""
    num_tokens, _, _, _, num_tiles, slots = sizes
    s_rows: gl.constexpr = gl.SliceLayout(1, accumulator_layout(ROWS, BN))
    dq_layout: gl.constexpr = accumulator_layout(ROWS, D)
    dq_rows: gl.constexpr = gl.SliceLayout(1, dq_layout)
    dtype: gl.constexpr = memory.q[0].dtype
    step = 0  # tiles of keys of all tiles before
    tiles_done = 0
    for index in range(gl.program_id(0), num_tiles * slots, gl.num_programs(0)):
        batch, group, slot, tile, token0 = tile_of(index, num_tiles, slots, GROUPS, HEADS)
        row = gl.arange(0, ROWS, s_rows)  # [64]
        token = token_of_warpgroup(token0, WARPGROUP, HEADS) + row // rows_per_token(HEADS)  # [64]
        q_row, ok = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [64], [64]
        lse, delta = _load_statistics(Lse, Delta, 0, q_row, ok, num_rows)  # [64], [64]
        mbarrier.wait(memory.q_ready.index(WARPGROUP), tiles_done & 1)
        q = memory.q[0].index(WARPGROUP).reshape([ROWS, D])  # [64, D]
        d_out = memory.d_out[0].index(WARPGROUP).reshape([ROWS, D])  # [64, D]
        dq = gl.zeros([ROWS, D], gl.float32, dq_layout)  # [64, D]
        if RUNS >= 1:
            dq, count = _add_range(dq, q, d_out, memory, lse, delta, range0, token, token0, num_tokens, step,
                                   scale_log2, HEADS, D, BN, STAGES)  # fmt: skip
            step += count
        if LISTED:
            if RUNS == 2:
                lse, delta = _load_statistics(Lse, Delta, 1, q_row, ok, num_rows)
            slot_row = slot.to(gl.int64) * num_tiles + tile
            dq, count = _add_listed(dq, q, d_out, memory, lse, delta, lists, Position, slot_row, token, token0,
                                    num_tokens, step, scale_log2, WARPGROUP, HEADS, D, BN, WIDTH, STAGES)  # fmt: skip
            step += count
        if RUNS == 2:
            lse, delta = _load_statistics(Lse, Delta, 2, q_row, ok, num_rows)
            dq, count = _add_range(dq, q, d_out, memory, lse, delta, range1, token, token0, num_tokens, step,
                                   scale_log2, HEADS, D, BN, STAGES)  # fmt: skip
            step += count
        mbarrier.arrive(memory.q_free.index(WARPGROUP), count=1)
        tiles_done += 1

        # Epilogue.
        dq *= scale
        if ADD:
            column = gl.arange(0, D, gl.SliceLayout(0, dq_layout))  # [D]
            at = DQ + gl.convert_layout(q_row, dq_rows)[:, None] * D + column[None, :]  # [64, D]
            dq += gl.load(at, mask=gl.convert_layout(ok, dq_rows)[:, None], other=0.0).to(gl.float32)
        tma.store_wait(0)  # dq_smem may still be read for the tile before
        at = (batch, token_of_warpgroup(token0, WARPGROUP, HEADS), group * HEADS)
        store_rows(dq_desc, DQ, dq_smem.index(WARPGROUP), dq.to(dtype), at, q_row, ok, HEADS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=(*INTEGERS, "keys_cmp", "keys_slc", "keys_win"))
def query_kernel(q_desc, d_desc, kc_desc, vc_desc, ks_desc, vs_desc, kw_desc, vw_desc, dq_desc, Lse, Delta, DQ,
                 First0, Last0, First1, Last1, Starts, Members, Counts, Position, num_tokens, keys_cmp,
                 keys_slc, keys_win, num_tiles, num_slots, num_rows, scale_log2, scale, RUNS: gl.constexpr,
                 LISTED: gl.constexpr, ADD: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
                 BN: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """DQ (B, T, H, D) of tiles of 128 rows; added to what is there if ADD. Persistent.

    RUNS is the number of branches that see ranges of keys: First0 and Last0, then First1 and Last1 (T,). LISTED: a
    branch sees chosen blocks. With RUNS 2 and LISTED, all three branches are computed, and Lse and Delta are
    (3, B, T, H). Otherwise one branch is, and they are (B, T, H).
    """
    memory = allocate_memory((q_desc,), (kc_desc,), vc_desc, STAGES, 1, True)
    (dq_smem,) = allocate_stages((dq_desc,), WARPGROUPS)
    descs = (q_desc, d_desc, kc_desc, vc_desc, ks_desc, vs_desc, kw_desc, vw_desc)
    range0, range1, lists = (First0, Last0), (First1, Last1), (Starts, Members, Counts)
    sizes = (num_tokens, keys_cmp, keys_slc, keys_win, num_tiles, num_slots)
    num_rows = num_rows.to(gl.int64)  # 2 num_rows may pass 2^31
    gl.warp_specialize(
        [
            (_compute, (memory, Lse, Delta, dq_desc, DQ, dq_smem, range0, range1, lists, Position, sizes, num_rows,
                        scale_log2, scale, 0, RUNS, LISTED, ADD, GROUPS, HEADS, D, BN, WIDTH, STAGES)),
            (_compute, (memory, Lse, Delta, dq_desc, DQ, dq_smem, range0, range1, lists, Position, sizes, num_rows,
                        scale_log2, scale, 1, RUNS, LISTED, ADD, GROUPS, HEADS, D, BN, WIDTH, STAGES)),
            (_producer, (descs, memory, range0, range1, lists, sizes, RUNS, LISTED, GROUPS, HEADS, D, BN, WIDTH,
                         STAGES)),
        ],
        [4, 1],  # warps of the second and third
        [240, 24],  # their registers for a thread: accumulators and P for the former, the fewest for the latter
    )  # fmt: skip


Lists = tuple[Tensor, Tensor, Tensor, int]  # as from `nsa.ops.kernels.selected.unions`, of tiles of 128 rows


def query_gradient(
    q: Tensor, kv: list[Tensor], d_out: Tensor, lse: Tensor, delta: Tensor, runs: list[Tensor], lists: Lists | None,
    position: Tensor | None, scale: float, dq: Tensor, add: bool = False,
) -> None:  # fmt: skip
    """Write the gradient of all three branches, or of one, to dq (B, T, H, D). If ``add``, add it to dq.

    Args:
        q, d_out: (B, T, H, D).
        kv: k and v (B, S, G, D) of each branch, in order.
        lse, delta: fp32, (3, B, T, H) for three branches, (B, T, H) for one.
        runs: first and last (T,) int32 of each branch that sees ranges of keys: the compressed and the window branch,
            one, or none.
        lists, position: the selected blocks and the queries' positions (T,) int32; None without the selected branch.
    """
    (batch, tokens, heads, width), groups = q.shape, kv[0].shape[2]
    tile, options = tile_sizes("hopper_query", q, kv[0], kv[1])
    heads //= groups
    slots, tiles = batch * groups, triton.cdiv(tokens, tokens_per_tile(heads))
    box, unused = [1, tokens_per_warpgroup(heads), rows_per_token(heads), width], lse
    kv = kv * (6 // len(kv))
    query_kernel[(min(tiles * slots, multiprocessors(q.device)),)](
        *(box_descriptor(x, list(x.shape), box) for x in (q, d_out)), *(key_descriptor(x, tile["BN"]) for x in kv),
        box_descriptor(dq, list(dq.shape), box), lse, delta, dq, *[*runs, *[unused] * 4][:4],
        *(lists[:3] if lists else [unused] * 3), unused if position is None else position, tokens,
        *(x.shape[1] for x in kv[::2]), tiles, slots, q.shape[:3].numel(), scale * LOG2_E, scale,
        RUNS=len(runs) // 2, LISTED=lists is not None, ADD=add, GROUPS=groups, HEADS=heads, D=width,
        WIDTH=lists[0].shape[3] if lists else 0, **tile, **options,
    )  # fmt: skip
