"""The loss of DSA's indexer over lists of tokens, with its gradients.

A program takes a tile of queries, and goes through the union of their lists twice. First come the target (the
attention, summed over all heads) and the index score of each query and token, and their sums; both are kept in memory.
Then the loss and the gradients with respect to the scores are known, and with them those of the index queries and their
weights. Gradients of the index keys are sums over the tiles that list them: `nsa.ops.kernels.tokens.summed_parts` adds
them up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import load_base2_lse, load_row_parts, load_rows, scores, store_rows
from nsa.ops.kernels.hardware import INTEGERS, LOG2_E, tile_width
from nsa.ops.kernels.ranges import shape_constants
from nsa.ops.kernels.tokens import (
    MOST_ROWS,
    queries_of_tile,
    summed_parts,
    tile_rows,
    union_options,
    united_slots,
)

# Rows of a tile of queries, by the bytes of an element, and stages of the loops over its keys.
KL_ROWS, KL_STAGES = {2: 64, 4: 16}, 2
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # in place of a sum of 0


@triton.jit
def _attention_sum(Q, K, Lse, token_row, member, head, ok, row, listed, scale_log2, GROUPS: tl.constexpr,
                   HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, QUERIES: tl.constexpr,
                   ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[QUERIES, BN]: the sum over all heads of exp(score - lse), of a tile's queries and the keys in ``row``.

    Row i of the tile is head ``head[i]`` of ROWS, of the query in ``token_row[i]``.
    """
    total = tl.zeros([QUERIES, BN], tl.float32)  # [QUERIES, BN]
    for group in tl.range(0, GROUPS):
        k1, k2 = load_row_parts(K, row * GROUPS + group, listed, D, D1, D2)  # [BN, D1], [BN, D2]
        for first in tl.range(0, HEADS, ROWS):
            at = (token_row * GROUPS + group) * HEADS + first + head  # [BM]
            here = ok & (first + head < HEADS)  # [BM]
            q1, q2 = load_row_parts(Q, at, here, D, D1, D2)  # [BM, D1], [BM, D2]
            lse = load_base2_lse(Lse, at, here)  # [BM]
            p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
            total += _query_sum(p, QUERIES, BM, BN)
    return total


@triton.jit
def _query_sum(x, QUERIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(QUERIES, BN): the sums over the rows of each query of x (BM, BN)."""
    return tl.sum(tl.reshape(x, [QUERIES, BM // QUERIES, BN]), 1)


@triton.jit
def _to_rows(x, QUERIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN): x (QUERIES, BN), repeated for all rows of a query."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [QUERIES, BM // QUERIES, BN]), [BM, BN])


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "num_queries"])
def list_kl_kernel(Q, K, Lse, QIndex, KIndex, Weights, Union, Members, Count, Targets, Scores, Loss, DQuery, DWeights,
                   Parts, token0, num_queries, num_tokens, num_keys, num_slots, scale_log2, GROUPS: tl.constexpr,
                   HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                   INDEX_HEADS: tl.constexpr, DI: tl.constexpr, DI1: tl.constexpr, QUERIES: tl.constexpr,
                   BM: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Loss (B, T), DQuery (B, T, Hi, Di) and DWeights (B, T, Hi) of a tile of queries; its Parts of dK.

    Q (B, T, H, D); K (B, S, G, D); Lse (B, T, H) fp32; QIndex (B, T, Hi, Di); KIndex (B, S, Di); Weights (B, T, Hi)
    fp32; Union, Members (B, tiles, slots), Count (B, tiles): see `nsa.ops.kernels.tokens.union_kernel`. Targets,
    Scores: room for (B, tiles, QUERIES, slots) fp32. Parts (B, tiles, slots, Di). A query has BM / QUERIES rows of
    heads, and BH / QUERIES of index heads.
    """
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = batch * tl.num_programs(0) + tile
    Union += place * num_slots
    Members += place * num_slots
    count = tl.load(Count + place)
    first_row = batch * num_tokens + token0
    query, member, head, ok = tile_rows(tile, num_queries, QUERIES, BM // QUERIES, BM // QUERIES, BM)
    index_query, _member, index_head, index_ok = tile_rows(tile, num_queries, QUERIES, BH // QUERIES, INDEX_HEADS, BH)
    index_row = (first_row + index_query) * INDEX_HEADS + index_head  # [BH]
    q_index = load_rows(QIndex, index_row, index_ok, tl.arange(0, DI1), DI)  # [BH, DI1]
    weight = tl.load(Weights + index_row, mask=index_ok, other=0.0)  # [BH]
    of_tile = tl.arange(0, QUERIES)  # [QUERIES]
    room = (place * QUERIES + of_tile)[:, None] * num_slots  # [QUERIES, 1]
    mass, exponentials = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)  # [QUERIES]
    largest = tl.full([QUERIES], float("-inf"), tl.float32)  # [QUERIES]
    for start in tl.range(0, count, BN):
        row, listed, queries = united_slots(Union, Members, start, count, batch * num_keys, BN)  # [BN]
        lists = ((queries[None, :] >> of_tile[:, None]) & 1) == 1  # [QUERIES, BN]
        target = _attention_sum(Q, K, Lse, first_row + query, member, head, ok, row, listed, scale_log2, GROUPS, HEADS,
                                D, D1, D2, QUERIES, BM // QUERIES, BM, BN, PRECISION)  # fmt: skip
        target = tl.where(lists, target, 0.0)  # [QUERIES, BN]
        k_index = load_rows(KIndex, row, listed, tl.arange(0, DI1), DI)  # [BN, DI1]
        a = tl.dot(q_index, k_index.T, input_precision=PRECISION)  # [BH, BN]
        score = _query_sum(tl.maximum(a, 0.0) * weight[:, None], QUERIES, BH, BN)  # [QUERIES, BN]
        score = tl.where(lists, score, float("-inf"))
        slot = start + tl.arange(0, BN)  # [BN]
        tl.store(Targets + room + slot[None, :], target, mask=listed[None, :])
        tl.store(Scores + room + slot[None, :], score, mask=listed[None, :])
        mass += tl.sum(target, 1)
        new = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        exponentials = exponentials * tl.exp(largest - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        largest = new
    tl.debug_barrier()  # what other threads of the program stored is there
    log_sum = tl.where(exponentials > 0, largest + tl.log(tl.maximum(exponentials, TINY)), 0.0)  # [QUERIES]
    some = tl.where(mass > 0, 1.0, 0.0)  # the sum of the target
    mass = tl.maximum(mass, TINY)
    loss = tl.zeros([QUERIES], tl.float32)  # [QUERIES]
    d_query = tl.zeros([BH, DI1], tl.float32)  # [BH, DI1]
    d_weight = tl.zeros([BH], tl.float32)  # [BH]
    for start in tl.range(0, count, BN):
        row, listed, queries = united_slots(Union, Members, start, count, batch * num_keys, BN)  # [BN]
        lists = ((queries[None, :] >> of_tile[:, None]) & 1) == 1  # [QUERIES, BN]
        slot = start + tl.arange(0, BN)  # [BN]
        target = tl.load(Targets + room + slot[None, :], mask=lists, other=0.0) / mass[:, None]  # [QUERIES, BN]
        log_q = tl.load(Scores + room + slot[None, :], mask=lists, other=0.0) - log_sum[:, None]  # [QUERIES, BN]
        loss += tl.sum(tl.where(target > 0, target * (tl.log(tl.maximum(target, TINY)) - log_q), 0.0), 1)
        d_score = tl.where(lists, tl.exp(log_q) * some[:, None] - target, 0.0)  # [QUERIES, BN]
        d_score = _to_rows(d_score, QUERIES, BH, BN)  # [BH, BN]
        k_index = load_rows(KIndex, row, listed, tl.arange(0, DI1), DI)  # [BN, DI1]
        a = tl.dot(q_index, k_index.T, input_precision=PRECISION)  # [BH, BN]
        d_weight += tl.sum(tl.maximum(a, 0.0) * d_score, 1)
        d_a = tl.where(a > 0, d_score * weight[:, None], 0.0).to(k_index.dtype)  # [BH, BN]
        d_query = tl.dot(d_a, k_index, d_query, input_precision=PRECISION)
        part = tl.dot(tl.trans(d_a), q_index, input_precision=PRECISION)  # [BN, DI1]
        store_rows(Parts, place * num_slots + slot, listed, tl.arange(0, DI1), DI, part)
    of_chunk = tile * QUERIES + of_tile  # [QUERIES]
    tl.store(Loss + first_row + of_chunk, loss, mask=of_chunk < num_queries)
    store_rows(DQuery, index_row, index_ok, tl.arange(0, DI1), DI, d_query)
    tl.store(DWeights + index_row, d_weight, mask=index_ok)


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
        rows = min(MOST_ROWS, triton.next_power_of_2(q.shape[2] // k.shape[2]))
        index_rows = triton.next_power_of_2(heads)
        queries = queries_of_tile(max(rows, index_rows), slots, KL_ROWS[q.element_size()])
        least = 16 // queries  # rows of a query, so that a tile has the 16 that tl.dot needs
        tile = {"QUERIES": queries, "BM": queries * max(rows, least), "BH": queries * max(index_rows, least)}
        options = union_options(max(tile["BM"], tile["BH"]), q.shape[3] * q.element_size(), KL_STAGES)
        room: Tensor | None = None
        for tiles, parts in summed_parts(lists, total, k_idx.dtype, queries):
            number, width_of_union = tiles.union.shape[1:]
            if room is None:
                room = loss.new_empty(2, batch * number * queries * width_of_union)
            list_kl_kernel[number, batch](
                q, k, lse, q_idx, k_idx, weights, tiles.union, tiles.members, tiles.count, *room, loss, d_query,
                d_weights, parts, tiles.token, tiles.here, tokens, keys, width_of_union, scale * LOG2_E, **constants,
                INDEX_HEADS=heads, DI=width, DI1=tile_width(width), **tile, **options,
            )  # fmt: skip
    return loss.sum(), d_query, total.to(k_idx.dtype), d_weights
