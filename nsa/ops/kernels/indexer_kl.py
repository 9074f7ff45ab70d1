"""The loss of DSA's indexer over lists of tokens, with its gradients.

A program takes one query. It goes through its list twice. First come the target (the attention, summed over all heads)
and the index score of each listed token, and their sums; both are kept in memory. Then the loss and the gradients with
respect to the scores are known, and with them those of the index query and its weights. Gradients of the index keys are
sums over the queries that list them: `nsa.ops.kernels.tokens.summed_parts` adds them up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import load_base2_lse, load_row_parts, load_rows, scores, store_rows
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, tile_width
from nsa.ops.kernels.ranges import shape_constants
from nsa.ops.kernels.tokens import MOST_ROWS, summed_parts

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # in place of a sum of 0


@triton.jit
def _attention_sum(Q, K, Lse, q_row, row, listed, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                   D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """[BN]: the sum over all heads of exp(score - lse), of the query in row ``q_row`` and the keys in ``row``."""
    total = tl.zeros([BN], tl.float32)  # [BN]
    for group in tl.range(0, GROUPS):
        k1, k2 = load_row_parts(K, row * GROUPS + group, listed, D, D1, D2)  # [BN, D1], [BN, D2]
        for first in tl.range(0, HEADS, BM):
            head = first + tl.arange(0, BM)  # [BM]
            at = (q_row * GROUPS + group) * HEADS + head  # [BM]
            q1, q2 = load_row_parts(Q, at, head < HEADS, D, D1, D2)  # [BM, D1], [BM, D2]
            lse = load_base2_lse(Lse, at, head < HEADS)  # [BM]
            p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
            total += tl.sum(p, 0)
    return tl.where(listed, total, 0.0)


@triton.jit(do_not_specialize=[*INTEGERS, "token0"])
def list_kl_kernel(Q, K, Lse, QIndex, KIndex, Weights, Lists, Targets, Scores, Loss, DQuery, DWeights, Parts, token0,
                   num_tokens, num_keys, num_slots, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                   D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INDEX_HEADS: tl.constexpr, DI: tl.constexpr,
                   DI1: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Loss (B, T), DQuery (B, T, Hi, Di) and DWeights (B, T, Hi) of query ``token0`` + program; its Parts of dK.

    Q (B, T, H, D); K (B, S, G, D); Lse (B, T, H) fp32; QIndex (B, T, Hi, Di); KIndex (B, S, Di); Weights (B, T, Hi)
    fp32; Lists (B, T, slots) int32. Targets, Scores: room for (B, queries, slots) fp32. Parts (B, queries, slots, Di).
    """
    batch = tl.program_id(1).to(tl.int64)
    q_row = batch * num_tokens + token0 + tl.program_id(0)
    Lists += q_row * num_slots
    room = (batch * tl.num_programs(0) + tl.program_id(0)) * num_slots
    head = tl.arange(0, BH)  # [BH]
    q_index = load_rows(QIndex, q_row * INDEX_HEADS + head, head < INDEX_HEADS, tl.arange(0, DI1), DI)  # [BH, DI1]
    weight = tl.load(Weights + q_row * INDEX_HEADS + head, mask=head < INDEX_HEADS, other=0.0)  # [BH]
    mass, largest, exponentials = 0.0, float("-inf"), 0.0
    for start in tl.range(0, num_slots, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        key = tl.load(Lists + slot, mask=slot < num_slots, other=-1)  # [BN]
        listed = key >= 0  # [BN]
        row = batch * num_keys + key  # [BN]
        target = _attention_sum(Q, K, Lse, q_row, row, listed, scale_log2, GROUPS, HEADS, D, D1, D2, BM, BN, PRECISION)
        k_index = load_rows(KIndex, row, listed, tl.arange(0, DI1), DI)  # [BN, DI1]
        a = tl.dot(q_index, k_index.T, input_precision=PRECISION)  # [BH, BN]
        score = tl.where(listed, tl.sum(tl.maximum(a, 0.0) * weight[:, None], 0), float("-inf"))  # [BN]
        tl.store(Targets + room + slot, target, mask=slot < num_slots)
        tl.store(Scores + room + slot, score, mask=slot < num_slots)
        mass += tl.sum(target)
        new = tl.maximum(largest, tl.max(score))
        base = tl.where(new == float("-inf"), 0.0, new)
        exponentials = exponentials * tl.exp(largest - base) + tl.sum(tl.exp(score - base))
        largest = new
    tl.debug_barrier()  # what other threads of the program stored is there
    log_sum = tl.where(exponentials > 0, largest + tl.log(tl.maximum(exponentials, TINY)), 0.0)
    some = tl.where(mass > 0, 1.0, 0.0)  # the sum of the target
    loss = 0.0
    d_query = tl.zeros([BH, DI1], tl.float32)  # [BH, DI1]
    d_weight = tl.zeros([BH], tl.float32)  # [BH]
    for start in tl.range(0, num_slots, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        key = tl.load(Lists + slot, mask=slot < num_slots, other=-1)  # [BN]
        listed = key >= 0  # [BN]
        target = tl.load(Targets + room + slot, mask=listed, other=0.0) / tl.maximum(mass, TINY)  # [BN]
        log_q = tl.load(Scores + room + slot, mask=listed, other=0.0) - log_sum  # [BN]
        loss += tl.sum(tl.where(target > 0, target * (tl.log(tl.maximum(target, TINY)) - log_q), 0.0))
        d_score = tl.where(listed, tl.exp(log_q) * some - target, 0.0)  # [BN]
        k_index = load_rows(KIndex, batch * num_keys + key, listed, tl.arange(0, DI1), DI)  # [BN, DI1]
        a = tl.dot(q_index, k_index.T, input_precision=PRECISION)  # [BH, BN]
        d_weight += tl.sum(tl.maximum(a, 0.0) * d_score[None, :], 1)
        d_a = tl.where(a > 0, d_score[None, :] * weight[:, None], 0.0).to(k_index.dtype)  # [BH, BN]
        d_query = tl.dot(d_a, k_index, d_query, input_precision=PRECISION)
        part = tl.dot(tl.trans(d_a), q_index, input_precision=PRECISION)  # [BN, DI1]
        store_rows(Parts, room + slot, listed, tl.arange(0, DI1), DI, part)
    tl.store(Loss + q_row, loss)
    store_rows(DQuery, q_row * INDEX_HEADS + head, head < INDEX_HEADS, tl.arange(0, DI1), DI, d_query)
    tl.store(DWeights + q_row * INDEX_HEADS + head, d_weight, mask=head < INDEX_HEADS)


def divergence(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor, lists: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (), fp32, and its gradients with respect to q_idx, k_idx (in their dtypes) and weights (fp32).

    Args:
        q_idx (B, T, Hi, Di), k_idx (B, S, Di), q (B, T, H, D), k (B, S, G, D), lists (B, T, slots) int32: contiguous.
        weights (B, T, Hi), lse (B, T, H): contiguous, fp32.
    """
    (batch, tokens, heads, width), keys, slots = q_idx.shape, k_idx.shape[1], lists.shape[2]
    loss = torch.zeros(batch, tokens, dtype=torch.float32, device=q.device)
    d_query, d_weights = torch.zeros_like(q_idx), torch.zeros_like(weights)
    total = torch.zeros_like(k_idx, dtype=torch.float32)
    if lists.numel() and keys:
        constants = shape_constants(q, k, k)
        constants = {name: value for name, value in constants.items() if name not in ("DV", "DV1")}
        rows = min(MOST_ROWS, tile_width(q.shape[2] // k.shape[2]))
        tile = {"BM": rows, "BH": tile_width(heads), "BN": 16 if INTERPRETED else 32}
        options = {} if INTERPRETED else {"num_warps": 4, "num_stages": 2}
        room: Tensor | None = None
        for tiles, (parts,) in summed_parts(lists, [total], k_idx.dtype, None):
            if room is None:
                room = loss.new_empty(2, batch * tiles.here * slots)
            list_kl_kernel[tiles.here, batch](
                q, k, lse, q_idx, k_idx, weights, lists, *room, loss, d_query, d_weights, parts, tiles.token, tokens,
                keys, slots, scale * LOG2_E, **constants, INDEX_HEADS=heads, DI=width, DI1=tile_width(width), **tile,
                **options,
            )  # fmt: skip
    return loss.sum(), d_query, total.to(k_idx.dtype), d_weights
