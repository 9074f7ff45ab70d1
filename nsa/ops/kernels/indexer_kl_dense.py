"""The loss of DSA's indexer over all visible tokens (the dense warm-up), with its gradients, in linear memory.

Where lists hold a large part of the tokens, this is also the way of the loss over lists: their bits say which count.

Queries are taken in chunks. For a chunk, two slabs of SLAB_BYTES hold the target (the attention, summed over all heads)
and the index scores of all keys. A program per query then turns its row of scores into the gradient with respect to
them, a third slab, and adds up its loss. From that one come the gradients of the chunk's index queries and weights, by
tiles of queries, and those of the index keys: a program owns a tile of keys, so the chunks add to it in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import load_base2_lse, load_row_parts, load_rows, scores, store_rows
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, tile_width
from nsa.ops.kernels.index_topk import score_kernel, score_tiles
from nsa.ops.kernels.ranges import shape_constants
from nsa.ops.kernels.token_tiles import tile_shape, tiles_of

SLAB_BYTES = 2**28  # of a slab: fp32 values of a chunk of queries with all keys
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # in place of a sum of 0
EDGE = 16 if INTERPRETED else 128  # a row of a slab is a multiple of it; no tile below is longer
ROW_BLOCK = 2048  # values of a row that a program of `row_kernel` loads at once
# (queries, keys, warps, stages) of a program, by the bytes of an element.
TARGET_TILES = {2: (64, 128, 4, 3), 4: (32, 64, 4, 3)}
WIDE_TARGET_TILES = {2: (64, 64, 4, 3), 4: (32, 32, 4, 3)}  # of heads wider than 128
QUERY_TILES = {2: (128, 64, 8, 3), 4: (32, 32, 4, 3)}
KEY_TILES = {2: (64, 64, 4, 3), 4: (32, 32, 4, 3)}


@triton.jit
def _sees(First, Own, token0, row0, rows, num_rows, key0, keys):
    """Whether a query of the rows ``row0`` on sees a key of those from ``key0`` on."""
    begin = tl.load(First + token0 + row0)
    end = tl.load(Own + token0 + tl.minimum(row0 + rows, num_rows) - 1)
    return (key0 <= end) & (key0 + keys > begin)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_tiles"])
def target_kernel(Q, K, Lse, First, Own, Targets, token0, num_rows, num_tokens, num_keys, row_tiles, scale_log2,
                  EDGE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
                  D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Targets (B, rows, row_tiles * EDGE) fp32: the sum over all heads of exp(score - lse).

    What is not visible means nothing.

    Q (B, T, H, D); K (B, S, G, D); Lse (B, T, H) fp32; First, Own (T,) int32: the first and the last visible key.
    """
    batch = tl.program_id(2).to(tl.int64)
    row0, key0 = tl.program_id(1) * BM, tl.program_id(0) * BN
    if _sees(First, Own, token0, row0, BM, num_rows, key0, BN):
        row = row0 + tl.arange(0, BM)  # [BM]
        key = key0 + tl.arange(0, BN)  # [BN]
        ok = row < num_rows  # [BM]
        total = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
        for group in tl.range(0, GROUPS):
            k_row = (batch * num_keys + key) * GROUPS + group  # [BN]
            k1, k2 = load_row_parts(K, k_row, key < num_keys, D, D1, D2)  # [BN, D1], [BN, D2]
            for head in tl.range(0, HEADS):
                q_row = ((batch * num_tokens + token0 + row) * GROUPS + group) * HEADS + head  # [BM]
                q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
                lse = load_base2_lse(Lse, q_row, ok)  # [BM]
                total += tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])
        at = (batch * num_rows + row)[:, None] * (row_tiles * EDGE) + key[None, :]
        tl.store(Targets + at, total, mask=ok[:, None] & (key[None, :] < row_tiles * EDGE))


@triton.jit
def _seen(key, first, own, Bits, KEYS: tl.constexpr, num_tokens, num_tiles):
    """Whether the query whose words are at Bits sees each key."""
    seen = (key >= first) & (key <= own)
    if Bits is not None:
        word = tl.load(Bits + (key // KEYS).to(tl.int64) * num_tokens, mask=seen & (key // KEYS < num_tiles), other=0)
        seen = ((word >> (key % KEYS).to(tl.int64)) & 1) == 1
    return seen


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_tiles"])
def row_kernel(Targets, Scores, DScores, First, Own, Loss, token0, num_rows, num_tokens, row_tiles, Bits, num_tiles,
               EDGE: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The Loss (B, T) of a query, and the gradient of the loss with respect to its scores: its row of DScores.

    Targets, Scores (B, rows, row_tiles * EDGE) fp32; DScores likewise, in the dtype of the index queries. Tiles of EDGE
    queries and keys, or of a divisor of it, are all that is read of DScores: it is 0 there where the key is not seen.
    Bits (B, num_tiles, T) int64: a query sees key i of a tile of KEYS keys if bit i is set. None: it sees all.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if Bits is not None:
        Bits += batch * num_tiles * num_tokens + token0 + row
    row_size = row_tiles * EDGE
    at = (batch * num_rows + row) * row_size
    Targets += at
    Scores += at
    DScores += at
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    tile = row // EDGE * EDGE
    begin = tl.load(First + token0 + tile) // EDGE * EDGE
    end = tl.load(Own + token0 + tl.minimum(tile + EDGE, num_rows) - 1) // EDGE * EDGE + EDGE
    mass, largest, exponentials = 0.0, float("-inf"), 0.0
    # Loads are masked by the row's end alone, so that the compiler may load several values at once.
    for start in tl.range(first // EDGE * EDGE, own + 1, BLOCK):
        key = start + tl.arange(0, BLOCK)  # [BLOCK]
        seen = _seen(key, first, own, Bits, KEYS, num_tokens, num_tiles)  # [BLOCK]
        mass += tl.sum(tl.where(seen, tl.load(Targets + key, mask=key < row_size, other=0.0), 0.0))
        score = tl.load(Scores + key, mask=key < row_size, other=0.0)  # [BLOCK]
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(largest, tl.max(score))
        base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
        exponentials = exponentials * tl.exp(largest - base) + tl.sum(tl.exp(score - base))
        largest = new
    log_sum = tl.where(exponentials > 0, largest + tl.log(tl.maximum(exponentials, TINY)), 0.0)
    some = tl.where(mass > 0, 1.0, 0.0)  # the sum of the target
    loss = 0.0
    for start in tl.range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)  # [BLOCK]
        seen = _seen(key, first, own, Bits, KEYS, num_tokens, num_tiles)  # [BLOCK]
        target = tl.load(Targets + key, mask=key < row_size, other=0.0)  # [BLOCK]
        target = tl.where(seen, target, 0.0) / tl.maximum(mass, TINY)
        log_q = tl.load(Scores + key, mask=key < row_size, other=0.0) - log_sum  # [BLOCK]
        loss += tl.sum(tl.where(target > 0, target * (tl.log(tl.maximum(target, TINY)) - log_q), 0.0))
        gradient = tl.where(seen, tl.exp(log_q) * some - target, 0.0)  # [BLOCK]
        tl.store(DScores + key, gradient.to(DScores.dtype.element_ty), mask=key < row_size)
    tl.store(Loss + batch * num_tokens + token0 + row, loss)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_tiles"])
def query_kernel(Q, K, W, DScores, First, Own, DQ, DW, token0, num_rows, num_tokens, num_keys, row_tiles,
                 EDGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DQ (B, T, Hi, Di) and DW (B, T, Hi) of BM queries and one index head. Q, K, W: as in `score_kernel`."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)  # neighbours read the same of K and DScores
    row0 = tl.program_id(1) * BM
    row = row0 + tl.arange(0, BM)  # [BM]
    ok = row < num_rows  # [BM]
    q_row = (batch * num_tokens + token0 + row) * HEADS + head  # [BM]
    q = load_rows(Q, q_row, ok, tl.arange(0, D1), D)  # [BM, D1]
    weight = tl.load(W + q_row, mask=ok, other=0.0)  # [BM]
    begin = tl.load(First + token0 + row0) // BN * BN
    end = tl.load(Own + token0 + tl.minimum(row0 + BM, num_rows) - 1) + 1
    dq = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
    dw = tl.zeros([BM], tl.float32)  # [BM]
    d_row = (batch * num_rows + row) * (row_tiles * EDGE)  # [BM]
    for key0 in tl.range(begin, end, BN):
        key = key0 + tl.arange(0, BN)  # [BN]
        k = load_rows(K, batch * num_keys + key, key < num_keys, tl.arange(0, D1), D)  # [BN, D1]
        a = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BN]
        d_scores = tl.load(DScores + d_row[:, None] + key[None, :], mask=ok[:, None], other=0.0)  # [BM, BN]
        d = d_scores.to(tl.float32)
        dw += tl.sum(tl.maximum(a, 0.0) * d, 1)
        da = tl.where(a > 0, d * weight[:, None], 0.0).to(k.dtype)  # [BM, BN]
        dq = tl.dot(da, k, dq, input_precision=PRECISION)
    store_rows(DQ, q_row, ok, tl.arange(0, D1), D, dq)
    tl.store(DW + q_row, dw, mask=ok)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_tiles"])
def key_kernel(Q, K, W, DScores, First, Own, DK, token0, num_rows, num_tokens, num_keys, row_tiles,
               EDGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds to DK (B, S, Di) fp32, of BN keys, what the queries of the chunk give. Q, K, W: as in `score_kernel`."""
    batch = tl.program_id(1).to(tl.int64)
    key0 = tl.program_id(0) * BN
    if _sees(First, Own, token0, 0, num_rows, num_rows, key0, BN):
        key = key0 + tl.arange(0, BN)  # [BN]
        k_row = batch * num_keys + key  # [BN]
        k = load_rows(K, k_row, key < num_keys, tl.arange(0, D1), D)  # [BN, D1]
        dk = load_rows(DK, k_row, key < num_keys, tl.arange(0, D1), D)  # [BN, D1]
        for row0 in tl.range(0, num_rows, BM):
            if _sees(First, Own, token0, row0, BM, num_rows, key0, BN):
                row = row0 + tl.arange(0, BM)  # [BM]
                ok = row < num_rows  # [BM]
                at = (batch * num_rows + row)[:, None] * (row_tiles * EDGE) + key[None, :]
                d = tl.load(DScores + at, mask=ok[:, None], other=0.0)  # [BM, BN]
                d = tl.trans(d).to(tl.float32)  # [BN, BM]: so the products are, and none of them needs to be turned
                for head in tl.range(0, HEADS):
                    q_row = (batch * num_tokens + token0 + row) * HEADS + head  # [BM]
                    q = load_rows(Q, q_row, ok, tl.arange(0, D1), D)  # [BM, D1]
                    weight = tl.load(W + q_row, mask=ok, other=0.0)  # [BM]
                    a = tl.dot(k, q.T, input_precision=PRECISION)  # [BN, BM]
                    da = tl.where(a > 0, d * weight[None, :], 0.0).to(q.dtype)  # [BN, BM]
                    dk = tl.dot(da, q, dk, input_precision=PRECISION)
        store_rows(DK, k_row, key < num_keys, tl.arange(0, D1), D, dk)


def divergence(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor, first: Tensor, own: Tensor,
    scale: float, lists: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (), fp32, and its gradients with respect to q_idx, k_idx (in their dtypes) and weights (fp32).

    Args:
        q_idx (B, T, Hi, Di), k_idx (B, S, Di), q (B, T, H, D), k (B, S, G, D): contiguous.
        weights (B, T, Hi), lse (B, T, H): contiguous, fp32.
        first, own: (T,) int32, the first and the last key that each query sees; nondecreasing.
        lists: (B, T, slots) int32, contiguous: only these keys count, -1 for none; None: all visible ones.
    """
    (batch, tokens, heads, width), keys = q_idx.shape, k_idx.shape[1]
    loss = torch.zeros(batch, tokens, dtype=torch.float32, device=q.device)
    d_query, d_weights = torch.zeros_like(q_idx), torch.zeros_like(weights)
    d_key = torch.zeros_like(k_idx, dtype=torch.float32)
    if not (loss.numel() and keys):
        return loss.sum(), d_query, torch.zeros_like(k_idx), d_weights
    constants = {name: x for name, x in shape_constants(q, k, k).items() if name not in ("DV", "DV1")}
    precision, size = constants["PRECISION"], q_idx.element_size()
    rows = max(1, min(tokens, SLAB_BYTES // (4 * keys * batch)))
    row_tiles = triton.cdiv(keys, EDGE)
    targets, slab = (loss.new_empty(batch, rows, row_tiles * EDGE) for _ in range(2))
    d_scores = torch.empty_like(slab, dtype=q_idx.dtype)
    bits = None if lists is None else tiles_of(lists, keys, size).bits
    index = {"HEADS": heads, "D": width, "D1": tile_width(width), "PRECISION": precision}

    def tiles(choice: dict[int, tuple[int, int, int, int]]) -> tuple[int, int, dict[str, int]]:
        queries, columns, warps, stages = (16, 16, 4, 2) if INTERPRETED else choice[size]
        return queries, columns, {"BM": queries, "BN": columns, "num_warps": warps, "num_stages": stages}

    for token in range(0, tokens, rows):
        here = min(rows, tokens - token)
        where = (token, here, tokens, keys)
        queries, columns, run = score_tiles(q_idx)
        score_kernel[triton.cdiv(keys, columns), triton.cdiv(here, queries * run), batch](
            q_idx, k_idx, weights, first, own, slab, *where, row_tiles, VECTOR=EDGE, BM=queries, BN=columns,
            TILES=run, **index, num_warps=4, num_stages=3,
        )  # fmt: skip
        queries, columns, options = tiles(TARGET_TILES if q.shape[3] <= 128 else WIDE_TARGET_TILES)
        target_kernel[triton.cdiv(keys, columns), triton.cdiv(here, queries), batch](
            q, k, lse, first, own, targets, *where, row_tiles, scale * LOG2_E, EDGE, **constants, **options
        )
        row_kernel[here, batch](
            targets, slab, d_scores, first, own, loss, token, here, tokens, row_tiles, Bits=bits,
            num_tiles=0 if bits is None else bits.shape[1], EDGE=EDGE, KEYS=tile_shape(size)[1],
            BLOCK=EDGE if INTERPRETED else ROW_BLOCK, num_warps=4,
        )  # fmt: skip
        queries, columns, options = tiles(QUERY_TILES)
        query_kernel[heads, triton.cdiv(here, queries), batch](
            q_idx, k_idx, weights, d_scores, first, own, d_query, d_weights, *where, row_tiles, EDGE, **index, **options
        )
        queries, columns, options = tiles(KEY_TILES)
        key_kernel[triton.cdiv(keys, columns), batch](
            q_idx, k_idx, weights, d_scores, first, own, d_key, *where, row_tiles, EDGE, **index, **options
        )
    return loss.sum(), d_query, d_key.to(k_idx.dtype), d_weights
