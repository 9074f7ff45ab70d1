"""Attention of each query to a list of latents (DSA over MLA, DeepSeek-V3.2), forward and backward.

All heads share one key for each token: a latent, and columns that are rotated. The values are the latents, so the first
DV columns of the keys: they are loaded once, and what comes back to them is one gradient of D columns. So many heads
fill the rows of a tile that queries share none; a program takes one query.

The backward pass is a row of products of matrices, each by a kernel that needs few registers for its sums:

- `weight_kernel`: Q K^T and dO V^T, from these P and dS of all heads and slots, which go to memory in Q's dtype;
- `query_kernel`: dQ = dS K;
- `part_kernel`: the query's part of dK for each slot, dS^T Q + P^T dO, the sum over its heads.

`nsa.ops.kernels.tokens.summed_parts` goes by chunks of queries and adds a key's parts in a fixed order: no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels import hardware
from nsa.ops.kernels.device_functions import (
    load_base2_lse,
    load_row_parts,
    load_rows,
    store_output,
    store_rows,
)
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, split_width
from nsa.ops.kernels.ranges import shape_constants
from nsa.ops.kernels.tokens import Learner, summed_parts

SLOT_BLOCK = 1024  # slots of which a program of `forward_kernel` looks for the last that has a key
WIDEST = 2 * (512 + 64) * (2 if INTERPRETED else 1)  # bytes of a key; wider ones in fp32 spill all registers


@triton.jit
def _slots_with_keys(Lists, num_slots, BLOCK: tl.constexpr):
    """The number of the last slot of a list that has a key, plus 1."""
    count = 0
    for start in tl.range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(Lists + slot, mask=slot < num_slots, other=-1)  # [BLOCK]
        count = tl.maximum(count, tl.max(tl.where(key >= 0, slot + 1, 0)))
    return count


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(Q, K, Lists, Out, Lse, num_tokens, num_keys, num_slots, scale_log2, HEADS: tl.constexpr,
                   D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Output and LSE of BM heads of a query. The programs of a query's heads are neighbours.

    Q, Out (B, T, H, D or DV); K (B, S, D); Lists (B, T, slots) int32, -1 for none; Lse (B, T, H) fp32. DV <= D1.
    """
    batch, blocks = tl.program_id(1).to(tl.int64), (HEADS + BM - 1) // BM
    token = batch * num_tokens + tl.program_id(0) // blocks
    head = tl.program_id(0) % blocks * BM + tl.arange(0, BM)  # [BM]
    ok = head < HEADS  # [BM]
    q_row = token * HEADS + head  # [BM]
    Lists += token * num_slots
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    count = _slots_with_keys(Lists, num_slots, BLOCK)
    acc = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM], in units of log2
    sums = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
    for start in tl.range(0, count, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        key = tl.load(Lists + slot, mask=slot < num_slots, other=-1)  # [BN]
        listed = key >= 0  # [BN]
        k1, k2 = load_row_parts(K, batch * num_keys + key, listed, D, D1, D2)  # [BN, D1], [BN, D2]
        # Where a product's result goes to another product, Triton gives all warps all of its columns, which would be
        # twice the work. Results of a branch hide that. It is always taken, and what stands before it is of no use.
        new_max = row_max
        p = tl.broadcast_to(head[:, None], [BM, BN]).to(k1.dtype)  # [BM, BN]
        if count > 0:
            s = tl.dot(q1, k1.T, input_precision=PRECISION) * scale_log2  # [BM, BN]
            if D2 > 0:
                s += tl.dot(q2, k2.T, input_precision=PRECISION) * scale_log2
            s = tl.where(listed[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))  # [BM]
            # A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
            base = tl.where(new_max == float("-inf"), 0.0, new_max)  # [BM]
            e = tl.exp2(s - base[:, None])  # [BM, BN]
            sums = sums * tl.exp2(row_max - base)[:, None] + e
            p = e.to(k1.dtype)
        rescale = tl.exp2(row_max - tl.where(new_max == float("-inf"), 0.0, new_max))  # [BM]
        acc = tl.dot(p, k1, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    store_output(Out, Lse, q_row, ok, acc, row_max, tl.sum(sums, 1), DV, D1)


@triton.jit
def _store_tile(X, row, column, stride, value):
    """(rows, columns) of X (.., stride) at int64 row numbers, in X's dtype; there is room for all of it."""
    tl.store(X + row[:, None] * stride + column[None, :], value.to(X.dtype.element_ty))


@triton.jit(do_not_specialize=[*INTEGERS, "token0"])
def weight_kernel(Q, K, DOut, Lse, Delta, Union, Count, P, DS, Sums, token0, num_tokens, num_keys, num_slots,
                  num_blocks, scale_log2, HEADS: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """P and DS (B, queries, ROOM, num_blocks * BN) of BM heads of a query, over blocks of slots.

    Union (B, queries, slots), Count (B, queries): see `nsa.ops.kernels.tokens.union_kernel`. P is 0 from Count on, up
    to a whole block; behind that nothing is written. DOut (B, T, H, DV), Delta (B, T, H), P and DS may be None: then
    only Sums are wanted. Sums (head blocks, B, queries, slots) fp32: P, summed over these heads; or None.
    """
    query, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + query
    head = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    ok = head < HEADS  # [BM]
    q_row = (batch * num_tokens + token0 + query) * HEADS + head  # [BM]
    lse = load_base2_lse(Lse, q_row, ok)  # [BM]
    if P is not None:
        delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
    Union += place * num_slots
    count = tl.load(Count + place)
    for start in tl.range(0, count, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        key = tl.load(Union + slot, mask=slot < count, other=0)  # [BN]
        k_row = batch * num_keys + key  # [BN]
        s = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
        dp = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
        for column0 in tl.range(0, D, BK):
            column = column0 + tl.arange(0, BK)  # [BK]
            k = load_rows(K, k_row, slot < count, column, D)  # [BN, BK]
            q = load_rows(Q, q_row, ok, column, D)  # [BM, BK]
            s = tl.dot(q, k.T, s, input_precision=PRECISION)
            if P is not None:
                d_out = load_rows(DOut, q_row, ok, column, DV)  # [BM, BK]
                dp = tl.dot(d_out, k.T, dp, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[:, None])  # [BM, BN]
        p = tl.where((slot < count)[None, :], p, 0.0)
        if P is not None:
            row = place * ROOM + head  # [BM]
            _store_tile(P, row, slot, num_blocks * BN, p)
            _store_tile(DS, row, slot, num_blocks * BN, p * (dp - delta[:, None]))
        if Sums is not None:
            at = tl.program_id(0) * tl.num_programs(2) * tl.num_programs(1) + place
            tl.store(Sums + at * num_slots + slot, tl.sum(p, 0), mask=slot < count)


@triton.jit(do_not_specialize=[*INTEGERS, "token0"])
def query_kernel(K, DS, Union, Count, DQ, token0, num_tokens, num_keys, num_slots, num_blocks, scale,
                 HEADS: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                 C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """DQ (B, T, H, D) of BM heads of a query: C1 of its first D1 columns, and C2 of those behind, if D2 is not 0.

    DS (B, queries, ROOM, num_blocks * BLOCK): see `weight_kernel`. BN divides BLOCK.
    """
    query, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + query
    share = tl.program_id(0) % (D1 // C1)
    head = tl.program_id(0) // (D1 // C1) * BM + tl.arange(0, BM)  # [BM]
    column1 = share * C1 + tl.arange(0, C1)  # [C1]
    column2 = D1 + share * C2 + tl.arange(0, C2)  # [C2]
    Union += place * num_slots
    count = tl.load(Count + place)
    row = place * ROOM + head  # [BM]
    dq1 = tl.zeros([BM, C1], tl.float32)  # [BM, C1]
    dq2 = tl.zeros([BM, C2], tl.float32)  # [BM, C2], unused if D2 is 0
    for start in tl.range(0, count, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        ds = tl.load(DS + row[:, None] * (num_blocks * BLOCK) + slot[None, :])  # [BM, BN]
        key = tl.load(Union + slot, mask=slot < count, other=0)  # [BN]
        k_row = batch * num_keys + key  # [BN]
        k1 = load_rows(K, k_row, slot < count, column1, D)  # [BN, C1]
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            k2 = load_rows(K, k_row, slot < count, column2, D)  # [BN, C2]
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    q_row = (batch * num_tokens + token0 + query) * HEADS + head  # [BM]
    store_rows(DQ, q_row, head < HEADS, column1, D, dq1 * scale)
    if D2 > 0:
        store_rows(DQ, q_row, head < HEADS, column2, D, dq2 * scale)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "first_head"])
def part_kernel(Q, DOut, P, DS, Count, Parts, token0, first_head, num_tokens, num_slots, num_blocks, scale,
                HEADS: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                D2: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BLOCK: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Parts (B, queries, slots, D) of dK, of BM heads from ``first_head`` on; with ADD added to those that are there.

    A program takes a share of the columns, as in `query_kernel`. P, DS: see `weight_kernel`.
    """
    query, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + query
    share = tl.program_id(0)
    head = first_head + tl.arange(0, BM)  # [BM]
    ok = head < HEADS  # [BM]
    column1 = share * C1 + tl.arange(0, C1)  # [C1]
    column2 = D1 + share * C2 + tl.arange(0, C2)  # [C2]
    q_row = (batch * num_tokens + token0 + query) * HEADS + head  # [BM]
    q1 = load_rows(Q, q_row, ok, column1, D)  # [BM, C1]
    q2 = q1
    if D2 > 0:
        q2 = load_rows(Q, q_row, ok, column2, D)  # [BM, C2]
    d_out = load_rows(DOut, q_row, ok, column1, DV)  # [BM, C1]
    count = tl.load(Count + place)
    row = place * ROOM + head  # [BM]
    for start in tl.range(0, count, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        at = row[:, None] * (num_blocks * BLOCK) + slot[None, :]
        ds = tl.load(DS + at)  # [BM, BN]
        p = tl.load(P + at)  # [BM, BN]
        # The product of one is no accumulator of the other: see `forward_kernel`. P is 0 where the mask is.
        part = tl.dot(tl.trans(ds), q1, input_precision=PRECISION) * scale  # [BN, C1]
        of_values = tl.dot(tl.trans(p), d_out, input_precision=PRECISION)  # [BN, C1]
        part += tl.where((slot < count)[:, None], of_values, 0.0)
        to = place * num_slots + slot  # [BN]
        if ADD:
            part += load_rows(Parts, to, slot < count, column1, D)
        store_rows(Parts, to, slot < count, column1, D, part)
        if D2 > 0:
            part2 = tl.dot(tl.trans(ds), q2, input_precision=PRECISION) * scale  # [BN, C2]
            if ADD:
                part2 += load_rows(Parts, to, slot < count, column2, D)
            store_rows(Parts, to, slot < count, column2, D, part2)


def fits(q: Tensor, k: Tensor, v_width: int) -> bool:
    """Whether the kernels take q (B, T, H, D), k (B, S, G, D) and values that are k's first columns.

    Narrower keys are for `nsa.ops.kernels.tokens`, which has tiles of several queries.
    """
    width, row_bytes = k.shape[3], k.shape[3] * k.element_size()
    served = row_bytes > hardware.MAX_ROW_BYTES and row_bytes % hardware.TMA_BYTES == 0 and row_bytes <= WIDEST
    # Fewer values than that failed a test in fp32 on a GPU; the reason was not found.
    return k.shape[2] == 1 and served and v_width in (0, split_width(width)[0])


def forward(q: Tensor, k: Tensor, v_width: int, lists: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, T, H, v_width) in q's dtype and lse (B, T, H) fp32.

    Args:
        q (B, T, H, D), k (B, S, 1, D), lists (B, T, slots) int32: contiguous. See `fits`.
    """
    (batch, tokens, heads, _), keys, slots = q.shape, k.shape[1], lists.shape[2]
    out = q.new_empty(batch, tokens, heads, v_width)
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    if not (q.numel() and k.numel() and lists.numel()):
        return out.zero_(), lse.fill_(-torch.inf)
    tile, options = _forward_tile(q)
    forward_kernel[triton.cdiv(heads, tile["BM"]) * tokens, batch](
        q, k, lists, out, lse, tokens, keys, slots, scale * LOG2_E, **_sizes(q, k, v_width, "D1", "D2", "DV"), **tile,
        BLOCK=64 if INTERPRETED else SLOT_BLOCK, **options,
    )  # fmt: skip
    return out, lse


def _sizes(q: Tensor, k: Tensor, v_width: int, *names: str) -> dict[str, Any]:
    """The constants HEADS, D and PRECISION, and those with these names."""
    constants = shape_constants(q, k, k) | {"DV": v_width}
    return {name: constants[name] for name in ("HEADS", "D", "PRECISION", *names)}


def _rows(heads: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(heads)))


def _forward_tile(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """(rows and keys of a tile, launch options)."""
    if INTERPRETED:
        return {"BM": 16, "BN": 16}, {}
    if q.element_size() == 4:
        return {"BM": 16, "BN": 32}, {"num_warps": 8, "num_stages": 1}
    rows = _rows(q, 64)
    if rows == 64:
        keys = 64 if hardware.architecture() == "sm_90" else 32  # three tiles of 32 were slower there than one of 64
        return {"BM": rows, "BN": keys}, {"num_warps": 8, "num_stages": 2}
    return {"BM": rows, "BN": 32}, {"num_warps": 4, "num_stages": 2}


def _rows(q: Tensor, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(q.shape[2])))


def _backward_rows(q: Tensor) -> int:
    if INTERPRETED:
        return 16
    if q.element_size() == 4:
        return _rows(q, 32)
    return _rows(q, 64 if hardware.architecture() == "sm_80" else 128)


def head_blocks(q: Tensor) -> int:
    """In how many blocks the backward pass takes the heads of q (B, T, H, D): as many sums go to a learner."""
    return triton.cdiv(q.shape[2], _backward_rows(q))


def _weight_tile(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """As `_forward_tile`, for `weight_kernel`."""
    rows = _backward_rows(q)
    if INTERPRETED:
        return {"BM": rows, "BN": 32, "BK": 32}, {}
    if q.element_size() == 4:
        return {"BM": rows, "BN": 64, "BK": 32}, {"num_warps": 4, "num_stages": 2}
    stages = 4 if hardware.architecture() == "sm_90" else 3
    return {"BM": rows, "BN": 128, "BK": 64}, {"num_warps": 8 if rows >= 64 else 4, "num_stages": stages}


def _share_tile(q: Tensor, most_columns: int) -> dict[str, int]:
    """Rows, keys, and columns (so many at most, and some of the last) of a tile of `query_kernel` or `part_kernel`."""
    whole, rest = split_width(q.shape[3])
    shares = 2 if INTERPRETED else max(1, whole // most_columns)
    tile = {"BM": _backward_rows(q), "BN": 64, "C1": whole // shares, "C2": max(16, rest // shares)}
    if INTERPRETED or q.element_size() == 4:
        tile["BN"] = 16
    elif hardware.architecture() == "sm_80":
        tile["BN"] = 32
    return tile


def _stages(gathers: bool, wide: bool) -> dict[str, int]:
    """Launch options of a kernel of eight warps with three tiles in shared memory: one is used, two are on their way.

    Triton starts a load at the end of a step, so one that was only a step ahead would be waited for at once. Loads of
    rows whose numbers are loaded, too, take twice as many stages. ``wide``: there is no room for three.
    """
    if INTERPRETED:
        return {}
    few = wide or hardware.architecture() != "sm_90"
    return {"num_warps": 8, "num_stages": 2 if few else 5 if gathers else 3}


def backward(
    q: Tensor, k: Tensor, v_width: int, lists: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float,
    learner: Learner | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq and dk, the gradient of keys and values together, in the dtypes of q and k.

    Args:
        q to scale: as for `forward`. d_out: (B, T, H, v_width), contiguous. lse, delta: (B, T, H) fp32.
    """
    (batch, tokens, heads, width), keys, slots = q.shape, k.shape[1], lists.shape[2]
    if not (q.numel() and k.numel() and lists.numel()):
        return torch.zeros_like(q), torch.zeros_like(k)
    dq, total = torch.empty_like(q), k.new_zeros(batch, keys, width, dtype=torch.float32)
    tile, options = _weight_tile(q)
    in_full = q.element_size() == 4
    query_tile, part_tile = _share_tile(q, 256), _share_tile(q, 256 if in_full else 128)
    blocks, slot_blocks = head_blocks(q), triton.cdiv(slots, tile["BN"])
    rows = blocks * tile["BM"]
    room = rows * slot_blocks * tile["BN"]  # weights of a query
    sizes = _sizes(q, k, v_width, "D1", "D2") | {"ROOM": rows, "BLOCK": tile["BN"]}
    totals = [total, *([] if learner is None else [learner.total])]
    weights: Tensor | None = None
    sums: Tensor | None = None
    for tiles, parts in summed_parts(lists, totals, k.dtype, 1, beside=2 * room * q.element_size()):
        here = tiles.here
        if weights is None:  # the first chunk is the largest
            weights = q.new_empty(2, batch * here * room)
            sums = None if learner is None else total.new_empty(blocks * batch * here * slots)
        weight_kernel[blocks, here, batch](
            q, k, d_out, lse, delta, tiles.union, tiles.count, P=weights[0], DS=weights[1], Sums=sums,
            token0=tiles.token, num_tokens=tokens, num_keys=keys, num_slots=slots, num_blocks=slot_blocks,
            scale_log2=scale * LOG2_E, **_sizes(q, k, v_width, "DV"), ROOM=rows, **tile, **options,
        )  # fmt: skip
        query_kernel[blocks * (sizes["D1"] // query_tile["C1"]), here, batch](
            k, weights[1], tiles.union, tiles.count, dq, tiles.token, tokens, keys, slots, slot_blocks, scale, **sizes,
            **query_tile, **_stages(True, in_full),
        )  # fmt: skip
        for first_head in range(0, heads, tile["BM"]):
            part_kernel[sizes["D1"] // part_tile["C1"], here, batch](
                q, d_out, *weights, tiles.count, parts[0], tiles.token, first_head, tokens, slots, slot_blocks, scale,
                DV=v_width, ADD=first_head > 0, **sizes, **part_tile, **_stages(False, in_full),
            )  # fmt: skip
        if learner is not None and sums is not None:
            learner.learn(tiles, 1, sums, parts[-1])
    return dq, total.to(k.dtype).view_as(k)


def learn(q: Tensor, k: Tensor, lists: Tensor, lse: Tensor, scale: float, learner: Learner) -> None:
    """Gives the learner what `backward` would: the target of the indexer's loss. Arguments as there."""
    (batch, tokens), keys, slots = q.shape[:2], k.shape[1], lists.shape[2]
    if not (q.numel() and k.numel() and lists.numel()):
        return
    tile, options = _weight_tile(q)
    sums: Tensor | None = None
    for tiles, parts in summed_parts(lists, [learner.total], q.dtype, 1):
        if sums is None:  # the first chunk is the largest
            sums = learner.total.new_empty(head_blocks(q) * batch * tiles.here * slots)
        weight_kernel[head_blocks(q), tiles.here, batch](
            q, k, None, lse, None, tiles.union, tiles.count, P=None, DS=None, Sums=sums, token0=tiles.token,
            num_tokens=tokens, num_keys=keys, num_slots=slots, num_blocks=0, scale_log2=scale * LOG2_E,
            **_sizes(q, k, 0, "DV"), ROOM=0, **tile, **options,
        )  # fmt: skip
        learner.learn(tiles, 1, sums, parts[0])
