"""Block importance and top-n in one kernel (NSA, arXiv 2502.11089, Eq. 9 to 11): nothing of size T x S is written.

With R = block_size / stride and u = length / stride, compressed key i = R * j + m starts in selection block j and
covers u strides (u <= R). Of these, ``own(m) = min(u, R - m)`` lie in block j and ``next(m) = max(0, m + u - R)`` in
block j + 1. So importance[j] = A[j] + B[j - 1], where A and B are sums over the probabilities of block j's R keys, A
weighted with own and B with next.

The kernel recomputes the probabilities from the LSE. A program holds a chunk of keys in registers and goes through the
heads of the group, adding up probabilities: p += exp2(q k - lse). So the mask, the weights and the top-n cost once per
group, not once per head.

A candidate is one int64: the bits of the fp32 importance in the upper half, 2^31 - 1 - j in the lower. Importance is
never negative, so the order of the integers is importance first, then the lower block. The n best so far stay in
registers. The number of blocks is not limited, and the result does not depend on the order of additions or programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import Documents, Ranges, block_starts, cached
from nsa.ops.kernels.device_functions import (
    BEST_CANDIDATE,
    IMPORTANCE_SHIFT,
    LAST_BLOCK,
    LSE_TO_BASE_2,
    NO_CANDIDATE,
    load_box_parts,
    load_row_parts,
    scores,
    tile_of_program,
)
from nsa.ops.kernels.hardware import BOTH_PASSES, INTEGERS, LOG2_E, descriptor, tile_sizes, warpgroups
from nsa.ops.kernels.ranges import int32_runs, shape_constants

SORTED = 2048  # block numbers that a program of `sort_kernel` sorts
# Hopper's kernel supports at most so many selected blocks, and compressed keys per block.
HOPPER_MOST_BLOCKS = HOPPER_MOST_RATIO = 32


@triton.jit
def _insert(best, candidates):
    """The N largest of best (BQ, N) and candidates (BQ, BJ), all different.

    Each round replaces the least of best by the largest candidate, in all rows that gain by it. After the first chunks
    few candidates beat the n-th best, so few rounds run: that is several times cheaper than merging sorted lists.
    """
    top, low = tl.max(candidates, 1), tl.min(best, 1)  # [BQ], [BQ]
    while tl.max((top > low).to(tl.int32), 0) > 0:
        better = (top > low)[:, None]  # [BQ, 1]
        best = tl.where(better & (best == low[:, None]), top[:, None], best)
        candidates = tl.where(candidates == top[:, None], NO_CANDIDATE, candidates)
        top, low = tl.max(candidates, 1), tl.min(best, 1)
    return best


@triton.jit
def _store_sorted(Out, chosen, row, slot_n, ok, num_blocks):
    """Store block numbers ``chosen`` (rows, N), -1 for none, ascending, with the -1s last."""
    chosen = tl.sort(tl.where(chosen < 0, LAST_BLOCK, chosen), dim=1)
    tl.store(Out + row[:, None] * num_blocks + slot_n[None, :], tl.where(chosen == LAST_BLOCK, -1, chosen),
             mask=ok[:, None] & (slot_n < num_blocks)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def sort_kernel(Out, num_rows, num_blocks, N: tl.constexpr, BM: tl.constexpr):
    """Sort each row of Out (rows, num_blocks) in place, with the -1s last."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    slot_n = tl.arange(0, N)  # [N]
    ok = row < num_rows  # [BM]
    chosen = tl.load(Out + row[:, None] * num_blocks + slot_n[None, :],
                     mask=ok[:, None] & (slot_n < num_blocks)[None, :], other=-1)  # [BM, N]  # fmt: skip
    _store_sorted(Out, chosen, row, slot_n, ok, num_blocks)


@triton.jit(do_not_specialize=INTEGERS)
def select_kernel(Q1, Q2, K, Lse, First, Last, Local, TileStart, TileEnd, Out, num_tokens, num_keys, num_tiles,
                  num_blocks, num_initial, num_local, block_size, scale_log2, GROUPS: tl.constexpr,
                  HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, RATIO: tl.constexpr,
                  UNITS: tl.constexpr, N: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, RATIO2: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Out (B, T, G, num_blocks) int32 of BQ tokens, TileStart .. TileEnd - 1, of one document.

    Q1, Q2: descriptors of (B * T, H * D). K (B, S, G, D). Lse (B, T, H). Local (T,): position in the document. RATIO is
    R and UNITS is u of the module's docstring. A chunk is BJ blocks of RATIO2 keys (RATIO, up to a power of two).
    """
    tile, _slot, batch, group = tile_of_program(num_tiles, GROUPS)
    start, stop = tl.load(TileStart + tile), tl.load(TileEnd + tile)
    if start >= stop:
        return
    token = start + tl.arange(0, BQ)  # [BQ]
    ok = token < stop  # [BQ]
    local = tl.load(Local + token, mask=ok, other=0)  # [BQ]
    own = local // block_size  # [BQ], the token's own block
    key0 = tl.load(First + start)
    seen = tl.load(Last + token, mask=ok, other=0) - key0  # [BQ], how many keys the token sees
    most_seen, most_own = tl.max(seen, 0), tl.max(own, 0)

    # Column m * BJ + j of a chunk is key m of block j. So sums over m add whole tiles of BJ columns.
    part = tl.arange(0, RATIO2 * BJ)  # [RATIO2 * BJ]
    m = part // BJ  # [RATIO2 * BJ]
    own_weight = tl.where(m < RATIO, tl.minimum(UNITS, RATIO - m), 0).to(tl.float32)  # [RATIO2 * BJ]
    next_weight = tl.where(m < RATIO, tl.maximum(0, m + UNITS - RATIO), 0).to(tl.float32)  # [RATIO2 * BJ]
    q_row = (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS  # [BQ]
    slot_n = tl.arange(0, N)  # [N]
    # A free place is negative, and each has a value of its own. Places beyond num_blocks are never to be replaced.
    best = tl.where(slot_n < num_blocks, -1 - slot_n.to(tl.int64), BEST_CANDIDATE)  # [N]
    best = tl.broadcast_to(best[None, :], [BQ, N])  # [BQ, N]
    carry = tl.zeros([BQ], tl.float32)  # [BQ], what the last block of the chunk before gives to the next block
    for j0 in tl.range(0, most_own + 1, BJ):
        key = (j0 + part % BJ) * RATIO + m  # [RATIO2 * BJ]
        k_ok = (m < RATIO) & (key < most_seen)  # [RATIO2 * BJ]
        k_row = (batch.to(tl.int64) * num_keys + key0 + key) * GROUPS + group  # [RATIO2 * BJ]
        k1, k2 = load_row_parts(K, k_row, k_ok, D, D1, D2)  # [RATIO2 * BJ, D1], [RATIO2 * BJ, D2]
        p = tl.zeros([BQ, RATIO2 * BJ], tl.float32)  # [BQ, RATIO2 * BJ]
        heads = tl.where(j0 * RATIO < most_seen, HEADS, 0)
        # Triton prefetches operands of tl.dot only. The LSE is none, so it is loaded one head ahead here.
        lse = tl.load(Lse + q_row, mask=ok, other=float("-inf"))  # [BQ]
        for head in tl.range(0, heads):
            # [BQ, D1], [BQ, D2]
            q1, q2 = load_box_parts(Q1, Q2, batch * num_tokens + start, (group * HEADS + head) * D, D1, D2)
            base = tl.where(lse == float("-inf"), float("inf"), lse * LSE_TO_BASE_2)  # [BQ]
            lse = tl.load(Lse + q_row + tl.minimum(head + 1, HEADS - 1), mask=ok, other=float("-inf"))
            # Keys that the query does not see may overflow to inf here. They are dropped below.
            p += tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - base[:, None])
        p = tl.where(key[None, :] < seen[:, None], p, 0.0)
        importance = tl.sum(tl.reshape(p * own_weight[None, :], [BQ, RATIO2, BJ]), 1)  # [BQ, BJ]
        j = tl.arange(0, BJ)  # [BJ]
        if UNITS > 1:
            after = tl.sum(tl.reshape(p * next_weight[None, :], [BQ, RATIO2, BJ]), 1)  # [BQ, BJ]
            before = tl.gather(after, tl.broadcast_to(tl.maximum(j - 1, 0)[None, :], [BQ, BJ]), 1)  # [BQ, BJ]
            importance += tl.where(j[None, :] == 0, carry[:, None], before)
            carry = tl.sum(tl.where(j[None, :] == BJ - 1, after, 0.0), 1)
        j += j0
        forced = (j[None, :] < num_initial) | (j[None, :] > own[:, None] - num_local)  # [BQ, BJ]
        importance = tl.where(forced, float("inf"), importance)
        candidate = importance.to(tl.int32, bitcast=True).to(tl.int64) << IMPORTANCE_SHIFT  # [BQ, BJ]
        candidate |= (LAST_BLOCK.value - j)[None, :].to(tl.int64)
        best = _insert(best, tl.where(j[None, :] <= own[:, None], candidate, NO_CANDIDATE))

    ok_n = (slot_n < num_blocks)[None, :]  # [1, N]
    chosen = LAST_BLOCK.value - (best & LAST_BLOCK).to(tl.int32)  # [BQ, N]
    out_row = (batch.to(tl.int64) * num_tokens + token) * GROUPS + group  # [BQ]
    _store_sorted(Out, tl.where((best >= 0) & ok_n, chosen, -1), out_row, slot_n, ok, num_blocks)


@cached
def document_tiles(documents: Documents, size: int) -> tuple[Tensor, Tensor]:
    """(start, end) int32 of tiles of at most ``size`` queries, each within one document. The last may be empty."""
    bounds, tokens = documents.query_bounds, len(documents.query_position)
    counts = torch.nn.functional.pad(((bounds[1:] - bounds[:-1] + size - 1) // size).cumsum(0), (1, 0))
    start, document = block_starts(bounds, counts, size, tokens // size + len(bounds) - 1)
    end = torch.minimum(start + size, bounds[document + 1])
    return start.int(), end.int()


def select(
    q: Tensor, k: Tensor, lse: Tensor, documents: Documents, visible: Ranges, length: int, stride: int,
    block_size: int, num_blocks: int, num_initial: int, num_local: int, scale: float,
) -> Tensor:  # fmt: skip
    """(B, T, G, num_blocks) int32, as `nsa.ops.select_blocks`.

    Args:
        q: (B, T, H, D), k: (B, S, G, D), lse: (B, T, H) fp32; all contiguous.
        visible: the range of compressed keys that each query sees.
    """
    (batch, tokens), groups = q.shape[:2], k.shape[2]
    out = q.new_empty(batch, tokens, groups, num_blocks, dtype=torch.int32)
    if not out.numel():
        return out
    ratio, units = block_size // stride, length // stride
    if _on_hopper(q, k, ratio, units, num_blocks, scale):
        from nsa.ops.kernels.hopper import selection as hopper

        tiles = document_tiles(documents, hopper.TILE)
        runs = (*int32_runs(visible), local_positions(documents))
        hopper.select(
            q, k, lse, runs, tiles, out, (num_blocks, num_initial, num_local, block_size), ratio, units, scale
        )
        n = max(2, triton.next_power_of_2(num_blocks))
        rows = batch * tokens * groups
        sort_kernel[(triton.cdiv(rows, SORTED // n),)](out, rows, num_blocks, N=n, BM=SORTED // n, num_warps=4)
        return out
    constants = shape_constants(q, k, k)
    del constants["DV"], constants["DV1"]
    tile, options = select_tile(q, k, ratio, num_blocks)
    start, end = document_tiles(documents, tile["BQ"])
    select_kernel[(len(start) * batch * groups,)](
        descriptor(q, tile["BQ"], constants["D1"]),
        descriptor(q, tile["BQ"], constants["D2"] or constants["D1"]),
        k, lse, *int32_runs(visible), local_positions(documents), start, end, out, tokens, k.shape[1], len(start),
        num_blocks, num_initial, num_local, block_size, scale * LOG2_E, **constants, RATIO=ratio, UNITS=units,
        **tile, **options,
    )  # fmt: skip
    return out


def _on_hopper(q: Tensor, k: Tensor, ratio: int, units: int, num_blocks: int, scale: float) -> bool:
    """Whether the kernel for Hopper supports these tensors.

    Its shared memory holds the keys, the LSEs of all heads and the sums of a chunk's blocks. The fewer keys a block
    has, the more blocks a chunk has.
    """
    heads = q.shape[2] // k.shape[2]
    if q.shape[3] > 128:
        fits = ratio >= 4 and heads <= 32 and heads % 2 == 0
    else:
        fits = ratio >= max(1, min(units, 2))
    fits = fits and ratio <= HOPPER_MOST_RATIO and num_blocks <= HOPPER_MOST_BLOCKS
    return fits and warpgroups(q, k, k, scale, (*BOTH_PASSES, (192, 192)))  # no values: the widths are the keys', twice


@cached
def local_positions(documents: Documents) -> Tensor:
    """(T,) int32 position of each query in its document."""
    return documents.query_local.int()


def select_tile(q: Tensor, k: Tensor, ratio: int, num_blocks: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile constants and launch options. The table's KEYS keys of a chunk become BJ selection blocks."""
    tile, options = tile_sizes("select", q, k, k)
    ratio2 = triton.next_power_of_2(ratio)
    blocks = max(1, tile.pop("KEYS") // ratio2)
    return {**tile, "BJ": blocks, "RATIO2": ratio2, "N": max(2, triton.next_power_of_2(num_blocks))}, options
