"""Native Sparse Attention of one query token per sequence, in three launches and without a wait for the host.

1. Parts of the compressed branch, whose scores are kept, and of the window (`near_kernel`).
2. The importance of each selection block, from the kept scores: cheaper than the keys again. The last program of a KV
   head takes its top-n. Beside these, programs merge the parts of the first launch (`importance_kernel`).
3. Parts of the selected branch. The last program of a KV head merges them and adds what was merged before
   (`chosen_kernel`).

Who is the last depends on timing, what it computes does not. A counter says who it is; the first launch clears it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels import hardware
from nsa.ops.kernels.decode import (
    COUNTS,
    MOST_CHUNK,
    attend,
    merge_options,
    merged_parts,
    parts_of,
    place,
    run_of,
    splits_of,
    tile,
)
from nsa.ops.kernels.device_functions import (
    TOP,
    begin_launch,
    largest,
    load_row_parts,
    load_rows,
    store_rows,
    store_taken,
)
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, early, tile_width
from nsa.ops.kernels.ranges import shape_constants

IMPORTANCE_TILE = 4096  # scores that a program of `importance_kernel` loads at once
VECTOR = tl.constexpr(hardware.VECTOR)
MOST_RUN = 2 * MOST_CHUNK  # slots that a program of `near_kernel` goes through at most
MOST_BLOCKS = 8192  # of a memory: a program holds all candidates in registers


@triton.jit
def blocks_seen(length, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """How many whole compression blocks ``length`` tokens have (`nsa.ops.geometry.num_compressed`)."""
    return tl.where(length >= LENGTH, (length - LENGTH) // STRIDE + 1, 0)


@triton.jit
def overlap(m, per_block: tl.constexpr, units: tl.constexpr):
    """How many units a selection block shares with the m-th compressed block that shares any."""
    return tl.minimum(m, per_block - 1) - tl.maximum(m - units + 1, 0) + 1


@triton.jit
def row_size(num_compressed):
    """Of the kept scores: whole vectors."""
    return tl.cdiv(num_compressed, VECTOR) * VECTOR


@triton.jit
def is_last(Arrived, count):
    """Whether this program is the last of ``count`` that come here. It then sees what the others stored before."""
    tl.debug_barrier()  # all threads have stored
    return tl.atomic_add(Arrived, 1, sem="acq_rel") == count - 1


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS, "num_near"])
def near_kernel(Q, KCmp, VCmp, KWin, VWin, Lengths, Scores, Parts, PartLse, Arrived, num_compressed, num_near,
                num_splits, num_parts, run, scale_log2, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
                CHUNK: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                PRECISION: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Parts of ``run`` chunks: first the ``num_splits`` of the compressed blocks, then those of the window.

    KCmp, VCmp (B, num_compressed, G, ..); KWin, VWin (B, num_near, G, ..), a ring; Scores (B, H, `row_size`) fp32;
    Arrived (2, rows): for the launches after this one.
    """
    begin_launch(EARLY)
    batch, _list, group, head, ok = place(GROUPS, GROUPS, HEADS, BM)
    row = batch * (GROUPS * HEADS) + head  # [BM]
    length = tl.load(Lengths + batch)  # before the queries, for which the program waits
    q1, q2 = load_row_parts(Q, row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    if tl.program_id(2) == 0:
        slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(Arrived + slot, 0)
        tl.store(Arrived + tl.num_programs(0) * tl.num_programs(1) + slot, 0)
    first = tl.program_id(2) * run
    last = tl.minimum(first + run, num_parts) - 1
    # One loop for both memories: two would hold their tiles in shared memory at once. What both have in common is
    # computed twice: before the loop it takes registers that are not there.
    begin, until = (first >= num_splits).to(tl.int32), (last >= num_splits).to(tl.int32) + 1
    for near in tl.range(begin, until, disable_licm=True):
        if near == 0:
            K, V, memory, before = KCmp, VCmp, num_compressed, 0
            there = tl.minimum(blocks_seen(length, LENGTH, STRIDE), num_compressed)
            end = tl.minimum(last + 1, num_splits)
        else:
            K, V, memory, before = KWin, VWin, num_near, num_splits
            there = tl.minimum(length, num_near)
            end = last + 1
        part = tl.maximum(first, before)
        attend(
            q1, q2, K, V, Lengths, Lengths, Scores, Parts, PartLse, row, ok, ok & (near == 0),
            (part - before) * CHUNK, (end - before) * CHUNK, there, batch * memory, row_size(num_compressed), part,
            num_parts, scale_log2, group, False, False, True, False, True, 1, 1, CHUNK, GROUPS, D, DV, D1, D2, DV1, BM,
            BN, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def importance_kernel(Scores, Parts, PartLse, Gates, Lengths, Importance, Blocks, Near, Arrived, num_compressed,
                      num_blocks, num_splits, num_parts, num_tiles, num_initial, num_local, LENGTH: tl.constexpr,
                      STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                      N: tl.constexpr, BLOCKS: tl.constexpr, BH: tl.constexpr, BJ: tl.constexpr,
                      TOGETHER: tl.constexpr, FAR: tl.constexpr, MOST: tl.constexpr, SIDE: tl.constexpr,
                      DV: tl.constexpr, DV1: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Importance (B, G, BLOCKS) fp32 of BJ selection blocks (`nsa.ops.select_blocks`), and Blocks (B, G, N) int32.

    Or from program ``num_tiles`` on Near (B, H, Dv) fp32 of a head: compressed branch and window, merged, times Gates
    (B, H, 3), summed. Their parts follow each other: ``num_splits``, and the rest. TOGETHER: a power of two, at least
    the compressed blocks that begin in a selection block.
    """
    begin_launch(EARLY)
    pair = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) >= num_tiles:
        own = pair * HEADS + tl.program_id(1) - num_tiles
        cmp, _lse = merged_parts(Parts, PartLse, own, 0, num_splits, num_parts, MOST, SIDE, DV, DV1)  # [DV1]
        rest = num_parts - num_splits
        win, _lse = merged_parts(Parts, PartLse, own, num_splits, rest, num_parts, MOST, SIDE, DV, DV1)  # [DV1]
        near = tl.load(Gates + own * 3).to(tl.float32) * cmp + tl.load(Gates + own * 3 + 2).to(tl.float32) * win
        tl.store(Near + own * DV + tl.arange(0, DV1), near, mask=tl.arange(0, DV1) < DV)
    else:
        length = tl.load(Lengths + pair // GROUPS)
        Importance += pair * BLOCKS
        first = tl.program_id(1) * BJ
        if first * BLOCK_SIZE < length:
            head = tl.arange(0, BH)  # [BH]
            row = pair * HEADS + head  # [BH]
            seen = tl.minimum(blocks_seen(length, LENGTH, STRIDE), num_compressed)
            per_block: tl.constexpr = BLOCK_SIZE // STRIDE
            units: tl.constexpr = LENGTH // STRIDE
            size = row_size(num_compressed)
            every = tl.arange(0, BJ * TOGETHER)  # [BJ TOGETHER]
            if per_block == TOGETHER:
                key = first * per_block + every  # [BJ TOGETHER]
            else:
                key = (first + every // TOGETHER) * per_block + every % TOGETHER  # [BJ TOGETHER]
                key = tl.where(every % TOGETHER < per_block, key, num_compressed)
            ok = (head < HEADS)[:, None] & (key < size)[None, :]  # the same for a vector of keys
            s = tl.load(Scores + row[:, None] * size + key[None, :], mask=ok, other=float("-inf"))  # [BH, BJ TOGETHER]
            far = tl.arange(0, FAR)  # [FAR]
            there = (head < HEADS)[:, None] & (far < num_splits)[None, :]
            lses = tl.load(PartLse + row[:, None] * num_parts + far[None, :], mask=there, other=float("-inf"))
            top = tl.max(lses, 1)  # [BH]
            base = tl.where(top == float("-inf"), 0.0, top)  # [BH]
            lse = base + tl.log2(tl.sum(tl.exp2(lses - base[:, None]), 1))  # [BH]
            lse = tl.where(lse == float("-inf"), 0.0, lse)  # such a head sees no block: every score is masked
            s = tl.where((key < seen)[None, :], s, float("-inf"))
            # Compressed block per_block j - (units - 1) + m shares `overlap` units with block j.
            m = tl.arange(0, TOGETHER)[None, :] + units - 1  # [1, TOGETHER]
            own = tl.reshape(tl.sum(tl.exp2(s - lse[:, None]), 0), [BJ, TOGETHER])  # [BJ, TOGETHER]
            total = tl.sum(own * overlap(m, per_block, units), 1)  # [BJ]
            block = first + tl.arange(0, BJ)  # [BJ]
            for before in tl.static_range(units - 1):  # and those that begin before their block
                key = block * per_block - (units - 1) + before  # [BJ]
                ok = ((key >= 0) & (key < seen))[:, None] & (head < HEADS)[None, :]
                # Blocks come first, so that neighbouring threads load for neighbouring blocks.
                s = tl.load(Scores + row[None, :] * size + key[:, None], mask=ok, other=float("-inf"))  # [BJ, BH]
                total += tl.sum(tl.exp2(s - lse[None, :]), 1) * overlap(before, per_block, units)
            tl.store(Importance + block, total, mask=block < num_blocks)
        if is_last(Arrived + pair, num_tiles):
            choose(Importance, Blocks + pair * N, length, num_blocks, num_initial, num_local, BLOCK_SIZE, N, BLOCKS)


@triton.jit
def choose(Importance, Blocks, length, num_blocks, num_initial, num_local, BLOCK_SIZE: tl.constexpr, N: tl.constexpr,
           BLOCKS: tl.constexpr):  # fmt: skip
    """Blocks (N,) int32: the N most important ones of a KV head, ascending, then -1; ties go to the lower one."""
    own = (length - 1) // BLOCK_SIZE
    block = tl.arange(0, BLOCKS)  # [BLOCKS]
    ok = (block * BLOCK_SIZE < length) & (block < num_blocks)  # [BLOCKS]
    # The bits of numbers that are not negative have their order. 0 is none.
    bits = tl.load(Importance + block).to(tl.uint32, bitcast=True) + 1  # [BLOCKS]
    bits = tl.where((block < num_initial) | (block > own - num_local), TOP, bits)
    store_taken(Blocks, largest(tl.where(ok, bits, 0), N), BLOCKS)
    number = tl.minimum(N, tl.minimum(tl.cdiv(length, BLOCK_SIZE), num_blocks))
    for start in tl.range(number, N, BLOCKS):
        tl.store(Blocks + start + block, tl.full([BLOCKS], -1, tl.int32), mask=start + block < N)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def chosen_kernel(Q, K, V, Lengths, Blocks, Near, Gates, Parts, PartLse, Out, Arrived, num_keys, num_parts, run,
                  scale_log2, N: tl.constexpr, MOST: tl.constexpr, SIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                  CHUNK: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                  DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Parts of ``run`` chunks of the selected branch. The last program of its heads also writes Out (B, H, Dv).

    K, V (B, num_keys, G, ..); Blocks (B, G, N); Near as from `importance_kernel`.
    """
    begin_launch(EARLY)
    batch, _list, group, head, ok = place(GROUPS, GROUPS, HEADS, BM)
    row = batch * (GROUPS * HEADS) + head  # [BM]
    length = tl.load(Lengths + batch)  # before the queries, for which the program waits
    q1, q2 = load_row_parts(Q, row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    first = tl.program_id(2) * run
    end = tl.minimum(tl.minimum(first + run, num_parts) * CHUNK, N * BLOCK_SIZE)
    attend(
        q1, q2, K, V, Blocks + (batch * GROUPS + group) * N, Lengths, Near, Parts, PartLse, row, ok, ok, first * CHUNK,
        end, length, batch * num_keys, num_keys, first, num_parts, scale_log2, group, True, False, False, False,
        True, BLOCK_SIZE, 0, CHUNK, GROUPS, D, DV, D1, D2, DV1, BM, BN, PRECISION,
    )  # fmt: skip
    slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if is_last(Arrived + tl.num_programs(0) * tl.num_programs(1) + slot, tl.num_programs(2)):
        # What is loaded here waits for nothing but each other: not for the LSEs either, which say what is empty.
        near = load_rows(Near, row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
        gate = tl.load(Gates + row * 3 + 1, mask=ok, other=0.0).to(tl.float32)  # [BM]
        every = tl.arange(0, MOST)  # [MOST]
        there = ok[:, None] & (every < num_parts)[None, :]
        at = row * num_parts  # [BM]
        lses = tl.load(PartLse + at[:, None] + every[None, :], mask=there, other=float("-inf"))  # [BM, MOST]
        top = tl.max(lses, 1)  # [BM]
        base = tl.where(top == float("-inf"), 0.0, top)  # [BM]
        total = tl.sum(tl.exp2(lses - base[:, None]), 1)  # [BM]
        acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
        for start in tl.range(0, num_parts, SIDE):
            for side in tl.static_range(SIDE):  # their loads are under way together
                part = start + side
                lse = tl.load(PartLse + at + part, mask=ok & (part < num_parts), other=float("-inf"))  # [BM]
                x = load_rows(Parts, at + part, ok & (part < num_parts), tl.arange(0, DV1), DV)  # [BM, DV1]
                acc += tl.where((lse > float("-inf"))[:, None], x, 0.0) * tl.exp2(lse - base)[:, None]
        acc = near + gate[:, None] * acc / tl.where(total == 0, 1.0, total)[:, None]
        store_rows(Out, row, ok, tl.arange(0, DV1), DV, acc)


def attention(
    q: Tensor, kv: list[Tensor], gates: Tensor, lengths: Tensor, length: int, stride: int, block_size: int,
    num_blocks: int, num_initial: int, num_local: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Dv) in q's dtype, and the selected blocks (B, G, num_blocks) int32.

    Args:
        q (B, H, D), kv (keys and values of the compressed, selected and window branch), gates (B, H, 3), lengths (B,)
            int32: as for `nsa.ops.native_sparse_decode`, contiguous.
    """
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = kv
    (batch, heads, _), groups, compressed = q.shape, k_slc.shape[2], k_cmp.shape[1]
    have = triton.cdiv(k_slc.shape[1], block_size)  # selection blocks of the memory
    if have > MOST_BLOCKS:
        raise ValueError(f"memory of {have} selection blocks: the kernel holds {MOST_BLOCKS}; use backend='torch'")
    blocks = q.new_empty(batch, groups, num_blocks, dtype=torch.int32)
    out = q.new_empty(batch, heads, v_slc.shape[3])
    if not out.numel():
        return out, blocks
    chunk, splits = splits_of(max(compressed, k_win.shape[1]), groups)
    splits, near_splits = triton.cdiv(compressed, chunk), triton.cdiv(k_win.shape[1], chunk)
    chosen_chunk, chosen_splits = splits_of(num_blocks * block_size, groups)
    parts, chosen_parts = (parts_of(q, v_slc.shape[3], n) for n in (splits + near_splits, chosen_splits))
    scores = q.new_empty(batch, heads, triton.cdiv(compressed, hardware.VECTOR) * hardware.VECTOR, dtype=torch.float32)
    constants = shape_constants(q[:, None], k_slc, v_slc)
    sizes, options = tile(constants, q.element_size(), two=True)
    rows = groups * triton.cdiv(heads // groups, sizes["BM"])
    arrived = q.new_empty(2, batch * rows, dtype=torch.int32)
    run = run_of(MOST_RUN // chunk, splits + near_splits, rows * batch)
    programs = triton.cdiv(splits + near_splits, run)
    near_kernel[rows, batch, programs](
        q, k_cmp, v_cmp, k_win, v_win, lengths, scores, *parts, arrived, compressed, k_win.shape[1], splits,
        splits + near_splits, run, scale * LOG2_E, LENGTH=length, STRIDE=stride, CHUNK=chunk,
        **constants, **sizes, **options, **early(rows * batch * programs),
    )  # fmt: skip
    near = q.new_empty(batch, heads, v_slc.shape[3], dtype=torch.float32)
    height, most = triton.next_power_of_2(heads // groups), tile_width(have)
    importance = q.new_empty(batch, groups, most, dtype=torch.float32)
    per_block = block_size // stride
    together = triton.next_power_of_2(per_block)
    at_once = 16 if INTERPRETED else max(16, IMPORTANCE_TILE // (height * together))
    tiles, merging = triton.cdiv(have, at_once), merge_options(max(splits, near_splits), v_slc.shape[3])
    importance_kernel[batch * groups, tiles + heads // groups](
        scores, *parts, gates, lengths, importance, blocks, near, arrived, compressed, have, splits,
        splits + near_splits, tiles, num_initial, num_local, LENGTH=length, STRIDE=stride, BLOCK_SIZE=block_size,
        GROUPS=groups, HEADS=heads // groups, N=num_blocks, BLOCKS=most, BH=height, BJ=at_once,
        TOGETHER=together, FAR=triton.next_power_of_2(max(1, splits)),
        **merging | {"num_warps": 8 if most > 1024 else 4}, **early(),
    )  # fmt: skip
    sizes, options = tile(constants, q.element_size(), listed=True)
    run = run_of(MOST_CHUNK // chosen_chunk, chosen_splits, rows * batch)
    side = triton.next_power_of_2(chosen_splits)
    programs = triton.cdiv(chosen_splits, run)
    chosen_kernel[rows, batch, programs](
        q, k_slc, v_slc, lengths, blocks, near, gates, *chosen_parts, out, arrived, k_slc.shape[1], chosen_splits, run,
        scale * LOG2_E, N=num_blocks, MOST=side, SIDE=min(4, side), BLOCK_SIZE=block_size,
        CHUNK=chosen_chunk, **constants, **sizes, **options, **early(rows * batch * programs),
    )  # fmt: skip
    return out, blocks
