"""Attention of each query to a list of tokens (DSA), forward and backward.

Neighbouring queries list much the same tokens. So a program takes a tile of a few neighbouring queries, with all heads
of a KV head, and goes through the union of their lists, BN keys at a time. A byte for each key of the union tells which
queries list it; for the others its score is -inf. Queries that share little cost more products, not more than their
number times.

dK and dV of a key are sums over the queries that list it. Atomic adds would make their order, and so their bits, depend
on chance. Instead each tile writes its part for each slot of its union (the sum over its heads and queries). For each
key, the slots that have it are found in the order of the tiles, and one program adds their parts up. This goes in
chunks of queries, so that the parts take PART_BYTES at most.

The backward pass also gives the sums of the probabilities over the heads, which are the target of DSA's indexer: see
`nsa.ops.kernels.indexer_kl_tiles`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels import hardware
from nsa.ops.kernels.device_functions import (
    SMALLEST_DOT,
    load_base2_lse,
    load_row_parts,
    load_rows,
    scores,
    store_output,
    store_query_gradient,
    store_rows,
)
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, tile_width
from nsa.ops.kernels.ranges import shape_constants

PART_BYTES = 2**31  # of the parts of a chunk of queries
MOST_QUERIES = 1024  # of a chunk
MOST_ROWS = 64  # heads of a program
MOST_COLUMNS = 1024  # of a program of `sum_kernel`
GATHERED = 8192  # elements that such a program loads at once
SUMMED = 512  # keys times tiles of such a program, if it takes several keys
USERS = 2048  # keys times tiles of a program of `users_kernel`
# Neighbouring queries list much the same keys. So many of them at most share a tile: a bit of a byte each.
MOST_UNITED = 8
TILE_ROWS = {2: 128, 4: 16}  # rows of a tile at most, by the bytes of an element
UNION_BLOCK = 4096  # slots, or keys, that a program of `union_kernel` loads at once
UNION_BYTES = 2**27  # of the unions of a chunk of queries in the forward pass


@triton.jit
def tile_rows(tile, num_queries, QUERIES: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """(query of the chunk, number within its tile, head, whether it exists), each [BM], of a tile of QUERIES queries.

    A query has ROWS rows, of which HEADS are heads.
    """
    member, head = tl.arange(0, BM) // ROWS, tl.arange(0, BM) % ROWS  # [BM]
    query = tile * QUERIES + member  # [BM]
    return query, member, head, (head < HEADS) & (member < QUERIES) & (query < num_queries)


@triton.jit
def united_slots(Union, Members, start, count, key_row, BN: tl.constexpr):
    """(int64 rows of the keys [BN], whether the slot has one [BN], the set of its queries [BN]) of slots on."""
    slot = start + tl.arange(0, BN)  # [BN]
    key = tl.load(Union + slot, mask=slot < count, other=0)  # [BN]
    return key_row + key, slot < count, tl.load(Members + slot, mask=slot < count, other=0).to(tl.int32)


@triton.jit
def add_rows(X, row, ok, column, D, value):
    """Adds to rows of X (.., D) at int64 row numbers."""
    store_rows(X, row, ok, column, D, load_rows(X, row, ok, column, D) + value)


@triton.jit
def query_sum(x, ROWS: tl.constexpr):
    """(BM / ROWS, BN): the sums over the ROWS rows of each query of x (BM, BN)."""
    return tl.sum(tl.reshape(x, [x.shape[0] // ROWS, ROWS, x.shape[1]]), 1)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "num_queries"])
def forward_kernel(Q, K, V, Union, Members, Count, Out, Lse, token0, num_queries, num_tokens, num_keys, num_slots,
                   scale_log2, QUERIES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                   D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Output and LSE of ROWS heads of a KV head, of a tile of queries.

    Q, Out (B, T, H, D or Dv); K, V (B, S, G, D or Dv); Union, Members (B, tiles, slots), Count (B, tiles): see
    `union_kernel`; Lse (B, T, H) fp32.
    """
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    group = tl.program_id(1) // parts
    query, member, head, ok = tile_rows(tile, num_queries, QUERIES, ROWS, HEADS, BM)
    head += tl.program_id(1) % parts * ROWS
    ok = ok & (head < HEADS)
    q_row = ((batch * num_tokens + token0 + query) * GROUPS + group) * HEADS + head  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    place = batch * tl.num_programs(0) + tile
    Union += place * num_slots
    Members += place * num_slots
    count = tl.load(Count + place)
    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM], in units of log2
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    for start in tl.range(0, count, BN):
        row, listed, queries = united_slots(Union, Members, start, count, batch * num_keys, BN)  # [BN]
        row = row * GROUPS + group  # [BN]
        k1, k2 = load_row_parts(K, row, listed, D, D1, D2)  # [BN, D1], [BN, D2]
        s = scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2  # [BM, BN]
        s = tl.where(((queries[None, :] >> member[:, None]) & 1) == 1, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))  # [BM]
        # A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # [BM]
        p = tl.exp2(s - base[:, None])  # [BM, BN]
        rescale = tl.exp2(row_max - base)  # [BM]
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = load_rows(V, row, listed, tl.arange(0, DV1), DV)  # [BN, DV1]
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    store_output(Out, Lse, q_row, ok, acc, row_max, row_sum, DV, DV1)


@triton.jit
def _store_part(Parts, at, ok, column, D, value):
    """Rows (rows, columns) of which the first column lies at ``at``."""
    value = value.to(Parts.dtype.element_ty)
    tl.store(Parts + at[:, None] + column[None, :], value, mask=ok[:, None] & (column[None, :] < D))


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "num_queries"])
def backward_kernel(Q, K, V, Union, Members, Count, DOut, Lse, Delta, DQ, Parts, token0, num_queries, num_tokens,
                    num_keys, num_slots, scale_log2, scale, Sums, QUERIES: tl.constexpr, ROWS: tl.constexpr,
                    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                    D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """DQ of all heads of a KV head of a tile of queries, and the tile's parts of dK and dV.

    Union, Members (B, tiles, slots), Count (B, tiles): see `union_kernel`. Parts (B, tiles, slots, G, D + Dv): dK, then
    dV. Sums (G, B, tiles, QUERIES, slots) fp32: the probabilities, summed over the heads of each KV head; 0 where the
    query does not list the key; None: they are not stored. Other arguments as in `forward_kernel`.
    """
    tile, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    query, member, head, ok = tile_rows(tile, num_queries, QUERIES, ROWS, HEADS, BM)
    q_row = ((batch * num_tokens + token0 + query) * GROUPS + group) * HEADS + head  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    d_out = load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
    lse = load_base2_lse(Lse, q_row, ok)  # [BM]
    delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
    place = batch * tl.num_programs(0) + tile
    Union += place * num_slots
    Members += place * num_slots
    count = tl.load(Count + place)
    dq1 = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
    dq2 = tl.zeros([BM, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BM, D2], unused if D2 is 0
    for start in tl.range(0, count, BN):
        row, listed, queries = united_slots(Union, Members, start, count, batch * num_keys, BN)  # [BN]
        row = row * GROUPS + group  # [BN]
        k1, k2 = load_row_parts(K, row, listed, D, D1, D2)  # [BN, D1], [BN, D2]
        v = load_rows(V, row, listed, tl.arange(0, DV1), DV)  # [BN, DV1]
        p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        p = tl.where(((queries[None, :] >> member[:, None]) & 1) == 1, p, 0.0)
        ds = (p * (tl.dot(d_out, v.T, input_precision=PRECISION) - delta[:, None])).to(k1.dtype)  # [BM, BN]
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        part = ((place * num_slots + start + tl.arange(0, BN)) * GROUPS + group) * (D + DV)  # [BN]
        dk1 = tl.dot(tl.trans(ds), q1, input_precision=PRECISION) * scale  # [BN, D1]
        _store_part(Parts, part, listed, tl.arange(0, D1), D, dk1)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
            dk2 = tl.dot(tl.trans(ds), q2, input_precision=PRECISION) * scale  # [BN, D2]
            _store_part(Parts, part, listed, D1 + tl.arange(0, D2), D, dk2)
        dv = tl.dot(tl.trans(p.to(d_out.dtype)), d_out, input_precision=PRECISION)  # [BN, DV1]
        _store_part(Parts, part + D, listed, tl.arange(0, DV1), DV, dv)
        if Sums is not None:
            of_tile = tl.arange(0, BM // ROWS)  # [BM / ROWS], of which QUERIES are queries
            at = (group * tl.num_programs(2) * tl.num_programs(0) + place) * QUERIES + of_tile
            at = at[:, None] * num_slots + start + tl.arange(0, BN)[None, :]
            tl.store(Sums + at, query_sum(p, ROWS), mask=(of_tile < QUERIES)[:, None] & listed[None, :])
    store_query_gradient(DQ, q_row, ok, dq1, dq2, scale, D, D1, D2, False)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "num_queries"])
def union_kernel(Lists, Seen, Union, Members, Count, token0, num_queries, num_tokens, num_keys, num_slots,
                 QUERIES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Union (B, tiles, QUERIES * slots) int32: the keys that a tile of QUERIES queries lists, ascending.

    Members, likewise, uint8: bit i is set where query i of the tile lists the key. Count (B, tiles) int32: of the keys.
    Seen (B, tiles, S) uint8 is 0, before and afterwards.
    """
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = batch * tl.num_programs(0) + tile
    Seen += place * num_keys
    Union += place * num_slots * QUERIES
    Members += place * num_slots * QUERIES
    Lists += (batch * num_tokens + token0 + tile * QUERIES) * num_slots
    least, most = num_keys, -1
    for query in tl.range(0, tl.minimum(QUERIES, num_queries - tile * QUERIES)):
        for start in tl.range(0, num_slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)  # [BLOCK]
            key = tl.load(Lists + query * num_slots + slot, mask=slot < num_slots, other=-1)  # [BLOCK]
            bits = tl.load(Seen + key, mask=key >= 0, other=0).to(tl.int32) | (1 << query)  # [BLOCK]
            tl.store(Seen + key, bits.to(tl.uint8), mask=key >= 0)
            least = tl.minimum(least, tl.min(tl.where(key >= 0, key, num_keys)))
            most = tl.maximum(most, tl.max(key))
        tl.debug_barrier()  # the next query sees what other threads of the program stored
    count = 0
    for start in tl.range(least // 16 * 16, most + 1, BLOCK):
        key = start + tl.arange(0, BLOCK)  # [BLOCK]
        bits = tl.load(Seen + key, mask=key < num_keys, other=0)  # [BLOCK]
        some = bits != 0  # [BLOCK]
        slot = count + tl.cumsum(some.to(tl.int32), 0) - 1  # [BLOCK]
        tl.store(Union + slot, key, mask=some)
        tl.store(Members + slot, bits, mask=some)
        tl.store(Seen + key, tl.zeros([BLOCK], tl.uint8), mask=some)
        count += tl.sum(some.to(tl.int32))
    tl.store(Count + place, count)


@triton.jit(do_not_specialize=[*INTEGERS, "row0", "num_rows"])
def invert_kernel(Lists, Count, Slots, row0, num_rows, num_keys, num_slots, TILES: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Slots (B, S, TILES) int16 or int32: the slot in which each tile of the chunk lists key s. Filled with -1.

    Lists (B, rows, slots) int32: the keys of a tile, row ``row0`` + i for tile i, or -1. Count (B, tiles) int32: how
    many slots have a key; None: any of them may have one.
    """
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Lists += (batch * num_rows + row0 + tile) * num_slots
    count = num_slots
    if Count is not None:
        count = tl.load(Count + batch * tl.num_programs(0) + tile)
    for start in tl.range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(Lists + slot, mask=slot < count, other=-1)  # [BLOCK]
        tl.store(Slots + (batch * num_keys + key) * TILES + tile, slot.to(Slots.dtype.element_ty), mask=key >= 0)


@triton.jit(do_not_specialize=INTEGERS)
def users_kernel(Slots, Users, Number, Listed, num_keys, num_slots, TILES: tl.constexpr,
                 KEYS: tl.constexpr):  # fmt: skip
    """Users (B, S, TILES) int32: the numbers tile * slots + slot that list each key. Number (B, S): of them.

    A program takes KEYS keys, as far as they lie among those that the chunk lists: Listed (2,), the least and the most.
    Slots is -1 again afterwards, for the next chunk.
    """
    first = tl.program_id(0) * KEYS
    least, most = tl.load(Listed), tl.load(Listed + 1)
    if (first <= most) & (first + KEYS > least):
        tile, key = tl.arange(0, TILES), first + tl.arange(0, KEYS)  # [TILES], [KEYS]
        ok = (key >= least) & (key <= most)  # [KEYS]
        row = tl.program_id(1).to(tl.int64) * num_keys + key  # [KEYS]
        at = row[:, None] * TILES + tile[None, :]  # [KEYS, TILES]
        slot = tl.load(Slots + at, mask=ok[:, None], other=-1).to(tl.int32)
        lists = slot >= 0
        rank = tl.cumsum(lists.to(tl.int32), 1) - 1
        tl.store(Users + row[:, None] * TILES + rank, tile[None, :] * num_slots + slot, mask=lists)
        tl.store(Slots + at, tl.full([KEYS, TILES], -1, Slots.dtype.element_ty), mask=lists)
        tl.store(Number + row, tl.sum(lists.to(tl.int32), 1), mask=ok)


@triton.jit(do_not_specialize=INTEGERS)
def sum_kernel(Parts, Users, Number, Listed, Total, num_keys, num_slots, num_tiles, WIDTH: tl.constexpr,
               COLUMNS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, GATHERED: tl.constexpr):  # fmt: skip
    """Adds Parts (B, tiles of the chunk, slots, WIDTH) of a key's users to COLUMNS of Total (B, S, WIDTH) fp32.

    A program takes KEYS keys, and loads GATHERED parts at a time, as many of each.
    """
    first, batch = tl.program_id(0) * KEYS, tl.program_id(2).to(tl.int64)
    least, most = tl.load(Listed), tl.load(Listed + 1)
    key = first + tl.arange(0, GATHERED) % KEYS  # [GATHERED]
    if KEYS == 1:
        number = tl.load(Number + batch * num_keys + first, mask=(first >= least) & (first <= most), other=0)
        largest = number
    else:
        number = tl.load(Number + batch * num_keys + key, mask=(key >= least) & (key <= most), other=0)  # [GATHERED]
        largest = tl.max(number)  # keys out of these bounds have no number
    if largest > 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
        total = tl.zeros([KEYS, COLUMNS], tl.float32)  # [KEYS, COLUMNS]
        for start in tl.range(0, largest, GATHERED // KEYS):
            rank = start + tl.arange(0, GATHERED) // KEYS  # [GATHERED]
            at = (batch * num_keys + key) * TILES + rank  # [GATHERED]
            user = tl.load(Users + at, mask=rank < number, other=0)  # [GATHERED]
            row = batch * num_tiles * num_slots + user  # [GATHERED]
            parts = load_rows(Parts, row, rank < number, column, WIDTH).to(tl.float32)  # [GATHERED, COLUMNS]
            total += tl.sum(tl.reshape(parts, [GATHERED // KEYS, KEYS, COLUMNS]), 0)
        to = first + tl.arange(0, KEYS)  # [KEYS]
        add_rows(Total, batch * num_keys + to, (to >= least) & (to <= most), column, WIDTH, total)


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, T, H, Dv) in q's dtype and lse (B, T, H) fp32.

    Args:
        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv), lists (B, T, slots) int32: contiguous.
    """
    (batch, tokens, heads, width), (keys, groups), slots = q.shape, k.shape[1:3], lists.shape[2]
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    if not (q.numel() and k.numel() and lists.numel()):
        return out.zero_(), lse.fill_(-torch.inf)
    constants, of_group = shape_constants(q, k, v), heads // groups
    row_bytes = max(width, v.shape[3]) * q.element_size()
    rows = min(MOST_ROWS, triton.next_power_of_2(of_group))
    queries = _queries_of_tile(rows, slots, TILE_ROWS[q.element_size()] // (2 if row_bytes > 256 else 1))
    tile = {"QUERIES": queries, "ROWS": rows, "BM": tile_width(queries * rows)}
    options = union_options(tile["BM"], row_bytes)
    chunk = UNION_BYTES // (batch * (5 * slots + keys // queries)) // queries * queries
    for tiles in _united(lists, keys, max(queries, min(tokens, chunk)), queries):
        forward_kernel[tiles.union.shape[1], groups * triton.cdiv(of_group, rows), batch](
            q, k, v, tiles.union, tiles.members, tiles.count, out, lse, tiles.token, tiles.here, tokens, keys,
            tiles.union.shape[2], scale * LOG2_E, **constants, **tile, **options,
        )  # fmt: skip
    return out, lse


class Tiles(NamedTuple):
    """Tiles of neighbouring queries with the keys that one of them lists.

    Attributes:
        token: the first query of the chunk. here: the number of its queries.
        union (B, tiles, slots) int32, members (B, tiles, slots) uint8, count (B, tiles) int32: see `union_kernel`.
            If each query is alone: the lists of all queries (B, T, slots), None and None.
    """

    token: int
    here: int
    union: Tensor
    members: Tensor | None
    count: Tensor | None


def _queries_of_tile(rows: int, slots: int, most_rows: int) -> int:
    """How many queries share a tile, a power of two, if each has ``rows`` rows; their slots must fit an int16."""
    most = max(1, min(MOST_UNITED, most_rows // rows, 2**15 // slots))
    return 1 << (most.bit_length() - 1)


def _united(lists: Tensor, keys: int, chunk: int, queries: int) -> Iterator[Tiles]:
    """Tiles of ``queries`` queries, for each ``chunk`` of the queries of lists (B, T, slots) int32."""
    batch, tokens, slots = lists.shape
    tiles = triton.cdiv(chunk, queries)
    seen = lists.new_zeros(batch, tiles, keys, dtype=torch.uint8)
    union, members = (lists.new_empty(batch * tiles * queries * slots, dtype=x) for x in (torch.int32, torch.uint8))
    count = lists.new_empty(batch * tiles)
    for token in range(0, tokens, chunk):
        here = min(chunk, tokens - token)
        number = triton.cdiv(here, queries)
        union_kernel[number, batch](
            lists, seen, union, members, count, token, here, tokens, keys, slots, queries,
            64 if INTERPRETED else UNION_BLOCK, num_warps=8,
        )  # fmt: skip
        shape = (batch, number, queries * slots)
        size = batch * number * queries * slots
        yield Tiles(token, here, union[:size].view(shape), members[:size].view(shape), count)


def summed_parts(
    lists: Tensor, totals: Sequence[Tensor], dtype: torch.dtype, queries: int | None, beside: int = 0
) -> Iterator[tuple[Tiles, list[Tensor]]]:  # fmt: skip
    """Adds to ``totals`` what the caller writes for each slot of the union of a tile's lists.

    Args:
        lists: (B, T, slots) int32.
        totals: each (B, S, columns) fp32. The parts of each are PART_BYTES at most.
        queries: of a tile. None: each query has parts for the slots of its own list, and there is no union.
        beside: bytes of a query that the caller needs beside its parts; PART_BYTES are of both.

    Yields:
        the tiles of a chunk of queries, and for each total room for their parts (B, tiles, slots, columns) in
        ``dtype``. They are summed before the next chunk.
    """
    (batch, tokens, slots), keys = lists.shape, totals[0].shape[1]
    columns = max(total.shape[2] for total in totals)
    of_tile = queries or 1
    chunk = max(16, min(MOST_QUERIES, tokens, PART_BYTES // (batch * (slots * columns * dtype.itemsize + beside))))
    chunk = triton.cdiv(chunk, of_tile) * of_tile
    most = triton.next_power_of_2(chunk // of_tile)
    number_dtype = torch.int16 if of_tile * slots <= 2**15 else torch.int32
    inverse = lists.new_full((batch, keys, most), -1, dtype=number_dtype)
    listed = _least_and_most(lists, chunk, keys)
    users, number = lists.new_empty(batch, keys, most), lists.new_empty(batch, keys)
    parts = [x.new_empty(batch * chunk * slots * x.shape[2], dtype=dtype) for x in totals]
    keys_at_once = max(1, USERS // most)
    alone = (Tiles(token, min(chunk, tokens - token), lists, None, None) for token in range(0, tokens, chunk))
    chunks = alone if queries is None else _united(lists, keys, chunk, queries)
    for bounds, tiles in zip(listed, chunks, strict=True):
        width, tile_count = tiles.union.shape[2], triton.cdiv(tiles.here, of_tile)
        invert_kernel[tile_count, batch](
            tiles.union, tiles.count, inverse, tiles.token if queries is None else 0, tiles.union.shape[1], keys, width,
            most, 64 if INTERPRETED else 512, num_warps=4,
        )  # fmt: skip
        users_kernel[triton.cdiv(keys, keys_at_once), batch](
            inverse, users, number, bounds, keys, width, most, keys_at_once, num_warps=4
        )
        yield tiles, parts
        for part, total in zip(parts, totals, strict=True):
            columns = total.shape[2]
            at_once = min(MOST_COLUMNS, tile_width(columns))
            gathered = min(64, GATHERED // at_once)
            keys_of_sum = max(1, min(gathered // 8, SUMMED // most))
            sum_kernel[triton.cdiv(keys, keys_of_sum), triton.cdiv(columns, at_once), batch](
                part, users, number, bounds, total, keys, width, tile_count, columns, at_once, most, keys_of_sum,
                gathered, num_warps=4,
            )  # fmt: skip


def _least_and_most(lists: Tensor, chunk: int, keys: int) -> Tensor:
    """(chunks, 2) int32: the least and the most key that the queries of each chunk list; (keys, -1) if none does."""
    found = []
    for part in lists.split(chunk, dim=1):
        found.append(torch.stack((part.masked_fill(part < 0, keys).amin(), part.amax())))
    return torch.stack(found)


class Learner(Protocol):
    """What learns from the probabilities of a chunk of queries, summed over the heads, in the backward pass.

    Attributes:
        total: (B, S, columns) fp32, to which its parts are added.
    """

    total: Tensor

    def learn(self, tiles: Tiles, queries: int, sums: Tensor, parts: Tensor) -> None:
        """sums: of `backward_kernel`, of tiles of ``queries`` queries. parts: room for (B, tiles, slots, columns), in
        q's dtype."""


def backward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float,
    learner: Learner | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k, v.

    Args:
        q, k, v, lists: as for `forward`. d_out: (B, T, H, Dv), contiguous. lse, delta: (B, T, H) fp32.
    """
    (batch, tokens, heads, width), (keys, groups), slots = q.shape, k.shape[1:3], lists.shape[2]
    total = k.new_zeros(batch, keys, groups, width + v.shape[3], dtype=torch.float32)
    if not (q.numel() and k.numel() and lists.numel()):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, constants = torch.empty_like(q), shape_constants(q, k, v)
    rows = triton.next_power_of_2(heads // groups)
    row_bytes = max(width, v.shape[3]) * q.element_size()
    queries = _queries_of_tile(rows, slots, TILE_ROWS[q.element_size()] // (4 if row_bytes > 256 else 1))
    tile = {"QUERIES": queries, "ROWS": rows, "BM": tile_width(queries * rows)}
    options = union_options(tile["BM"], row_bytes)
    totals = [total.flatten(2), *([] if learner is None else [learner.total])]
    sums: Tensor | None = None
    for tiles, parts in summed_parts(lists, totals, k.dtype, queries):
        number, width_of_union = tiles.union.shape[1:]
        if learner is not None and sums is None:  # the first chunk is the largest
            sums = total.new_empty(groups * batch * number * queries * width_of_union)
        backward_kernel[number, groups, batch](
            q, k, v, tiles.union, tiles.members, tiles.count, d_out, lse, delta, dq, parts[0], tiles.token, tiles.here,
            tokens, keys, width_of_union, scale * LOG2_E, scale, Sums=sums, **constants, **tile, **options,
        )  # fmt: skip
        if learner is not None and sums is not None:
            learner.learn(tiles, queries, sums, parts[1])
    dk, dv = total.split([width, v.shape[3]], -1)
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv)


def union_options(rows: int, row_bytes: int) -> dict[str, int]:
    """BN and launch options of a kernel over tiles of ``rows`` rows."""
    if INTERPRETED:
        return {"BN": 16}
    few = row_bytes > 256 or rows < 64
    few |= hardware.architecture() == "sm_80"  # 64 would spill many registers, and not fit small GPUs
    return {
        "BN": 32 if few else 64,
        "num_warps": 8 if rows >= 64 else 4,
        "num_stages": 2,
    }
