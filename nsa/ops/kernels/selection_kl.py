"""The loss that teaches NSA's selection the blocks of dense attention, with its gradient (`nsa.ops.selection_kl`).

Dense attention and the compressed probabilities are summed by one kernel. Selection block j of a document has RATIO
keys: its tokens, or the compressed keys that begin in it. A compressed key covers UNITS strides, so the UNITS - 1 keys
before the block reach into it, too. The sum over a block therefore takes RATIO + UNITS - 1 keys, each times the strides
that it shares with the block. For tokens UNITS is 1, and each counts once.

Sums, and the slopes that replace them, are (B, G, M, T): neighbouring queries of one block lie side by side in memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import BlockSizes, Documents, Ranges, block_starts, cached, visible_blocks
from nsa.ops.kernels import hardware, ranges
from nsa.ops.kernels.device_functions import (
    SMALLEST_DOT,
    load_base2_lse,
    load_row_parts,
    scores,
    store_rows,
    tile_of_program,
)
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E
from nsa.ops.kernels.ranges import int32_runs, shape_constants
from nsa.ops.kernels.selection import document_tiles, local_positions

MOST_NUMBERS = 2**26  # of sums of blocks that exist at once
DIVERGENCE_TILE = (8, 128)  # blocks and queries that a program of `divergence_kernel` loads at once
KEY_PROGRAMS = 1056  # target number of programs of `key_kernel`
TILES_PER_SPLIT = 8  # tiles of queries that a program of `key_kernel` goes through at least, if it shares its keys
MOST_SPLITS = 16  # programs that share one tile of compressed keys
WIDEST_VALUES = 128  # for which wider keys have a kernel for Hopper
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LARGEST = tl.constexpr(3e38)  # nearly the largest fp32


@triton.jit
def _block_loop(total, q1, q2, lse, token, ok, seen, own, slope_row, most_seen, first_row, begin, end, K, Slope, Out,
                num_tokens, num_blocks, num_initial, num_local, scale_log2, factor, GROUPS: tl.constexpr,
                D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, RATIO: tl.constexpr, UNITS: tl.constexpr,
                BQ: tl.constexpr, HEADS_UP: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
                PARTS: tl.constexpr, MASKED: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``total`` (BM, BLOCKS) after steps ``begin .. end - 1``, of BLOCKS blocks with COLUMNS keys each.

    If PARTS > 1, a step has one block, and so many steps follow each other with its keys.
    """
    column = tl.arange(0, BLOCKS * COLUMNS)  # [BN]
    for step in tl.range(begin, end):
        block = num_initial + step // PARTS * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
        m = step % PARTS * COLUMNS + column % COLUMNS  # [BN], of the keys that reach into the block
        key = (num_initial + step // PARTS * BLOCKS + column // COLUMNS) * RATIO + m - (UNITS - 1)  # [BN]
        there = (key >= 0) & (key < most_seen)  # [BN]
        k1, k2 = load_row_parts(K, first_row + key * GROUPS, there, D, D1, D2)  # [BN, D1], [BN, D2]
        p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        if MASKED:  # keys that the query does not see may have overflowed to inf
            reaches = (key >= 0) & (m < RATIO + UNITS - 1)  # [BN]
            p = tl.where(reaches[None, :] & (key[None, :] < seen[:, None]), p, 0.0)
        if UNITS > 1:
            shared = tl.minimum(m, RATIO - 1) - tl.maximum(m - UNITS + 1, 0) + 1  # [BN]
            p *= shared.to(tl.float32)[None, :]
        sums = tl.sum(tl.reshape(p, [BQ * HEADS_UP, BLOCKS, COLUMNS]), 2)  # [BM, BLOCKS]
        if DELTA:
            at = block.to(tl.int64)[None, :] * num_tokens + slope_row[:, None]  # [BM, BLOCKS]
            total += sums * tl.load(Slope + at, mask=(lse < float("inf"))[:, None] & (block < num_blocks)[None, :],
                                    other=0.0)  # fmt: skip
        else:
            if PARTS > 1:
                total = tl.where(step % PARTS == 0, 0.0, total) + sums
            else:
                total = sums
            mean = tl.sum(tl.reshape(total, [BQ, HEADS_UP, BLOCKS]), 1) * factor  # [BQ, BLOCKS]
            inside = ok[:, None] & (block[None, :] <= own[:, None] - num_local)  # [BQ, BLOCKS]
            at = block.to(tl.int64)[None, :] * num_tokens + token[:, None]  # [BQ, BLOCKS]
            tl.store(Out + at, mean, mask=inside & (block < num_blocks)[None, :] & (step % PARTS == PARTS - 1))
    return total


@triton.jit(do_not_specialize=[*INTEGERS, "block_size"])
def block_attention_kernel(Q, K, Lse, First, Seen, Local, TileStart, TileEnd, Slope, Out, num_tokens, num_keys,
                           num_tiles, num_blocks, num_initial, num_local, block_size, scale_log2, factor,
                           GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
                           D2: tl.constexpr, RATIO: tl.constexpr, UNITS: tl.constexpr, BQ: tl.constexpr,
                           HEADS_UP: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
                           DELTA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Out (B, G, M, T) fp32 of BQ tokens, TileStart .. TileEnd - 1, of one document: ``factor`` times the probability
    of each block that the token chooses among, summed over the heads. Other blocks are not written.

    If DELTA, Out is (B, T, H) instead: for each head the sum over the blocks of its probability times Slope (B, G, M,
    T), which is 0 for blocks that the token does not choose among.

    Q (B, T, H, D), K (B, S, G, D), Lse (B, T, H). First (T,): the first key of the token's document. Seen (T,): how
    many keys from there on the token sees. Local (T,): its position in the document. A row is a head of a token, with
    the heads up to HEADS_UP, a power of two.
    """
    tile, slot, batch, group = tile_of_program(num_tiles, GROUPS)
    start, stop = tl.load(TileStart + tile), tl.load(TileEnd + tile)
    if start >= stop:
        return
    token = start + tl.arange(0, BQ)  # [BQ]
    own = tl.load(Local + token, mask=token < stop, other=0) // block_size  # [BQ], the token's own block
    row = tl.arange(0, BQ * HEADS_UP)  # [BM]
    row_token = start + row // HEADS_UP  # [BM]
    row_ok = (row_token < stop) & (row % HEADS_UP < HEADS)  # [BM]
    seen = tl.load(Seen + row_token, mask=row_ok, other=0)  # [BM]
    q_row = (batch.to(tl.int64) * num_tokens + row_token) * (GROUPS * HEADS) + group * HEADS + row % HEADS_UP  # [BM]
    q1, q2 = load_row_parts(Q, q_row, row_ok, D, D1, D2)  # [BM, D1], [BM, D2]
    lse = load_base2_lse(Lse, q_row, row_ok)  # [BM]

    # What a token sees, and its own block, rise within a document.
    least_seen, most_seen = tl.load(Seen + start), tl.load(Seen + stop - 1)
    last_block = tl.load(Local + stop - 1) // block_size - num_local
    blocks = tl.minimum(last_block + 1, tl.cdiv(most_seen + UNITS - 1, RATIO)) - num_initial
    end = tl.cdiv(tl.maximum(blocks, 0), BLOCKS) * PARTS
    full_end = 0
    if UNITS == 1 and COLUMNS * PARTS == RATIO:  # every column is a key
        full_end = tl.minimum(tl.maximum(least_seen // RATIO - num_initial, 0) // BLOCKS * PARTS, end)
    first_row = (batch.to(tl.int64) * num_keys + tl.load(First + start)) * GROUPS + group
    slot_row = slot.to(tl.int64) * num_blocks * num_tokens
    total = tl.zeros([BQ * HEADS_UP, BLOCKS], tl.float32)  # [BM, BLOCKS]
    total = _block_loop(total, q1, q2, lse, slot_row + token, token < stop, seen, own, slot_row + row_token, most_seen,
                        first_row, 0, full_end, K, Slope, Out, num_tokens, num_blocks, num_initial, num_local,
                        scale_log2, factor, GROUPS, D, D1, D2, RATIO, UNITS, BQ, HEADS_UP, BLOCKS, COLUMNS, PARTS,
                        False, DELTA, PRECISION)  # fmt: skip
    total = _block_loop(total, q1, q2, lse, slot_row + token, token < stop, seen, own, slot_row + row_token, most_seen,
                        first_row, full_end, end, K, Slope, Out, num_tokens, num_blocks, num_initial, num_local,
                        scale_log2, factor, GROUPS, D, D1, D2, RATIO, UNITS, BQ, HEADS_UP, BLOCKS, COLUMNS, PARTS,
                        True, DELTA, PRECISION)  # fmt: skip
    if DELTA:
        tl.store(Out + q_row, tl.sum(total, 1), mask=row_ok)


@triton.jit
def _choice(block, own, seen, num_initial, num_local, RATIO: tl.constexpr, UNITS: tl.constexpr):
    """(BLOCKS, BT): whether a token chooses among these blocks, of which it sees ``seen`` compressed keys."""
    first_key = tl.maximum(block * RATIO - (UNITS - 1), 0)  # [BLOCKS], the first that reaches into the block
    chosen = (block >= num_initial)[:, None] & (block[:, None] <= own[None, :] - num_local)
    return chosen & (first_key[:, None] < seen[None, :])


@triton.jit(do_not_specialize=[*INTEGERS, "block_size"])
def divergence_kernel(Target, Importance, Seen, Local, Loss, num_tokens, num_blocks, num_initial, num_local, block_size,
                      RATIO: tl.constexpr, UNITS: tl.constexpr, BLOCKS: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Loss (B, G, T) fp32 of BT tokens; Importance (B, G, M, T) becomes its slope.

    Target (B, G, M, T). Seen (T,): how many compressed keys the token sees. Local (T,): its position in the document.
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)  # [BT]
    ok = token < num_tokens  # [BT]
    seen = tl.load(Seen + token, mask=ok, other=0)  # [BT]
    own = tl.load(Local + token, mask=ok, other=-1) // block_size  # [BT]
    slot = tl.program_id(1).to(tl.int64)
    end = tl.minimum(tl.max(own, 0) - num_local + 1, num_blocks)
    mass, whole = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)  # [BT], [BT]
    for start in tl.range(num_initial, end, BLOCKS):
        block = start + tl.arange(0, BLOCKS)  # [BLOCKS]
        at = (slot * num_blocks + block)[:, None] * num_tokens + token[None, :]  # [BLOCKS, BT]
        choice = _choice(block, own, seen, num_initial, num_local, RATIO, UNITS) & ok[None, :]  # [BLOCKS, BT]
        mass += tl.sum(tl.load(Target + at, mask=choice, other=0.0), 0)
        whole += tl.sum(tl.load(Importance + at, mask=choice, other=0.0), 0)
    whole = tl.maximum(whole, TINY)
    loss = tl.zeros([BT], tl.float32)  # [BT]
    for start in tl.range(num_initial, end, BLOCKS):
        block = start + tl.arange(0, BLOCKS)  # [BLOCKS]
        at = (slot * num_blocks + block)[:, None] * num_tokens + token[None, :]  # [BLOCKS, BT]
        choice = _choice(block, own, seen, num_initial, num_local, RATIO, UNITS) & ok[None, :]  # [BLOCKS, BT]
        target = tl.load(Target + at, mask=choice, other=0.0)  # [BLOCKS, BT]
        importance = tl.load(Importance + at, mask=choice, other=0.0)  # [BLOCKS, BT]
        known = tl.maximum(importance, TINY)  # [BLOCKS, BT]
        # The difference of logarithms: a quotient of tiny numbers may be 0.
        share = tl.log(tl.maximum(target, TINY)) - tl.log(tl.maximum(mass, TINY))[None, :]  # [BLOCKS, BT]
        loss += tl.sum(target * (share - tl.log(known) + tl.log(whole)[None, :]), 0)
        slope = (mass / whole)[None, :] - tl.where(importance > TINY, target / known, 0.0)  # [BLOCKS, BT]
        slope = tl.maximum(slope, -LARGEST / UNITS)  # a key's share of the slopes of its blocks is finite, then
        # What is no choice has no slope: also blocks that `block_attention_kernel` wrote.
        tl.store(Importance + at, tl.where(choice, slope, 0.0), mask=ok[None, :] & (block < num_blocks)[:, None])
    tl.store(Loss + slot * num_tokens + token, loss, mask=ok)


@triton.jit(do_not_specialize=[*INTEGERS, "pitch"])
def key_kernel(Q, K, Lse, Delta, Slope, Seen, Tiles, DK, num_tokens, num_keys, num_splits, num_blocks, pitch,
               scale_log2, scale, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
               D2: tl.constexpr, RATIO: tl.constexpr, UNITS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
               BLOCKS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DK (splits, B, S, G, D) fp32 of up to BN compressed keys of one document, from one split: a share of the tokens
    that see some of them.

    Tiles (5, pitch): as from `_key_tiles`. Seen (T,): how many keys of its document a token sees. Lse, Delta (B, T, H).
    Slope (B, G, M, T). BLOCKS: a power of two, no tile reaches into more blocks.
    """
    slots = tl.num_programs(1)
    split, tile = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    slot = tl.program_id(1)
    batch, group = slot // GROUPS, slot % GROUPS
    Tiles += tile
    key0, stop, place0 = tl.load(Tiles), tl.load(Tiles + pitch), tl.load(Tiles + 2 * pitch)
    key = key0 + tl.arange(0, BN)  # [BN]
    k_row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group  # [BN]
    k1, k2 = load_row_parts(K, k_row, key < stop, D, D1, D2)  # [BN, D1], [BN, D2]
    place = place0 + tl.arange(0, BN)  # [BN], the key's number within its document
    block = place0 // RATIO + tl.arange(0, BLOCKS)  # [BLOCKS]
    here = tl.minimum(UNITS, RATIO - place % RATIO)  # [BN], strides in the block where the key begins
    shared = tl.where(block[:, None] == (place // RATIO)[None, :], here[None, :], 0)  # [BLOCKS, BN]
    if UNITS > 1:
        shared += tl.where(block[:, None] == (place // RATIO + 1)[None, :], UNITS - here[None, :], 0)
    shared = shared.to(tl.float32)
    Slope += slot.to(tl.int64) * num_blocks * num_tokens  # that many fit an int32: MOST_NUMBERS

    token0, token1 = tl.load(Tiles + 3 * pitch), tl.load(Tiles + 4 * pitch)
    tiles = tl.cdiv(tl.maximum(tl.where(key0 < stop, token1 - token0, 0), 0), BT).to(tl.int64)
    begin, end = (tiles * split // num_splits).to(tl.int32), (tiles * (split + 1) // num_splits).to(tl.int32)
    dk1 = tl.zeros([BN, D1], tl.float32)  # [BN, D1]
    dk2 = tl.zeros([BN, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BN, D2], unused if D2 is 0
    # One loop over tiles and heads, though a tile's slopes serve all heads: with a product in the outer of two loops
    # Triton 3.7.1 fails for sm_100.
    for i in tl.range(begin * HEADS, end * HEADS):
        token = token0 + i // HEADS * BT + tl.arange(0, BT)  # [BT]
        ok = token < token1  # [BT]
        seen = tl.load(Seen + token, mask=ok, other=0) - place0  # [BT], of the tile
        slope = tl.load(Slope + ((block * num_tokens)[None, :] + token[:, None]),
                        mask=ok[:, None] & (block < num_blocks)[None, :], other=0.0)  # [BT, BLOCKS]  # fmt: skip
        d_p = tl.dot(slope, shared, input_precision=PRECISION)  # [BT, BN]
        row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + i % HEADS  # [BT]
        q1, q2 = load_row_parts(Q, row, ok, D, D1, D2)  # [BT, D1], [BT, D2]
        # Tokens are the rows: so a thread has few LSEs and deltas.
        p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - load_base2_lse(Lse, row, ok)[:, None])
        ds = p * (d_p - tl.load(Delta + row, mask=ok, other=0.0)[:, None])  # [BT, BN]
        ds = tl.where(tl.arange(0, BN)[None, :] < seen[:, None], ds, 0.0).to(q1.dtype)  # [BT, BN]
        dk1 = tl.dot(ds.T, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds.T, q2, dk2, input_precision=PRECISION)
    out_row = k_row + split.to(tl.int64) * (slots // GROUPS) * num_keys * GROUPS  # [BN]
    store_rows(DK, out_row, key < stop, tl.arange(0, D1), D, dk1 * scale)
    if D2 > 0:
        store_rows(DK, out_row, key < stop, D1 + tl.arange(0, D2), D, dk2 * scale)


class _Keys(NamedTuple):
    """The keys that are summed by blocks, and which of them a query sees.

    Attributes:
        k: (B, S, G, D), contiguous. first: (T,) int32, the first key of each query's document. seen: (T,) int32, how
            many keys from there on it sees. ratio, units: see the module's docstring.
    """

    k: Tensor
    first: Tensor
    seen: Tensor
    ratio: int
    units: int


def block_attention(
    q: Tensor, k: Tensor, lse: Tensor, documents: Documents, sizes: BlockSizes, longest: int, scale: float
) -> Tensor:
    """(B, G, M, T) fp32: the target of `nsa.ops.selection_kl`, with M blocks of ``longest`` tokens.

    Args:
        q: (B, T, H, D), k: (B, S, G, D), lse: (B, T, H) fp32; all contiguous. longest: no document has more tokens.
    """
    keys = _Keys(k, *_outside_of_window(documents, sizes.window), sizes.block_size, 1)
    out = q.new_zeros(len(q), k.shape[2], triton.cdiv(longest, sizes.block_size), q.shape[1], dtype=torch.float32)
    return _sums(q, lse, keys, documents, sizes, None, out, k.shape[2] / q.shape[2], scale)


def divergence(
    q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int,
    positions: Tensor | None, sizes: BlockSizes, longest: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss (), fp32, and its gradient with respect to k_cmp (B, M, G, D); other arguments as `block_attention`.

    Queries are at ``positions`` (T,) int32, or if that is None at ``offset`` and behind.
    """
    (batch, tokens), groups = q.shape[:2], k.shape[2]
    total = q.new_zeros((), dtype=torch.float32)
    if not q.numel() or not k_cmp.numel():
        return total, torch.zeros_like(k_cmp)
    blocks = triton.cdiv(longest, sizes.block_size)
    rows = max(1, min(tokens, MOST_NUMBERS // (batch * groups * blocks)))
    gradient = None
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        part = slice(start, stop)
        if positions is None:
            documents = Documents.of(stop - start, offset + start, cu_seqlens, q.device)
        else:  # of the tensor itself, if that is all of it: its documents are known
            documents = Documents.at(positions if rows == tokens else positions[part], k.shape[1], cu_seqlens)
        found, d_k = _learn(
            q[:, part].contiguous(), k_cmp, k, lse[:, part].contiguous(), documents, sizes, longest, scale
        )
        total = total + found
        gradient = d_k if gradient is None else gradient + d_k
    assert gradient is not None
    return total / groups, gradient.to(k_cmp.dtype)


def _learn(
    q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, documents: Documents, sizes: BlockSizes, longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `divergence`, of a chunk of queries: the sum over KV heads, and the fp32 gradient of their mean."""
    (batch, tokens), groups = q.shape[:2], k.shape[2]
    visible = visible_blocks(documents, sizes.length, sizes.stride)
    first, last = int32_runs(visible)
    ratio, units = sizes.block_size // sizes.stride, sizes.length // sizes.stride
    keys = _Keys(k_cmp, first, _counts(visible), ratio, units)
    target = block_attention(q, k, lse, documents, sizes, longest, scale)
    values = k_cmp[..., :WIDEST_VALUES].contiguous()  # any will do, since the LSE alone is taken
    _, lse_cmp = ranges.forward(q, k_cmp, values, first, last, scale)
    importance = torch.zeros_like(target)
    _sums(q, lse_cmp, keys, documents, sizes, None, importance, 1.0, scale)
    loss = target.new_empty(batch, groups, tokens)
    wide, long = (4, 16) if INTERPRETED else DIVERGENCE_TILE
    divergence_kernel[triton.cdiv(tokens, long), batch * groups](
        target, importance, keys.seen, local_positions(documents), loss, tokens, target.shape[2], sizes.num_initial,
        sizes.num_local, sizes.block_size, RATIO=ratio, UNITS=units, BLOCKS=wide, BT=long, num_warps=4,
    )  # fmt: skip
    slope = importance
    delta = _sums(q, lse_cmp, keys, documents, sizes, slope, torch.empty_like(lse_cmp), 1.0, scale)

    count, (tile, options) = k_cmp.shape[1], key_tile(q, ratio)
    tiles = _key_tiles(documents, sizes.length, sizes.stride, count, tile["BN"])
    full_tiles = triton.cdiv(count, tile["BN"]) * batch * groups  # documents make more of them, but no more work
    splits = max(1, min(MOST_SPLITS, KEY_PROGRAMS // full_tiles, tokens // (TILES_PER_SPLIT * tile["BT"])))
    d_key = target.new_zeros(splits, *k_cmp.shape)
    key_kernel[tiles.shape[1] * splits, batch * groups](
        q, k_cmp, lse_cmp, delta, slope, keys.seen, tiles, d_key, tokens, count, splits, target.shape[2],
        tiles.shape[1], scale * LOG2_E, scale / groups, **_constants(q, k_cmp), RATIO=ratio, UNITS=units, **tile,
        **options,
    )  # fmt: skip
    return loss.sum(), d_key.sum(0)


def _sums(
    q: Tensor, lse: Tensor, keys: _Keys, documents: Documents, sizes: BlockSizes, slope: Tensor | None,
    out: Tensor, factor: float, scale: float,
) -> Tensor:  # fmt: skip
    """``out`` (B, G, M, T), zeros before: the sums of blocks. With a slope (B, G, M, T): (B, T, H), the deltas."""
    (batch, tokens), groups = q.shape[:2], keys.k.shape[2]
    blocks = (out if slope is None else slope).shape[2]
    if not out.numel() or not keys.k.numel():
        return out
    tile, options = block_tile(q, keys.k, keys.ratio + keys.units - 1)
    start, end = document_tiles(documents, tile["BQ"])
    block_attention_kernel[(len(start) * batch * groups,)](
        q, keys.k, lse, keys.first, keys.seen, local_positions(documents), start, end, slope, out, tokens,
        keys.k.shape[1], len(start), blocks, sizes.num_initial, sizes.num_local, sizes.block_size, scale * LOG2_E,
        factor, **_constants(q, keys.k), RATIO=keys.ratio, UNITS=keys.units, **tile, DELTA=slope is not None,
        **options,
    )  # fmt: skip
    return out


def block_tile(q: Tensor, k: Tensor, reach: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile constants and launch options of `block_attention_kernel`, where ``reach`` keys reach into a block."""
    width = q.shape[3]
    if INTERPRETED:
        rows, keys, warps, stages = 16, 16, 4, 1
    elif q.element_size() == 2:
        rows, keys, warps, stages = (128, 128, 8, 3 if width <= 64 else 2) if width <= 128 else (64, 64, 4, 2)
    else:
        rows, keys, warps, stages = 64, 32, 4, 1
    heads_up = triton.next_power_of_2(q.shape[2] // k.shape[2])
    columns = min(keys, triton.next_power_of_2(reach))
    tile = {"BQ": max(1, rows // heads_up), "HEADS_UP": heads_up, "BLOCKS": keys // columns, "COLUMNS": columns}
    return tile | {"PARTS": triton.cdiv(reach, columns)}, {"num_warps": warps, "num_stages": stages}


def key_tile(q: Tensor, ratio: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile constants and launch options of `key_kernel`, where ``ratio`` compressed keys begin in a block."""
    if INTERPRETED:
        rows, keys, warps = 16, 16, 4
    elif q.element_size() == 2:
        few = q.shape[3] <= 64 or (q.shape[3] <= 128 and hardware.architecture() == "sm_90")  # without spills
        rows, keys, warps = (64, 64 if q.shape[3] <= 128 else 32, 4 if few else 8)
    else:
        rows, keys, warps = 32, 32, 8
    blocks = (keys + ratio - 2) // ratio + 2  # the first may begin before the tile, and the last reach into one more
    tile = {"BT": rows, "BN": keys, "BLOCKS": max(16, triton.next_power_of_2(blocks))}
    return tile, {"num_warps": warps, "num_stages": 1}  # with 2 ptxas has products of D 64 wait for each other


def _constants(q: Tensor, k: Tensor) -> dict[str, int | str]:
    return {name: value for name, value in shape_constants(q, k, k).items() if name not in ("DV", "DV1")}


@cached
def _counts(visible: Ranges) -> Tensor:
    """(T,) int32, how many keys each query sees."""
    return (visible.last - visible.first).int()


@cached
def _outside_of_window(documents: Documents, window: int) -> tuple[Tensor, Tensor]:
    """(T,) int32 each: the first token of each query's document, and how many of it precede the window."""
    first = documents.bounds[documents.query_document]
    return first.int(), (documents.query_local - window + 1).clamp(min=0).int()


@cached
def _key_tiles(documents: Documents, length: int, stride: int, count: int, size: int) -> Tensor:
    """(5, n) int32 of tiles of at most ``size`` of ``count`` compressed keys, each within one document.

    The first key, the one behind the last, the number of the first within its document, and the range of queries that
    see some of them. Tiles may be empty.
    """
    bounds = documents.compressed_bounds(length, stride)
    counts = torch.nn.functional.pad(((bounds[1:] - bounds[:-1] + size - 1) // size).cumsum(0), (1, 0))
    start, document = block_starts(bounds, counts, size, count // size + len(bounds) - 1)
    end = torch.minimum(start + size, bounds[document + 1]).clamp(max=count)
    place = start - bounds[document]
    first = documents.bounds[document] + place * stride + length - 1
    queries = torch.searchsorted(documents.query_position, torch.stack([first, documents.bounds[document + 1]]))
    return torch.stack([start, end, place, *queries]).int()
