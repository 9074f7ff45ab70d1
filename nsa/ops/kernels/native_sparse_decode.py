"""Native Sparse Attention of one query token per sequence, in five launches and without a wait for the host.

1. Parts of the compressed branch, whose scores are kept, and of the window (`near_kernel`).
2. The importance of each selection block, from the kept scores: cheaper than the keys again (`importance_kernel`).
3. The top-n of each KV head (`choose_kernel`).
4. Parts of the selected branch: `nsa.ops.kernels.decode.split_kernel` with blocks as pages.
5. The branches merged, and summed with their gates (`gate_kernel`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.decode import (
    COUNTS,
    attend_chunk,
    list_splits,
    merge_options,
    merged_parts,
    parts_of,
    place,
    splits_of,
    store_part,
    tile,
    write_parts,
)
from nsa.ops.kernels.device_functions import IMPORTANCE_SHIFT, LAST_BLOCK, NO_CANDIDATE, load_row_parts
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, tile_width
from nsa.ops.kernels.ranges import shape_constants

IMPORTANCE_TILE = 2048  # scores that a program of `importance_kernel` loads at once
MOST_BLOCKS = 8192  # of a memory: `choose_kernel` holds all candidates in registers


@triton.jit
def blocks_seen(length, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """How many whole compression blocks ``length`` tokens have (`nsa.ops.geometry.num_compressed`)."""
    return tl.where(length >= LENGTH, (length - LENGTH) // STRIDE + 1, 0)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS, "num_near", "near_splits"])
def near_kernel(Q, KCmp, VCmp, KWin, VWin, Lengths, Scores, Parts, PartLse, num_compressed, num_near, num_splits,
                num_parts, scale_log2, LENGTH: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
                NEAR_CHUNK: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Part of a program: a chunk of the compressed blocks, or after ``num_splits`` of these one of the window.

    KCmp, VCmp (B, num_compressed, G, ..); KWin, VWin (B, num_near, G, ..), a ring; Scores (B, H, num_compressed) fp32.
    """
    batch, _list, group, head, ok = place(GROUPS, GROUPS, HEADS, BM)
    split = tl.program_id(0)
    row = batch * (GROUPS * HEADS) + head  # [BM]
    q1, q2 = load_row_parts(Q, row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    length = tl.load(Lengths + batch)
    far = split < num_splits
    if far:  # one loop for both: two would hold their tiles in shared memory at once
        K, V, chunk, memory = KCmp, VCmp, split * CHUNK, num_compressed
        there = tl.minimum(blocks_seen(length, LENGTH, STRIDE), num_compressed)
        end = tl.minimum(chunk + CHUNK, there)
    else:
        K, V, chunk, memory = KWin, VWin, (split - num_splits) * NEAR_CHUNK, num_near
        there = tl.minimum(length, num_near)
        end = tl.minimum(chunk + NEAR_CHUNK, there)
    acc, row_max, row_sum = attend_chunk(
        q1, q2, K, V, Lengths, Lengths, Scores, row, ok & far, chunk, end, there, batch * memory, num_compressed,
        scale_log2, group, False, False, True, False, 1, GROUPS, D, DV, D1, D2, DV1, BM, BN, PRECISION,
    )  # fmt: skip
    store_part(Parts, PartLse, row, ok, split, num_parts, acc, row_max, row_sum, DV, DV1)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def importance_kernel(Scores, PartLse, Lengths, Importance, num_compressed, num_blocks, num_splits, num_parts,
                      LENGTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr,
                      HEADS: tl.constexpr, BH: tl.constexpr, BJ: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """Importance (B, G, num_blocks) fp32 of BJ selection blocks for a KV head (`nsa.ops.select_blocks`).

    PartLse (B, H, num_parts): of the compressed branch are the first ``num_splits`` parts.
    """
    batch, group = tl.program_id(1).to(tl.int64) // GROUPS, tl.program_id(1) % GROUPS
    length = tl.load(Lengths + batch)
    first = tl.program_id(0) * BJ
    if first * BLOCK_SIZE < length:
        head = tl.arange(0, BH)  # [BH]
        row = (batch * GROUPS + group) * HEADS + head  # [BH]
        part = tl.arange(0, MOST)  # [MOST]
        there = (head < HEADS)[:, None] & (part < num_splits)[None, :]
        lses = tl.load(PartLse + row[:, None] * num_parts + part[None, :], mask=there, other=float("-inf"))
        top = tl.max(lses, 1)  # [BH]
        base = tl.where(top == float("-inf"), 0.0, top)  # [BH]
        lse = base + tl.log2(tl.sum(tl.exp2(lses - base[:, None]), 1))  # [BH]
        lse = tl.where(lse == float("-inf"), 0.0, lse)  # such a head sees no block: every score is masked
        seen = tl.minimum(blocks_seen(length, LENGTH, STRIDE), num_compressed)
        per_block: tl.constexpr = BLOCK_SIZE // STRIDE
        units: tl.constexpr = LENGTH // STRIDE
        block = first + tl.arange(0, BJ)  # [BJ]
        total = tl.zeros([BJ], tl.float32)  # [BJ]
        for m in tl.static_range(per_block + units - 1):
            # Compressed block per_block j - (units - 1) + m shares so many units with block j.
            key = block * per_block - (units - 1) + m  # [BJ]
            ok = (key >= 0) & (key < seen)  # [BJ]
            at = row[:, None] * num_compressed + key[None, :]  # [BH, BJ]
            s = tl.load(Scores + at, mask=(head < HEADS)[:, None] & ok[None, :], other=float("-inf"))  # [BH, BJ]
            p = tl.sum(tl.exp2(s - lse[:, None]), 0)  # [BJ]
            total += p * (tl.minimum(m, per_block - 1) - tl.maximum(m - units + 1, 0) + 1)
        tl.store(Importance + (batch * GROUPS + group) * num_blocks + block, total, mask=block < num_blocks)


@triton.jit(do_not_specialize=[*INTEGERS])
def choose_kernel(Importance, Lengths, Blocks, num_blocks, num_initial, num_local, BLOCK_SIZE: tl.constexpr,
                  GROUPS: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Blocks (B, G, N) int32: the N most important ones of a KV head, ascending, then -1; ties go to the lower one."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(Lengths + row // GROUPS)
    own = (length - 1) // BLOCK_SIZE
    block = tl.arange(0, BLOCKS)  # [BLOCKS]
    ok = (block * BLOCK_SIZE < length) & (block < num_blocks)  # [BLOCKS]
    importance = tl.load(Importance + row * num_blocks + block, mask=ok, other=0.0)  # [BLOCKS]
    forced = (block < num_initial) | (block > own - num_local)  # [BLOCKS]
    importance = tl.where(forced, float("inf"), importance)
    # The bits of numbers that are not negative have their order.
    candidate = (importance.to(tl.int32, bitcast=True).to(tl.int64) << IMPORTANCE_SHIFT) | (LAST_BLOCK.value - block)
    candidate = tl.where(ok, candidate, NO_CANDIDATE)  # [BLOCKS]
    least = tl.max(candidate, 0)
    for _ in tl.range(1, N):  # ends at the N-th best, or below all that are there
        least = tl.max(tl.where(candidate < least, candidate, NO_CANDIDATE), 0)
    taken = ok & (candidate >= least)  # [BLOCKS]
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1  # [BLOCKS]
    tl.store(Blocks + row * N + slot, block, mask=taken)
    number = tl.sum(taken.to(tl.int32), 0)
    fill = tl.arange(0, BLOCKS)  # [BLOCKS]
    for start in tl.range(0, N, BLOCKS):
        empty = (start + fill >= number) & (start + fill < N)  # [BLOCKS]
        tl.store(Blocks + row * N + start + fill, tl.full([BLOCKS], -1, tl.int32), mask=empty)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS, "near_splits"])
def gate_kernel(Parts, PartLse, Gates, Out, num_splits, near_splits, num_parts, MOST: tl.constexpr, SIDE: tl.constexpr,
                DV: tl.constexpr, DV1: tl.constexpr):  # fmt: skip
    """Out (B, H, Dv): the branches of a row, merged, times Gates (B, H, 3), summed.

    Parts are those of the compressed branch, the window and the selected branch, in this order.
    MOST: at least the parts of each branch.
    """
    row = tl.program_id(0).to(tl.int64)
    far = num_splits + near_splits
    cmp, _lse = merged_parts(Parts, PartLse, row, 0, num_splits, num_parts, MOST, SIDE, DV, DV1)  # [DV1]
    win, _lse = merged_parts(Parts, PartLse, row, num_splits, near_splits, num_parts, MOST, SIDE, DV, DV1)
    slc, _lse = merged_parts(Parts, PartLse, row, far, num_parts - far, num_parts, MOST, SIDE, DV, DV1)
    out = tl.load(Gates + row * 3).to(tl.float32) * cmp + tl.load(Gates + row * 3 + 1).to(tl.float32) * slc
    out += tl.load(Gates + row * 3 + 2).to(tl.float32) * win
    column = tl.arange(0, DV1)  # [DV1]
    tl.store(Out + row * DV + column, out.to(Out.dtype.element_ty), mask=column < DV)


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
    (chunk, splits), (near_chunk, near_splits) = splits_of(compressed), splits_of(k_win.shape[1])
    selected_splits = list_splits(k_slc, blocks, block_size)[1]
    parts = parts_of(q, v_slc.shape[3], splits + near_splits + selected_splits)
    scores = q.new_empty(batch, heads, compressed, dtype=torch.float32)
    constants = shape_constants(q[:, None], k_slc, v_slc)
    sizes, options = tile(constants, q.element_size())
    rows = groups * triton.cdiv(heads // groups, sizes["BM"])
    near_kernel[splits + near_splits, rows, batch](
        q, k_cmp, v_cmp, k_win, v_win, lengths, scores, *parts, compressed, k_win.shape[1], splits, parts[1].shape[2],
        scale * LOG2_E, LENGTH=length, STRIDE=stride, CHUNK=chunk, NEAR_CHUNK=near_chunk, **constants, **sizes,
        **options,
    )  # fmt: skip
    importance = q.new_empty(batch, groups, have, dtype=torch.float32)
    height = triton.next_power_of_2(heads // groups)
    at_once = 16 if INTERPRETED else max(16, IMPORTANCE_TILE // height)
    importance_kernel[triton.cdiv(have, at_once), batch * groups](
        scores, parts[1], lengths, importance, compressed, have, splits, parts[1].shape[2], LENGTH=length,
        STRIDE=stride, BLOCK_SIZE=block_size, GROUPS=groups, HEADS=heads // groups, BH=height, BJ=at_once,
        MOST=triton.next_power_of_2(max(1, splits)), num_warps=4,
    )  # fmt: skip
    most = tile_width(have)
    choose_kernel[(batch * groups,)](
        importance, lengths, blocks, have, num_initial, num_local, BLOCK_SIZE=block_size, GROUPS=groups, N=num_blocks,
        BLOCKS=most, num_warps=8 if most > 1024 else 4,
    )  # fmt: skip
    write_parts(
        q, k_slc, v_slc, lengths, blocks, block_size, None, None, scale, parts, first_part=splits + near_splits
    )  # fmt: skip
    options = merge_options(max(splits, near_splits, selected_splits), v_slc.shape[3])
    gate_kernel[(batch * heads,)](
        *parts, gates, out, splits, near_splits, parts[1].shape[2], **options, num_warps=4
    )  # fmt: skip
    return out, blocks
