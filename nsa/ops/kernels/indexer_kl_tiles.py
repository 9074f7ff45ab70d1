"""The loss of DSA's indexer over lists, with its gradients, in the backward pass of the attention to these lists.

The target is the attention, summed over its heads. `nsa.ops.kernels.tokens.backward_kernel` has these probabilities,
so they cost no second pass over the keys. They come for a chunk of queries at a time, in tiles of neighbouring queries
with the union of their lists. What remains works on the same tiles:

- `score_kernel`: the index scores of all slots;
- `row_kernel`, a program for each query: the loss, and the gradient with respect to the scores;
- `gradient_kernel`: from that one the gradients of the index queries and their weights, and parts of that of the index
  keys, which are summed as those of the attention's keys are.

A tile has few programs, so its slots are split among several. Their sums of the query's gradients are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels import hardware
from nsa.ops.kernels.device_functions import load_rows, store_rows
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, tile_width
from nsa.ops.kernels.ranges import shape_constants
from nsa.ops.kernels.tokens import TILE_ROWS, Tiles, backward, query_sum, tile_rows, union_options, united_slots

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # in place of a sum of 0
SCORE_PROGRAMS, GRADIENT_PROGRAMS = 256, 128  # of a chunk, at least, where its lists are long enough
ROW_BLOCK = 1024  # slots that a program of `row_kernel` loads at once


@triton.jit
def _slots_of_program(Count, place, BN: tl.constexpr):
    """The first slot of this program, and that after the last: a run of whole blocks of BN."""
    count = tl.load(Count + place)
    each = tl.cdiv(tl.cdiv(count, BN), tl.num_programs(1)) * BN
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, count), count


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "num_queries"])
def score_kernel(Q, K, Weights, Union, Members, Count, Scores, token0, num_queries, num_tokens, num_keys, num_slots,
                 HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores (B, tiles, QUERIES, slots) fp32 of all slots, also of those that a query does not list.

    Q (B, T, H, D) and K (B, S, D) of the indexer; Weights (B, T, H) fp32; Union, Members (B, tiles, slots), Count (B,
    tiles): see `nsa.ops.kernels.tokens.union_kernel`. ROWS heads of each query are taken at a time.
    """
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(0) + tile
    first, last, count = _slots_of_program(Count, place, BN)
    Union += place * num_slots
    Members += place * num_slots
    query, _member, of_query, ok = tile_rows(tile, num_queries, QUERIES, ROWS, ROWS, BM)
    of_tile = tl.arange(0, BM // ROWS)  # [BM / ROWS], of which QUERIES are queries
    room = (place * QUERIES + of_tile)[:, None] * num_slots  # [BM / ROWS, 1]
    for head0 in tl.range(0, HEADS, ROWS):
        head = head0 + of_query  # [BM]
        at = (batch * num_tokens + token0 + query) * HEADS + head  # [BM]
        q = load_rows(Q, at, ok & (head < HEADS), tl.arange(0, D1), D)  # [BM, D1]
        weight = tl.load(Weights + at, mask=ok & (head < HEADS), other=0.0)  # [BM]
        for start in tl.range(first, last, BN):
            row, listed, _queries = united_slots(Union, Members, start, count, batch * num_keys, BN)  # [BN]
            k = load_rows(K, row, listed, tl.arange(0, D1), D)  # [BN, D1]
            a = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BN]
            score = query_sum(tl.maximum(a, 0.0) * weight[:, None], ROWS)  # [BM / ROWS, BN]
            where = room + start + tl.arange(0, BN)[None, :]
            there = (of_tile < QUERIES)[:, None] & listed[None, :]
            if HEADS > ROWS:
                score += tl.load(Scores + where, mask=there & (head0 > 0), other=0.0)
            tl.store(Scores + where, score, mask=there)
        if HEADS > ROWS:
            tl.debug_barrier()  # what other threads of the program stored is there


@triton.jit(do_not_specialize=[*INTEGERS, "token0"])
def row_kernel(Members, Count, Sums, Scores, Loss, token0, num_tokens, num_slots, SLABS: tl.constexpr,
               QUERIES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Loss (B, T) of a query. Scores becomes the gradient with respect to it: 0 for keys that it does not list.

    Sums (SLABS, B, tiles, QUERIES, slots) fp32: parts of the target; their sum is not normalised, and takes the place
    of the first.
    """
    query, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(tl.num_programs(0), QUERIES)
    place = batch * tiles + query // QUERIES
    count = tl.load(Count + place)
    Members += place * num_slots
    Sums += (place * QUERIES + query % QUERIES) * num_slots
    Scores += (place * QUERIES + query % QUERIES) * num_slots
    slab = tl.num_programs(1).to(tl.int64) * tiles * QUERIES * num_slots
    mass, largest, exponentials = 0.0, float("-inf"), 0.0
    for start in tl.range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        queries = tl.load(Members + slot, mask=slot < count, other=0).to(tl.int32)  # [BLOCK]
        lists = ((queries >> (query % QUERIES)) & 1) == 1  # [BLOCK]
        target = tl.load(Sums + slot, mask=lists, other=0.0)  # [BLOCK]
        for index in tl.range(1, SLABS):
            target += tl.load(Sums + index * slab + slot, mask=lists, other=0.0)
        tl.store(Sums + slot, target, mask=lists)
        score = tl.load(Scores + slot, mask=lists, other=float("-inf"))  # [BLOCK]
        mass += tl.sum(target)
        new = tl.maximum(largest, tl.max(score))
        base = tl.where(new == float("-inf"), 0.0, new)
        exponentials = exponentials * tl.exp(largest - base) + tl.sum(tl.exp(score - base))
        largest = new
    tl.debug_barrier()  # what other threads of the program stored is there
    log_sum = tl.where(exponentials > 0, largest + tl.log(tl.maximum(exponentials, TINY)), 0.0)
    some = tl.where(mass > 0, 1.0, 0.0)  # the sum of the target
    loss = 0.0
    for start in tl.range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        queries = tl.load(Members + slot, mask=slot < count, other=0).to(tl.int32)  # [BLOCK]
        lists = ((queries >> (query % QUERIES)) & 1) == 1  # [BLOCK]
        target = tl.load(Sums + slot, mask=lists, other=0.0) / tl.maximum(mass, TINY)  # [BLOCK]
        log_q = tl.load(Scores + slot, mask=lists, other=0.0) - log_sum  # [BLOCK]
        loss += tl.sum(tl.where(target > 0, target * (tl.log(tl.maximum(target, TINY)) - log_q), 0.0))
        tl.store(Scores + slot, tl.where(lists, tl.exp(log_q) * some - target, 0.0), mask=slot < count)
    tl.store(Loss + batch * num_tokens + token0 + query, loss)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "num_queries"])
def gradient_kernel(Q, K, Weights, Union, Members, Count, DScores, DQuery, DWeights, Parts, token0, num_queries,
                    num_tokens, num_keys, num_slots, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
                    QUERIES: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """DQuery (splits, B, queries, H, D) and DWeights (splits, B, queries, H), fp32: sums over a split's slots.

    Parts (B, tiles, slots, D): of dK. DScores: what `row_kernel` made of Scores. Other arguments as in `score_kernel`.
    """
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(0) + tile
    first, last, count = _slots_of_program(Count, place, BN)
    Union += place * num_slots
    Members += place * num_slots
    query, _member, of_query, ok = tile_rows(tile, num_queries, QUERIES, ROWS, ROWS, BM)
    of_tile = tl.arange(0, BM // ROWS)  # [BM / ROWS], of which QUERIES are queries
    room = (place * QUERIES + of_tile)[:, None] * num_slots  # [BM / ROWS, 1]
    split_row = (tl.program_id(1) * tl.num_programs(2) + batch) * num_queries
    for head0 in tl.range(0, HEADS, ROWS):
        head = head0 + of_query  # [BM]
        here = ok & (head < HEADS)  # [BM]
        at = (batch * num_tokens + token0 + query) * HEADS + head  # [BM]
        q = load_rows(Q, at, here, tl.arange(0, D1), D)  # [BM, D1]
        weight = tl.load(Weights + at, mask=here, other=0.0)  # [BM]
        d_query = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
        d_weight = tl.zeros([BM], tl.float32)  # [BM]
        for start in tl.range(first, last, BN):
            row, listed, _queries = united_slots(Union, Members, start, count, batch * num_keys, BN)  # [BN]
            slot = start + tl.arange(0, BN)  # [BN]
            k = load_rows(K, row, listed, tl.arange(0, D1), D)  # [BN, D1]
            a = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BN]
            # Of a query that is not there they mean nothing; its rows of ``a`` are 0, and no gradient of it is stored.
            there = (of_tile < QUERIES)[:, None] & listed[None, :]
            d_score = tl.load(DScores + room + slot[None, :], mask=there, other=0.0)  # [BM / ROWS, BN]
            d_score = tl.broadcast_to(d_score[:, None, :], [BM // ROWS, ROWS, BN])
            d_score = tl.reshape(d_score, [BM, BN])  # [BM, BN], the same for all rows of a query
            d_weight += tl.sum(tl.maximum(a, 0.0) * d_score, 1)
            d_a = tl.where(a > 0, d_score * weight[:, None], 0.0).to(k.dtype)  # [BM, BN]
            d_query = tl.dot(d_a, k, d_query, input_precision=PRECISION)
            part = tl.dot(tl.trans(d_a), q, input_precision=PRECISION)  # [BN, D1]
            if HEADS > ROWS:
                part += load_rows(Parts, place * num_slots + slot, listed & (head0 > 0), tl.arange(0, D1), D)
            store_rows(Parts, place * num_slots + slot, listed, tl.arange(0, D1), D, part)
        to = (split_row + query) * HEADS + head  # [BM]
        store_rows(DQuery, to, here, tl.arange(0, D1), D, d_query)
        tl.store(DWeights + to, d_weight, mask=here)
        if HEADS > ROWS:
            tl.debug_barrier()  # what other threads of the program stored is there


class ListLearner:
    """The indexer's loss and gradients, chunk by chunk (`nsa.ops.kernels.tokens.Learner`).

    Args:
        q_idx (B, T, Hi, Di), k_idx (B, S, Di): contiguous. weights (B, T, Hi): contiguous, fp32. groups: KV heads of
        the attention. precision: of products of fp32.

    Attributes:
        loss: (B, T) fp32, of each query. d_query, d_weights: gradients, in q_idx's dtype and fp32. total: that of the
        index keys, fp32.
    """

    def __init__(self, q_idx: Tensor, k_idx: Tensor, weights: Tensor, groups: int, precision: str) -> None:
        self.inputs, self.groups, self.precision = (q_idx, k_idx, weights), groups, precision
        self.loss = torch.zeros(q_idx.shape[:2], dtype=torch.float32, device=q_idx.device)
        self.d_query, self.d_weights = torch.zeros_like(q_idx), torch.zeros_like(weights)
        self.total = torch.zeros_like(k_idx, dtype=torch.float32)
        self.scores: Tensor | None = None

    def learn(self, tiles: Tiles, queries: int, sums: Tensor, parts: Tensor) -> None:
        q_idx, k_idx, _ = self.inputs
        (batch, tokens, heads, width), keys = q_idx.shape, k_idx.shape[1]
        number, slots = tiles.union.shape[1:]
        if self.scores is None:  # the first chunk is the largest
            self.scores = self.loss.new_empty(batch * number * queries * slots)
        rows = max(1, min(triton.next_power_of_2(heads), TILE_ROWS[q_idx.element_size()] // queries))
        tile = {"QUERIES": queries, "ROWS": rows, "BM": tile_width(queries * rows)}
        options = union_options(tile["BM"], width * q_idx.element_size())
        gradient_options = dict(options)
        if heads > rows and not INTERPRETED:  # with all of it, parts that are read again would spill registers
            gradient_options |= {"num_stages": 1} if hardware.architecture() == "sm_80" else {"BN": 32}
        sizes = {"HEADS": heads, "D": width, "D1": tile_width(width), "PRECISION": self.precision}
        most = triton.cdiv(min(slots, keys), options["BN"])
        splits = [max(1, min(x // (number * batch), most)) for x in (SCORE_PROGRAMS, GRADIENT_PROGRAMS)]
        where = (tiles.token, tiles.here, tokens, keys, slots)
        union = (tiles.union, tiles.members, tiles.count)
        score_kernel[number, splits[0], batch](*self.inputs, *union, self.scores, *where, **sizes, **tile, **options)
        row_kernel[tiles.here, batch](
            tiles.members, tiles.count, sums, self.scores, self.loss, tiles.token, tokens, slots, self.groups, queries,
            64 if INTERPRETED else ROW_BLOCK, num_warps=4,
        )  # fmt: skip
        d_query = self.loss.new_empty(splits[1], batch, tiles.here, heads, width)
        d_weights = self.loss.new_empty(splits[1], batch, tiles.here, heads)
        gradient_kernel[number, splits[1], batch](
            *self.inputs, *union, self.scores, d_query, d_weights, parts, *where, **sizes, **tile, **gradient_options
        )
        chunk = slice(tiles.token, tiles.token + tiles.here)
        self.d_query[:, chunk] = d_query.sum(0)
        self.d_weights[:, chunk] = d_weights.sum(0)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float,
    q_idx: Tensor, k_idx: Tensor, weights: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv as `nsa.ops.kernels.tokens.backward`; the loss (), fp32; its gradients with respect to q_idx, k_idx
    (in their dtypes) and weights (fp32).

    Args:
        q to scale: as there. q_idx (B, T, Hi, Di), k_idx (B, S, Di): contiguous. weights (B, T, Hi): contiguous, fp32.
    """
    learner = ListLearner(q_idx, k_idx, weights, k.shape[2], str(shape_constants(q, k, v)["PRECISION"]))
    gradients = backward(q, k, v, lists, d_out, lse, delta, scale, learner)
    return *gradients, learner.loss.sum(), learner.d_query, learner.total.to(k_idx.dtype), learner.d_weights
