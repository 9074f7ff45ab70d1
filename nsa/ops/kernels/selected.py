"""Attention to the blocks that each query selected (NSA, arXiv 2502.11089, Eq. 12), forward and backward.

Queries in the outer loop (output, dQ): a tile is BT neighbouring tokens times the h heads of a group. Its rows share
the union of their tokens' blocks. `union_kernel` writes for each tile the sorted list of distinct blocks, and for each
block a bit for every token that selected it. A row that did not select a block gets +inf as its maximum (or LSE), so
its probabilities are exp2(-inf) = 0. That costs nothing per score.

Keys in the outer loop (dK, dV): for each block the list of tokens that selected it comes from one stable sort of
(block, token) pairs (`nsa.ops.kernels.lists`). It takes linear memory, has a fixed order, and does not wait for the
host. Long lists (all tokens select the first block) are divided into work items of bounded length, whose fp32 sums are
added in order. All heads of a token are rows of one product.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import Documents, block_starts, cached
from nsa.ops.kernels.device_functions import (
    NO_BLOCK,
    SMALLEST_DOT,
    TOKEN_BITS,
    TOKEN_MASK,
    load_base2_lse,
    load_box_parts,
    load_row_parts,
    load_rows,
    query_rows,
    scores,
    store_key_gradients,
    store_output,
    store_query_gradient,
    store_rows,
    tile_of_program,
)
from nsa.ops.kernels.hardware import (
    BOTH_PASSES,
    FORWARD,
    INTEGERS,
    LOG2_E,
    descriptor,
    tile_sizes,
    tile_width,
    warpgroups,
)
from nsa.ops.kernels.lists import work_items
from nsa.ops.kernels.ranges import shape_constants

MOST_TOKENS = 1 << TOKEN_BITS.value  # of a tile of queries
ITEMS = 2112  # target number of work items: sixteen for each of some 130 multiprocessors
# Rows of queries in a work item at most, though at least 128 tokens. The rows of all items that run at the same time
# then fit the L2 cache.
ITEM_ROWS = 4096
PART_BYTES = 512 << 20  # of the fp32 sums that exist at the same time, at most
PART_ROWS = 8  # keys of one program of `add_parts_kernel`
PART_LOADS = 8  # loads that it keeps in flight


@triton.jit(do_not_specialize=INTEGERS)
def union_kernel(Blocks, BlockStart, Position, Starts, Members, Counts, num_tokens, num_tiles, block_size,
                 GROUPS: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr,
                 WIDTH2: tl.constexpr):  # fmt: skip
    """The distinct blocks of a tile, ascending: of BT tokens with N choices each.

    Args:
        Blocks: (B, T, G, N) int32 numbers of blocks, or NO_BLOCK.
        Starts: (B, G, tiles, WIDTH) int32, first token of each distinct block.
        Members: (B, G, tiles, WIDTH) int64, zeroed before. Bit t is set where token t of the tile chose the block.
        Counts: (B, G, tiles, 2) int32: the blocks that end at or before the first token of the tile, which need no
            causal mask, and all blocks.
        WIDTH2: WIDTH up to a power of two.
    """
    tile, slot = tl.program_id(0), tl.program_id(1)
    batch, group = slot // GROUPS, slot % GROUPS
    entry = tl.arange(0, WIDTH2)  # [WIDTH2]
    in_tile = entry // N  # [WIDTH2], number of the token within the tile
    token = tile * BT + in_tile  # [WIDTH2]
    ok = (entry < BT * N) & (token < num_tokens)  # [WIDTH2]
    row = (batch.to(tl.int64) * num_tokens + token) * GROUPS + group  # [WIDTH2]
    block = tl.load(Blocks + row * N + entry % N, mask=ok, other=NO_BLOCK)  # [WIDTH2]
    key = tl.sort((block << TOKEN_BITS) | tl.where(ok, in_tile, 0))  # [WIDTH2]
    block, in_tile = key >> TOKEN_BITS, key & TOKEN_MASK
    before = tl.gather(block, tl.maximum(entry - 1, 0), 0)  # [WIDTH2]
    is_block = block < NO_BLOCK  # [WIDTH2]
    is_first = is_block & ((entry == 0) | (block != before))  # [WIDTH2], not a repetition
    index = tl.cumsum(is_first.to(tl.int32), 0) - 1  # [WIDTH2]
    start = tl.load(BlockStart + block, mask=is_block, other=0)  # [WIDTH2]
    out = (slot.to(tl.int64) * num_tiles + tile) * WIDTH + index  # [WIDTH2]
    tl.store(Starts + out, start, mask=is_first)
    bit = tl.full([WIDTH2], 1, tl.int64) << in_tile.to(tl.int64)  # [WIDTH2]
    tl.atomic_or(Members + out, bit, mask=is_block, sem="relaxed")  # integers: any order gives the same bits
    unmasked = is_first & (start + block_size - 1 <= tl.load(Position + tile * BT))  # [WIDTH2]
    counts = Counts + (slot.to(tl.int64) * num_tiles + tile) * 2
    tl.store(counts, tl.sum(unmasked.to(tl.int32), 0))
    tl.store(counts + 1, tl.sum(is_first.to(tl.int32), 0))


@triton.jit
def _list_of_tile(Starts, Members, Counts, tile, slot, num_tiles, WIDTH: tl.constexpr):
    """(Starts, Members) of a tile's blocks, how many of them need no causal mask, and how many there are."""
    tile_row = slot.to(tl.int64) * num_tiles + tile
    Starts += tile_row * WIDTH
    Members += tile_row * WIDTH
    return Starts, Members, tl.load(Counts + tile_row * 2), tl.load(Counts + tile_row * 2 + 1)


@triton.jit
def _forward_loop(acc, row_max, row_sum, q1, q2, in_tile, position, K1, K2, V, Starts, Members, key_row, begin, end,
                  k_column, v_column, block_size, scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr,
                  MASKED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over blocks ``begin .. end - 1`` of the list: (acc, row_max, row_sum) with them taken in.

    MASKED: the causal mask is needed. PADDED: blocks have fewer than BN keys.
    """
    for i in tl.range(begin, end):
        start = tl.load(Starts + i)
        member = ((tl.load(Members + i) >> in_tile) & 1) != 0  # [BM], whether the row's token chose the block
        k1, k2 = load_box_parts(K1, K2, key_row + start, k_column, D1, D2)  # [BN, D1], [BN, D2]
        s = scores(q1, q2, k1, k2, D2, PRECISION)  # [BM, BN]
        within = tl.arange(0, BN)  # [BN]
        if MASKED:
            s = tl.where(start + within[None, :] <= position[:, None], s, float("-inf"))
        if PADDED:
            s = tl.where(within[None, :] < block_size, s, float("-inf"))
        new_max = tl.where(member, tl.maximum(row_max, tl.max(s, 1) * scale_log2), row_max)  # [BM]
        p = tl.exp2(s * scale_log2 - tl.where(member, new_max, float("inf"))[:, None])  # [BM, BN]
        rescale = tl.where(member, tl.exp2(row_max - new_max), 1.0)  # [BM]
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = V.load([key_row + start, v_column])  # [BN, DV1]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(Q, K1, K2, V, Out, Lse, Starts, Members, Counts, Position, num_tokens, num_keys, num_tiles,
                   block_size, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                   DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BT: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Output and LSE of BT tokens x HEADS heads; rows beyond those are idle.

    Lists as from `union_kernel`; the other arguments as in `nsa.ops.kernels.ranges.forward_kernel`.
    """
    tile, slot, batch, group = tile_of_program(num_tiles, GROUPS)
    row = tl.arange(0, BM)  # [BM]
    in_tile = row // HEADS  # [BM], number of the token within the tile
    token = tile * BT + in_tile  # [BM]
    ok = (in_tile < BT) & (token < num_tokens)  # [BM]
    q_row = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    position = tl.load(Position + token, mask=ok, other=0)  # [BM]
    in_tile = in_tile.to(tl.int64)  # [BM], shifts a Member
    Starts, Members, unmasked, count = _list_of_tile(Starts, Members, Counts, tile, slot, num_tiles, WIDTH)
    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM], in units of log2
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, in_tile, position, K1, K2, V, Starts, Members,
                                          batch * num_keys, 0, unmasked, group * D, group * DV, block_size, scale_log2,
                                          D1, D2, BN, False, PADDED, PRECISION)  # fmt: skip
    acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, in_tile, position, K1, K2, V, Starts, Members,
                                          batch * num_keys, unmasked, count, group * D, group * DV, block_size,
                                          scale_log2, D1, D2, BN, True, PADDED, PRECISION)  # fmt: skip
    store_output(Out, Lse, q_row, ok, acc, row_max, row_sum, DV, DV1)


@triton.jit
def _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, in_tile, position, K1, K2, V, Starts, Members, key_row, begin, end,
                k_column, v_column, block_size, scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr,
                MASKED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(dq1, dq2) with dS K of blocks ``begin .. end - 1`` of the list added, not yet times the scale."""
    for i in tl.range(begin, end):
        start = tl.load(Starts + i)
        member = ((tl.load(Members + i) >> in_tile) & 1) != 0  # [BM], whether the row's token chose the block
        k1, k2 = load_box_parts(K1, K2, key_row + start, k_column, D1, D2)  # [BN, D1], [BN, D2]
        v = V.load([key_row + start, v_column])  # [BN, DV1]
        s = scores(q1, q2, k1, k2, D2, PRECISION)  # [BM, BN]
        p = tl.exp2(s * scale_log2 - tl.where(member, lse, float("inf"))[:, None])  # [BM, BN]
        within = tl.arange(0, BN)  # [BN]
        if MASKED:
            p = tl.where(start + within[None, :] <= position[:, None], p, 0.0)
        if PADDED:
            p = tl.where(within[None, :] < block_size, p, 0.0)
        ds = (p * (tl.dot(d_out, v.T, input_precision=PRECISION) - delta[:, None])).to(k1.dtype)  # [BM, BN]
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit(do_not_specialize=INTEGERS)
def query_kernel(Q, K1, K2, V, DOut, Lse, Delta, DQ, Starts, Members, Counts, Position, num_tokens, num_keys,
                 num_tiles, block_size, scale_log2, scale, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                 D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr,
                 BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                 ADD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DQ (B, T, H, D) of BT tokens x HEADS heads; added to what is there if ADD. Arguments as in `forward_kernel`."""
    tile, slot, batch, group = tile_of_program(num_tiles, GROUPS)
    row = tl.arange(0, BM)  # [BM]
    in_tile = row // HEADS  # [BM], number of the token within the tile
    token = tile * BT + in_tile  # [BM]
    ok = (in_tile < BT) & (token < num_tokens)  # [BM]
    q_row = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    d_out = load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
    lse = load_base2_lse(Lse, q_row, ok)  # [BM]
    delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
    position = tl.load(Position + token, mask=ok, other=0)  # [BM]
    in_tile = in_tile.to(tl.int64)  # [BM], shifts a Member
    Starts, Members, unmasked, count = _list_of_tile(Starts, Members, Counts, tile, slot, num_tiles, WIDTH)
    dq1 = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
    dq2 = tl.zeros([BM, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BM, D2], unused if D2 is 0
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, in_tile, position, K1, K2, V, Starts, Members,
                           batch * num_keys, 0, unmasked, group * D, group * DV, block_size, scale_log2, D1, D2, BN,
                           False, PADDED, PRECISION)  # fmt: skip
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, in_tile, position, K1, K2, V, Starts, Members,
                           batch * num_keys, unmasked, count, group * D, group * DV, block_size, scale_log2, D1, D2, BN,
                           True, PADDED, PRECISION)  # fmt: skip
    store_query_gradient(DQ, q_row, ok, dq1, dq2, scale, D, D1, D2, ADD)


@triton.jit
def _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, DOut, Lse, Delta, Order, Position, q_row0, entries, start, stop,
              scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
              D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """(dk1, dk2, dv) with tiles ``start .. stop - 1`` of the list's rows taken in."""
    for i in tl.range(start, stop):
        row = i * BM + tl.arange(0, BM)  # [BM]
        ok = row < entries * HEADS  # [BM]
        token = tl.load(Order + row // HEADS, mask=ok, other=0)  # [BM]
        q_row = q_row0 + token.to(tl.int64) * (GROUPS * HEADS) + row % HEADS  # [BM]
        q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
        lse = load_base2_lse(Lse, q_row, ok)  # [BM]
        p = tl.exp2(scores(k1, k2, q1, q2, D2, PRECISION) * scale_log2 - lse[None, :])  # [BN, BM]
        if MASKED:
            position = tl.load(Position + token, mask=ok, other=0)  # [BM]
            p = tl.where(key[:, None] <= position[None, :], p, 0.0)
        d_out = load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
        ds = (p * (tl.dot(v, d_out.T, input_precision=PRECISION) - delta[None, :])).to(q1.dtype)  # [BN, BM]
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=INTEGERS)
def key_kernel(Q, K, V, DOut, Lse, Delta, DK, DV_, PartK, PartV, Order, ListBegin, ItemBlock, ItemBegin, PartBegin,
               Turns, BlockStart, BlockEnd, Position, list0, list1, num_tokens, num_keys, num_blocks, block_size, chunk,
               scale_log2, scale, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
               D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """dK and dV of one block from one work item: a chunk of the block's list. Lists are ``list0 .. list1 - 1``.

    If the item is the only one of its list, it writes DK, DV_ (B, S, G, D or Dv). Otherwise it writes its part of
    PartK, PartV (parts of these lists, BN, D or Dv) fp32. The lists are as `nsa.ops.kernels.lists.Items`.
    """
    turn = tl.load(ItemBegin + list0) + tl.program_id(0)
    if turn >= tl.load(ItemBegin + list1):
        return
    item = tl.load(Turns + turn).to(tl.int32)
    index = tl.load(ItemBlock + item)  # number of the list: (batch, group, block)
    slot, block = index // num_blocks, index % num_blocks
    batch, group = slot // GROUPS, slot % GROUPS
    item0 = tl.load(ItemBegin + index)
    alone = tl.load(ItemBegin + index + 1) - item0 == 1
    begin = tl.load(ListBegin + index) + (item - item0) * chunk
    entries = tl.minimum(tl.load(ListBegin + index + 1) - begin, chunk)
    key = tl.load(BlockStart + block) + tl.arange(0, BN)  # [BN]
    ok = (key < tl.load(BlockEnd + block)) & (tl.arange(0, BN) < block_size)  # [BN]
    k_row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group  # [BN]
    k1, k2 = load_row_parts(K, k_row, ok, D, D1, D2)  # [BN, D1], [BN, D2]
    v = load_rows(V, k_row, ok, tl.arange(0, DV1), DV)  # [BN, DV1]
    tiles = tl.cdiv(entries * HEADS, BM)
    # Only tokens of the block itself need the causal mask. Lists are in token order, so these are among the first
    # block_size entries, which lie in the list's first item.
    masked = tl.where(item == item0, tl.minimum(tl.cdiv(block_size * HEADS, BM), tiles), 0)
    dk1 = tl.zeros([BN, D1], tl.float32)  # [BN, D1]
    dk2 = tl.zeros([BN, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BN, D2], unused if D2 is 0
    dv = tl.zeros([BN, DV1], tl.float32)  # [BN, DV1]
    q_row0 = batch.to(tl.int64) * num_tokens * (GROUPS * HEADS) + group * HEADS
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, DOut, Lse, Delta, Order + begin, Position, q_row0,
                             entries, 0, masked, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, True,
                             PRECISION)  # fmt: skip
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, DOut, Lse, Delta, Order + begin, Position, q_row0,
                             entries, masked, tiles, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, False,
                             PRECISION)  # fmt: skip
    if alone:
        store_key_gradients(DK, DV_, k_row, ok, dk1, dk2, dv, scale, D, DV, D1, D2, DV1)
    else:
        part = tl.load(PartBegin + index) - tl.load(PartBegin + list0) + item - item0
        part_row = part.to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
        store_key_gradients(PartK, PartV, part_row, ok, dk1, dk2, dv, scale, D, DV, D1, D2, DV1)


@triton.jit
def _add_parts(Part, Out, part, items, row, ok, out_row, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
               ROWS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """`add_parts_kernel` for one of dK and dV."""
    column = tl.arange(0, WIDTH)  # [WIDTH]
    total = tl.zeros([ROWS, WIDTH], tl.float32)  # [ROWS, WIDTH]
    for first in tl.range(0, items, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # several loads under way, added in order
            total += load_rows(Part, (part + first + i) * BN + row, ok & (first + i < items), column, D)
    store_rows(Out, out_row, ok, column, D, total)


@triton.jit(do_not_specialize=INTEGERS)
def add_parts_kernel(PartK, PartV, DK, DV_, ItemBegin, PartBegin, BlockStart, BlockEnd, list0, num_keys, num_blocks,
                     block_size, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
                     V_WIDTH: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
                     AT_ONCE: tl.constexpr):  # fmt: skip
    """DK or DV_ (B, S, G, D or Dv) at ROWS keys of one block: the sum of its parts, if it has several.

    PartK, PartV: (parts, BN, D or Dv) fp32. All tokens choose the first block, so it has the most parts by far. Several
    programs share its keys, so that the launch does not wait for a single one.
    """
    index = list0 + tl.program_id(0)
    items = tl.load(ItemBegin + index + 1) - tl.load(ItemBegin + index)
    if items <= 1:
        return
    slot, block = index // num_blocks, index % num_blocks
    batch, group = slot // GROUPS, slot % GROUPS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    key = tl.load(BlockStart + block) + row  # [ROWS]
    ok = (key < tl.load(BlockEnd + block)) & (row < block_size)  # [ROWS]
    part = (tl.load(PartBegin + index) - tl.load(PartBegin + list0)).to(tl.int64)
    out_row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group  # [ROWS]
    if tl.program_id(2) == 0:
        _add_parts(PartK, DK, part, items, row, ok, out_row, D, WIDTH, BN, ROWS, AT_ONCE)
    else:
        _add_parts(PartV, DV_, part, items, row, ok, out_row, DV, V_WIDTH, BN, ROWS, AT_ONCE)


@dataclass(frozen=True)
class BlockLayout:
    """Positions of the blocks of a (packed) sequence, and the blocks that each query selected. All int32.

    Attributes:
        blocks: (B, T, G, n) selected blocks, numbered over the whole sequence; NO_BLOCK for none.
        start, end: (M,) first token of each block, and one past its last.
        position: (T,) token index of each query.
    """

    blocks: Tensor
    start: Tensor
    end: Tensor
    position: Tensor

    @classmethod
    def of(cls, documents: Documents, block_indices: Tensor, num_keys: int, block_size: int) -> "BlockLayout":
        """From ``block_indices`` (B, T, G, n), numbered within each document; -1 is none."""
        start, end, first, own, position = _blocks(documents, num_keys, block_size)
        # Blocks after the query have no keys that it may see.
        none = (block_indices < 0) | (block_indices > own)
        blocks = (block_indices.int() + first).masked_fill_(none, NO_BLOCK.value)
        return cls(blocks.contiguous(), start, end, position)


@cached
def _blocks(documents: Documents, num_keys: int, block_size: int) -> tuple[Tensor, ...]:
    """start, end and position as in `BlockLayout`, with two tensors between them, (T, 1, 1) int32.

    These are the first block of each query's document, and the query's own block within the document.
    """
    bounds = documents.selection_bounds(block_size)
    count = num_keys // block_size + len(documents.bounds) - 1
    start, document = block_starts(documents.bounds, bounds, block_size, count)
    end = torch.minimum(start + block_size, documents.bounds[document + 1])
    first, own = bounds[documents.query_document], documents.query_local // block_size
    return start.int(), end.int(), first.int()[:, None, None], own.int()[:, None, None], documents.query_position.int()


def unions(layout: BlockLayout, tokens_per_tile: int, block_size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Starts, Members and Counts as `union_kernel` writes them, and the number of tiles."""
    batch, tokens, groups, n = layout.blocks.shape
    num_tiles, width = triton.cdiv(tokens, tokens_per_tile), tokens_per_tile * n
    starts = layout.blocks.new_empty(batch, groups, num_tiles, width)
    members = torch.zeros_like(starts, dtype=torch.int64)
    counts = layout.blocks.new_empty(batch, groups, num_tiles, 2)
    union_kernel[(num_tiles, batch * groups)](
        layout.blocks, layout.start, layout.position, starts, members, counts, tokens, num_tiles, block_size,
        GROUPS=groups, N=n, BT=tokens_per_tile, WIDTH=width, WIDTH2=triton.next_power_of_2(width),
        num_warps=min(4, max(1, triton.next_power_of_2(width) // 1024)),  # few warps exchange less, many hold more
    )  # fmt: skip
    return starts, members, counts, num_tiles


def _tile(kernel: str, q: Tensor, k: Tensor, v: Tensor, block_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile constants and launch options of a kernel over tiles of queries. BT: the tokens that fill the BM rows."""
    tile, options = tile_sizes(kernel, q, k, v)
    heads = q.shape[2] // k.shape[2]
    tile["BM"] = max(tile["BM"], triton.next_power_of_2(heads))
    tile["BT"] = min(MOST_TOKENS, tile["BM"] // heads)
    return {**tile, **_block_constants(block_size)}, options


def on_hopper(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, widths: tuple[tuple[int, int], ...] = BOTH_PASSES
) -> bool:
    """Whether Hopper's kernels over tiles of queries support these tensors.

    Groups need two heads: a tile of 128 rows then has at most the 64 tokens that a Member has bits for.
    """
    return warpgroups(q, k, v, scale, widths) and block_size == 64 and q.shape[2] >= 2 * k.shape[2]


def _block_constants(block_size: int) -> dict[str, int]:
    """BN, and whether a block has fewer keys."""
    width = tile_width(block_size)
    return {"BN": width, "PADDED": width != block_size}


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, Dv) in q's dtype and lse (B, T, H) fp32, of contiguous q, k, v."""
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    if not q.numel():
        return out, lse
    if on_hopper(q, k, v, block_size, scale, FORWARD):
        from nsa.ops.kernels.hopper import selected as hopper
        from nsa.ops.kernels.hopper import tokens_per_warpgroup

        # With groups of two heads, three warpgroups of 64 rows would have more tokens than a Member has bits.
        row = "hopper_selected_forward" + ("_pairs" if heads == 2 * k.shape[2] else "")
        tile, options = tile_sizes(row, q, k, v)
        lists = unions(layout, tile["PARTS"] * tokens_per_warpgroup(heads // k.shape[2]), block_size)
        hopper.forward(q, k, v, lists, layout.position, scale, out, lse, tile, options)
        return out, lse
    constants = shape_constants(q, k, v)
    tile, options = _tile("selected_forward", q, k, v, block_size)
    starts, members, counts, num_tiles = unions(layout, tile["BT"], block_size)
    forward_kernel[(num_tiles * batch * k.shape[2],)](
        q,
        descriptor(k, tile["BN"], constants["D1"]),
        descriptor(k, tile["BN"], constants["D2"] or constants["D1"]),
        descriptor(v, tile["BN"], constants["DV1"]),
        out, lse, starts, members, counts, layout.position, tokens, k.shape[1], num_tiles, block_size,
        scale * LOG2_E, **constants, **tile, WIDTH=starts.shape[3], **options,
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, block_size: int,
    scale: float, add_to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k, v. If ``add_to`` (B, T, H, D) is given, dq is added to it in place.

    Args:
        q, k, v: as for `forward`. d_out: (B, T, H, Dv), contiguous. lse, delta: (B, T, H) fp32.
    """
    if not q.numel():
        return torch.zeros_like(q) if add_to is None else add_to, torch.zeros_like(k), torch.zeros_like(v)
    tensors = (q, k, v, d_out, lse, delta, layout, block_size, scale)
    return query_gradient(*tensors, add_to), *key_gradients(*tensors)


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, block_size: int,
    scale: float, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dq (B, T, H, D), as in `backward`."""
    (batch, tokens), groups = q.shape[:2], k.shape[2]
    dq = torch.empty_like(q) if add_to is None else add_to
    if on_hopper(q, k, v, block_size, scale):
        from nsa.ops.kernels.hopper import gradient

        lists = unions(layout, gradient.tokens_per_tile(q.shape[2] // groups), block_size)
        gradient.query_gradient(q, [k, v], d_out, lse, delta, [], lists, layout.position, scale, dq, add_to is not None)
        return dq
    constants = shape_constants(q, k, v)
    tile, options = _tile("selected_query", q, k, v, block_size)
    starts, members, counts, num_tiles = unions(layout, tile["BT"], block_size)
    query_kernel[(num_tiles * batch * groups,)](
        q,
        descriptor(k, tile["BN"], constants["D1"]),
        descriptor(k, tile["BN"], constants["D2"] or constants["D1"]),
        descriptor(v, tile["BN"], constants["DV1"]),
        d_out, lse, delta, dq, starts, members, counts, layout.position, tokens, k.shape[1], num_tiles, block_size,
        scale * LOG2_E, scale, **constants, **tile, WIDTH=starts.shape[3], ADD=add_to is not None, **options,
    )  # fmt: skip
    return dq


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk (B, S, G, D) and dv (B, S, G, Dv), as in `backward`."""
    (batch, tokens, groups, n), num_blocks = layout.blocks.shape, len(layout.start)
    heads, rows = q.shape[2] // groups, _block_constants(block_size)["BN"]
    # The layout of shared memory repeats every eight rows, which the box of a token must fill.
    hopper_keys = warpgroups(q, k, v, scale) and rows == 64 and heads > 4
    token_rows = triton.next_power_of_2(heads) if hopper_keys else heads
    # Items must be short enough that every multiprocessor gets several. Where a token has many rows, they must also be
    # so short that items which run at the same time read much the same tokens. They must be long enough to pay for
    # loading the block and for adding up the parts.
    entries, own_entries = layout.blocks.numel(), tokens * n
    chunk = min(ITEM_ROWS // token_rows if token_rows >= 8 else 2048, triton.next_power_of_2(entries // ITEMS))
    chunk = max(128, triton.next_power_of_2(block_size), chunk)  # the kernels mask in a list's first item only
    # Launches follow each other, each for one (batch, KV head) or several, and use the same memory for their parts. A
    # list of c > chunk entries has at most c / chunk + 1 parts.
    part_bytes = rows * (k.shape[3] + v.shape[3]) * 4
    while (parts := own_entries // chunk + min(num_blocks, own_entries // chunk)) * part_bytes > PART_BYTES:
        chunk *= 2
    items = work_items(layout.blocks, num_blocks, chunk)
    slots = min(batch * groups, PART_BYTES // max(1, parts * part_bytes))
    slots = triton.cdiv(batch * groups, triton.cdiv(batch * groups, slots))
    part_k = k.new_empty(slots * parts, rows, k.shape[3], dtype=torch.float32)
    part_v = v.new_empty(slots * parts, rows, v.shape[3], dtype=torch.float32)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    sizes = (tokens, k.shape[1], num_blocks, block_size, chunk, scale * LOG2_E, scale)
    widths = [tile_width(x.shape[3]) for x in (k, v)]
    tile, options = tile_sizes("hopper_selected_key" if hopper_keys else "selected_key", q, k, v)
    for list0 in range(0, batch * groups * num_blocks, slots * num_blocks):
        list1 = min(list0 + slots * num_blocks, batch * groups * num_blocks)
        grid = (list1 - list0 + (list1 - list0) // num_blocks * (own_entries // chunk),)
        lists = (*items, layout.start, layout.end)
        if hopper_keys:
            from nsa.ops.kernels.hopper import keys as hopper

            hopper.selected_key_kernel[grid](
                *hopper.descriptors(q, k, v, d_out, 1, rows), lse, delta, layout.position, dk, dv, part_k, part_v,
                *lists, list0, list1, *sizes, **hopper.shape_constants(q, k), **tile, **options,
            )  # fmt: skip
        else:
            key_kernel[grid](
                q, k, v, d_out, lse, delta, dk, dv, part_k, part_v, *lists, layout.position, list0, list1, *sizes,
                **shape_constants(q, k, v), **tile, BN=rows, **options,
            )  # fmt: skip
        add_parts_kernel[(list1 - list0, triton.cdiv(rows, PART_ROWS), 2)](
            part_k, part_v, dk, dv, items.item_begin, items.part_begin, layout.start, layout.end, list0, k.shape[1],
            num_blocks, block_size, GROUPS=groups, D=k.shape[3], DV=v.shape[3], WIDTH=widths[0], V_WIDTH=widths[1],
            BN=rows, ROWS=PART_ROWS, AT_ONCE=PART_LOADS, num_warps=4,
        )  # fmt: skip
    return dk, dv
