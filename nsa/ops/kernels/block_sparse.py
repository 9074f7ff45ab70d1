"""Attention of tiles of queries to lists of blocks and to columns, forward only, and the lists that it needs.

A program computes some neighbouring tokens of one tile of queries, times the heads that share a list. All its rows
attend to all blocks of the list, so nothing but the last blocks needs a mask: those that reach beyond its first token.

The keys and values of a head's columns are first copied side by side. A tile of columns is then loaded like a block.
Columns have a mask: `column_keys_kernel` writes for each tile of queries the position of every column, or NEVER for
one that lies in a listed block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import (
    count_up_to,
    load_box_parts,
    load_row_parts,
    query_rows,
    scores,
    store_output,
    tile_of_program,
)
from nsa.ops.kernels.hardware import FORWARD, INTEGERS, LOG2_E, descriptor, tile_sizes, tile_width, warpgroups
from nsa.ops.kernels.ranges import shape_constants

SIZES = ("num_blocks_listed", "num_columns", "num_rows", "tile_size", "block_size", "offset", "steps", "num_masked")
NEVER = tl.constexpr(0x7FFFFFFF)  # a position after every query
MOST_KEYS = 64  # of one load
COLUMN_BLOCK = 256  # columns that a program of `column_keys_kernel` takes at once
HOPPER_BLOCK = 64  # keys: blocks are multiples of it in the kernel for Hopper


@triton.jit(do_not_specialize=[*INTEGERS, *SIZES])
def list_kernel(Keep, Blocks, Counts, num_blocks, WIDTH: tl.constexpr):
    """Blocks (rows, num_blocks) int32: the true entries of Keep (rows, num_blocks), ascending. Counts (rows,) int32."""
    row = tl.program_id(0).to(tl.int64)
    taken = 0
    for first in tl.range(0, num_blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)  # [WIDTH]
        keep = tl.load(Keep + row * num_blocks + block, mask=block < num_blocks, other=0).to(tl.int32)  # [WIDTH]
        tl.store(Blocks + row * num_blocks + taken + tl.cumsum(keep, 0) - 1, block, mask=keep != 0)
        taken += tl.sum(keep, 0)
    tl.store(Counts + row, taken)


@triton.jit(do_not_specialize=[*INTEGERS, *SIZES])
def column_keys_kernel(Columns, Blocks, Counts, Keys, ColumnCounts, num_keys, num_columns, num_blocks_listed, num_rows,
                       tile_size, block_size, offset, steps, BLOCK: tl.constexpr):  # fmt: skip
    """Keys (B, N, R, C) int32: the positions of the columns, NEVER for those that a tile has in its blocks.

    ColumnCounts (B, N, R) int32: how many columns lie at or before the last query of the tile; Keys after these are not
    read. Columns (B, N, C), Blocks (B, N, R, L), Counts (B, N, R) as in `nsa.ops.block_sparse_attention`; 2^steps > L.
    """
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = slot * num_rows + tile
    last = tl.minimum(offset + (tile + 1) * tile_size, num_keys) - 1
    Blocks += row * num_blocks_listed
    count = tl.load(Counts + row)
    there_are = 0
    for first in tl.range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(Columns + slot * num_columns + column, mask=column < num_columns, other=-1)  # [BLOCK]
        there = (key >= 0) & (key <= last)  # [BLOCK]
        block = key // block_size  # [BLOCK]
        found = count_up_to(Blocks, block, count, steps)  # [BLOCK], listed blocks up to this one
        listed = tl.load(Blocks + found - 1, mask=found > 0, other=-1)  # [BLOCK]
        position = tl.where(there & (listed != block), key, NEVER)  # [BLOCK]
        tl.store(Keys + row * num_columns + column, position, mask=column < num_columns)
        there_are += tl.sum(there.to(tl.int32), 0)
    tl.store(ColumnCounts + row, there_are)


@triton.jit
def _forward_loop(acc, row_max, row_sum, q1, q2, position, K1, K2, V, Blocks, Keys, key_row, begin, end, num_columns,
                  k_column, v_column, block_size, scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr,
                  SPLITS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over steps ``begin .. end - 1`` of BN keys: (acc, row_max, row_sum) with them taken in.

    A step is BN columns (COLUMNS), or one of the SPLITS parts of a block. PADDED: BN does not divide the block.
    """
    for i in tl.range(begin, end):
        within = tl.arange(0, BN)  # [BN]
        if COLUMNS:
            start = i * BN
            key = tl.load(Keys + start + within, mask=start + within < num_columns, other=NEVER)  # [BN]
        else:
            in_block = i % SPLITS * BN + within  # [BN]
            start = tl.load(Blocks + i // SPLITS) * block_size + i % SPLITS * BN
            key = start + within  # [BN]
        k1, k2 = load_box_parts(K1, K2, key_row + start, k_column, D1, D2)  # [BN, D1], [BN, D2]
        s = scores(q1, q2, k1, k2, D2, PRECISION)  # [BM, BN]
        if MASKED:
            s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
        if PADDED and not COLUMNS:
            s = tl.where(in_block[None, :] < block_size, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)  # [BM]
        # A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # [BM]
        p = tl.exp2(s * scale_log2 - base[:, None])  # [BM, BN]
        rescale = tl.exp2(row_max - base)  # [BM]
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = V.load([key_row + start, v_column])  # [BN, DV1]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=[*INTEGERS, *SIZES])
def forward_kernel(Q, K1, K2, V, ColumnK1, ColumnK2, ColumnV, Out, Lse, Blocks, Counts, Keys, ColumnCounts, num_tokens,
                   num_keys, num_tiles, num_rows, num_blocks_listed, num_columns, tile_size, block_size, offset,
                   num_masked, scale_log2, SHARE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                   D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr,
                   BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
                   PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Output and LSE of BT tokens x HEADS heads that share a list; rows beyond those are idle. BT divides tile_size.

    Args:
        K1, K2, V: descriptors of (B * S, G * D or Dv). ColumnK1, ColumnK2, ColumnV: of (B * N * C, D or Dv).
        Out (B, T, H, Dv); Lse (B, T, H) fp32. Keys, ColumnCounts as from `column_keys_kernel`.
        num_masked: how many of a list's last steps may reach beyond a program's first token.
        GROUPS: lists of a sequence (N). SHARE: lists of a KV head.
    """
    tile, slot, batch, group = tile_of_program(num_tiles, GROUPS)
    row = tl.arange(0, BM)  # [BM]
    in_tile = row // HEADS  # [BM]
    token = tile * BT + in_tile  # [BM]
    ok = (in_tile < BT) & (token < num_tokens)  # [BM]
    q_row = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    position = offset + token  # [BM]
    list_row = slot.to(tl.int64) * num_rows + tile * BT // tile_size
    Blocks += list_row * num_blocks_listed
    Keys += list_row * num_columns
    count = tl.load(Counts + list_row) * SPLITS
    unmasked = tl.maximum(count - num_masked, 0)
    k_column, v_column = group // SHARE * D, group // SHARE * DV
    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM], in units of log2
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    if COLUMNS:
        there = tl.load(ColumnCounts + list_row)
        acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, position, ColumnK1, ColumnK2, ColumnV,
                                              Blocks, Keys, slot * num_columns, 0, tl.cdiv(there, BN), there, 0, 0,
                                              block_size, scale_log2, D1, D2, BN, SPLITS, True, True, PADDED,
                                              PRECISION)  # fmt: skip
    acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, position, K1, K2, V, Blocks, Keys,
                                          batch * num_keys, 0, unmasked, 0, k_column, v_column, block_size, scale_log2,
                                          D1, D2, BN, SPLITS, False, False, PADDED, PRECISION)  # fmt: skip
    acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, position, K1, K2, V, Blocks, Keys,
                                          batch * num_keys, unmasked, count, 0, k_column, v_column, block_size,
                                          scale_log2, D1, D2, BN, SPLITS, False, True, PADDED, PRECISION)  # fmt: skip
    store_output(Out, Lse, q_row, ok, acc, row_max, row_sum, DV, DV1)


def lists_of(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and counts of ``keep`` (B, N, R, U) bool, contiguous, as `nsa.ops.block_lists`."""
    blocks = torch.empty(keep.shape, dtype=torch.int32, device=keep.device)
    counts = blocks.new_zeros(keep.shape[:3])
    if keep.numel():
        width = min(1024, triton.next_power_of_2(keep.shape[3]))
        list_kernel[(counts.numel(),)](
            keep.view(torch.uint8), blocks, counts, keep.shape[3], WIDTH=width, num_warps=4
        )  # fmt: skip
    return blocks, counts


class Columns:
    """Keys and values of columns, copied side by side, and what each tile of queries sees of them.

    Attributes:
        k: (1, B * N * C, 1, D). v: (1, B * N * C, 1, Dv).
        keys, counts: as from `column_keys_kernel`.
        number: C.
    """

    def __init__(
        self, k: Tensor, v: Tensor, columns: Tensor, blocks: Tensor, counts: Tensor, tile_size: int, block_size: int,
        offset: int,
    ) -> None:  # fmt: skip
        (batch, lists, self.number), rows, groups = columns.shape, blocks.shape[2], k.shape[2]
        sequence = torch.arange(batch, device=k.device)[:, None, None]
        head = (torch.arange(lists, device=k.device) * groups // lists)[:, None]
        at = columns.clamp(min=0).long()
        self.k, self.v = (x[sequence, at, head].view(1, -1, 1, x.shape[3]) for x in (k, v))
        self.keys = blocks.new_empty(batch, lists, rows, self.number)
        self.counts = torch.empty_like(counts)
        column_keys_kernel[rows, batch * lists](
            columns, blocks, counts, self.keys, self.counts, k.shape[1], self.number, blocks.shape[3], rows, tile_size,
            block_size, offset, blocks.shape[3].bit_length(), BLOCK=COLUMN_BLOCK, num_warps=4,
        )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, columns: Tensor | None, tile_size: int,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, T, H, Dv) in q's dtype and lse (B, T, H) fp32, as `nsa.ops.block_sparse_attention`. All contiguous."""
    (batch, tokens, heads, _), (keys, groups), lists = q.shape, k.shape[1:3], blocks.shape[1]
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    offset = keys - tokens
    beside = None
    if columns is not None and columns.numel():
        beside = Columns(k, v, columns, blocks, counts, tile_size, block_size, offset)
    if on_hopper(q, k, v, lists, tile_size, block_size, scale):
        from nsa.ops.kernels.hopper import block_sparse as hopper

        masked = masked_steps(tile_size, block_size, block_size // HOPPER_BLOCK, offset)
        hopper.forward(q, k, v, blocks, counts, beside, tile_size, block_size, masked, scale, out, lse)
        return out, lse
    share = heads // lists
    constants = shape_constants(q, k, v) | {"GROUPS": lists, "HEADS": share}
    tile, options = tile_sizes("selected_forward", q, k, v)
    tile["BM"] = max(tile["BM"], triton.next_power_of_2(share))
    most = min(tile["BM"] // share, tile_size)
    tile["BT"] = next(n for n in range(most, 0, -1) if tile_size % n == 0)
    width = min(MOST_KEYS, tile_width(block_size))
    splits = triton.cdiv(block_size, width)
    near = beside or _NoColumns(k, v, counts)
    parts = constants["D1"], constants["D2"] or constants["D1"]
    tiles = triton.cdiv(tokens, tile["BT"])
    forward_kernel[(tiles * batch * lists,)](
        q, *(descriptor(k, width, part) for part in parts), descriptor(v, width, constants["DV1"]),
        *(descriptor(near.k, width, part) for part in parts), descriptor(near.v, width, constants["DV1"]), out, lse,
        blocks, counts, near.keys, near.counts, tokens, keys, tiles, blocks.shape[2], blocks.shape[3], near.number,
        tile_size, block_size, offset, masked_steps(tile_size, block_size, splits, offset), scale * LOG2_E,
        SHARE=lists // groups, **constants, **tile, BN=width, SPLITS=splits, COLUMNS=beside is not None,
        PADDED=block_size % width != 0, **options,
    )  # fmt: skip
    return out, lse


class _NoColumns:
    """Stands for `Columns` where a kernel does not read them."""

    number = 0

    def __init__(self, k: Tensor, v: Tensor, counts: Tensor) -> None:
        self.k, self.v, self.keys, self.counts = k, v, counts, counts


def masked_steps(tile_size: int, block_size: int, splits: int, offset: int) -> int:
    """How many of the last steps of a list may hold keys after the first query of its tile.

    ``splits``: steps of a block. ``offset``: position of the first query.
    """
    if offset % block_size == 0 and (tile_size % block_size == 0 or block_size % tile_size == 0):
        return max(1, tile_size // block_size) * splits
    return ((tile_size + block_size - 2) // block_size + 1) * splits


def on_hopper(q: Tensor, k: Tensor, v: Tensor, lists: int, tile_size: int, block_size: int, scale: float) -> bool:
    """Whether the kernel for Hopper supports these tensors: a program's 128 rows must lie in one tile of queries."""
    share = q.shape[2] // lists
    if not warpgroups(q, k, v, scale, FORWARD, share) or block_size % HOPPER_BLOCK:
        return False
    return tile_size % (128 // triton.next_power_of_2(share)) == 0
