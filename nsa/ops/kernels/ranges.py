"""Attention where each query sees a run of keys: dense, sliding window and compressed, packed or not.

Rows: for KV head g, row r is query head ``g * h + r % h`` of token ``r // h``, h = H / G. A program takes consecutive
rows, so that any group size fills a tile and all heads of neighbouring tokens share each key tile.

Token t sees keys ``first[t] .. last[t] - 1``, both rising with t. For a tile of tokens t0..t1 the keys from
``first[t1]`` to ``last[t0]`` are seen by all: those tiles need no mask. The inverse, the tokens that see a tile of
keys, is a run again, found by binary search. So the backward pass for keys is the mirror of the forward one.

Algorithm: FlashAttention-2 (arXiv 2307.08691); the backward pass recomputes the probabilities from the LSE, once with
queries outside (dQ), once with keys outside (dK, dV): seven products instead of five, but no atomics, so that the same
inputs give the same bits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.ops.geometry import Ranges, cached, derived
from nsa.ops.kernels.launch import (
    FORWARD,
    INTEGERS,
    LOG2_E,
    descriptor,
    head_descriptor,
    split_width,
    tile_sizes,
    vector_of,
    warpgroups,
)


@triton.jit
def _scores(q1, q2, k1, k2, D2: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q1, k1.T, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(q2, k2.T, s, input_precision=PRECISION)
    return s


@triton.jit
def _load_rows(X, row, ok, column, D):
    """(rows, columns) of X (.., D) at int64 row numbers; 0 where there is none."""
    return tl.load(X + row[:, None] * D + column[None, :], mask=ok[:, None] & (column[None, :] < D), other=0.0)


@triton.jit
def _store_rows(X, row, ok, column, D, value):
    value = value.to(X.dtype.element_ty)
    tl.store(X + row[:, None] * D + column[None, :], value, mask=ok[:, None] & (column[None, :] < D))


@triton.jit
def _forward_loop(acc, peak, total, q1, q2, first, last, K1, K2, V, key_row, start, stop, k_column, v_column,
                  scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    for j in tl.range(start, stop, BN):
        k1 = K1.load([key_row + j, k_column])
        k2 = k1
        if D2 > 0:
            k2 = K2.load([key_row + j, k_column + D1])
        s = _scores(q1, q2, k1, k2, D2, PRECISION)
        if MASKED:
            key = j + tl.arange(0, BN)
            s = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]), s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale_log2)
        # A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
        base = new_peak
        if MASKED:
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s * scale_log2 - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = V.load([key_row + j, v_column])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(Q, K1, K2, V, Out, Lse, First, Last, num_tokens, num_keys, num_tiles, scale_log2,
                   GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                   D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """out, lse of BM rows. Q, Out (B, T, H, D or Dv); K1, K2, V: descriptors of (B * S, G * D); Lse (B, T, H)."""
    slots = tl.num_programs(0) // num_tiles  # batch x groups
    tile = num_tiles - 1 - tl.program_id(0) // slots  # the last tiles see most: they go first
    slot = tl.program_id(0) % slots
    batch, group = slot // GROUPS, slot % GROUPS
    row = tile * BM + tl.arange(0, BM)
    token = row // HEADS
    ok = token < num_tokens
    q_row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + row % HEADS
    q1 = _load_rows(Q, q_row, ok, tl.arange(0, D1), D)
    q2 = q1
    if D2 > 0:
        q2 = _load_rows(Q, q_row, ok, D1 + tl.arange(0, D2), D)
    first = tl.load(First + token, mask=ok, other=0)
    last = tl.load(Last + token, mask=ok, other=0)

    token0 = tile * BM // HEADS
    token1 = tl.minimum((tile * BM + BM - 1) // HEADS, num_tokens - 1)
    begin, end = tl.load(First + token0), tl.load(Last + token1)
    full_begin, full_end = tl.load(First + token1), tl.load(Last + token0)
    full_begin = tl.minimum(begin + tl.cdiv(full_begin - begin, BN) * BN, end)
    full_end = full_begin + tl.maximum(full_end - full_begin, 0) // BN * BN

    acc = tl.zeros([BM, DV1], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    key_row = batch * num_keys
    acc, peak, total = _forward_loop(acc, peak, total, q1, q2, first, last, K1, K2, V, key_row, begin, full_begin,
                                     group * D, group * DV, scale_log2, D1, D2, BN, True, PRECISION)  # fmt: skip
    # A masked tile may have left rows without any key; the unmasked ones need a finite peak or a fresh -inf.
    acc, peak, total = _forward_loop(acc, peak, total, q1, q2, first, last, K1, K2, V, key_row, full_begin, full_end,
                                     group * D, group * DV, scale_log2, D1, D2, BN, False, PRECISION)  # fmt: skip
    acc, peak, total = _forward_loop(acc, peak, total, q1, q2, first, last, K1, K2, V, key_row, full_end, end,
                                     group * D, group * DV, scale_log2, D1, D2, BN, True, PRECISION)  # fmt: skip
    _store_rows(Out, q_row, ok, tl.arange(0, DV1), DV, acc / tl.where(total == 0, 1.0, total)[:, None])
    tl.store(Lse + q_row, (peak + tl.log2(total)) * 0.6931471805599453, mask=ok)


@triton.jit(do_not_specialize=INTEGERS)
def delta_kernel(Out, DOut, Delta, num_rows, DV: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr):
    """Delta (rows,) = sum of Out * DOut (rows, Dv), fp32."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, DV1)
    out = _load_rows(Out, row, row < num_rows, column, DV).to(tl.float32)
    d_out = _load_rows(DOut, row, row < num_rows, column, DV).to(tl.float32)
    tl.store(Delta + row, tl.sum(out * d_out, 1), mask=row < num_rows)


@triton.jit
def _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, start, stop, k_column, v_column,
                scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    for j in tl.range(start, stop, BN):
        k1 = K1.load([key_row + j, k_column])
        k2 = k1
        if D2 > 0:
            k2 = K2.load([key_row + j, k_column + D1])
        v = V.load([key_row + j, v_column])
        p = tl.exp2(_scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])
        if MASKED:
            key = j + tl.arange(0, BN)
            p = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]), p, 0.0)
        ds = (p * (tl.dot(d_out, v.T, input_precision=PRECISION) - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit(do_not_specialize=INTEGERS)
def query_kernel(Q, K1, K2, V, DOut, Lse, Delta, First, Last, DQ, num_tokens, num_keys, num_tiles, scale_log2, scale,
                 GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                 D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 ADD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DQ (B, T, H, D) of BM rows; added to what is there if ADD. Arguments as in `forward_kernel`."""
    slots = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    batch, group = slot // GROUPS, slot % GROUPS
    row = tile * BM + tl.arange(0, BM)
    token = row // HEADS
    ok = token < num_tokens
    q_row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + row % HEADS
    q1 = _load_rows(Q, q_row, ok, tl.arange(0, D1), D)
    q2 = q1
    if D2 > 0:
        q2 = _load_rows(Q, q_row, ok, D1 + tl.arange(0, D2), D)
    d_out = _load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)
    lse = tl.load(Lse + q_row, mask=ok, other=float("-inf")) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # nothing seen: every probability is exp2(-inf)
    delta = tl.load(Delta + q_row, mask=ok, other=0.0)
    first = tl.load(First + token, mask=ok, other=0)
    last = tl.load(Last + token, mask=ok, other=0)

    token0 = tile * BM // HEADS
    token1 = tl.minimum((tile * BM + BM - 1) // HEADS, num_tokens - 1)
    begin, end = tl.load(First + token0), tl.load(Last + token1)
    full_begin, full_end = tl.load(First + token1), tl.load(Last + token0)
    full_begin = tl.minimum(begin + tl.cdiv(full_begin - begin, BN) * BN, end)
    full_end = full_begin + tl.maximum(full_end - full_begin, 0) // BN * BN

    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    key_row = batch * num_keys
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, begin, full_begin,
                           group * D, group * DV, scale_log2, D1, D2, BN, True, PRECISION)  # fmt: skip
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, full_begin, full_end,
                           group * D, group * DV, scale_log2, D1, D2, BN, False, PRECISION)  # fmt: skip
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, full_end, end,
                           group * D, group * DV, scale_log2, D1, D2, BN, True, PRECISION)  # fmt: skip
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
def _load_box(X, token, head, column, row, ok, D, HEADS: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
              BOXED: tl.constexpr):  # fmt: skip
    """(BM, WIDTH): BM / HEADS tokens of HEADS heads from ``token``, ``head`` of a (B * T, H, D) descriptor.

    Where the heads of a group are no power of two there is no such box, and the rows are gathered.
    """
    if BOXED:
        return tl.reshape(X.load([token, head, column]), [BM, WIDTH])
    else:
        return _load_rows(X, row, ok, column + tl.arange(0, WIDTH), D)


@triton.jit
def _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0, start, stop,
              num_tokens, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
              D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BOXED: tl.constexpr,
              MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    for i in tl.range(start, stop):
        row = row0 + i * BM + tl.arange(0, BM)
        token = row // HEADS
        ok = token < num_tokens
        q_row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + row % HEADS
        box = batch * num_tokens + (row0 + i * BM) // HEADS
        head = group * HEADS
        q1 = _load_box(Q, box, head, 0, q_row, ok, D, HEADS, BM, D1, BOXED)
        q2 = q1
        if D2 > 0:
            q2 = _load_box(Q2, box, head, D1, q_row, ok, D, HEADS, BM, D2, BOXED)
        lse = tl.load(Lse + q_row, mask=ok, other=float("-inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        p = tl.exp2(_scores(k1, k2, q1, q2, D2, PRECISION) * scale_log2 - lse[None, :])  # (BN, BM)
        if MASKED:
            first = tl.load(First + token, mask=ok, other=0)
            last = tl.load(Last + token, mask=ok, other=0)
            p = tl.where((key[:, None] >= first[None, :]) & (key[:, None] < last[None, :]), p, 0.0)
        d_out = _load_box(DOut, box, head, 0, q_row, ok, DV, HEADS, BM, DV1, BOXED)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        delta = tl.load(Delta + q_row, mask=ok, other=0.0)
        ds = (p * (tl.dot(v, d_out.T, input_precision=PRECISION) - delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=INTEGERS)
def key_kernel(Q, Q2, K, V, DOut, Lse, Delta, First, Last, SeenBegin, SeenEnd, FullBegin, FullEnd, DK, DV_, num_tokens,
               num_keys, num_splits, scale_log2, scale, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
               DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BOXED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DK, DV_ (splits, B, S, G, D or Dv) of BN keys, from one share of the rows that see them.

    SeenBegin .. SeenEnd - 1 are the tokens that see some key of the tile, FullBegin .. FullEnd - 1 all of them.
    """
    slots = tl.num_programs(1)
    split = tl.program_id(0) % num_splits
    tile = tl.program_id(0) // num_splits
    slot = tl.program_id(1)
    batch, group = slot // GROUPS, slot % GROUPS
    key = tile * BN + tl.arange(0, BN)
    ok = key < num_keys
    k_row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group
    k1 = _load_rows(K, k_row, ok, tl.arange(0, D1), D)
    k2 = k1
    if D2 > 0:
        k2 = _load_rows(K, k_row, ok, D1 + tl.arange(0, D2), D)
    v = _load_rows(V, k_row, ok, tl.arange(0, DV1), DV)

    token0, token1 = tl.load(SeenBegin + tile), tl.load(SeenEnd + tile)
    row0 = token0 * HEADS
    tiles = tl.cdiv(tl.maximum(token1 - token0, 0) * HEADS, BM)
    begin = (tiles.to(tl.int64) * split // num_splits).to(tl.int32)
    end = (tiles.to(tl.int64) * (split + 1) // num_splits).to(tl.int32)
    full_begin = tl.cdiv(tl.maximum(tl.load(FullBegin + tile) - token0, 0) * HEADS, BM)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.maximum(tl.load(FullEnd + tile) - token0, 0) * HEADS // BM
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    dk1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, DV1], tl.float32)
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0,
                             begin, full_begin, num_tokens, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, BOXED,
                             True, PRECISION)  # fmt: skip
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0,
                             full_begin, full_end, num_tokens, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM,
                             BOXED, False, PRECISION)  # fmt: skip
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0,
                             full_end, end, num_tokens, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, BOXED, True,
                             PRECISION)  # fmt: skip
    out_row = k_row + split.to(tl.int64) * (slots // GROUPS) * num_keys * GROUPS
    _store_rows(DK, out_row, ok, tl.arange(0, D1), D, dk1 * scale)
    if D2 > 0:
        _store_rows(DK, out_row, ok, D1 + tl.arange(0, D2), D, dk2 * scale)
    _store_rows(DV_, out_row, ok, tl.arange(0, DV1), DV, dv)


@triton.jit
def _count_up_to(Values, bound, count, steps):
    """How many of the ``count`` rising Values are at most each bound; 2^steps > count."""
    low = tl.zeros_like(bound)
    high = low + count
    for _ in tl.range(0, steps):
        middle = low + (high - low) // 2  # their sum may pass 2^31
        below = (middle < high) & (tl.load(Values + middle, mask=middle < high, other=0) <= bound)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=[*INTEGERS, "steps", "pitch"])
def tile_runs_kernel(First, Last, Runs, num_tokens, num_keys, num_tiles, steps, pitch, BN: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Runs (4, pitch) int32: for each tile of BN keys the tokens that see some of it, begin and end, and all of it."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tile * BN
    last = tl.minimum(begin + BN, num_keys) - 1
    ok = tile < num_tiles
    tl.store(Runs + tile, _count_up_to(Last, begin, num_tokens, steps), mask=ok)
    tl.store(Runs + pitch + tile, _count_up_to(First, last, num_tokens, steps), mask=ok)
    tl.store(Runs + 2 * pitch + tile, _count_up_to(Last, last, num_tokens, steps), mask=ok)
    tl.store(Runs + 3 * pitch + tile, _count_up_to(First, begin, num_tokens, steps), mask=ok)


@triton.jit(do_not_specialize=[*INTEGERS, "vectors_k", "vectors_v"])
def add_splits_kernel(PartK, PartV, DK, DV_, vectors_k, vectors_v, num_splits, VECTOR: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """DK and DV_ from the sums (splits, ..) fp32 of the programs that shared a tile, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        _add_splits(PartK, DK, at, vectors_k.to(tl.int64) * VECTOR, num_splits, BLOCK)
    else:
        _add_splits(PartV, DV_, at, vectors_v.to(tl.int64) * VECTOR, num_splits, BLOCK)


@triton.jit
def _add_splits(Part, Out, at, count, num_splits, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, num_splits):
        total += tl.load(Part + at, mask=at < count, other=0.0)
        Part += count
    tl.store(Out + at, total.to(Out.dtype.element_ty), mask=at < count)


@cached
def int32_runs(visible: Ranges) -> tuple[Tensor, Tensor]:
    """first and last (T,) int32 of a pattern."""
    return visible.first.int(), visible.last.int()


@functools.lru_cache(maxsize=256)
def _constants(heads: int, groups: int, width: int, v_width: int, dtype: torch.dtype) -> dict[str, int | str]:
    first, second = split_width(width)
    return {
        "GROUPS": groups,
        "HEADS": heads // groups,
        "D": width,
        "DV": v_width,
        "D1": first,
        "D2": second,
        "DV1": max(16, triton.next_power_of_2(v_width)),
        # fp32 products in three tf32 passes: errors of fp32 at the tensor cores' speed.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def shape_constants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int | str]:
    """The compile-time constants that every attention kernel shares."""
    return dict(_constants(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype))


def forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, T, H, Dv) in q's dtype and lse (B, T, H) fp32.

    Args:
        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv): contiguous. first, last: (T,) int32, never falling.
    """
    (batch, tokens, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    if not k.numel() or not q.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    if warpgroups(q, k, v, scale, FORWARD):
        from nsa.ops.kernels.hopper import ranges as hopper

        hopper.forward(q, k, v, first, last, scale, out, lse)
        return out, lse
    constants = shape_constants(q, k, v)
    tile, options = tile_sizes("range_forward", q, k, v)
    num_tiles = triton.cdiv(tokens * heads // groups, tile["BM"])
    forward_kernel[(num_tiles * batch * groups,)](
        q,
        descriptor(k, tile["BN"], constants["D1"]),
        descriptor(k, tile["BN"], constants["D2"] or constants["D1"]),
        descriptor(v, tile["BN"], constants["DV1"]),
        out, lse, first, last, tokens, keys, num_tiles, scale * LOG2_E, **constants, **tile, **options,
    )  # fmt: skip
    return out, lse


def delta(out: Tensor, d_out: Tensor) -> Tensor:
    """(B, T, H) fp32: the sum of out * d_out (B, T, H, Dv) over its last axis."""
    result = out.new_empty(out.shape[:3], dtype=torch.float32)
    width = max(16, triton.next_power_of_2(out.shape[3]))
    rows = max(1, 8192 // width)
    if result.numel():
        grid = (triton.cdiv(result.numel(), rows),)
        delta_kernel[grid](out, d_out, result, result.numel(), out.shape[3], width, rows, num_warps=4)
    return result


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, first: Tensor, last: Tensor,
    scale: float, add_to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (``add_to`` plus it, in place, if given), dk, dv in the dtypes of q, k, v; d_out contiguous.

    Args:
        q, k, v, first, last: as for `forward`. d_out: (B, T, H, Dv). lse, delta: (B, T, H) fp32.
    """
    tensors = (q, k, v, d_out, lse, delta, first, last)
    if not k.numel() or not q.numel():
        return torch.zeros_like(q) if add_to is None else add_to, torch.zeros_like(k), torch.zeros_like(v)
    return query_gradient(*tensors, scale, add_to), *key_gradients(*tensors, scale)


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, first: Tensor, last: Tensor,
    scale: float, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (batch, tokens, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    dq = torch.empty_like(q) if add_to is None else add_to
    if warpgroups(q, k, v, scale):
        from nsa.ops.kernels.hopper import gradient

        gradient.query_gradient(q, [k, v], d_out, lse, delta, [first, last], None, None, scale, dq, add_to is not None)
        return dq
    constants = shape_constants(q, k, v)
    tile, options = tile_sizes("range_query", q, k, v)
    num_tiles = triton.cdiv(tokens * heads // groups, tile["BM"])
    query_kernel[(num_tiles * batch * groups,)](
        q,
        descriptor(k, tile["BN"], constants["D1"]),
        descriptor(k, tile["BN"], constants["D2"] or constants["D1"]),
        descriptor(v, tile["BN"], constants["DV1"]),
        d_out, lse, delta, first, last, dq, tokens, keys, num_tiles, scale * LOG2_E, scale,
        **constants, **tile, ADD=add_to is not None, **options,
    )  # fmt: skip
    return dq


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, first: Tensor, last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, tokens, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    on_hopper = warpgroups(q, k, v, scale)
    tile, options = tile_sizes("hopper_range_key" if on_hopper else "range_key", q, k, v)
    num_tiles = triton.cdiv(keys, tile["BN"])
    runs = derived(first, _tile_runs, last, keys, tile["BN"])
    # Few key tiles, each seen by many queries (compressed keys): several programs share one, and their sums are
    # added in a fixed order. At most one for each token to a key, so that the sums take memory linear in the tokens.
    rows = tokens * heads // groups
    programs = PROGRAMS * (2 if on_hopper else 1) // (num_tiles * batch * groups)
    splits = max(1, min(16, programs, rows // (8 * tile["BM"])), min(triton.cdiv(rows, LONGEST_SUM), tokens // keys))
    whole = splits == 1
    dk = torch.empty_like(k) if whole else k.new_empty(splits, *k.shape, dtype=torch.float32)
    dv = torch.empty_like(v) if whole else v.new_empty(splits, *v.shape, dtype=torch.float32)
    others = (lse, delta, first, last, *runs, dk, dv, tokens, keys, splits)
    if on_hopper:
        from nsa.ops.kernels.hopper import keys as hopper
        from nsa.ops.kernels.hopper import span

        inputs = hopper.descriptors(q, k, v, d_out, tile["BM"] // span(heads // groups), tile["BN"])
        hopper.range_key_kernel[(num_tiles * batch * groups, splits)](
            *inputs, *others, scale * LOG2_E, scale, **hopper.shape_constants(q, k), **tile, **options
        )  # fmt: skip
        return (dk, dv) if whole else _add_splits_of(dk, dv, k, v)
    constants = shape_constants(q, k, v)
    boxed = constants["HEADS"] <= tile["BM"] and constants["HEADS"] & (constants["HEADS"] - 1) == 0

    def box(x: Tensor, width: int) -> Tensor | TensorDescriptor:
        return head_descriptor(x, tile["BM"], constants["HEADS"], width) if boxed else x

    key_kernel[(num_tiles * splits, batch * groups)](
        box(q, constants["D1"]), box(q, constants["D2"] or constants["D1"]), k, v, box(d_out, constants["DV1"]),
        *others, scale * LOG2_E, scale, **constants, **tile, BOXED=boxed, **options,
    )  # fmt: skip
    return (dk, dv) if whole else _add_splits_of(dk, dv, k, v)


def _tile_runs(first: Tensor, last: Tensor, num_keys: int, tile: int) -> Tensor:
    """As `tile_runs_kernel`: the same for all layers, which see the same runs."""
    tokens, num_tiles = len(first), triton.cdiv(num_keys, tile)
    runs = first.new_empty(4, (num_tiles + 3) // 4 * 4)  # rows at multiples of 16 bytes
    tile_runs_kernel[(triton.cdiv(num_tiles, 128),)](
        first, last, runs, tokens, num_keys, num_tiles, tokens.bit_length(), runs.shape[1], BN=tile, BLOCK=128,
        num_warps=4,
    )  # fmt: skip
    return runs


def _add_splits_of(parts_k: Tensor, parts_v: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the first axis of both, in the shapes and dtypes of k and v."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    vector = vector_of(k.numel(), v.numel())
    add_splits_kernel[(triton.cdiv(max(k.numel(), v.numel()), 1024), 2)](
        parts_k, parts_v, dk, dv, k.numel() // vector, v.numel() // vector, len(parts_k), VECTOR=vector, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    return dk, dv


PROGRAMS = 1056  # enough to balance uneven work over a GPU of some 130 multiprocessors: eight each
# Rows of queries that one program adds up. A tensor core cuts off what does not fit when it adds to a sum: over 2^20
# rows dK and dV come out 0.2 % too small, over 2^23 rows 1.7 % (docs/log/2026-11.md).
LONGEST_SUM = 2**20
