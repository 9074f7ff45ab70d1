"""Attention to the blocks that each query selected (NSA, arXiv 2502.11089, Eq. 12), forward and backward.

Queries outside (output, dQ): a tile of BT neighbouring tokens times the h heads of a group shares the union of its
tokens' blocks. `union_kernel` writes for each tile the sorted list of distinct blocks, and for each of them the bits of
the tokens that chose it. A row that did not choose a block has its probabilities pushed to exp2(-inf) through its
maximum (or LSE): membership costs nothing per score. BT = 1 is the case of a token on its own.

Keys outside (dK, dV): the inverse lists, per block the tokens that chose it, come from one stable sort of
(block, token) pairs: linear memory, fixed order, no wait for the host. Blocks chosen by many (the first by all) are cut
into work items of bounded length, whose fp32 sums are added in order. All heads of a token are rows of one product.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import Documents, block_starts, cached
from nsa.ops.kernels.launch import BOTH_PASSES, FORWARD, INTEGERS, LOG2_E, descriptor, tile_sizes, warpgroups
from nsa.ops.kernels.lists import NO_BLOCK, work_items
from nsa.ops.kernels.ranges import _load_rows, _scores, _store_rows, shape_constants


@triton.jit(do_not_specialize=INTEGERS)
def union_kernel(Blocks, BlockStart, Position, Starts, Members, Counts, num_tokens, num_tiles, block_size,
                 GROUPS: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr,
                 WIDTH2: tl.constexpr):  # fmt: skip
    """The distinct blocks of BT tokens x N choices, ascending.

    Blocks (B, T, G, N) int32 numbers of blocks, or NO_BLOCK. Starts (B, G, tiles, WIDTH) int32: first token of each;
    Members (same) int64, zeroed: bit t is set where token t of the tile chose it. Counts (B, G, tiles, 2): how many of
    them end at or before the first token of the tile, and how many there are.
    """
    tile, slot = tl.program_id(0), tl.program_id(1)
    batch, group = slot // GROUPS, slot % GROUPS
    entry = tl.arange(0, WIDTH2)
    place = entry // N
    token = tile * BT + place
    ok = (entry < BT * N) & (token < num_tokens)
    row = (batch.to(tl.int64) * num_tokens + token) * GROUPS + group
    block = tl.load(Blocks + row * N + entry % N, mask=ok, other=NO_BLOCK)
    key = tl.sort((block << 6) | tl.where(ok, place, 0))
    block, place = key >> 6, key & 63
    before = tl.gather(block, tl.maximum(entry - 1, 0), 0)
    is_block = block < NO_BLOCK
    fresh = is_block & ((entry == 0) | (block != before))
    index = tl.cumsum(fresh.to(tl.int32), 0) - 1
    start = tl.load(BlockStart + block, mask=is_block, other=0)
    out = (slot.to(tl.int64) * num_tiles + tile) * WIDTH + index
    tl.store(Starts + out, start, mask=fresh)
    bit = tl.full([WIDTH2], 1, tl.int64) << place.to(tl.int64)
    tl.atomic_or(Members + out, bit, mask=is_block, sem="relaxed")
    whole = fresh & (start + block_size - 1 <= tl.load(Position + tile * BT))
    counts = Counts + (slot.to(tl.int64) * num_tiles + tile) * 2
    tl.store(counts, tl.sum(whole.to(tl.int32), 0))
    tl.store(counts + 1, tl.sum(fresh.to(tl.int32), 0))


@triton.jit
def _forward_loop(acc, peak, total, q1, q2, place, position, K1, K2, V, Starts, Members, key_row, begin, end, k_column,
                  v_column, block_size, scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr,
                  MASKED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    for i in tl.range(begin, end):
        start = tl.load(Starts + i)
        member = ((tl.load(Members + i) >> place) & 1) != 0
        k1 = K1.load([key_row + start, k_column])
        k2 = k1
        if D2 > 0:
            k2 = K2.load([key_row + start, k_column + D1])
        s = _scores(q1, q2, k1, k2, D2, PRECISION)
        within = tl.arange(0, BN)
        if MASKED:
            s = tl.where(start + within[None, :] <= position[:, None], s, float("-inf"))
        if PADDED:
            s = tl.where(within[None, :] < block_size, s, float("-inf"))
        new_peak = tl.where(member, tl.maximum(peak, tl.max(s, 1) * scale_log2), peak)
        p = tl.exp2(s * scale_log2 - tl.where(member, new_peak, float("inf"))[:, None])
        shrink = tl.where(member, tl.exp2(peak - new_peak), 1.0)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = V.load([key_row + start, v_column])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(Q, K1, K2, V, Out, Lse, Starts, Members, Counts, Position, num_tokens, num_keys, num_tiles,
                   block_size, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                   DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BT: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """out, lse of BT tokens x HEADS heads (rows beyond those idle); layouts as in the range kernels."""
    slots = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    batch, group = slot // GROUPS, slot % GROUPS
    row = tl.arange(0, BM)
    place = row // HEADS
    token = tile * BT + place
    ok = (place < BT) & (token < num_tokens)
    q_row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + row % HEADS
    q1 = _load_rows(Q, q_row, ok, tl.arange(0, D1), D)
    q2 = q1
    if D2 > 0:
        q2 = _load_rows(Q, q_row, ok, D1 + tl.arange(0, D2), D)
    position = tl.load(Position + token, mask=ok, other=0)
    place = place.to(tl.int64)
    tile_row = slot.to(tl.int64) * num_tiles + tile
    Starts += tile_row * WIDTH
    Members += tile_row * WIDTH
    whole, count = tl.load(Counts + tile_row * 2), tl.load(Counts + tile_row * 2 + 1)
    acc = tl.zeros([BM, DV1], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc, peak, total = _forward_loop(acc, peak, total, q1, q2, place, position, K1, K2, V, Starts, Members,
                                     batch * num_keys, 0, whole, group * D, group * DV, block_size, scale_log2, D1, D2,
                                     BN, False, PADDED, PRECISION)  # fmt: skip
    acc, peak, total = _forward_loop(acc, peak, total, q1, q2, place, position, K1, K2, V, Starts, Members,
                                     batch * num_keys, whole, count, group * D, group * DV, block_size, scale_log2, D1,
                                     D2, BN, True, PADDED, PRECISION)  # fmt: skip
    _store_rows(Out, q_row, ok, tl.arange(0, DV1), DV, acc / tl.where(total == 0, 1.0, total)[:, None])
    tl.store(Lse + q_row, (peak + tl.log2(total)) * 0.6931471805599453, mask=ok)


@triton.jit
def _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, place, position, K1, K2, V, Starts, Members, key_row, begin, end,
                k_column, v_column, block_size, scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr,
                MASKED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    for i in tl.range(begin, end):
        start = tl.load(Starts + i)
        member = ((tl.load(Members + i) >> place) & 1) != 0
        k1 = K1.load([key_row + start, k_column])
        k2 = k1
        if D2 > 0:
            k2 = K2.load([key_row + start, k_column + D1])
        v = V.load([key_row + start, v_column])
        s = _scores(q1, q2, k1, k2, D2, PRECISION)
        p = tl.exp2(s * scale_log2 - tl.where(member, lse, float("inf"))[:, None])
        within = tl.arange(0, BN)
        if MASKED:
            p = tl.where(start + within[None, :] <= position[:, None], p, 0.0)
        if PADDED:
            p = tl.where(within[None, :] < block_size, p, 0.0)
        ds = (p * (tl.dot(d_out, v.T, input_precision=PRECISION) - delta[:, None])).to(k1.dtype)
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
    """DQ (B, T, H, D) of BT tokens x HEADS heads; added to what is there if ADD."""
    slots = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    batch, group = slot // GROUPS, slot % GROUPS
    row = tl.arange(0, BM)
    place = row // HEADS
    token = tile * BT + place
    ok = (place < BT) & (token < num_tokens)
    q_row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + row % HEADS
    q1 = _load_rows(Q, q_row, ok, tl.arange(0, D1), D)
    q2 = q1
    if D2 > 0:
        q2 = _load_rows(Q, q_row, ok, D1 + tl.arange(0, D2), D)
    d_out = _load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)
    lse = tl.load(Lse + q_row, mask=ok, other=float("-inf")) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(Delta + q_row, mask=ok, other=0.0)
    position = tl.load(Position + token, mask=ok, other=0)
    place = place.to(tl.int64)
    tile_row = slot.to(tl.int64) * num_tiles + tile
    Starts += tile_row * WIDTH
    Members += tile_row * WIDTH
    whole, count = tl.load(Counts + tile_row * 2), tl.load(Counts + tile_row * 2 + 1)
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, place, position, K1, K2, V, Starts, Members,
                           batch * num_keys, 0, whole, group * D, group * DV, block_size, scale_log2, D1, D2, BN,
                           False, PADDED, PRECISION)  # fmt: skip
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, place, position, K1, K2, V, Starts, Members,
                           batch * num_keys, whole, count, group * D, group * DV, block_size, scale_log2, D1, D2, BN,
                           True, PADDED, PRECISION)  # fmt: skip
    dq1 *= scale
    dq2 *= scale
    if ADD:
        dq1 += _load_rows(DQ, q_row, ok, tl.arange(0, D1), D).to(tl.float32)
    _store_rows(DQ, q_row, ok, tl.arange(0, D1), D, dq1)
    if D2 > 0:
        if ADD:
            dq2 += _load_rows(DQ, q_row, ok, D1 + tl.arange(0, D2), D).to(tl.float32)
        _store_rows(DQ, q_row, ok, D1 + tl.arange(0, D2), D, dq2)


@triton.jit
def _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, DOut, Lse, Delta, Order, Position, q_row0, entries, start, stop,
              scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
              D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    for i in tl.range(start, stop):
        row = i * BM + tl.arange(0, BM)
        ok = row < entries * HEADS
        token = tl.load(Order + row // HEADS, mask=ok, other=0)
        q_row = q_row0 + token.to(tl.int64) * (GROUPS * HEADS) + row % HEADS
        q1 = _load_rows(Q, q_row, ok, tl.arange(0, D1), D)
        q2 = q1
        if D2 > 0:
            q2 = _load_rows(Q, q_row, ok, D1 + tl.arange(0, D2), D)
        lse = tl.load(Lse + q_row, mask=ok, other=float("-inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        p = tl.exp2(_scores(k1, k2, q1, q2, D2, PRECISION) * scale_log2 - lse[None, :])  # (BN, BM)
        if MASKED:
            position = tl.load(Position + token, mask=ok, other=0)
            p = tl.where(key[:, None] <= position[None, :], p, 0.0)
        d_out = _load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        delta = tl.load(Delta + q_row, mask=ok, other=0.0)
        ds = (p * (tl.dot(v, d_out.T, input_precision=PRECISION) - delta[None, :])).to(q1.dtype)
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
    """dK, dV of one block from one chunk of its list, one of the lists list0 .. list1 - 1: into DK, DV_ (B, S, G, ..)
    if it is the only one, else into the item's part, PartK, PartV (parts of these lists, BN, ..) fp32."""
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
    key = tl.load(BlockStart + block) + tl.arange(0, BN)
    ok = (key < tl.load(BlockEnd + block)) & (tl.arange(0, BN) < block_size)
    k_row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group
    k1 = _load_rows(K, k_row, ok, tl.arange(0, D1), D)
    k2 = k1
    if D2 > 0:
        k2 = _load_rows(K, k_row, ok, D1 + tl.arange(0, D2), D)
    v = _load_rows(V, k_row, ok, tl.arange(0, DV1), DV)
    tiles = tl.cdiv(entries * HEADS, BM)
    # Lists are in token order: only the first block_size entries, at most chunk, can be tokens of the block itself.
    masked = tl.where(item == item0, tl.minimum(tl.cdiv(block_size * HEADS, BM), tiles), 0)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, DV1], tl.float32)
    q_row0 = batch.to(tl.int64) * num_tokens * (GROUPS * HEADS) + group * HEADS
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, DOut, Lse, Delta, Order + begin, Position, q_row0,
                             entries, 0, masked, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, True,
                             PRECISION)  # fmt: skip
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, DOut, Lse, Delta, Order + begin, Position, q_row0,
                             entries, masked, tiles, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, False,
                             PRECISION)  # fmt: skip
    if alone:
        _store_rows(DK, k_row, ok, tl.arange(0, D1), D, dk1 * scale)
        if D2 > 0:
            _store_rows(DK, k_row, ok, D1 + tl.arange(0, D2), D, dk2 * scale)
        _store_rows(DV_, k_row, ok, tl.arange(0, DV1), DV, dv)
    else:
        part = tl.load(PartBegin + index) - tl.load(PartBegin + list0) + item - item0
        part = part.to(tl.int64) * BN + tl.arange(0, BN)
        _store_rows(PartK, part, ok, tl.arange(0, D1), D, dk1 * scale)
        if D2 > 0:
            _store_rows(PartK, part, ok, D1 + tl.arange(0, D2), D, dk2 * scale)
        _store_rows(PartV, part, ok, tl.arange(0, DV1), DV, dv)


@triton.jit
def _add_parts(Part, Out, part, items, row, ok, out_row, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
               ROWS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    column = tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, items, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # several loads under way, summed in order
            total += _load_rows(Part, (part + first + i) * BN + row, ok & (first + i < items), column, D)
    _store_rows(Out, out_row, ok, column, D, total)


@triton.jit(do_not_specialize=INTEGERS)
def add_parts_kernel(PartK, PartV, DK, DV_, ItemBegin, PartBegin, BlockStart, BlockEnd, list0, num_keys, num_blocks,
                     block_size, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
                     V_WIDTH: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
                     AT_ONCE: tl.constexpr):  # fmt: skip
    """ROWS keys of one block in DK or DV_ (B, S, G, ..): the sum of its parts (parts, BN, ..), where it has several.

    The first block, chosen by all, has the most by far: its keys are dealt out so that none waits for its sum.
    """
    index = list0 + tl.program_id(0)
    items = tl.load(ItemBegin + index + 1) - tl.load(ItemBegin + index)
    if items <= 1:
        return
    slot, block = index // num_blocks, index % num_blocks
    batch, group = slot // GROUPS, slot % GROUPS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    key = tl.load(BlockStart + block) + row
    ok = (key < tl.load(BlockEnd + block)) & (row < block_size)
    part = (tl.load(PartBegin + index) - tl.load(PartBegin + list0)).to(tl.int64)
    out_row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group
    if tl.program_id(2) == 0:
        _add_parts(PartK, DK, part, items, row, ok, out_row, D, WIDTH, BN, ROWS, AT_ONCE)
    else:
        _add_parts(PartV, DV_, part, items, row, ok, out_row, DV, V_WIDTH, BN, ROWS, AT_ONCE)


@dataclass(frozen=True)
class BlockLayout:
    """Where the blocks of a (packed) sequence lie, and which ones each query chose; all int32.

    Attributes:
        blocks: (B, T, G, n) numbers over the whole sequence; NO_BLOCK where there is none.
        start, end: (M,) first token of each block, and the one after its last.
        position: (T,) token index of each query.
    """

    blocks: Tensor
    start: Tensor
    end: Tensor
    position: Tensor

    @classmethod
    def of(cls, documents: Documents, block_indices: Tensor, num_keys: int, block_size: int) -> "BlockLayout":
        start, end, first, own, position = _blocks(documents, num_keys, block_size)
        # A block after the query has no key that it may see.
        none = (block_indices < 0) | (block_indices > own)
        blocks = (block_indices.int() + first).masked_fill_(none, NO_BLOCK.value)
        return cls(blocks.contiguous(), start, end, position)


@cached
def _blocks(documents: Documents, num_keys: int, block_size: int) -> tuple[Tensor, ...]:
    """start, end of all blocks; the first block of each query's document and its own within it, (T, 1, 1); position."""
    bounds = documents.selection_bounds(block_size)
    count = num_keys // block_size + len(documents.bounds) - 1
    start, document = block_starts(documents.bounds, bounds, block_size, count)
    end = torch.minimum(start + block_size, documents.bounds[document + 1])
    first, own = bounds[documents.query_document], documents.query_local // block_size
    return start.int(), end.int(), first.int()[:, None, None], own.int()[:, None, None], documents.query_position.int()


def unions(layout: BlockLayout, tokens_per_tile: int, block_size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Starts, Members, Counts of `union_kernel`, and the number of tiles."""
    batch, tokens, groups, n = layout.blocks.shape
    num_tiles, width = triton.cdiv(tokens, tokens_per_tile), tokens_per_tile * n
    starts = layout.blocks.new_empty(batch, groups, num_tiles, width)
    members = torch.zeros_like(starts, dtype=torch.int64)
    counts = layout.blocks.new_empty(batch, groups, num_tiles, 2)
    union_kernel[(num_tiles, batch * groups)](
        layout.blocks, layout.start, layout.position, starts, members, counts, tokens, num_tiles, block_size,
        GROUPS=groups, N=n, BT=tokens_per_tile, WIDTH=width, WIDTH2=triton.next_power_of_2(width),
        num_warps=min(4, max(1, triton.next_power_of_2(width) // 1024)),  # fewer exchange less, more hold more
    )  # fmt: skip
    return starts, members, counts, num_tiles


def _tile(kernel: str, q: Tensor, k: Tensor, v: Tensor, block_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile constants and options of a query-outer kernel: as many tokens as their heads fill the rows."""
    tile, options = tile_sizes(kernel, q, k, v)
    heads = q.shape[2] // k.shape[2]
    tile["BM"] = max(tile["BM"], triton.next_power_of_2(heads))
    tile["BT"] = min(64, tile["BM"] // heads)
    return {**tile, **_block_constants(block_size)}, options


def on_hopper(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, widths: tuple[tuple[int, int], ...] = BOTH_PASSES
) -> bool:
    """Whether the queries-outside kernels for Hopper serve: 128 rows are at most the 64 tokens of a list's bits."""
    return warpgroups(q, k, v, scale, widths) and block_size == 64 and q.shape[2] >= 2 * k.shape[2]


def _block_constants(block_size: int) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(block_size))
    return {"BN": width, "PADDED": width != block_size}


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, Dv) in q's dtype and lse (B, T, H) fp32; q, k, v contiguous."""
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    if not q.numel():
        return out, lse
    if on_hopper(q, k, v, block_size, scale, FORWARD):
        from nsa.ops.kernels.hopper import selected as hopper
        from nsa.ops.kernels.hopper import span

        # Three parts of two heads would be more than the 64 tokens of a list's bits.
        row = "hopper_selected_forward" + ("_pairs" if heads == 2 * k.shape[2] else "")
        tile, options = tile_sizes(row, q, k, v)
        lists = unions(layout, tile["PARTS"] * 64 // span(heads // k.shape[2]), block_size)
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
    """dq (``add_to`` plus it, in place, if given), dk, dv in the dtypes of q, k, v; all contiguous."""
    if not q.numel():
        return torch.zeros_like(q) if add_to is None else add_to, torch.zeros_like(k), torch.zeros_like(v)
    tensors = (q, k, v, d_out, lse, delta, layout, block_size, scale)
    return query_gradient(*tensors, add_to), *key_gradients(*tensors)


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, block_size: int,
    scale: float, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (batch, tokens), groups = q.shape[:2], k.shape[2]
    dq = torch.empty_like(q) if add_to is None else add_to
    if on_hopper(q, k, v, block_size, scale):
        from nsa.ops.kernels.hopper import gradient, span

        lists = unions(layout, 128 // span(q.shape[2] // groups), block_size)
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
    (batch, tokens, groups, n), num_blocks = layout.blocks.shape, len(layout.start)
    heads, rows = q.shape[2] // groups, _block_constants(block_size)["BN"]
    # Boxes of a token's rows must fill the eight after which shared memory's layout repeats.
    by_hand = warpgroups(q, k, v, scale) and rows == 64 and heads > 4
    token_rows = triton.next_power_of_2(heads) if by_hand else heads
    # Items short enough that all multiprocessors get several and that, where a token's rows are many, those under way
    # at once read much the same tokens; long enough to pay for loading the block and adding up the sums.
    entries, own_entries = layout.blocks.numel(), tokens * n
    chunk = min(ITEM_ROWS // token_rows if token_rows >= 8 else 2048, triton.next_power_of_2(entries // ITEMS))
    chunk = max(128, triton.next_power_of_2(block_size), chunk)  # the kernels mask in a list's first item only
    # One launch after the other, of one KV head or several, uses the same memory for its parts. A list of c > chunk
    # entries has at most c / chunk + 1.
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
    widths = [max(16, triton.next_power_of_2(x.shape[3])) for x in (k, v)]
    tile, options = tile_sizes("hopper_selected_key" if by_hand else "selected_key", q, k, v)
    for list0 in range(0, batch * groups * num_blocks, slots * num_blocks):
        list1 = min(list0 + slots * num_blocks, batch * groups * num_blocks)
        grid = (list1 - list0 + (list1 - list0) // num_blocks * (own_entries // chunk),)
        lists = (*items, layout.start, layout.end)
        if by_hand:
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
        add_parts_kernel[(list1 - list0, triton.cdiv(rows, 8), 2)](
            part_k, part_v, dk, dv, items.item_begin, items.part_begin, layout.start, layout.end, list0, k.shape[1],
            num_blocks, block_size, GROUPS=groups, D=k.shape[3], DV=v.shape[3], WIDTH=widths[0], V_WIDTH=widths[1],
            BN=rows, ROWS=8, AT_ONCE=8, num_warps=4,
        )  # fmt: skip
    return dk, dv


ITEMS = 2112  # work items to aim at: sixteen for each of some 130 multiprocessors
ITEM_ROWS = 4096  # rows of queries in an item, of 128 tokens at least: with the others under way they fit the L2 cache
PART_BYTES = 512 << 20  # of fp32 sums at a time at most
