"""Attention in which each query sees a range of keys: dense, sliding window and compressed, packed or not.

Rows: for KV head g, row r is query head ``g * h + r % h`` of token ``r // h``, with h = H / G. A program takes
consecutive rows. So any group size fills a tile, and all heads of neighbouring tokens share each tile of keys.

Token t sees keys ``first[t] .. last[t] - 1``. Both never decrease with t. For a tile of tokens t0..t1, all tokens see
the keys from ``first[t1]`` to ``last[t0] - 1``, so those tiles of keys need no mask. The tokens that see a tile of keys
are also a range, which a binary search finds. So dK and dV are computed like the output, with the roles swapped.

Algorithm: FlashAttention-2 (arXiv 2307.08691). The backward pass recomputes the probabilities from the LSE twice: once
with queries in the outer loop (dQ), once with keys (dK, dV). That takes seven products instead of five, but no atomic
adds, so the result is bitwise deterministic.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.ops.geometry import Ranges, cached, derived
from nsa.ops.kernels.device_functions import (
    SMALLEST_DOT,
    count_up_to,
    load_base2_lse,
    load_box_parts,
    load_row_parts,
    load_rows,
    query_rows,
    scores,
    store_key_gradients,
    store_output,
    store_query_gradient,
    tile_of_program,
)
from nsa.ops.kernels.hardware import (
    FORWARD,
    INTEGERS,
    LOG2_E,
    descriptor,
    head_descriptor,
    split_width,
    tile_sizes,
    tile_width,
    vector_of,
    warpgroups,
)

# Target number of programs of a dK, dV launch: eight for each of some 130 multiprocessors balance uneven work.
PROGRAMS = 1056
DELTA_ELEMENTS = 8192  # of one program of `delta_kernel`
ADD_BLOCK = 1024  # elements of one program of `add_splits_kernel`
RUNS_BLOCK = 128  # tiles of keys of one program of `tile_runs_kernel`
MOST_SPLITS = 16  # programs that share one tile of keys
TILES_PER_SPLIT = 8  # tiles of queries that a program goes through at least, if it shares its keys
# Maximum number of rows of queries that one program sums. A tensor core truncates when it adds to a sum: over 2^20 rows
# dK and dV come out 0.2 % too small, over 2^23 rows 1.7 % (docs/log/2026-11.md).
LONGEST_SUM = 2**20


@triton.jit
def _keys_of_tile(First, Last, token0, token1, BN: tl.constexpr):
    """(begin, full_begin, full_end, end): the keys that tokens ``token0 .. token1`` see.

    Keys ``full_begin .. full_end - 1`` are whole tiles of BN keys that all tokens see.
    """
    begin, end = tl.load(First + token0), tl.load(Last + token1)
    full_begin, full_end = tl.load(First + token1), tl.load(Last + token0)
    full_begin = tl.minimum(begin + tl.cdiv(full_begin - begin, BN) * BN, end)
    full_end = full_begin + tl.maximum(full_end - full_begin, 0) // BN * BN
    return begin, full_begin, full_end, end


@triton.jit
def _forward_loop(acc, row_max, row_sum, q1, q2, first, last, K1, K2, V, key_row, start, stop, k_column, v_column,
                  scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over keys ``start .. stop - 1``: (acc, row_max, row_sum) with them taken in."""
    for j in tl.range(start, stop, BN):
        k1, k2 = load_box_parts(K1, K2, key_row + j, k_column, D1, D2)  # [BN, D1], [BN, D2]
        s = scores(q1, q2, k1, k2, D2, PRECISION)  # [BM, BN]
        if MASKED:
            key = j + tl.arange(0, BN)  # [BN]
            s = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)  # [BM]
        # A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
        base = new_max  # [BM]
        if MASKED:
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * scale_log2 - base[:, None])  # [BM, BN]
        rescale = tl.exp2(row_max - base)  # [BM]
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = V.load([key_row + j, v_column])  # [BN, DV1]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(Q, K1, K2, V, Out, Lse, First, Last, num_tokens, num_keys, num_tiles, scale_log2,
                   GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                   D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Output and LSE of BM rows.

    Q, Out (B, T, H, D or Dv); K1, K2, V: descriptors of (B * S, G * D or Dv); Lse (B, T, H) fp32.
    """
    tile, _slot, batch, group = tile_of_program(num_tiles, GROUPS)
    row = tile * BM + tl.arange(0, BM)  # [BM]
    token = row // HEADS  # [BM]
    ok = token < num_tokens  # [BM]
    q_row = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    first = tl.load(First + token, mask=ok, other=0)  # [BM]
    last = tl.load(Last + token, mask=ok, other=0)  # [BM]

    token0 = tile * BM // HEADS
    token1 = tl.minimum((tile * BM + BM - 1) // HEADS, num_tokens - 1)
    begin, full_begin, full_end, end = _keys_of_tile(First, Last, token0, token1, BN)

    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM], in units of log2
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    key_row = batch * num_keys
    acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, first, last, K1, K2, V, key_row, begin,
                                          full_begin, group * D, group * DV, scale_log2, D1, D2, BN, True,
                                          PRECISION)  # fmt: skip
    # After the masked tiles a row may still have seen no key. The tiles without mask give it a finite maximum.
    acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, first, last, K1, K2, V, key_row, full_begin,
                                          full_end, group * D, group * DV, scale_log2, D1, D2, BN, False,
                                          PRECISION)  # fmt: skip
    acc, row_max, row_sum = _forward_loop(acc, row_max, row_sum, q1, q2, first, last, K1, K2, V, key_row, full_end,
                                          end, group * D, group * DV, scale_log2, D1, D2, BN, True,
                                          PRECISION)  # fmt: skip
    store_output(Out, Lse, q_row, ok, acc, row_max, row_sum, DV, DV1)


@triton.jit(do_not_specialize=INTEGERS)
def delta_kernel(Out, DOut, Delta, num_rows, DV: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr):
    """Delta (rows,) fp32: the row sums of Out * DOut, both (rows, Dv)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    column = tl.arange(0, DV1)  # [DV1]
    out = load_rows(Out, row, row < num_rows, column, DV).to(tl.float32)  # [BM, DV1]
    d_out = load_rows(DOut, row, row < num_rows, column, DV).to(tl.float32)  # [BM, DV1]
    tl.store(Delta + row, tl.sum(out * d_out, 1), mask=row < num_rows)


@triton.jit
def _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, start, stop, k_column, v_column,
                scale_log2, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """(dq1, dq2) with dS K of keys ``start .. stop - 1`` added, not yet times the scale."""
    for j in tl.range(start, stop, BN):
        k1, k2 = load_box_parts(K1, K2, key_row + j, k_column, D1, D2)  # [BN, D1], [BN, D2]
        v = V.load([key_row + j, v_column])  # [BN, DV1]
        p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        if MASKED:
            key = j + tl.arange(0, BN)  # [BN]
            p = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]), p, 0.0)
        ds = (p * (tl.dot(d_out, v.T, input_precision=PRECISION) - delta[:, None])).to(k1.dtype)  # [BM, BN]
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
    tile, _slot, batch, group = tile_of_program(num_tiles, GROUPS)
    row = tile * BM + tl.arange(0, BM)  # [BM]
    token = row // HEADS  # [BM]
    ok = token < num_tokens  # [BM]
    q_row = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    d_out = load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
    lse = load_base2_lse(Lse, q_row, ok)  # [BM]
    delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
    first = tl.load(First + token, mask=ok, other=0)  # [BM]
    last = tl.load(Last + token, mask=ok, other=0)  # [BM]

    token0 = tile * BM // HEADS
    token1 = tl.minimum((tile * BM + BM - 1) // HEADS, num_tokens - 1)
    begin, full_begin, full_end, end = _keys_of_tile(First, Last, token0, token1, BN)

    dq1 = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
    dq2 = tl.zeros([BM, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BM, D2], unused if D2 is 0
    key_row = batch * num_keys
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, begin, full_begin,
                           group * D, group * DV, scale_log2, D1, D2, BN, True, PRECISION)  # fmt: skip
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, full_begin, full_end,
                           group * D, group * DV, scale_log2, D1, D2, BN, False, PRECISION)  # fmt: skip
    dq1, dq2 = _query_loop(dq1, dq2, q1, q2, d_out, lse, delta, first, last, K1, K2, V, key_row, full_end, end,
                           group * D, group * DV, scale_log2, D1, D2, BN, True, PRECISION)  # fmt: skip
    store_query_gradient(DQ, q_row, ok, dq1, dq2, scale, D, D1, D2, ADD)


@triton.jit
def _load_query_tile(X, token, head, column, row, ok, D, HEADS: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
                     BOXED: tl.constexpr):  # fmt: skip
    """(BM, WIDTH) of Q or dO, from ``column`` on: HEADS heads of BM / HEADS tokens.

    If BOXED, X is a descriptor of (B * T, H, D), and TMA loads a box from (token, head) on. Only a power of two of
    heads makes such a box. For other groups X is a tensor, and the rows ``row`` are gathered where ``ok``.
    """
    if BOXED:
        return tl.reshape(X.load([token, head, column]), [BM, WIDTH])
    else:
        return load_rows(X, row, ok, column + tl.arange(0, WIDTH), D)


@triton.jit
def _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0, start, stop,
              num_tokens, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
              D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BOXED: tl.constexpr,
              MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(dk1, dk2, dv) with tiles of queries ``start .. stop - 1`` taken in, counted from row ``row0`` of the slot."""
    for i in tl.range(start, stop):
        row = row0 + i * BM + tl.arange(0, BM)  # [BM]
        token = row // HEADS  # [BM]
        ok = token < num_tokens  # [BM]
        q_row = query_rows(batch, token, group, row, num_tokens, GROUPS, HEADS)  # [BM]
        box = batch * num_tokens + (row0 + i * BM) // HEADS
        head = group * HEADS
        q1 = _load_query_tile(Q, box, head, 0, q_row, ok, D, HEADS, BM, D1, BOXED)  # [BM, D1]
        q2 = q1
        if D2 > 0:
            q2 = _load_query_tile(Q2, box, head, D1, q_row, ok, D, HEADS, BM, D2, BOXED)  # [BM, D2]
        lse = load_base2_lse(Lse, q_row, ok)  # [BM]
        p = tl.exp2(scores(k1, k2, q1, q2, D2, PRECISION) * scale_log2 - lse[None, :])  # [BN, BM]
        if MASKED:
            first = tl.load(First + token, mask=ok, other=0)  # [BM]
            last = tl.load(Last + token, mask=ok, other=0)  # [BM]
            p = tl.where((key[:, None] >= first[None, :]) & (key[:, None] < last[None, :]), p, 0.0)
        d_out = _load_query_tile(DOut, box, head, 0, q_row, ok, DV, HEADS, BM, DV1, BOXED)  # [BM, DV1]
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
        ds = (p * (tl.dot(v, d_out.T, input_precision=PRECISION) - delta[None, :])).to(q1.dtype)  # [BN, BM]
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=INTEGERS)
def key_kernel(Q, Q2, K, V, DOut, Lse, Delta, First, Last, SeenBegin, SeenEnd, FullBegin, FullEnd, DK, DV_, num_tokens,
               num_keys, num_splits, scale_log2, scale, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
               DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BOXED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DK, DV_ (splits, B, S, G, D or Dv) of BN keys, from one split: a share of the rows that see them.

    SeenBegin .. SeenEnd - 1 are the tokens that see some key of the tile. FullBegin .. FullEnd - 1 are those that see
    all of its keys.
    """
    slots = tl.num_programs(1)
    split = tl.program_id(0) % num_splits
    tile = tl.program_id(0) // num_splits
    slot = tl.program_id(1)
    batch, group = slot // GROUPS, slot % GROUPS
    key = tile * BN + tl.arange(0, BN)  # [BN]
    ok = key < num_keys  # [BN]
    k_row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group  # [BN]
    k1, k2 = load_row_parts(K, k_row, ok, D, D1, D2)  # [BN, D1], [BN, D2]
    v = load_rows(V, k_row, ok, tl.arange(0, DV1), DV)  # [BN, DV1]

    token0, token1 = tl.load(SeenBegin + tile), tl.load(SeenEnd + tile)
    row0 = token0 * HEADS
    tiles = tl.cdiv(tl.maximum(token1 - token0, 0) * HEADS, BM)
    begin = (tiles.to(tl.int64) * split // num_splits).to(tl.int32)
    end = (tiles.to(tl.int64) * (split + 1) // num_splits).to(tl.int32)
    full_begin = tl.cdiv(tl.maximum(tl.load(FullBegin + tile) - token0, 0) * HEADS, BM)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.maximum(tl.load(FullEnd + tile) - token0, 0) * HEADS // BM
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    dk1 = tl.zeros([BN, D1], tl.float32)  # [BN, D1]
    dk2 = tl.zeros([BN, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BN, D2], unused if D2 is 0
    dv = tl.zeros([BN, DV1], tl.float32)  # [BN, DV1]
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0,
                             begin, full_begin, num_tokens, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, BOXED,
                             True, PRECISION)  # fmt: skip
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0,
                             full_begin, full_end, num_tokens, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM,
                             BOXED, False, PRECISION)  # fmt: skip
    dk1, dk2, dv = _key_loop(dk1, dk2, dv, k1, k2, v, key, Q, Q2, DOut, Lse, Delta, First, Last, batch, group, row0,
                             full_end, end, num_tokens, scale_log2, GROUPS, HEADS, D, DV, D1, D2, DV1, BM, BOXED, True,
                             PRECISION)  # fmt: skip
    out_row = k_row + split.to(tl.int64) * (slots // GROUPS) * num_keys * GROUPS  # [BN]
    store_key_gradients(DK, DV_, out_row, ok, dk1, dk2, dv, scale, D, DV, D1, D2, DV1)


@triton.jit(do_not_specialize=[*INTEGERS, "steps", "pitch"])
def tile_runs_kernel(First, Last, Runs, num_tokens, num_keys, num_tiles, steps, pitch, BN: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Runs (4, pitch) int32: for each tile of BN keys two ranges of tokens.

    Rows 0 and 1 hold begin and end of the tokens that see some key of the tile, rows 2 and 3 of those that see all.
    """
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    begin = tile * BN  # [BLOCK]
    last = tl.minimum(begin + BN, num_keys) - 1  # [BLOCK]
    ok = tile < num_tiles  # [BLOCK]
    tl.store(Runs + tile, count_up_to(Last, begin, num_tokens, steps), mask=ok)
    tl.store(Runs + pitch + tile, count_up_to(First, last, num_tokens, steps), mask=ok)
    tl.store(Runs + 2 * pitch + tile, count_up_to(Last, last, num_tokens, steps), mask=ok)
    tl.store(Runs + 3 * pitch + tile, count_up_to(First, begin, num_tokens, steps), mask=ok)


@triton.jit(do_not_specialize=[*INTEGERS, "vectors_k", "vectors_v"])
def add_splits_kernel(PartK, PartV, DK, DV_, vectors_k, vectors_v, num_splits, VECTOR: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """DK and DV_: the partial sums (splits, ..) fp32 of the programs that shared a tile of keys, added in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if tl.program_id(1) == 0:
        _add_splits(PartK, DK, at, vectors_k.to(tl.int64) * VECTOR, num_splits, BLOCK)
    else:
        _add_splits(PartV, DV_, at, vectors_v.to(tl.int64) * VECTOR, num_splits, BLOCK)


@triton.jit
def _add_splits(Part, Out, at, count, num_splits, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    for _ in tl.range(0, num_splits):
        total += tl.load(Part + at, mask=at < count, other=0.0)
        Part += count
    tl.store(Out + at, total.to(Out.dtype.element_ty), mask=at < count)


@cached
def int32_runs(visible: Ranges) -> tuple[Tensor, Tensor]:
    """first and last (T,) of a pattern, as int32."""
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
        "DV1": tile_width(v_width),
        # fp32 products take three tf32 passes, which are as accurate as fp32 and run on tensor cores.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def shape_constants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int | str]:
    """The compile-time constants that every attention kernel shares."""
    return dict(_constants(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype))


def forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, T, H, Dv) in q's dtype and lse (B, T, H) fp32.

    Args:
        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv): contiguous. first, last: (T,) int32, nondecreasing.
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
    """(B, T, H) fp32: the sum of out * d_out (B, T, H, Dv) over its last dimension."""
    result = out.new_empty(out.shape[:3], dtype=torch.float32)
    width = tile_width(out.shape[3])
    rows = max(1, DELTA_ELEMENTS // width)
    if result.numel():
        grid = (triton.cdiv(result.numel(), rows),)
        delta_kernel[grid](out, d_out, result, result.numel(), out.shape[3], width, rows, num_warps=4)
    return result


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, first: Tensor, last: Tensor,
    scale: float, add_to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k, v. If ``add_to`` (B, T, H, D) is given, dq is added to it in place.

    Args:
        q, k, v, first, last: as for `forward`. d_out: (B, T, H, Dv), contiguous. lse, delta: (B, T, H) fp32.
    """
    tensors = (q, k, v, d_out, lse, delta, first, last)
    if not k.numel() or not q.numel():
        return torch.zeros_like(q) if add_to is None else add_to, torch.zeros_like(k), torch.zeros_like(v)
    return query_gradient(*tensors, scale, add_to), *key_gradients(*tensors, scale)


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, first: Tensor, last: Tensor,
    scale: float, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dq (B, T, H, D), as in `backward`."""
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
    """dk (B, S, G, D) and dv (B, S, G, Dv), as in `backward`."""
    (batch, tokens, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    on_hopper = warpgroups(q, k, v, scale)
    tile, options = tile_sizes("hopper_range_key" if on_hopper else "range_key", q, k, v)
    num_tiles = triton.cdiv(keys, tile["BN"])
    runs = derived(first, _tile_runs, last, keys, tile["BN"])
    # There are few compressed keys, and many queries see each. So several programs share a tile of keys, and their
    # partial sums are added in a fixed order. There are at most tokens / keys of them, so the sums take memory linear
    # in the tokens.
    rows = tokens * heads // groups
    programs = PROGRAMS * (2 if on_hopper else 1) // (num_tiles * batch * groups)
    wanted = min(MOST_SPLITS, programs, rows // (TILES_PER_SPLIT * tile["BM"]))
    splits = max(1, wanted, min(triton.cdiv(rows, LONGEST_SUM), tokens // keys))
    whole = splits == 1
    dk = torch.empty_like(k) if whole else k.new_empty(splits, *k.shape, dtype=torch.float32)
    dv = torch.empty_like(v) if whole else v.new_empty(splits, *v.shape, dtype=torch.float32)
    others = (lse, delta, first, last, *runs, dk, dv, tokens, keys, splits)
    if on_hopper:
        from nsa.ops.kernels.hopper import keys as hopper
        from nsa.ops.kernels.hopper import rows_per_token

        inputs = hopper.descriptors(q, k, v, d_out, tile["BM"] // rows_per_token(heads // groups), tile["BN"])
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
    """Runs as `tile_runs_kernel` writes them: the same for all layers of a step, which share ``first`` and ``last``."""
    tokens, num_tiles = len(first), triton.cdiv(num_keys, tile)
    runs = first.new_empty(4, triton.cdiv(num_tiles, 4) * 4)  # rows begin at multiples of 16 bytes
    tile_runs_kernel[(triton.cdiv(num_tiles, RUNS_BLOCK),)](
        first, last, runs, tokens, num_keys, num_tiles, tokens.bit_length(), runs.shape[1], BN=tile, BLOCK=RUNS_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return runs


def _add_splits_of(parts_k: Tensor, parts_v: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of both over their first dimension, in the shapes and dtypes of k and v."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    vector = vector_of(k.numel(), v.numel())
    add_splits_kernel[(triton.cdiv(max(k.numel(), v.numel()), ADD_BLOCK), 2)](
        parts_k, parts_v, dk, dv, k.numel() // vector, v.numel() // vector, len(parts_k), VECTOR=vector,
        BLOCK=ADD_BLOCK, num_warps=4,
    )  # fmt: skip
    return dk, dv
