"""Device functions that several Triton kernels call: where a program works, rows in and out, scores, and the LSE.

Shapes in the comments: BM rows of queries, BN keys. A head of D columns is loaded as one or two parts whose widths are
powers of two: D1 columns, then D2 (0 if there is no second part). `nsa.ops.kernels.hardware.split_width` chooses them.
"""

import math

import triton
import triton.language as tl

from nsa.ops.kernels.hardware import LOG2_E

# Kernels compute softmax with exp2 and keep the LSE in natural units in memory.
LSE_TO_BASE_2 = tl.constexpr(LOG2_E)
LSE_TO_NATURAL = tl.constexpr(math.log(2))

TOKEN_BITS = tl.constexpr(6)  # a tile of queries has at most 64 tokens: their numbers take 6 bits, their set an int64
TOKEN_MASK = tl.constexpr((1 << TOKEN_BITS.value) - 1)
# Stands for "no block". It is above every block number, and an int32 still holds it beside the number of a token.
NO_BLOCK = tl.constexpr((1 << (31 - TOKEN_BITS.value)) - 1)

# A candidate for selection is an int64: the bits of the fp32 importance above, LAST_BLOCK - block below.
IMPORTANCE_SHIFT = tl.constexpr(32)
# 2^31 - 1. Left of an operator kernels take its .value: the interpreter knows no constexpr there.
LAST_BLOCK = tl.constexpr(0x7FFFFFFF)
NO_CANDIDATE = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below every candidate
BEST_CANDIDATE = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # above every candidate

TOP = tl.constexpr(0xFFFFFFFF)  # above the bits of every number: what is forced

SMALLEST_DOT = tl.constexpr(16)  # columns: tl.dot takes no narrower tile


@triton.jit
def begin_launch(EARLY: tl.constexpr):
    """The first thing that a program does which `hardware.early` launches: wait for the launches before this one.

    Such a launch begins as soon as all programs of the one before it have called this function, or have ended. So what
    takes time at the start of a launch takes it while the one before still works. The rule, for every kernel and every
    program of it:

    - It calls this function before it reads or writes memory, whatever else it does, and whether it has work or not.
      Writes are no exception: memory that was freed may still be read. Nor are weights: the launch before may be a cast
      of them. A prefetch to the L2 cache alone may come first, since later writes reach that cache, too.
    - It lets the next launch begin only here, after the wait. All programs have begun then, so the next launch takes no
      place from them.

    The wait ends when all programs of the launch before have ended and what they wrote is visible. They had waited for
    the launch before theirs, and so on. So everything that is earlier in the stream has ended.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def tile_of_program(num_tiles, GROUPS: tl.constexpr):
    """(tile, slot, batch, KV head) of this program. A slot is one pair of batch and KV head.

    The last tiles see the most keys, so they start first.
    """
    slots = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    return tile, slot, slot // GROUPS, slot % GROUPS


@triton.jit
def query_rows(batch, token, group, row, num_tokens, GROUPS: tl.constexpr, HEADS: tl.constexpr):
    """int64 rows of a (B, T, H, ..) tensor. Row ``row`` of a tile is head ``row % HEADS`` of the group."""
    return (batch.to(tl.int64) * num_tokens + token) * (GROUPS * HEADS) + group * HEADS + row % HEADS


@triton.jit
def load_rows(X, row, ok, column, D):
    """(rows, columns) of X (.., D) at int64 row numbers; 0 where ``ok`` is false or the column is not there."""
    return tl.load(X + row[:, None] * D + column[None, :], mask=ok[:, None] & (column[None, :] < D), other=0.0)


@triton.jit
def store_rows(X, row, ok, column, D, value):
    """The inverse of `load_rows`, in X's dtype."""
    value = value.to(X.dtype.element_ty)
    tl.store(X + row[:, None] * D + column[None, :], value, mask=ok[:, None] & (column[None, :] < D))


@triton.jit
def load_row_parts(X, row, ok, D, D1: tl.constexpr, D2: tl.constexpr):
    """`load_rows` of all D columns, as two parts; the second means nothing if D2 is 0."""
    part1 = load_rows(X, row, ok, tl.arange(0, D1), D)  # [rows, D1]
    part2 = part1
    if D2 > 0:
        part2 = load_rows(X, row, ok, D1 + tl.arange(0, D2), D)  # [rows, D2]
    return part1, part2


@triton.jit
def load_box_parts(X1, X2, row, column, D1: tl.constexpr, D2: tl.constexpr):
    """The two parts of a head from tensor descriptors, from (row, column) on; the second means nothing if D2 is 0."""
    part1 = X1.load([row, column])  # [rows, D1]
    part2 = part1
    if D2 > 0:
        part2 = X2.load([row, column + D1])  # [rows, D2]
    return part1, part2


@triton.jit
def scores(q1, q2, k1, k2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Q K^T in fp32, (rows of q, rows of k), of heads in two parts."""
    s = tl.dot(q1, k1.T, input_precision=PRECISION)  # [rows of q, rows of k]
    if D2 > 0:
        s = tl.dot(q2, k2.T, s, input_precision=PRECISION)
    return s


@triton.jit
def load_base2_lse(Lse, row, ok):
    """The LSE of rows to base 2. It is +inf where a row sees nothing: every probability is then exp2(-inf) = 0."""
    lse = tl.load(Lse + row, mask=ok, other=float("-inf")) * LSE_TO_BASE_2  # [rows]
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def store_output(Out, Lse, row, ok, acc, row_max, row_sum, DV: tl.constexpr, DV1: tl.constexpr):
    """Epilogue of a forward kernel: the normalized output and the natural LSE. A row that sees nothing gets 0, -inf."""
    store_rows(Out, row, ok, tl.arange(0, DV1), DV, acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None])
    tl.store(Lse + row, (row_max + tl.log2(row_sum)) * LSE_TO_NATURAL, mask=ok)


@triton.jit
def store_query_gradient(DQ, row, ok, dq1, dq2, scale, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                         ADD: tl.constexpr):  # fmt: skip
    """Epilogue of a dQ kernel: ``scale`` times both parts; added to what DQ holds if ADD."""
    dq1 *= scale
    dq2 *= scale
    if ADD:
        dq1 += load_rows(DQ, row, ok, tl.arange(0, D1), D).to(tl.float32)
    store_rows(DQ, row, ok, tl.arange(0, D1), D, dq1)
    if D2 > 0:
        if ADD:
            dq2 += load_rows(DQ, row, ok, D1 + tl.arange(0, D2), D).to(tl.float32)
        store_rows(DQ, row, ok, D1 + tl.arange(0, D2), D, dq2)


@triton.jit
def store_key_gradients(DK, DV_, row, ok, dk1, dk2, dv, scale, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                        D2: tl.constexpr, DV1: tl.constexpr):  # fmt: skip
    """Epilogue of a dK, dV kernel: ``scale`` times both parts of dK, and dV."""
    store_rows(DK, row, ok, tl.arange(0, D1), D, dk1 * scale)
    if D2 > 0:
        store_rows(DK, row, ok, D1 + tl.arange(0, D2), D, dk2 * scale)
    store_rows(DV_, row, ok, tl.arange(0, DV1), DV, dv)


@triton.jit
def count_up_to(Values, bound, count, steps):
    """How many of the ``count`` rising Values are at most each bound, by binary search; 2^steps > count."""
    low = tl.zeros_like(bound)
    high = low + count
    for _ in tl.range(0, steps):
        middle = low + (high - low) // 2  # as bound; low + high may pass 2^31
        below = (middle < high) & (tl.load(Values + middle, mask=middle < high, other=0) <= bound)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def largest(values, k):
    """Which of the uint32 values are the k largest; of equal ones the first; 0 is none. [BLOCK], fewer than 2^15

    The search is for a bound that exactly k of them reach. It begins with the least value and the greatest one below
    TOP, so a gap below what is forced takes no steps. A step leaves a third of what is between: two counts are one
    integer, since all warps wait in a reduction.
    """
    low = tl.maximum(tl.min(values - 1, 0) + 1, 1)  # 0 - 1 is the greatest integer,
    high = tl.max(values + 1, 0)  # and TOP + 1 the least
    counts = tl.sum(tl.where(values == TOP, 0x10001, tl.minimum(values, 1).to(tl.int32)), 0)
    number = counts & 0xFFFF  # reach low: at least k, or all
    fewer = counts >> 16  # reach high: less than k
    if fewer >= k:
        low, high, number, fewer = tl.full([], TOP, tl.uint32), tl.full([], TOP, tl.uint32), fewer, 0
    while (number > k) & (high - low > 1):
        span = high - low
        step = (span - 1) // 3 + 1
        one, two = low + step, low + tl.minimum(2 * step, span)
        counts = tl.sum(tl.where(values >= two, 0x10001, tl.where(values >= one, 1, 0)), 0)
        some, few = counts & 0xFFFF, counts >> 16
        high = tl.where(few >= k, high, tl.where(some >= k, two, one))
        fewer = tl.where(few >= k, fewer, tl.where(some >= k, few, some))
        low = tl.where(few >= k, two, tl.where(some >= k, one, low))
        number = tl.where(few >= k, few, tl.where(some >= k, some, number))
    taken = values >= low
    if number > k:  # several are equal to the k-th
        equal = values == low
        taken = (values > low) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= k - fewer))
    return taken


@triton.jit
def store_taken(Indices, taken, BLOCK: tl.constexpr):
    """Store the numbers of the entries that are ``taken`` (bool, [BLOCK]; at least 4), ascending.

    Four neighbours share an entry of the scan. A thread that loads four entries at once has them itself.
    """
    even, odd = tl.split(tl.reshape(taken.to(tl.int32), [BLOCK // 4, 2, 2]))  # [BLOCK / 4, 2]
    first, third = tl.split(even)  # [BLOCK / 4]
    second, fourth = tl.split(odd)  # [BLOCK / 4]
    two, three = first + second, first + second + third  # [BLOCK / 4]
    number = 4 * tl.arange(0, BLOCK // 4)  # [BLOCK / 4]
    Indices += tl.cumsum(three + fourth, 0) - (three + fourth)  # [BLOCK / 4]
    tl.store(Indices, number, mask=first > 0)
    tl.store(Indices + first, number + 1, mask=second > 0)
    tl.store(Indices + two, number + 2, mask=third > 0)
    tl.store(Indices + three, number + 3, mask=fourth > 0)
