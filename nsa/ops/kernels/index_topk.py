"""DSA's lightning indexer: index scores, and the exact top-k of each query.

Scores of SLAB_BYTES at most exist at a time: those of a chunk of queries with all keys. A program then selects the
top-k of one query. A sample of the row gives a bound that somewhat more than k scores reach. One pass over the row
collects these candidates. If they are fewer than k, or too many, all scores are candidates.

Among the candidates the k-th largest is found by radix (MSD radix select): a score becomes an integer of the same
order, and four counts find its bytes. What lies above is taken, in the order of the keys, and as many equal ones as are
missing. So the result is exact, ties go to the lower key, and it is ascending. Nothing depends on a sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import largest, load_rows, wait_for_others
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, VECTOR, early_launch, tile_width, vector_of

SLAB_BYTES = 3 * 2**26  # of fp32 scores at a time
# Queries and keys of a program of `score_kernel`, by the bytes of an element.
SCORE_TILES = {2: (64, 128), 4: (32, 64)}
SCORE_RUN = 2  # tiles of queries that it goes through
SELECT_BLOCK = 2048  # scores that a program of `candidate_kernel` and `topk_kernel` loads at once
SAMPLE = 2048  # scores of the sample
PROGRAMS = 256  # that look for candidates at a time, if there are few rows
SMALLEST = 64  # room for candidates at least
MANY = 4096  # candidates in the room, from which on `topk_kernel` takes 16 warps
FILL = 256  # entries that a program fills at once
SHORT_ROW = 32 if INTERPRETED else 8192  # scores of a row that one program holds
FORCED = tl.constexpr(0xFFFFFFFF)  # the key of a forced token, above that of every finite score


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors"])
def score_kernel(Q, K, W, First, Own, Scores, token0, num_rows, num_tokens, num_keys, row_vectors,
                 VECTOR: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores (B, rows, row) fp32 of queries ``token0 .. token0 + num_rows - 1`` with the keys that some of them sees.

    Q (B, T, Hi, Di); K (B, S, Di); W (B, T, Hi) fp32; First, Own (T,) int32: the first and the last visible key. A row
    of Scores has ``row_vectors`` times VECTOR entries. A program holds BN keys and goes through TILES tiles of BM
    queries, in one loop over tiles and heads, so that the next queries are loaded while these are multiplied.
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
                at = (batch * num_rows + row)[:, None] * row_size + key[None, :]
                tl.store(Scores + at, total, mask=ok[:, None] & (key[None, :] < row_size))
                total = tl.zeros([BM, BN], tl.float32)  # [BM, BN]


@triton.jit(do_not_specialize=[*INTEGERS, "topk"])
def token_score_kernel(Q, K, W, Lengths, Scores, Seen, Indices, num_keys, topk, HEADS: tl.constexpr, D: tl.constexpr,
                       D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FILL: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """Scores (B, S) fp32 of one query per sequence, with BN of the tokens that are there.

    Q (B, Hi, Di); K (B, S, Di); W (B, Hi) fp32. The first program of a sequence calls `begin_rows`.
    """
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
def _ordered(score, key, first, own, num_initial, num_local):
    """uint32 of the same order as the score; +0 and -0 are equal. Forced tokens are above all others."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    bits = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    forced = (key < first + num_initial) | (key > own - num_local)
    return tl.where(forced, FORCED, bits)


@triton.jit
def _next_byte(counts, threshold, missing):
    """The byte of the k-th largest, appended to ``threshold``, from the number of values by byte (256,).

    At least ``missing`` values have it or a larger one, and fewer a larger one. These are no longer missing.
    """
    at_least = tl.sum(counts) - tl.cumsum(counts, 0) + counts  # [256]
    byte = tl.sum((at_least >= missing).to(tl.int32)) - 1
    missing -= tl.sum(tl.where(tl.arange(0, 256) > byte, counts, 0))
    return (threshold << 8) | byte.to(tl.uint32), missing


@triton.jit
def _counts(ordered, ok, threshold, step: tl.constexpr):
    """How many of the values have each next byte (256,), among those that begin with ``threshold``."""
    if step > 0:
        ok = ok & ((ordered >> (32 - 8 * step)) == threshold)
    return tl.histogram(((ordered >> (24 - 8 * step)) & 0xFF).to(tl.int32), 256, mask=ok)


@triton.jit
def _kth_of_block(ordered, ok, k):
    """(the k-th largest of the values, how many equal to it are among the k largest)."""
    threshold, missing = tl.full([], 0, tl.uint32), k
    for step in tl.static_range(4):
        threshold, missing = _next_byte(_counts(ordered, ok, threshold, step), threshold, missing)
    return threshold, missing


@triton.jit
def _load_ordered(Scores, key, ok, first, own, num_initial, num_local):
    """(scores, their uint32) of keys, where ``ok``."""
    score = tl.load(Scores + key, mask=ok, other=0.0)
    return score, _ordered(score, key, first, own, num_initial, num_local)


@triton.jit
def _emit(Indices, Chosen, key, score, ordered, ok, threshold, missing, taken, ties):
    """Store those of the keys that are selected; (taken, ties) with them counted."""
    tie = ok & (ordered == threshold)
    take = ok & ((ordered > threshold) | (tie & (ties + tl.cumsum(tie.to(tl.int32), 0) <= missing)))
    slot = taken + tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(Indices + slot, key, mask=take)
    tl.store(Chosen + slot, score, mask=take)
    return taken + tl.sum(take.to(tl.int32)), ties + tl.sum(tie.to(tl.int32))


@triton.jit
def _emit_candidates(Scores, Candidates, Indices, Chosen, found, topk, first, own, num_initial, num_local,
                     MOST: tl.constexpr):  # fmt: skip
    """Store the top-k of the first ``found`` candidates, which are ascending."""
    place = tl.arange(0, MOST)  # [MOST]
    key = tl.load(Candidates + place, mask=place < found, other=0)  # [MOST]
    score, ordered = _load_ordered(Scores, key, place < found, first, own, num_initial, num_local)
    threshold, missing = _kth_of_block(ordered, place < found, topk)
    _emit(Indices, Chosen, key, score, ordered, place < found, threshold, missing, 0, 0)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors", "topk"])
def bound_kernel(Scores, First, Own, Bounds, token0, num_rows, row_vectors, topk, num_initial, num_local,
                 VECTOR: tl.constexpr, SAMPLE: tl.constexpr):  # fmt: skip
    """Bounds (B, rows) fp32: a score that most likely somewhat more than topk of a row reach, from a sample of it."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Scores += (batch * num_rows + row) * (row_vectors * VECTOR)
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    seen = own - first + 1
    if seen > topk:
        place = tl.arange(0, SAMPLE).to(tl.int64)  # [SAMPLE]
        key = first + (place * seen // SAMPLE).to(tl.int32)  # [SAMPLE]
        _score, ordered = _load_ordered(Scores, key, key <= own, first, own, num_initial, num_local)
        share = topk * 1.0 / seen * SAMPLE
        wanted = tl.minimum((share + 4 * tl.sqrt(share)).to(tl.int32) + 1, SAMPLE)
        bound, _ties = _kth_of_block(ordered, key <= own, wanted)
        # The score itself again. FORCED becomes a NaN, which no score is below.
        bits = tl.where((bound >> 31) == 1, bound ^ 0x80000000, bound ^ 0xFFFFFFFF)
        tl.store(Bounds + batch * num_rows + row, bits.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors", "topk"])
def candidate_kernel(Scores, First, Own, Bounds, Candidates, Found, token0, num_rows, row_vectors, topk, num_initial,
                     num_local, VECTOR: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, SPLITS: tl.constexpr,
                     WRITE: tl.constexpr):  # fmt: skip
    """Candidates (B, rows, MOST) int32: the keys that reach the bound, ascending. Found (B, rows, SPLITS): how many.

    A row has SPLITS programs, each with a part of it. If there are several, they first count, without WRITE, and then
    each begins behind what those before it found.

    A row of Scores has ``row_vectors`` times VECTOR entries. The pass over it begins at a multiple of VECTOR and masks
    by the row's end alone: so the compiler knows that it may load several scores at once, and a thread counts
    neighbouring ones by itself. This kernel is apart from the others because their registers would leave room for one
    or two programs of a multiprocessor.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_size = row_vectors * VECTOR
    Scores += (batch * num_rows + row) * row_size
    Candidates += (batch * num_rows + row) * MOST
    Found += (batch * num_rows + row) * SPLITS
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    if own - first + 1 > topk:
        found, bound = 0, tl.load(Bounds + batch * num_rows + row)
        begin, end, split = first // VECTOR * VECTOR, own + 1, tl.program_id(2)
        if SPLITS > 1:
            part = tl.cdiv(tl.cdiv(end - begin, BLOCK), SPLITS) * BLOCK
            begin += split * part
            end = tl.minimum(end, begin + part)
            if WRITE:
                other = tl.arange(0, SPLITS)  # [SPLITS]
                found += tl.sum(tl.load(Found + other, mask=other < split, other=0))
        for start in tl.range(begin, end, BLOCK):
            key = start + tl.arange(0, BLOCK)  # [BLOCK]
            score = tl.load(Scores + key, mask=key < row_size, other=0.0)  # [BLOCK]
            forced = (key < first + num_initial) | (key > own - num_local)  # [BLOCK]
            reaches = (key >= first) & (key <= own) & (forced | ((score < bound) == 0))  # [BLOCK]
            if WRITE:
                slot = found + tl.cumsum(reaches.to(tl.int32), 0) - 1  # [BLOCK]
                tl.store(Candidates + slot, key, mask=reaches & (slot < MOST))
            found += tl.sum(reaches.to(tl.int32))
        if (SPLITS == 1) | (not WRITE):
            tl.store(Found + split, found)


@triton.jit(do_not_specialize=[*INTEGERS, "token0", "row_vectors", "topk"])
def topk_kernel(Scores, First, Own, Candidates, Found, Indices, Chosen, token0, num_rows, num_tokens, row_vectors, topk,
                num_initial, num_local, VECTOR: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
                SPLITS: tl.constexpr):  # fmt: skip
    """Indices (B, T, topk) int32 ascending, and Chosen, their scores, of one query. Both are filled with padding.

    Scores, Candidates and Found are those of `candidate_kernel`.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Scores += (batch * num_rows + row) * (row_vectors * VECTOR)
    first, own = tl.load(First + token0 + row), tl.load(Own + token0 + row)
    Indices += (batch * num_tokens + token0 + row) * topk
    Chosen += (batch * num_tokens + token0 + row) * topk
    # Of a query that sees at most k tokens all are taken: the threshold is below every score.
    threshold, missing, found = tl.full([], 0, tl.uint32), topk, 0
    if own - first + 1 > topk:
        found = tl.sum(tl.load(Found + (batch * num_rows + row) * SPLITS + tl.arange(0, SPLITS)))
        if (found < topk) | (found > MOST):  # the sample misled: search the whole row
            for step in tl.static_range(4):
                counts = tl.zeros([256], tl.int32)  # [256]
                for start in tl.range(first, own + 1, BLOCK):
                    key = start + tl.arange(0, BLOCK)  # [BLOCK]
                    _score, ordered = _load_ordered(Scores, key, key <= own, first, own, num_initial, num_local)
                    counts += _counts(ordered, key <= own, threshold, step)
                threshold, missing = _next_byte(counts, threshold, missing)
    if (found >= topk) & (found <= MOST):
        Candidates += (batch * num_rows + row) * MOST
        _emit_candidates(Scores, Candidates, Indices, Chosen, found, topk, first, own, num_initial, num_local, MOST)
    else:
        taken, ties = 0, 0
        for start in tl.range(first, own + 1, BLOCK):
            key = start + tl.arange(0, BLOCK)  # [BLOCK]
            score, ordered = _load_ordered(Scores, key, key <= own, first, own, num_initial, num_local)
            taken, ties = _emit(Indices, Chosen, key, score, ordered, key <= own, threshold, missing, taken, ties)


@triton.jit(do_not_specialize=[*INTEGERS, "topk", "size"])
def short_row_kernel(Scores, Seen, Indices, num_rows, size, topk, num_initial, num_local, WIDTH: tl.constexpr,
                     EARLY: tl.constexpr = False):  # fmt: skip
    """Indices (rows, topk) int32, ascending, of one row of Scores (rows, size), which a program holds in registers.

    Seen (2, rows) int32: the first and the last entry of each row.
    """
    wait_for_others(EARLY)
    row = tl.program_id(0).to(tl.int64)
    first, own = tl.load(Seen + row), tl.load(Seen + num_rows + row)
    key = tl.arange(0, WIDTH)  # [WIDTH]
    ok = (key >= first) & (key <= own)  # [WIDTH]
    _score, ordered = _load_ordered(Scores + row * size, key, ok, first, own, num_initial, num_local)
    taken = largest(ordered, ok, topk).to(tl.int32)  # [WIDTH]
    tl.store(Indices + row * topk + tl.cumsum(taken, 0) - 1, key, mask=taken > 0)


def topk(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, first: Tensor, own: Tensor, topk: int, num_initial: int,
    num_local: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices (B, T, topk) int32, ascending, then -1; their scores (B, T, topk) fp32, -inf for the padding.

    Args:
        q_idx (B, T, Hi, Di), k_idx (B, S, Di): contiguous. weights: (B, T, Hi) fp32, contiguous.
        first, own: (T,) int32, the first and the last key that each query sees; nondecreasing. If it sees none, the
            last is before the first. The others are those of `nsa.ops.index_topk`.
    """
    (batch, tokens, heads, width), keys = q_idx.shape, k_idx.shape[1]
    indices = q_idx.new_full((batch, tokens, topk), -1, dtype=torch.int32)
    chosen = q_idx.new_full((batch, tokens, topk), -torch.inf, dtype=torch.float32)
    if not (indices.numel() and keys):
        return indices, chosen
    rows = max(1, min(tokens, SLAB_BYTES // (4 * keys * batch)))
    row_vectors = triton.cdiv(keys, VECTOR)
    slab = q_idx.new_empty(batch, rows, row_vectors * VECTOR, dtype=torch.float32)
    room = _room(topk, indices, batch * rows, 1)
    precision = "tf32x3" if q_idx.dtype == torch.float32 else "tf32"
    queries, block, tiles = score_tiles(q_idx)
    for token in range(0, tokens, rows):
        here = min(rows, tokens - token)
        score_kernel[triton.cdiv(keys, block), triton.cdiv(here, queries * tiles), batch](
            q_idx, k_idx, weights, first, own, slab, token, here, tokens, keys, row_vectors, VECTOR, heads, width,
            tile_width(width), queries, block, tiles, precision, num_warps=4, num_stages=3,
        )  # fmt: skip
        _select(
            slab, first, own, room, indices, chosen, token, here, tokens, row_vectors, topk, num_initial, num_local,
            VECTOR,
        )  # fmt: skip
    return indices, chosen


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
    token_score_kernel[triton.cdiv(keys, block), batch](
        q_idx, k_idx, weights, lengths, scores, seen, indices, keys, topk, heads, width, tile_width(width),
        min(64, tile_width(heads)), block, FILL, precision, num_warps=4,
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
        width = triton.next_power_of_2(size)
        short_row_kernel[(rows,)](
            scores, seen, indices, rows, size, topk, num_initial, num_local, WIDTH=width,
            num_warps=min(16, max(4, width // 256)), **early_launch(),
        )  # fmt: skip
        return
    chosen, splits = scores.new_empty(rows, topk), splits_of(rows, size)
    _select(
        scores[None], seen[0], seen[1], _room(topk, indices, rows, splits), indices, chosen, 0, rows, rows,
        size // vector, topk, num_initial, num_local, vector,
    )  # fmt: skip


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
    """Bounds (rows,) fp32, candidates (rows, MOST) int32 and their number (rows, splits) int32."""
    most = max(SMALLEST, triton.next_power_of_2(2 * topk))
    return like.new_empty(rows, dtype=torch.float32), like.new_empty(rows, most), like.new_empty(rows, splits)


def _select(
    scores: Tensor, first: Tensor, own: Tensor, room: tuple[Tensor, Tensor, Tensor], indices: Tensor, chosen: Tensor,
    token: int, here: int, tokens: int, row_vectors: int, topk: int, num_initial: int, num_local: int, vector: int,
) -> None:  # fmt: skip
    """The three kernels, of the ``here`` queries from ``token`` on; ``scores`` (B, here, S) are theirs."""
    batch, (bounds, candidates, found) = len(scores), room
    splits = found.shape[1]
    block, sample = (64, 32) if INTERPRETED else (SELECT_BLOCK, SAMPLE)
    where, forced = (token, here), (topk, num_initial, num_local, vector)
    bound_kernel[here, batch](scores, first, own, bounds, *where, row_vectors, *forced, sample, num_warps=8)
    for write in (False, True) if splits > 1 else (True,):
        candidate_kernel[here, batch, splits](
            scores, first, own, bounds, candidates, found, *where, row_vectors, *forced, block, candidates.shape[1],
            splits, write, num_warps=8,
        )  # fmt: skip
    topk_kernel[here, batch](
        scores, first, own, candidates, found, indices, chosen, *where, tokens, row_vectors, *forced, block,
        candidates.shape[1], splits, num_warps=16 if candidates.shape[1] >= MANY else 8,
    )  # fmt: skip
