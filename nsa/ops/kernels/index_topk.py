"""DSA's lightning indexer: index scores, and the exact top-k of each query.

Scores of SLAB_BYTES at most exist at a time: those of a chunk of queries with all keys. A program then selects the
top-k of one query by radix (MSD radix select): a score becomes an integer of the same order, and four passes over the
row find the k-th largest, a byte in each. The last pass takes, in the order of the keys, what lies above it and as many
equal ones as are missing. So ties go to the lower key, and the result is ascending. Nothing depends on a sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import Documents
from nsa.ops.kernels.device_functions import load_rows
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, tile_width

SLAB_BYTES = 2**26  # of fp32 scores at a time: about as much as the L2 cache holds
SELECT_BLOCK = 2048  # scores that a program of `topk_kernel` loads at once
BINS = tl.constexpr(256)  # of a byte
FORCED = tl.constexpr(0xFFFFFFFF)  # the key of a forced token, above that of every finite score


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_stride"])
def score_kernel(Q, K, W, First, Own, Scores, token0, num_rows, num_tokens, num_keys, row_stride,
                 HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Scores (B, rows, S) fp32 of queries ``token0 .. token0 + num_rows - 1`` with the keys that some of them sees.

    Q (B, T, Hi, Di); K (B, S, Di); W (B, T, Hi) fp32; First, Own (T,) int32: the first and the last visible key.
    """
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    ok = row < num_rows  # [BM]
    token = token0 + row  # [BM]
    key0 = tl.program_id(0) * BN
    begin = tl.load(First + token0 + tl.program_id(1) * BM)
    end = tl.load(Own + token0 + tl.minimum(tl.program_id(1) * BM + BM, num_rows) - 1)
    if (key0 <= end) & (key0 + BN > begin):
        key = key0 + tl.arange(0, BN)  # [BN]
        k = load_rows(K, batch * num_keys + key, key < num_keys, tl.arange(0, D1), D)  # [BN, D1]
        total = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
        for head in tl.range(0, HEADS):
            q_row = (batch * num_tokens + token) * HEADS + head  # [BM]
            q = load_rows(Q, q_row, ok, tl.arange(0, D1), D)  # [BM, D1]
            weight = tl.load(W + q_row, mask=ok, other=0.0)  # [BM]
            s = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BN]
            total += tl.maximum(s, 0.0) * weight[:, None]
        at = (batch * num_rows + row)[:, None] * row_stride + key[None, :]
        tl.store(Scores + at, total, mask=ok[:, None] & (key[None, :] < num_keys))


@triton.jit
def _ordered(score, key, first, own, num_initial, num_local):
    """uint32 of the same order as the score; +0 and -0 are equal. Forced tokens are above all others."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    bits = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    forced = (key < first + num_initial) | (key > own - num_local)
    return tl.where(forced, FORCED, bits)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_stride", "topk"])
def topk_kernel(Scores, First, Own, Indices, Chosen, token0, num_rows, num_tokens, row_stride, topk, num_initial,
                num_local, BLOCK: tl.constexpr):  # fmt: skip
    """Indices (B, T, topk) int32 ascending, and Chosen, their scores, of one query. Both are filled with padding."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Scores += (batch * num_rows + row) * row_stride
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    place = (batch * num_tokens + token0 + row) * topk
    # Of a query that sees at most k tokens all are taken: the threshold is below every score.
    threshold, missing = tl.full([], 0, tl.uint32), topk
    if own - first + 1 > topk:
        for step in tl.static_range(4):
            counts = tl.zeros([256], tl.int32)  # [BINS] tokens by the next byte
            for start in tl.range(first, own + 1, BLOCK):
                key = start + tl.arange(0, BLOCK)  # [BLOCK]
                ordered = _ordered(tl.load(Scores + key, mask=key <= own, other=0.0), key, first, own, num_initial,
                                   num_local)  # fmt: skip
                digit = ((ordered >> (24 - 8 * step)) & 0xFF).to(tl.int32)  # [BLOCK]
                here = key <= own
                if step > 0:
                    here = here & ((ordered >> (32 - 8 * step)) == threshold)
                counts += tl.histogram(digit, 256, mask=here)
            # The byte of the k-th largest: at least `missing` tokens have it or a larger one, fewer a larger one.
            at_least = tl.sum(counts) - tl.cumsum(counts, 0) + counts  # [BINS]
            byte = tl.sum((at_least >= missing).to(tl.int32)) - 1
            bins = tl.arange(0, 256)
            missing -= tl.sum(tl.where(bins > byte, counts, 0))
            threshold = (threshold << 8) | byte.to(tl.uint32)
    taken, ties = 0, 0
    for start in tl.range(first, own + 1, BLOCK):
        key = start + tl.arange(0, BLOCK)  # [BLOCK]
        score = tl.load(Scores + key, mask=key <= own, other=0.0)  # [BLOCK]
        ordered = _ordered(score, key, first, own, num_initial, num_local)
        tie = (key <= own) & (ordered == threshold)
        rank = ties + tl.cumsum(tie.to(tl.int32), 0)  # [BLOCK], from 1
        take = (key <= own) & ((ordered > threshold) | (tie & (rank <= missing)))
        slot = taken + tl.cumsum(take.to(tl.int32), 0) - 1  # [BLOCK]
        tl.store(Indices + place + slot, key, mask=take)
        tl.store(Chosen + place + slot, score, mask=take)
        taken += tl.sum(take.to(tl.int32))
        ties += tl.sum(tie.to(tl.int32))


def topk(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, documents: Documents, topk: int, num_initial: int, num_local: int
) -> tuple[Tensor, Tensor]:
    """Indices (B, T, topk) int32, ascending, then -1; their scores (B, T, topk) fp32, -inf for the padding.

    Args:
        q_idx (B, T, Hi, Di), k_idx (B, S, Di): contiguous. weights: (B, T, Hi) fp32, contiguous. The others are those
            of `nsa.ops.index_topk`.
    """
    (batch, tokens, heads, width), keys = q_idx.shape, k_idx.shape[1]
    indices = q_idx.new_full((batch, tokens, topk), -1, dtype=torch.int32)
    chosen = q_idx.new_full((batch, tokens, topk), -torch.inf, dtype=torch.float32)
    if not indices.numel():
        return indices, chosen
    first, own = documents.bounds[documents.query_document].int(), documents.query_position.int()
    block = 16 if INTERPRETED else 128
    rows = max(1, min(tokens, SLAB_BYTES // (4 * keys * batch)))
    slab = q_idx.new_empty(batch, rows, keys, dtype=torch.float32)
    precision = "tf32x3" if q_idx.dtype == torch.float32 else "tf32"
    for token in range(0, tokens, rows):
        here = min(rows, tokens - token)
        grid = (triton.cdiv(keys, block), triton.cdiv(here, block), batch)
        score_kernel[grid](
            q_idx, k_idx, weights, first, own, slab, token, here, tokens, keys, keys, heads, width, tile_width(width),
            block, block, precision, num_warps=8, num_stages=3,
        )  # fmt: skip
        topk_kernel[here, batch](
            slab, first, own, indices, chosen, token, here, tokens, keys, topk, num_initial, num_local,
            64 if INTERPRETED else SELECT_BLOCK, num_warps=8,
        )  # fmt: skip
    return indices, chosen
