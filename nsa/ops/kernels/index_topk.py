"""DSA's lightning indexer: index scores, and the exact top-k of each query.

Scores and candidates of SLAB_BYTES exist at a time: those of a chunk of queries with all keys. A program then
selects the top-k of one query. A sample of the row gives a bound that somewhat more than k scores reach. One pass over
the row collects these candidates. If they are fewer than k, or too many, all scores are candidates.

A score becomes an integer of the same order. Candidates stay in registers while bisection looks for an integer that
exactly k of them reach: about as many counts as their number has bits, and 32 at most, where many are equal. A whole
row is read for each count; where the bound is one of many equal scores, one is enough. What lies above is taken, in the
order of the keys, and as many equal ones as are missing. So the result is exact, ties go to the lower key, and it is
ascending. Nothing depends on a sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.index_topk.fp8 import LARGEST, SMALLEST
from nsa.ops.kernels.device_functions import begin_launch, largest, load_rows, store_rows, store_taken
from nsa.ops.kernels.hardware import (
    INTEGERS,
    INTERPRETED,
    VECTOR,
    architecture,
    early,
    tile_width,
    vector_of,
)

SLAB_BYTES = 27 * 2**23  # of fp32 scores and of candidates at a time
# Queries and keys of a program of `score_kernel`, by the bytes of an element.
SCORE_TILES = {1: (64, 128), 2: (64, 128), 4: (32, 64)}
SCORE_RUN = 2  # tiles of queries that it goes through
SELECT_BLOCK = 2048  # scores that a program of `candidate_kernel` loads at once, one of `topk_kernel` half of them
SAMPLES = (2048, 16384)  # scores of a sample, at least and at most
KEYS_PER_SAMPLE = 16  # for each score of a sample, in between
PROGRAMS = 256  # that look for candidates at a time, if there are few rows
SMALLEST_ROOM = 64  # for candidates
FILL = 256  # entries that a program fills at once
SHORT_ROW = 32 if INTERPRETED else 8192  # scores of a row that one program holds,
SHORT_ROW_ENTRIES = 1024  # and each of its warps: a reduction over few warps ends sooner
LARGEST_FP8, SMALLEST_ROW = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)
FP8, FP8_ROWS = torch.float8_e4m3fn, 16  # rows that a program of `fp8_kernel` rounds
FORCED = tl.constexpr(0xFFFFFFFF)  # the key of a forced token, above that of every finite score


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors"])
def score_kernel(Q, K, W, First, Own, Scores, token0, num_rows, num_tokens, num_keys, row_vectors,
                 VECTOR: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, KScale=None):  # fmt: skip
    """Scores (B, rows, row) fp32 of queries ``token0 .. token0 + num_rows - 1`` with the keys that some of them sees.

    Q (B, T, Hi, Di); K (B, S, Di); W (B, T, Hi) fp32; First, Own (T,) int32: the first and the last visible key; KScale
    (B, S) fp32: a factor of a key's scores, or None. A row of Scores has ``row_vectors`` times VECTOR entries.

    A program holds BN keys and goes through TILES tiles of BM queries, in one loop over tiles and heads, so that the
    next queries are loaded while these are multiplied.
    """
    batch = tl.program_id(2).to(tl.int64)
    key0 = tl.program_id(0) * BN
    row_size = row_vectors * VECTOR
    row0 = tl.program_id(1) * (BM * TILES)
    rows = tl.minimum(BM * TILES, num_rows - row0)
    # First and Own do not fall, so the tiles that see some of these keys follow each other.
    before, until = 0, 0
    for tile in tl.static_range(TILES):
        begin = tl.load(First + token0 + tl.minimum(row0 + tile * BM, num_rows - 1))
        end = tl.load(Own + token0 + tl.minimum(row0 + tile * BM + BM, num_rows) - 1)
        before += (end < key0).to(tl.int32)
        until += ((begin < key0 + BN) & (tile * BM < rows)).to(tl.int32)
    if before < until:
        key = key0 + tl.arange(0, BN)  # [BN]
        k = load_rows(K, batch * num_keys + key, key < num_keys, tl.arange(0, D1), D)  # [BN, D1]
        total = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
        for step in tl.range(before * HEADS, until * HEADS):
            head = step % HEADS
            row = row0 + step // HEADS * BM + tl.arange(0, BM)  # [BM]
            ok = row < num_rows  # [BM]
            q_row = (batch * num_tokens + token0 + row) * HEADS + head  # [BM]
            q = load_rows(Q, q_row, ok, tl.arange(0, D1), D)  # [BM, D1]
            weight = tl.load(W + q_row, mask=ok, other=0.0)  # [BM]
            s = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BN]
            total += tl.maximum(s, 0.0) * weight[:, None]
            if head == HEADS - 1:
                if KScale is not None:
                    total *= tl.load(KScale + batch * num_keys + key, mask=key < num_keys, other=0.0)[None, :]
                at = (batch * num_rows + row)[:, None] * row_size + key[None, :]
                tl.store(Scores + at, total, mask=ok[:, None] & (key[None, :] < row_size))
                total = tl.zeros([BM, BN], tl.float32)  # [BM, BN]


@triton.jit(do_not_specialize=[*INTEGERS, "token0"])
def fp8_kernel(X, W, Values, Scales, token0, num_rows, num_tokens, num_slots, HEADS: tl.constexpr, D: tl.constexpr,
               D1: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Values (B, num_slots, HEADS, D) e4m3 and Scales (B, num_slots, HEADS) fp32 of the rows of ``num_rows`` tokens.

    They are those of `nsa.ops.index_topk.fp8.to_fp8`. The tokens are those of X (B, T, HEADS, D) from ``token0`` on.
    W (B, T, HEADS) fp32: factors of the scales, or None.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    ok, column = row < num_rows * HEADS, tl.arange(0, D1)
    from_row, to_row = (batch * num_tokens + token0) * HEADS + row, batch * num_slots * HEADS + row  # [BM]
    x = load_rows(X, from_row, ok, column, D).to(tl.float32)  # [BM, D1]
    share = tl.math.div_rn(tl.maximum(tl.max(tl.abs(x), 1), SMALLEST_ROW), LARGEST_FP8)  # [BM]
    # Of the next power of two, with its bias: a mantissa that is not 0 carries into it.
    exponent = (share.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23  # [BM]
    scale = (exponent << 23).to(tl.float32, bitcast=True)  # [BM]
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # [BM]
    store_rows(Values, to_row, ok, column, D, x * inverse[:, None])
    if W is not None:
        scale *= tl.load(W + from_row, mask=ok, other=0.0)
    tl.store(Scales + to_row, scale, mask=ok)


@triton.jit(do_not_specialize=[*INTEGERS, "topk"])
def token_score_kernel(Q, K, W, Lengths, Scores, Seen, Indices, num_keys, topk, HEADS: tl.constexpr, D: tl.constexpr,
                       D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FILL: tl.constexpr,
                       PRECISION: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Scores (B, S) fp32 of one query per sequence, with BN of the tokens that are there.

    Q (B, Hi, Di); K (B, S, Di); W (B, Hi) fp32. The first program of a sequence calls `begin_rows`.
    """
    begin_launch(EARLY)
    batch = tl.program_id(1).to(tl.int64)
    length = tl.load(Lengths + batch)
    if tl.program_id(0) == 0:
        begin_rows(Seen, Indices, batch, tl.num_programs(1), length - 1, topk, FILL)
    key = tl.program_id(0) * BN + tl.arange(0, BN)  # [BN]
    if tl.program_id(0) * BN < length:
        ok = (key < length) & (key < num_keys)  # [BN]
        k = load_rows(K, batch * num_keys + key, ok, tl.arange(0, D1), D)  # [BN, D1]
        total = tl.zeros([BN], tl.float32)  # [BN]
        for head0 in tl.static_range(0, HEADS, BM):
            head = head0 + tl.arange(0, BM)  # [BM]
            q = load_rows(Q, batch * HEADS + head, head < HEADS, tl.arange(0, D1), D)  # [BM, D1]
            weight = tl.load(W + batch * HEADS + head, mask=head < HEADS, other=0.0)  # [BM]
            s = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BN]
            total += tl.sum(tl.maximum(s, 0.0) * weight[:, None], 0)
        tl.store(Scores + batch * num_keys + key, total, mask=ok)


@triton.jit
def begin_rows(Seen, Indices, row, num_rows, last, topk, FILL: tl.constexpr):
    """What `choose_rows` needs of a row: Seen (2, rows) int32, 0 and its last entry; Indices filled with -1."""
    tl.store(Seen + row, 0)
    tl.store(Seen + num_rows + row, last)
    for start in tl.range(0, topk, FILL):
        entry = start + tl.arange(0, FILL)  # [FILL]
        tl.store(Indices + row * topk + entry, tl.full([FILL], -1, tl.int32), mask=entry < topk)


@triton.jit
def _integer(score):
    """uint32 of the same order as the score, above 0; +0 and -0 are equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    return tl.maximum(tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000), 1)


@triton.jit
def _ordered(score, key, first, own, num_initial, num_local):
    """`_integer` of the score of a key. Forced tokens are above all others."""
    forced = (key < first + num_initial) | (key > own - num_local)
    return tl.where(forced, FORCED, _integer(score))


@triton.jit
def _reached(ordered, k, number):
    """(an integer that at least k of the values reach, how many do): k if there is one, else it is the k-th largest.

    ``ordered``: ``number`` values of `_ordered`, at least k, and 0 where there is none.
    """
    low = tl.min(tl.where(ordered == 0, FORCED, ordered))
    high = tl.max(tl.where(ordered == FORCED, 0, ordered)) + 1  # bisection need not cross the gap below FORCED
    while (low < high) & (number > k):
        middle = low + (high - low) // 2 + 1
        count = tl.sum((ordered >= middle).to(tl.int32))
        if count >= k:
            low, number = middle, count
        else:
            high = middle - 1
    return low, number


@triton.jit
def _threshold(ordered, k, number):
    """(an integer that the k largest reach, how many of those equal to it are among them, or -1 for all)."""
    threshold, reached = _reached(ordered, k, number)
    missing = -1
    if reached > k:
        missing = k - tl.sum((ordered > threshold).to(tl.int32))
        if missing <= 0:  # more than k are forced
            threshold, missing = tl.full([], FORCED, tl.uint32), k
    return threshold, missing


@triton.jit
def _load_ordered(Scores, key, ok, first, own, num_initial, num_local):
    """(scores, their uint32) of keys, where ``ok``."""
    score = tl.load(Scores + key, mask=ok, other=0.0)
    return score, _ordered(score, key, first, own, num_initial, num_local)


@triton.jit
def _above(Scores, value, first, own, num_initial, num_local, BLOCK: tl.constexpr):
    """How many of a row's visible keys have an `_ordered` above ``value``."""
    count = tl.zeros([BLOCK], tl.int32)  # [BLOCK]
    for start in tl.range(first, own + 1, BLOCK):
        key = start + tl.arange(0, BLOCK)  # [BLOCK]
        _score, ordered = _load_ordered(Scores, key, key <= own, first, own, num_initial, num_local)
        count += ((key <= own) & (ordered > value)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _emit(Indices, Chosen, key, score, ordered, ok, threshold, missing, taken, ties):
    """Store those of the keys that are selected; (taken, ties) with them counted.

    ``missing``: how many of those equal to the threshold are selected; below 0: all of them.
    """
    take = ok & (ordered >= threshold)
    if missing >= 0:
        tie = ok & (ordered == threshold)
        take = take & ((ordered > threshold) | (ties + tl.cumsum(tie.to(tl.int32), 0) <= missing))
        ties += tl.sum(tie.to(tl.int32))
    slot = taken + tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(Indices + slot, key, mask=take)
    tl.store(Chosen + slot, score, mask=take)
    return taken + tl.sum(take.to(tl.int32)), ties


@triton.jit
def _load_candidates(Candidates, place, found, first, own, num_initial, num_local):
    """(keys, scores, their `_ordered`, 0 where there is none) of the candidates at ``place``."""
    candidate = tl.load(Candidates + place, mask=place < found, other=0)
    key, score = (candidate >> 32).to(tl.int32), candidate.to(tl.uint32).to(tl.float32, bitcast=True)
    return key, score, tl.where(place < found, _ordered(score, key, first, own, num_initial, num_local), 0)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors", "topk"])
def bound_kernel(Scores, First, Own, Bounds, token0, num_rows, row_vectors, topk, num_initial, num_local,
                 VECTOR: tl.constexpr, SAMPLE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Bounds (B, rows) fp32: a score that most likely somewhat more than topk of a row reach, from a sample of it.

    A sample is of pairs of neighbours, which come from memory together. Where the two are alike, it is worth half.
    """
    begin_launch(EARLY)
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Scores += (batch * num_rows + row) * (row_vectors * VECTOR)
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    seen = own - first + 1
    if seen > topk:
        place = tl.arange(0, SAMPLE).to(tl.int64)  # [SAMPLE]
        key = first + (place // 2 * seen // (SAMPLE // 2) + place % 2).to(tl.int32)  # [SAMPLE]
        _score, ordered = _load_ordered(Scores, key, key <= own, first, own, num_initial, num_local)
        ordered = tl.where(key <= own, ordered, 0)
        there = tl.sum((key <= own).to(tl.int32))
        share = topk * 1.0 / seen * SAMPLE
        wanted = tl.minimum((share + 4 * tl.sqrt(2 * share)).to(tl.int32) + 1, there)
        bound, _number = _reached(ordered, wanted, there)
        # The score itself again. FORCED becomes a NaN, which no score is below.
        bits = tl.where((bound >> 31) == 1, bound ^ 0x80000000, bound ^ 0xFFFFFFFF)
        tl.store(Bounds + batch * num_rows + row, bits.to(tl.float32, bitcast=True))


@triton.jit
def _packed(key, score):
    """int64 of a candidate: its key above the bits of its score."""
    return (key.to(tl.int64) << 32) | score.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _reaches(Scores, key, bound, start, size, first, own, num_initial, num_local):
    """(score, whether it is a candidate) of ``size`` keys from ``start`` on."""
    score = tl.load(Scores + key, mask=key <= own, other=0.0)
    reaches = (score < bound) == 0
    if (start < first + num_initial) | (start + size > own - num_local + 1):  # one of the row's ends
        forced = (key < first + num_initial) | (key > own - num_local)
        reaches = (key <= own) & (forced | reaches)
    return score, reaches


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors", "topk"])
def candidate_kernel(Scores, First, Own, Bounds, Candidates, Found, token0, num_rows, row_vectors, topk, num_initial,
                     num_local, VECTOR: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, SPLITS: tl.constexpr,
                     WRITE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Candidates (B, rows, MOST) int64: the keys that reach the bound, ascending, above the bits of their scores.

    Found (B, rows, SPLITS): how many they are.

    A row has SPLITS programs, each with a part of it. If there are several, they first count, without WRITE, and then
    each begins behind what those before it found.

    Two halves of BLOCK scores share a scan. A thread loads single scores: those of a wider load would be neighbours,
    while a store wants them apart, and between the two they would pass through shared memory.
    """
    begin_launch(EARLY)
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Scores += (batch * num_rows + row) * (row_vectors * VECTOR)
    Candidates += (batch * num_rows + row) * MOST
    Found += (batch * num_rows + row) * SPLITS
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    if own - first + 1 > topk:
        found, bound = 0, tl.load(Bounds + batch * num_rows + row)
        begin, end, split = first, own + 1, tl.program_id(2)
        HALF: tl.constexpr = BLOCK // 2
        if SPLITS > 1:
            part = tl.cdiv(tl.cdiv(end - begin, BLOCK), SPLITS) * BLOCK
            begin += split * part
            end = tl.minimum(end, begin + part)
            if WRITE:
                other = tl.arange(0, SPLITS)  # [SPLITS]
                found += tl.sum(tl.load(Found + other, mask=other < split, other=0))
        for start in tl.range(begin, end, BLOCK):
            key = start + tl.arange(0, HALF)  # [HALF]
            score, reaches = _reaches(Scores, key, bound, start, HALF, first, own, num_initial, num_local)
            key2 = key + HALF  # [HALF]
            score2, reaches2 = _reaches(Scores, key2, bound, start + HALF, HALF, first, own, num_initial, num_local)
            both = reaches.to(tl.int32) + (reaches2.to(tl.int32) << 16)  # [HALF], one scan for two counts
            total = tl.sum(both)
            if WRITE:
                count = tl.cumsum(both, 0)  # [HALF]
                slot = found - 1 + (count & 0xFFFF)  # [HALF]
                slot2 = found - 1 + (total & 0xFFFF) + (count >> 16)  # [HALF]
                tl.store(Candidates + slot, _packed(key, score), mask=reaches & (slot < MOST))
                tl.store(Candidates + slot2, _packed(key2, score2), mask=reaches2 & (slot2 < MOST))
            found += (total & 0xFFFF) + (total >> 16)
        if (SPLITS == 1) | (not WRITE):
            tl.store(Found + split, found)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors", "topk"])
def topk_kernel(Scores, First, Own, Bounds, Candidates, Found, Indices, Chosen, token0, num_rows, num_tokens,
                row_vectors, topk, num_initial, num_local, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
                MOST: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Indices (B, T, topk) int32 ascending, and Chosen, their scores, of one query. Both are filled with padding.

    Scores, Candidates and Found are those of `candidate_kernel`.
    """
    begin_launch(EARLY)
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Scores += (batch * num_rows + row) * (row_vectors * VECTOR)
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    Indices += (batch * num_tokens + token0 + row) * topk
    Chosen += (batch * num_tokens + token0 + row) * topk
    # Of a query that sees at most k tokens all are taken: the threshold is below every score.
    threshold, missing, found, seen = tl.full([], 0, tl.uint32), -1, 0, own - first + 1
    if seen > topk:
        found = tl.sum(tl.load(Found + (batch * num_rows + row) * SPLITS + tl.arange(0, SPLITS)))
        if (found < topk) | (found > MOST):  # the sample misled: bisect the whole row
            bound = tl.load(Bounds + batch * num_rows + row)
            low, high, number = tl.full([], 1, tl.uint32), tl.full([], FORCED, tl.uint32), seen
            if (found > MOST) & (bound == bound):
                low, number = _integer(bound), found
            middle = low + 1  # first, since a bound that too many reach is often equal to many
            while (low < high) & (number > topk):
                count = _above(Scores, middle - 1, first, own, num_initial, num_local, BLOCK)
                if count >= topk:
                    low, number = middle, count
                else:
                    high = middle - 1
                middle = low + (high - low) // 2 + 1
            threshold = low
            if number > topk:
                missing = topk - _above(Scores, low, first, own, num_initial, num_local, BLOCK)
    taken, ties = 0, 0
    if (found >= topk) & (found <= MOST):
        Candidates += (batch * num_rows + row) * MOST
        all_places = tl.arange(0, MOST)  # [MOST]
        _key, _score, values = _load_candidates(Candidates, all_places, found, first, own, num_initial, num_local)
        threshold, missing = _threshold(values, topk, found)
        # They are loaded again, since their keys and scores would take most registers meanwhile.
        for start in tl.range(0, found, BLOCK):
            place = start + tl.arange(0, BLOCK)  # [BLOCK]
            key, score, ordered = _load_candidates(Candidates, place, found, first, own, num_initial, num_local)
            ok = place < found  # [BLOCK]
            taken, ties = _emit(Indices, Chosen, key, score, ordered, ok, threshold, missing, taken, ties)
    else:
        for start in tl.range(first, own + 1, BLOCK):
            key = start + tl.arange(0, BLOCK)  # [BLOCK]
            score, ordered = _load_ordered(Scores, key, key <= own, first, own, num_initial, num_local)
            taken, ties = _emit(Indices, Chosen, key, score, ordered, key <= own, threshold, missing, taken, ties)


@triton.jit(do_not_specialize=[*INTEGERS, "topk", "row_vectors"])
def short_row_kernel(Scores, Seen, Indices, num_rows, row_vectors, topk, num_initial, num_local, VECTOR: tl.constexpr,
                     WIDTH: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Indices (rows, topk) int32, ascending, of one row of Scores, which a program holds in registers.

    A row has ``row_vectors`` times VECTOR entries. Seen (2, rows) int32: the first and the last entry of each row.
    """
    begin_launch(EARLY)
    row = tl.program_id(0).to(tl.int64)
    size = row_vectors * VECTOR
    key = tl.arange(0, WIDTH)  # [WIDTH]
    score = tl.load(Scores + row * size + key, mask=key < size, other=0.0)  # [WIDTH]
    tl.debug_barrier()  # all are under way: else the compiler waits for one before it begins the next
    first, own = tl.load(Seen + row), tl.load(Seen + num_rows + row)
    # One comparison of unsigned integers for both ends: what is before the first wraps around.
    there = (key - first).to(tl.uint32) < tl.maximum(own - first + 1, 0).to(tl.uint32)  # [WIDTH]
    begin = first + num_initial
    free = (key - begin).to(tl.uint32) < tl.maximum(own - num_local + 1 - begin, 0).to(tl.uint32)  # [WIDTH]
    ordered = tl.where(free, _integer(tl.where(there, score, 0.0)), FORCED)  # [WIDTH]; a wait for all loads
    store_taken(Indices + row * topk, largest(tl.where(there, ordered, 0), topk), WIDTH)


def topk(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, first: Tensor, own: Tensor, ahead: int, topk: int, num_initial: int,
    num_local: int, fp8: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices (B, T, topk) int32, ascending, then -1; their scores (B, T, topk) fp32, -inf for the padding.

    Args:
        q_idx (B, T, Hi, Di), k_idx (B, S, Di): contiguous. weights: (B, T, Hi) fp32, contiguous.
        first, own: (T,) int32, the first and the last key that each query sees; nondecreasing. If it sees none, the
            last is before the first. ahead: query t sees no key behind t + ``ahead``. The others are those of
            `nsa.ops.index_topk`. fp8: whether to multiply in fp8, where `multiplies_fp8`.
    """
    (batch, tokens, heads, width), keys = q_idx.shape, k_idx.shape[1]
    indices = q_idx.new_full((batch, tokens, topk), -1, dtype=torch.int32)
    chosen = q_idx.new_full((batch, tokens, topk), -torch.inf, dtype=torch.float32)
    if not (indices.numel() and keys):
        return indices, chosen
    row_vectors, k_scale = triton.cdiv(keys, VECTOR), None
    if fp8:
        k_idx, k_scale = _in_fp8(k_idx[:, :, None], None, 0, keys, keys)
    queries, block, tiles = score_tiles(k_idx)
    rows = max(1, min(tokens, SLAB_BYTES // (batch * (4 * row_vectors * VECTOR + 8 * _most(topk)))))
    if queries < rows < tokens:
        rows = rows // queries * queries  # whole tiles
    slab = q_idx.new_empty(batch, rows, row_vectors * VECTOR, dtype=torch.float32)
    room = _room(topk, indices, batch * rows, 1)
    precision = "tf32x3" if q_idx.dtype == torch.float32 else "tf32"
    for token in range(0, tokens, rows):
        here = min(rows, tokens - token)
        visible = min(keys, token + here + ahead)
        scored = q_idx, k_idx, weights, first, own, slab, token, here, tokens
        if fp8:
            q8, w8 = _in_fp8(q_idx, weights, token, here, rows)
            scored = q8, k_idx, w8, first[token:], own[token:], slab, 0, here, rows
        score_kernel[triton.cdiv(visible, block), triton.cdiv(here, queries * tiles), batch](
            *scored, keys, row_vectors, VECTOR, heads, width, tile_width(width), queries, block, tiles, precision,
            k_scale, num_warps=4, num_stages=3,
        )  # fmt: skip
        _select(
            slab, first, own, room, indices, chosen, token, here, tokens, row_vectors, topk, num_initial, num_local,
            VECTOR,
        )  # fmt: skip
    return indices, chosen


def multiplies_fp8(q_idx: Tensor) -> bool:
    """Whether `topk` takes such index queries in fp8 (e4m3): on Hopper, from 16 bits, of rows that fill a product."""
    return q_idx.is_cuda and architecture() == "sm_90" and q_idx.element_size() == 2 and q_idx.shape[3] % 32 == 0


def _in_fp8(x: Tensor, weights: Tensor | None, token: int, number: int, slots: int) -> tuple[Tensor, Tensor]:
    """Values (B, slots, H, D) and scales (B, slots, H) of ``number`` tokens of x (B, T, H, D) from ``token`` on.

    ``weights`` (B, T, H) fp32, contiguous as x is: factors of the scales.
    """
    batch, tokens, heads, width = x.shape
    values = x.new_empty(batch, slots, heads, width, dtype=FP8)
    scales = x.new_empty(batch, slots, heads, dtype=torch.float32)
    fp8_kernel[triton.cdiv(number * heads, FP8_ROWS), batch](
        x, weights, values, scales, token, number, tokens, slots, heads, width, tile_width(width), FP8_ROWS,
        num_warps=4,
    )  # fmt: skip
    return values, scales


def topk_decode(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, lengths: Tensor, topk: int, num_initial: int, num_local: int
) -> Tensor:  # fmt: skip
    """(B, topk) int32, as `nsa.ops.index_topk_decode`. All contiguous; weights fp32."""
    (batch, heads, width), keys = q_idx.shape, k_idx.shape[1]
    indices = q_idx.new_empty(batch, topk, dtype=torch.int32)
    if not batch or not keys:
        return indices.fill_(-1)
    scores, seen = q_idx.new_empty(batch, keys, dtype=torch.float32), indices.new_empty(2, batch)
    precision = "tf32x3" if q_idx.dtype == torch.float32 else "tf32"
    block = 16 if INTERPRETED else 64
    tiles = triton.cdiv(keys, block)
    token_score_kernel[tiles, batch](
        q_idx, k_idx, weights, lengths, scores, seen, indices, keys, topk, heads, width, tile_width(width),
        min(64, tile_width(heads)), block, FILL, precision, num_warps=4, **early(tiles * batch),
    )  # fmt: skip
    choose_rows(scores, seen, indices, topk, num_initial, num_local)
    return indices


def choose_rows(
    scores: Tensor, seen: Tensor, indices: Tensor, topk: int, num_initial: int, num_local: int
) -> None:  # fmt: skip
    """Write the top-k of each row of ``scores`` (R, S) fp32, ascending, to ``indices`` (R, topk) int32, filled with -1.

    ``seen``: (2, R) int32, the first and the last entry of each row; what is forced is counted from these.
    """
    (rows, size), vector = scores.shape, vector_of(scores.shape[1])
    if size <= SHORT_ROW:
        width = max(4, triton.next_power_of_2(size))
        short_row_kernel[(rows,)](
            scores, seen, indices, rows, size // vector, topk, num_initial, num_local, VECTOR=vector, WIDTH=width,
            num_warps=max(4, width // SHORT_ROW_ENTRIES), **early(rows, each=2),
        )  # fmt: skip
        return
    chosen, splits = scores.new_empty(rows, topk), splits_of(rows, size)
    _select(
        scores[None], seen[0], seen[1], _room(topk, indices, rows, splits), indices, chosen, 0, rows, rows,
        size // vector, topk, num_initial, num_local, vector,
    )  # fmt: skip


def sample_of(size: int) -> int:
    """Scores of the sample of a row: a power of two."""
    return min(max(SAMPLES[0], triton.next_power_of_2(size) // KEYS_PER_SAMPLE), SAMPLES[1])


def splits_of(rows: int, size: int) -> int:
    """Programs that look for the candidates of a row, so that few long rows keep a GPU busy. A power of two."""
    if INTERPRETED:
        return 4
    wanted = min(PROGRAMS // max(1, rows), size // SELECT_BLOCK)
    return 1 << max(0, wanted.bit_length() - 1)


def score_tiles(q_idx: Tensor) -> tuple[int, int, int]:
    """BM, BN and TILES of `score_kernel`."""
    return (16, 16, 2) if INTERPRETED else (*SCORE_TILES[q_idx.element_size()], SCORE_RUN)


def _room(topk: int, like: Tensor, rows: int, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds (rows,) fp32, candidates (rows, MOST) int64 and their number (rows, splits) int32."""
    candidates = like.new_empty(rows, _most(topk), dtype=torch.int64)
    return like.new_empty(rows, dtype=torch.float32), candidates, like.new_empty(rows, splits)


def _most(topk: int) -> int:
    """Candidates of a query that there is room for."""
    return max(SMALLEST_ROOM, triton.next_power_of_2(2 * topk))


def _select(
    scores: Tensor, first: Tensor, own: Tensor, room: tuple[Tensor, Tensor, Tensor], indices: Tensor, chosen: Tensor,
    token: int, here: int, tokens: int, row_vectors: int, topk: int, num_initial: int, num_local: int, vector: int,
) -> None:  # fmt: skip
    """The three kernels, of the ``here`` queries from ``token`` on; ``scores`` (B, here, S) are theirs."""
    batch, (bounds, candidates, found) = len(scores), room
    splits = found.shape[1]
    block, sample = (64, 32) if INTERPRETED else (SELECT_BLOCK, sample_of(row_vectors * vector))
    where, forced = (token, here), (topk, num_initial, num_local, vector)
    options = {"num_warps": 8} | early(here * batch, each=2)
    bound_kernel[here, batch](scores, first, own, bounds, *where, row_vectors, *forced, sample, **options)
    for write in (False, True) if splits > 1 else (True,):
        candidate_kernel[here, batch, splits](
            scores, first, own, bounds, candidates, found, *where, row_vectors, *forced, block, candidates.shape[1],
            splits, write, **options,
        )  # fmt: skip
    topk_kernel[here, batch](
        scores, first, own, bounds, candidates, found, indices, chosen, *where, tokens, row_vectors, *forced,
        block // 2, candidates.shape[1], splits, **options,
    )  # fmt: skip
