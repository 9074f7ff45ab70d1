"""Block importance and top-n in one kernel (NSA, arXiv 2502.11089, Eq. 9 to 11): nothing of size T x S is written.

With R = block_size / stride and u = length / stride, compressed key i = R * j + m starts in selection block j and
covers u strides: ``own(m) = min(u, R - m)`` of them lie in block j, ``next(m) = max(0, m + u - R)`` in block j + 1
(u <= R). So importance[j] = A[j] + B[j - 1], where A and B weigh the probabilities of block j's R keys with own and
next. The probabilities are recomputed from the LSE; a program holds a chunk of keys and passes the group's heads by
them, adding probabilities in registers, so that the mask, the weights and the top-n cost once per group.

A candidate is one int64, ``bits of the fp32 importance << 32 | (2^31 - 1 - j)``: importance is never negative, so
integer order is importance first, lower block next. The n best so far stay in registers;
there is no limit to the number of blocks, and the result does not depend on the order of anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import Documents, Ranges, block_starts, cached
from nsa.ops.kernels.launch import BOTH_PASSES, INTEGERS, LOG2_E, descriptor, tile_sizes, warpgroups
from nsa.ops.kernels.ranges import _load_rows, _scores, int32_runs, shape_constants


@triton.jit
def _insert(best, candidates):
    """The largest of best (BQ, N) and candidates (BQ, BJ), all different: one candidate of each row at a time.

    Few candidates beat the n-th best after the first chunks, so this is several times cheaper than merging sorted
    lists, and it ends at once where none does.
    """
    top, low = tl.max(candidates, 1), tl.min(best, 1)
    while tl.max((top > low).to(tl.int32), 0) > 0:
        better = (top > low)[:, None]
        best = tl.where(better & (best == low[:, None]), top[:, None], best)
        candidates = tl.where(candidates == top[:, None], -0x7FFFFFFFFFFFFFFF, candidates)
        top, low = tl.max(candidates, 1), tl.min(best, 1)
    return best


@triton.jit
def _store_sorted(Out, chosen, row, slot_n, ok, num_blocks):
    """Block numbers (rows, N), -1 for none, to rows of Out, ascending, -1 behind."""
    chosen = tl.sort(tl.where(chosen < 0, 0x7FFFFFFF, chosen), dim=1)
    tl.store(Out + row[:, None] * num_blocks + slot_n[None, :], tl.where(chosen == 0x7FFFFFFF, -1, chosen),
             mask=ok[:, None] & (slot_n < num_blocks)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def sort_kernel(Out, num_rows, num_blocks, N: tl.constexpr, BM: tl.constexpr):
    row, slot_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, N)
    ok = row < num_rows
    chosen = tl.load(Out + row[:, None] * num_blocks + slot_n[None, :],
                     mask=ok[:, None] & (slot_n < num_blocks)[None, :], other=-1)  # fmt: skip
    _store_sorted(Out, chosen, row, slot_n, ok, num_blocks)


@triton.jit(do_not_specialize=INTEGERS)
def select_kernel(Q1, Q2, K, Lse, First, Last, Local, TileStart, TileEnd, Out, num_tokens, num_keys, num_tiles,
                  num_blocks, num_initial, num_local, block_size, scale_log2, GROUPS: tl.constexpr,
                  HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, RATIO: tl.constexpr,
                  UNITS: tl.constexpr, N: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, RATIO2: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Out (B, T, G, num_blocks) int32 of the tokens TileStart .. TileEnd - 1 of one document.

    Q1, Q2: descriptors of (B * T, H * D); K (B, S, G, D); Lse (B, T, H); Local (T,) position in the document.
    """
    slots = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    batch, group = slot // GROUPS, slot % GROUPS
    start, stop = tl.load(TileStart + tile), tl.load(TileEnd + tile)
    if start >= stop:
        return
    token = start + tl.arange(0, BQ)
    ok = token < stop
    local = tl.load(Local + token, mask=ok, other=0)
    own = local // block_size
    key0 = tl.load(First + start)
    seen = tl.load(Last + token, mask=ok, other=0) - key0
    most_seen, most_own = tl.max(seen, 0), tl.max(own, 0)

    part = tl.arange(0, RATIO2 * BJ)  # keys of a chunk: key m of every block, then key m + 1 of every block
    m = part // BJ
    own_weight = tl.where(m < RATIO, tl.minimum(UNITS, RATIO - m), 0).to(tl.float32)
    next_weight = tl.where(m < RATIO, tl.maximum(0, m + UNITS - RATIO), 0).to(tl.float32)
    q_row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS
    slot_n = tl.arange(0, N)
    # Negative: free, each different. Beyond num_blocks: never to be replaced.
    best = tl.where(slot_n < num_blocks, -1 - slot_n.to(tl.int64), 0x7FFFFFFFFFFFFFFF)
    best = tl.broadcast_to(best[None, :], [BQ, N])
    carry = tl.zeros([BQ], tl.float32)
    for j0 in tl.range(0, most_own + 1, BJ):
        key = (j0 + part % BJ) * RATIO + m
        k_ok = (m < RATIO) & (key < most_seen)
        k_row = (batch.to(tl.int64) * num_keys + key0 + key) * GROUPS + group
        k1 = _load_rows(K, k_row, k_ok, tl.arange(0, D1), D)
        k2 = k1
        if D2 > 0:
            k2 = _load_rows(K, k_row, k_ok, D1 + tl.arange(0, D2), D)
        p = tl.zeros([BQ, RATIO2 * BJ], tl.float32)
        heads = tl.where(j0 * RATIO < most_seen, HEADS, 0)
        # Not an operand of a product, so Triton does not prefetch it: one head ahead by hand.
        lse = tl.load(Lse + q_row, mask=ok, other=float("-inf"))
        for head in tl.range(0, heads):
            q1 = Q1.load([batch * num_tokens + start, (group * HEADS + head) * D])
            q2 = q1
            if D2 > 0:
                q2 = Q2.load([batch * num_tokens + start, (group * HEADS + head) * D + D1])
            base = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
            lse = tl.load(Lse + q_row + tl.minimum(head + 1, HEADS - 1), mask=ok, other=float("-inf"))
            # Keys that the query does not see may overflow to inf here; they are dropped below.
            p += tl.exp2(_scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - base[:, None])
        p = tl.where(key[None, :] < seen[:, None], p, 0.0)
        here = tl.sum(tl.reshape(p * own_weight[None, :], [BQ, RATIO2, BJ]), 1)
        j = tl.arange(0, BJ)
        if UNITS > 1:
            after = tl.sum(tl.reshape(p * next_weight[None, :], [BQ, RATIO2, BJ]), 1)
            before = tl.gather(after, tl.broadcast_to(tl.maximum(j - 1, 0)[None, :], [BQ, BJ]), 1)
            here += tl.where(j[None, :] == 0, carry[:, None], before)
            carry = tl.sum(tl.where(j[None, :] == BJ - 1, after, 0.0), 1)
        j += j0
        forced = (j[None, :] < num_initial) | (j[None, :] > own[:, None] - num_local)
        here = tl.where(forced, float("inf"), here)
        candidate = (here.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - j)[None, :].to(tl.int64)
        best = _insert(best, tl.where(j[None, :] <= own[:, None], candidate, -0x7FFFFFFFFFFFFFFF))

    ok_n = (slot_n < num_blocks)[None, :]
    chosen = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    out_row = (batch.to(tl.int64) * num_tokens + token) * GROUPS + group
    _store_sorted(Out, tl.where((best >= 0) & ok_n, chosen, -1), out_row, slot_n, ok, num_blocks)


@cached
def document_tiles(documents: Documents, offset: int, size: int) -> tuple[Tensor, Tensor]:
    """(start, end) int32 of tiles of at most ``size`` queries that never straddle documents; the last ones are empty.

    ``offset`` is the position of the first query: keys may precede it.
    """
    bounds, tokens = (documents.bounds - offset).clamp(min=0), len(documents.query_position)
    counts = torch.nn.functional.pad(((bounds[1:] - bounds[:-1] + size - 1) // size).cumsum(0), (1, 0))
    start, document = block_starts(bounds, counts, size, tokens // size + len(bounds) - 1)
    end = torch.minimum(start + size, bounds[document + 1])
    return start.int(), end.int()


def select(
    q: Tensor, k: Tensor, lse: Tensor, documents: Documents, visible: Ranges, offset: int, length: int, stride: int,
    block_size: int, num_blocks: int, num_initial: int, num_local: int, scale: float,
) -> Tensor:  # fmt: skip
    """(B, T, G, num_blocks) int32, as `nsa.ops.select_blocks`.

    Args:
        q (B, T, H, D), k (B, S, G, D), lse (B, T, H) fp32: contiguous. visible: the run of compressed keys that each
            query sees. offset: position of the first query.
    """
    (batch, tokens), groups = q.shape[:2], k.shape[2]
    out = q.new_empty(batch, tokens, groups, num_blocks, dtype=torch.int32)
    if not out.numel():
        return out
    ratio, units = block_size // stride, length // stride
    # The LSEs of all heads and the sums of a chunk's blocks, more the fewer keys they have, must fit beside the keys.
    wide = q.shape[3] > 128
    heads = q.shape[2] // groups
    fits = ratio >= 4 and heads <= 32 and heads % 2 == 0 if wide else ratio >= max(1, min(units, 2))
    widths = (*BOTH_PASSES, (192, 192))  # the keys twice, there are no values
    if warpgroups(q, k, k, scale, widths) and fits and ratio <= 32 and num_blocks <= 32:
        from nsa.ops.kernels.hopper import selection as hopper

        tiles = document_tiles(documents, offset, hopper.TILE)
        runs = (*int32_runs(visible), _local(documents))
        hopper.select(
            q, k, lse, runs, tiles, out, (num_blocks, num_initial, num_local, block_size), ratio, units, scale
        )
        n = max(2, triton.next_power_of_2(num_blocks))
        rows = batch * tokens * groups
        sort_kernel[(triton.cdiv(rows, 2048 // n),)](out, rows, num_blocks, N=n, BM=2048 // n, num_warps=4)
        return out
    constants = shape_constants(q, k, k)
    del constants["DV"], constants["DV1"]
    tile, options = select_tile(q, k, ratio, num_blocks)
    start, end = document_tiles(documents, offset, tile["BQ"])
    select_kernel[(len(start) * batch * groups,)](
        descriptor(q, tile["BQ"], constants["D1"]),
        descriptor(q, tile["BQ"], constants["D2"] or constants["D1"]),
        k, lse, *int32_runs(visible), _local(documents), start, end, out, tokens, k.shape[1], len(start), num_blocks,
        num_initial, num_local, block_size, scale * LOG2_E, **constants, RATIO=ratio, UNITS=units,
        **tile, **options,
    )  # fmt: skip
    return out


@cached
def _local(documents: Documents) -> Tensor:
    return documents.query_local.int()


def select_tile(q: Tensor, k: Tensor, ratio: int, num_blocks: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile constants and launch options: KEYS keys, that is BJ selection blocks, in a chunk."""
    tile, options = tile_sizes("select", q, k, k)
    ratio2 = triton.next_power_of_2(ratio)
    blocks = max(1, tile.pop("KEYS") // ratio2)
    return {**tile, "BJ": blocks, "RATIO2": ratio2, "N": max(2, triton.next_power_of_2(num_blocks))}, options
