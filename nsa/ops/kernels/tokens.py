"""Attention of each query to a list of tokens (DSA), forward and backward.

A program takes one token and some heads of a KV head: the rows of its tile. All of them see the listed keys, which it
gathers, BN at a time. Slots with -1 get the score -inf.

dK and dV of a key are sums over the queries that list it. Atomic adds would make their order, and so their bits, depend
on chance. Instead each query writes its part for each slot (the sum over its heads). For each key, the slots that list
it are found in the order of the queries, and one program adds their parts up. This goes in chunks of queries, so that
the parts take PART_BYTES at most.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import (
    SMALLEST_DOT,
    load_base2_lse,
    load_row_parts,
    load_rows,
    scores,
    store_output,
    store_query_gradient,
)
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, tile_width
from nsa.ops.kernels.ranges import shape_constants

PART_BYTES = 2**31  # of the parts of a chunk of queries
MOST_QUERIES = 1024  # of a chunk
MOST_ROWS = 64  # heads of a program
MOST_COLUMNS = 1024  # of a program of `sum_kernel`
GATHERED = 8192  # elements that such a program loads at once
KEYS = 8  # keys of a program of `users_kernel`, one after the other


@triton.jit
def _place(num_tokens, GROUPS: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """(token of the launch, batch, KV head, head [BM] of the group, whether it exists [BM]) of this program."""
    tiles: tl.constexpr = (HEADS + BM - 1) // BM
    group = tl.program_id(1) // tiles
    head = tl.program_id(1) % tiles * BM + tl.arange(0, BM)  # [BM]
    return tl.program_id(0), tl.program_id(2).to(tl.int64), group, head, head < HEADS


@triton.jit
def _listed(Lists, start, num_slots, key_row, GROUPS: tl.constexpr, group, BN: tl.constexpr):
    """(int64 rows of K and V [BN], whether the slot lists a key [BN]) of slots ``start`` on."""
    slot = start + tl.arange(0, BN)  # [BN]
    key = tl.load(Lists + slot, mask=slot < num_slots, other=-1)  # [BN]
    return (key_row + key) * GROUPS + group, key >= 0


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(Q, K, V, Lists, Out, Lse, num_tokens, num_keys, num_slots, scale_log2, GROUPS: tl.constexpr,
                   HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                   DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Output and LSE of some heads of a token.

    Q, Out (B, T, H, D or Dv); K, V (B, S, G, D or Dv); Lists (B, T, slots) int32; Lse (B, T, H) fp32.
    """
    token, batch, group, head, ok = _place(num_tokens, GROUPS, HEADS, BM)
    q_row = ((batch * num_tokens + token) * GROUPS + group) * HEADS + head  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    Lists += (batch * num_tokens + token) * num_slots
    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM], in units of log2
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    for start in tl.range(0, num_slots, BN):
        row, listed = _listed(Lists, start, num_slots, batch * num_keys, GROUPS, group, BN)  # [BN]
        k1, k2 = load_row_parts(K, row, listed, D, D1, D2)  # [BN, D1], [BN, D2]
        s = scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2  # [BM, BN]
        s = tl.where(listed[None, :], s, float("-inf"))
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


@triton.jit(do_not_specialize=[*INTEGERS, "token0"])
def backward_kernel(Q, K, V, Lists, DOut, Lse, Delta, DQ, Parts, token0, num_tokens, num_keys, num_slots,
                    scale_log2, scale, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                    D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """DQ of all heads of a KV head of token ``token0`` + program, and its parts of dK and dV.

    Parts (B, tokens of the launch, slots, G, D + Dv): dK, then dV. Other arguments as in `forward_kernel`.
    """
    local, batch, group, head, ok = _place(num_tokens, GROUPS, HEADS, BM)
    token = token0 + local
    q_row = ((batch * num_tokens + token) * GROUPS + group) * HEADS + head  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    d_out = load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
    lse = load_base2_lse(Lse, q_row, ok)  # [BM]
    delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
    Lists += (batch * num_tokens + token) * num_slots
    part_row = (batch * tl.num_programs(0) + local) * num_slots
    dq1 = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
    dq2 = tl.zeros([BM, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BM, D2], unused if D2 is 0
    for start in tl.range(0, num_slots, BN):
        row, listed = _listed(Lists, start, num_slots, batch * num_keys, GROUPS, group, BN)  # [BN]
        k1, k2 = load_row_parts(K, row, listed, D, D1, D2)  # [BN, D1], [BN, D2]
        v = load_rows(V, row, listed, tl.arange(0, DV1), DV)  # [BN, DV1]
        p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        p = tl.where(listed[None, :], p, 0.0)
        ds = (p * (tl.dot(d_out, v.T, input_precision=PRECISION) - delta[:, None])).to(k1.dtype)  # [BM, BN]
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        part = ((part_row + start + tl.arange(0, BN)) * GROUPS + group) * (D + DV)  # [BN]
        dk1 = tl.dot(tl.trans(ds), q1, input_precision=PRECISION) * scale  # [BN, D1]
        _store_part(Parts, part, listed, tl.arange(0, D1), D, dk1)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
            dk2 = tl.dot(tl.trans(ds), q2, input_precision=PRECISION) * scale  # [BN, D2]
            _store_part(Parts, part, listed, D1 + tl.arange(0, D2), D, dk2)
        dv = tl.dot(tl.trans(p.to(d_out.dtype)), d_out, input_precision=PRECISION)  # [BN, DV1]
        _store_part(Parts, part + D, listed, tl.arange(0, DV1), DV, dv)
    store_query_gradient(DQ, q_row, ok, dq1, dq2, scale, D, D1, D2, False)


@triton.jit(do_not_specialize=[*INTEGERS, "token0"])
def invert_kernel(Lists, Slots, token0, num_tokens, num_keys, num_slots, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Slots (B, S, QUERIES) int16: the slot in which query ``token0`` + i of the chunk lists key s. Filled with -1."""
    query, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Lists += (batch * num_tokens + token0 + query) * num_slots
    for start in tl.range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(Lists + slot, mask=slot < num_slots, other=-1)  # [BLOCK]
        tl.store(Slots + (batch * num_keys + key) * QUERIES + query, slot.to(tl.int16), mask=key >= 0)


@triton.jit(do_not_specialize=INTEGERS)
def users_kernel(Slots, Users, Count, Listed, num_keys, num_slots, QUERIES: tl.constexpr,
                 KEYS: tl.constexpr):  # fmt: skip
    """Users (B, S, QUERIES) int32: the numbers query * slots + slot that list each key. Count (B, S): of them.

    A program takes KEYS keys, as far as they lie among those that the chunk lists: Listed (2,), the least and the most.
    Slots is -1 again afterwards, for the next chunk.
    """
    query = tl.arange(0, QUERIES)  # [QUERIES]
    first = tl.maximum(tl.program_id(0) * KEYS, tl.load(Listed))
    end = tl.minimum(tl.program_id(0) * KEYS + KEYS, tl.load(Listed + 1) + 1)
    for number in tl.range(first, end):
        key = tl.program_id(1).to(tl.int64) * num_keys + number
        slot = tl.load(Slots + key * QUERIES + query).to(tl.int32)  # [QUERIES]
        lists = slot >= 0
        rank = tl.cumsum(lists.to(tl.int32), 0) - 1  # [QUERIES]
        tl.store(Users + key * QUERIES + rank, query * num_slots + slot, mask=lists)
        tl.store(Slots + key * QUERIES + query, tl.full([QUERIES], -1, tl.int16), mask=lists)
        tl.store(Count + key, tl.sum(lists.to(tl.int32)))


@triton.jit(do_not_specialize=[*INTEGERS, "num_queries"])
def sum_kernel(Parts, Users, Count, Listed, Total, num_keys, num_slots, num_queries, WIDTH: tl.constexpr,
               COLUMNS: tl.constexpr, QUERIES: tl.constexpr, GATHERED: tl.constexpr):  # fmt: skip
    """Adds Parts (B, queries of the chunk, slots, WIDTH) of a key's users to COLUMNS of Total (B, S, WIDTH) fp32."""
    key, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    at = batch * num_keys + key
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    if (key >= tl.load(Listed)) & (key <= tl.load(Listed + 1)):  # others have no count
        total = tl.zeros([COLUMNS], tl.float32)  # [COLUMNS]
        count = tl.load(Count + at)
        for start in tl.range(0, count, GATHERED):
            number = start + tl.arange(0, GATHERED)  # [GATHERED]
            ok = number < count  # [GATHERED]
            user = tl.load(Users + at * QUERIES + number, mask=ok, other=0)  # [GATHERED]
            row = batch * num_queries * num_slots + user  # [GATHERED]
            total += tl.sum(load_rows(Parts, row, ok, column, WIDTH).to(tl.float32), 0)
        place = at * WIDTH + column  # [COLUMNS]
        here = column < WIDTH
        tl.store(Total + place, tl.load(Total + place, mask=here, other=0.0) + total, mask=here)


def _tile(constants: dict[str, int | str], itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """(tile constants, launch options): rows for the heads of a KV head, and as many keys as fit beside them."""
    rows = min(MOST_ROWS, tile_width(int(constants["HEADS"])))
    if INTERPRETED:
        return {"BM": rows, "BN": 16}, {}
    wide = int(constants["D1"]) * itemsize > 256
    return {"BM": rows, "BN": 32 if wide else 64}, {"num_warps": 4, "num_stages": 1 if wide else 2}


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, T, H, Dv) in q's dtype and lse (B, T, H) fp32.

    Args:
        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv), lists (B, T, slots) int32: contiguous.
    """
    (batch, tokens, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    if not (q.numel() and k.numel() and lists.numel()):
        return out.zero_(), lse.fill_(-torch.inf)
    constants = shape_constants(q, k, v)
    tile, options = _tile(constants, q.element_size())
    grid = (tokens, groups * triton.cdiv(heads // groups, tile["BM"]), batch)
    forward_kernel[grid](
        q, k, v, lists, out, lse, tokens, keys, lists.shape[2], scale * LOG2_E, **constants, **tile, **options
    )
    return out, lse


def summed_parts(lists: Tensor, total: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Adds to ``total`` (B, S, columns) fp32 what the caller writes for each slot of ``lists`` (B, T, slots) int32.

    Yields:
        the first query of a chunk, the number of its queries, and room for their parts (B, queries, slots, columns) in
        ``dtype``. They are summed before the next chunk.
    """
    (batch, tokens, slots), (_, keys, columns) = lists.shape, total.shape
    chunk = max(16, min(MOST_QUERIES, tokens, PART_BYTES // (batch * slots * columns * dtype.itemsize)))
    queries = triton.next_power_of_2(chunk)
    inverse = lists.new_full((batch, keys, queries), -1, dtype=torch.int16)
    listed = _least_and_most(lists, chunk, keys)
    users, count = lists.new_empty(batch, keys, queries), lists.new_empty(batch, keys)
    parts = total.new_empty(batch * chunk * slots * columns, dtype=dtype)
    at_once = min(MOST_COLUMNS, tile_width(columns))
    for number, token in enumerate(range(0, tokens, chunk)):
        here = min(chunk, tokens - token)
        invert_kernel[here, batch](
            lists, inverse, token, tokens, keys, slots, queries, 64 if INTERPRETED else 512, num_warps=4
        )
        programs = triton.cdiv(keys, KEYS)
        users_kernel[programs, batch](inverse, users, count, listed[number], keys, slots, queries, KEYS, num_warps=4)
        yield token, here, parts
        sum_kernel[keys, triton.cdiv(columns, at_once), batch](
            parts,
            users,
            count,
            listed[number],
            total,
            keys,
            slots,
            here,
            columns,
            at_once,
            queries,
            min(64, GATHERED // at_once),
            num_warps=4,
        )


def _least_and_most(lists: Tensor, chunk: int, keys: int) -> Tensor:
    """(chunks, 2) int32: the least and the most key that the queries of each chunk list; (keys, -1) if none does."""
    found = []
    for part in lists.split(chunk, dim=1):
        found.append(torch.stack((part.masked_fill(part < 0, keys).amin(), part.amax())))
    return torch.stack(found)


def backward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v.

    Args:
        q, k, v, lists: as for `forward`. d_out: (B, T, H, Dv), contiguous. lse, delta: (B, T, H) fp32.
    """
    (batch, tokens, heads, width), (keys, groups), slots = q.shape, k.shape[1:3], lists.shape[2]
    total = k.new_zeros(batch, keys, groups, width + v.shape[3], dtype=torch.float32)
    if not (q.numel() and k.numel() and lists.numel()):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, constants = torch.empty_like(q), shape_constants(q, k, v)
    tile, options = _tile(constants, q.element_size())
    if not INTERPRETED:
        tile["BN"], options["num_warps"] = 32, 2 if tile["BM"] == 16 else 4
    tile["BM"] = tile_width(heads // groups)
    for token, here, parts in summed_parts(lists, total.flatten(2), k.dtype):
        backward_kernel[here, groups, batch](
            q, k, v, lists, d_out, lse, delta, dq, parts, token, tokens, keys, slots, scale * LOG2_E, scale,
            **constants, **tile, **options,
        )  # fmt: skip
    dk, dv = total.split([width, v.shape[3]], -1)
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv)
