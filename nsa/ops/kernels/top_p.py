"""Twilight's tokens of one query token per sequence: scores from 4-bit keys, a threshold per head, a list per KV head.

1. Scores of the candidates (`estimate_kernel`).
2. Their softmax weights, the weight from which on they have the share p, and what a query head so wants
   (`threshold_kernel`).
3. What one head of a KV head wants, in the order of the candidates (`list_kernel`).

The grids depend on shapes alone: nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.decode import COUNTS, PROGRAMS, run_of
from nsa.ops.kernels.device_functions import begin_launch
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, early, tile_width

CANDIDATES = 128  # that a program of `estimate_kernel` takes at once,
MOST_TILES = 16  # and how often at most
WEIGHTS = 16384  # that a program of `threshold_kernel` holds
WARP_WEIGHTS = 2048  # that a warp of it holds; half of them of a longer row, of which it loads as many besides
TIES_STEP = 16 if INTERPRETED else 2048  # of which it takes at once, where not all that are equal are wanted
LISTED_STEP = 4096  # candidates that a program of `list_kernel` takes at once
ONE_BITS = tl.constexpr(0x3F800000)  # of 1.0


@triton.jit
def token_of(Pages, slot, count, length, LISTED: tl.constexpr, PAGE: tl.constexpr):
    """(token, whether it is there) of candidates ``slot``: tokens of listed pages, or the tokens in their order."""
    token = slot
    ok = slot < count
    if LISTED:
        page = tl.load(Pages + slot // PAGE, mask=ok, other=-1)
        token = page * PAGE + slot % PAGE
        ok = page >= 0
    return token, ok & (token < length)


@triton.jit
def as_floats(codes, TYPE: tl.constexpr):
    """The codes (uint16), which are below 16, as numbers of a type. All of it is exact.

    16 bits of a type hold them below those of a power of two, which is subtracted again. A conversion of integers takes
    several times as long.
    """
    if tl.bfloat16 == TYPE:
        return (codes | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full([], 128.0, tl.bfloat16)
    elif tl.float16 == TYPE:
        return (codes | 0x6400).to(tl.float16, bitcast=True) - tl.full([], 1024.0, tl.float16)
    else:
        return codes.to(TYPE)


@triton.jit
def quarter_of(Q, row, ok, column, there, QUARTER: tl.constexpr):
    """Some columns of query rows, as `load_rows`; 0 where they are not ``there``."""
    at = row[:, None] * (4 * QUARTER) + column[None, :]
    return tl.load(Q + at, mask=ok[:, None] & there[None, :], other=0.0)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def estimate_kernel(Q, Codes, Spans, Lengths, Pages, Scores, num_keys, num_pages, num_slots, blocks, run,
                    scale_log2, BLOCK: tl.constexpr, LISTED: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr,
                    HEADS: tl.constexpr, QUARTER: tl.constexpr, H1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    STAGES: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Scores (B, H, blocks * BLOCK) fp32, to base 2, of ``run`` times BN candidates of a KV head; -inf: not there.

    Q (B, H, 4 QUARTER); Codes (B, S, G, QUARTER) int16, each of two neighbours' lower and upper codes; Spans (B, S, G,
    2) fp32: least and step; Pages (B, G, num_pages). Without lists, scores of candidates from the length on are not
    written. A program has BM of the heads.
    """
    begin_launch(EARLY)
    tiles: tl.constexpr = (HEADS + BM - 1) // BM
    group, batch = tl.program_id(0) // tiles, tl.program_id(1).to(tl.int64)
    pair = batch * GROUPS + group
    head = tl.program_id(0) % tiles * BM + tl.arange(0, BM)  # [BM]
    q_row = pair * HEADS + head  # [BM]
    column = tl.arange(0, H1)  # [H1]
    quarter = column < QUARTER  # [H1]
    q1 = quarter_of(Q, q_row, head < HEADS, 2 * column, quarter, QUARTER)  # [BM, H1]
    q2 = quarter_of(Q, q_row, head < HEADS, 2 * column + 2 * QUARTER, quarter, QUARTER)  # [BM, H1]
    q3 = quarter_of(Q, q_row, head < HEADS, 2 * column + 1, quarter, QUARTER)  # [BM, H1]
    q4 = quarter_of(Q, q_row, head < HEADS, 2 * column + 2 * QUARTER + 1, quarter, QUARTER)  # [BM, H1]
    whole = tl.sum(q1.to(tl.float32) + q3.to(tl.float32), 1) + tl.sum(q2.to(tl.float32) + q4.to(tl.float32), 1)  # [BM]
    length = tl.load(Lengths + batch)
    begin = tl.program_id(2) * run * BN
    end = tl.minimum(begin + run * BN, num_slots)
    if not LISTED:
        end = tl.minimum(end, length)
    for start in tl.range(begin, end, BN, num_stages=STAGES):
        slot = start + tl.arange(0, BN)  # [BN]
        token, ok = token_of(Pages + pair * num_pages, slot, num_slots, length, LISTED, PAGE)
        ok = ok & (token < num_keys)
        row = (batch * num_keys + token) * GROUPS + group  # [BN]
        place = row[:, None] * QUARTER + column[None, :]  # [BN, H1]
        codes = tl.load(Codes + place, mask=ok[:, None] & quarter[None, :], other=0).to(tl.uint16, bitcast=True)
        s = tl.dot(q1, as_floats(codes & 15, Q.dtype.element_ty).T, input_precision=PRECISION)  # [BM, BN]
        s = tl.dot(q2, as_floats((codes >> 4) & 15, Q.dtype.element_ty).T, s, input_precision=PRECISION)
        s = tl.dot(q3, as_floats((codes >> 8) & 15, Q.dtype.element_ty).T, s, input_precision=PRECISION)
        s = tl.dot(q4, as_floats(codes >> 12, Q.dtype.element_ty).T, s, input_precision=PRECISION)
        least = tl.load(Spans + row * 2, mask=ok, other=0.0)  # [BN]
        step = tl.load(Spans + row * 2 + 1, mask=ok, other=0.0)  # [BN]
        s = (s * step[None, :] + whole[:, None] * least[None, :]) * scale_log2
        s = tl.where(ok[None, :], s, float("-inf"))
        at = q_row[:, None] * (blocks * BLOCK) + slot[None, :]
        tl.store(Scores + at, s, mask=(head < HEADS)[:, None] & (slot < num_slots)[None, :])


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def sums_of_four(x, BLOCK: tl.constexpr):
    """Sums of four neighbours of x [BLOCK]: a thread that loaded them at once has them all."""
    return tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)


@triton.jit
def mass_from(Weights, weight, count, bits, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """(sum, number) of the weights whose bits are at least ``bits``, which is not negative; always in the same order.

    WHOLE: they are ``weight`` [BLOCK]; else they are read from memory, of which ``weight`` are the first.
    """
    reaches = tl.where(weight.to(tl.int32, bitcast=True) >= bits, 1.0, 0.0)  # [BLOCK]
    total, number = reaches * weight, reaches  # [BLOCK]
    if not WHOLE:
        total, number = sums_of_four(total, BLOCK), sums_of_four(number, BLOCK)  # [BLOCK / 4]
        for start in tl.range(BLOCK, count, BLOCK):
            more = tl.load(Weights + start + tl.arange(0, BLOCK))  # [BLOCK]
            reaches = tl.where(more.to(tl.int32, bitcast=True) >= bits, 1.0, 0.0)  # [BLOCK]
            total += sums_of_four(reaches * more, BLOCK)
            number += sums_of_four(reaches, BLOCK)
    return tl.reduce((total, number), 0, _add_two)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS, "p"])
def threshold_kernel(Scores, Lengths, Wanted, num_slots, blocks, p, LISTED: tl.constexpr, HEADS: tl.constexpr,
                     WHOLE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Wanted (B, H, blocks * BLOCK) int8: 1 for the candidates that a query head takes, or 0.

    Scores (B, H, blocks * BLOCK) are those of `estimate_kernel`; WHOLE: one block is a row. Else all but the first
    become weights: the highest is 1, and what is not there -1. HEADS: all of a sequence. Rows are read to their end:
    loads without a mask take several entries at once.

    Bisection ends where one weight is left between low and high: all from low on are taken. Else several are equal to
    low.
    """
    begin_launch(EARLY)
    row = tl.program_id(0).to(tl.int64)
    count = num_slots
    if not LISTED:
        count = tl.minimum(count, tl.load(Lengths + row // HEADS))
    Scores += row * (blocks * BLOCK)
    Wanted += row * (blocks * BLOCK)
    near = tl.arange(0, BLOCK)  # [BLOCK]
    scores = tl.where(near < count, tl.load(Scores + near), float("-inf"))  # [BLOCK]
    tops = scores
    if not WHOLE:
        for start in tl.range(BLOCK, count, BLOCK):
            score = tl.where(start + near < count, tl.load(Scores + start + near), float("-inf"))  # [BLOCK]
            tops = tl.maximum(tops, score)
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    first = tl.where(scores == float("-inf"), -1.0, tl.exp2(scores - base))  # [BLOCK]
    if not WHOLE:
        for start in tl.range(BLOCK, count, BLOCK):
            score = tl.where(start + near < count, tl.load(Scores + start + near), float("-inf"))  # [BLOCK]
            tl.store(Scores + start + near, tl.where(score == float("-inf"), -1.0, tl.exp2(score - base)))
        tl.debug_barrier()  # what other threads of the program stored is there
    low = tl.full([], 0, tl.int32)  # the weights from here on suffice,
    high = tl.full([], ONE_BITS + 1, tl.int32)  # those from here on do not
    whole, number = mass_from(Scores, first, count, low, WHOLE, BLOCK)
    wanted = p * whole
    above, fewer = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)  # sum and number of those from high on
    while (number - fewer > 1) & (high - low > 1):
        middle = low + (high - low) // 2
        mass, many = mass_from(Scores, first, count, middle, WHOLE, BLOCK)
        enough = mass >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        number, fewer = tl.where(enough, many, number), tl.where(enough, fewer, many)
        above = tl.where(enough, above, mass)
    each = low.to(tl.float32, bitcast=True)
    ties = tl.ceil((wanted - above) / tl.where(low > 0, each, 1.0)).to(tl.int32)
    ties = tl.where(above > 0, ties, tl.maximum(ties, 1))
    ties = tl.where(low > 0, ties, 0)  # what weighs nothing is not taken, unless all are
    bound = tl.where(p >= 1, -1, low)
    if ties >= tl.maximum(number - fewer, 1):  # all that equal the bound
        tl.store(Wanted + near, (first.to(tl.int32, bitcast=True) >= bound).to(tl.int8))
        if not WHOLE:
            for start in tl.range(BLOCK, count, BLOCK):
                weight = tl.load(Scores + start + near)  # [BLOCK]
                tl.store(Wanted + start + near, (weight.to(tl.int32, bitcast=True) >= bound).to(tl.int8))
    else:  # a few at a time: a scan of all would take as many registers again
        tl.store(Scores + near, first)
        tl.debug_barrier()  # what other threads of the program stored is there
        seen = tl.full([], 0, tl.int32)
        for start in tl.range(0, tl.cdiv(count, BLOCK) * BLOCK, STEP):
            slot = start + tl.arange(0, STEP)  # [STEP]
            seen = take(Wanted + slot, tl.load(Scores + slot), bound, ties, seen)


@triton.jit
def take(Wanted, weight, bound, ties, seen):
    """Store which weights are above the bound, or among the first ``ties`` that equal it; ``seen`` with its equals."""
    bits = weight.to(tl.int32, bitcast=True)  # [BLOCK]
    equal = (bits == bound).to(tl.int32)  # [BLOCK]
    wanted = (bits > bound) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= ties))  # [BLOCK]
    tl.store(Wanted, wanted.to(tl.int8))
    return seen + tl.sum(equal, 0)


@triton.jit
def wanted_by_any(Wanted, slot, blocks, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """int32 of the slots: whether a head of a KV head wants them."""
    wanted = tl.load(Wanted + slot)  # [STEP]
    for head in tl.static_range(1, HEADS):
        wanted |= tl.load(Wanted + head * (blocks * BLOCK) + slot)
    return wanted.to(tl.int32)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def list_kernel(Wanted, Lengths, Pages, Tokens, num_pages, num_slots, blocks, run, LISTED: tl.constexpr,
                PAGE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
                STEP: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Tokens (B, G, num_slots) int32 of a KV head: those that one of its heads wants, then -1.

    A program writes those among ``run`` times STEP candidates. It counts what is wanted before them, which is much
    cheaper. The last one writes the -1.
    """
    begin_launch(EARLY)
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(Lengths + pair // GROUPS)
    count = num_slots
    if not LISTED:
        count = tl.minimum(count, length)
    Pages += pair * num_pages
    Tokens += pair * num_slots
    Wanted += pair * HEADS * (blocks * BLOCK)
    begin = tl.program_id(1) * run * STEP
    before = tl.zeros([STEP], tl.int32)  # [STEP]
    for start in tl.range(0, tl.minimum(begin, count), STEP):
        before += wanted_by_any(Wanted, start + tl.arange(0, STEP), blocks, HEADS, BLOCK)
    taken = tl.sum(before, 0)
    for start in tl.range(begin, tl.minimum(begin + run * STEP, count), STEP):
        slot = start + tl.arange(0, STEP)  # [STEP]
        wanted = wanted_by_any(Wanted, slot, blocks, HEADS, BLOCK)  # [STEP]
        token, _ok = token_of(Pages, slot, count, length, LISTED, PAGE)
        tl.store(Tokens + taken + tl.cumsum(wanted, 0) - 1, token, mask=wanted > 0)
        taken += tl.sum(wanted, 0)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        for start in tl.range(taken, num_slots, STEP):
            slot = start + tl.arange(0, STEP)  # [STEP]
            tl.store(Tokens + slot, tl.full([STEP], -1, tl.int32), mask=slot < num_slots)


def choose(
    q: Tensor, codes: Tensor, spans: Tensor, lengths: Tensor, pages: Tensor | None, page_size: int, p: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """(B, G, slots) int32, as `nsa.ops.top_p_tokens`. All inputs are contiguous."""
    (batch, heads, _), (keys, groups, half) = q.shape, codes.shape[1:]
    number = 0 if pages is None else pages.shape[2]
    slots = keys if pages is None else number * page_size
    tokens = q.new_empty(batch, groups, slots, dtype=torch.int32)
    if not tokens.numel():
        return tokens
    block = 32 if INTERPRETED else min(WEIGHTS, max(256, triton.next_power_of_2(slots)))
    blocks = triton.cdiv(slots, block)
    scores = q.new_empty(batch, heads, blocks * block, dtype=torch.float32)
    wanted = torch.empty_like(scores, dtype=torch.int8)
    which = lengths if pages is None else pages
    constants = {"LISTED": pages is not None, "PAGE": page_size, "GROUPS": groups, "HEADS": heads // groups}
    at_once, height = 16 if INTERPRETED else CANDIDATES, min(64, tile_width(heads // groups))
    rows = groups * triton.cdiv(heads // groups, height)
    run = run_of(MOST_TILES, triton.cdiv(slots, at_once), batch * rows, 2 * PROGRAMS)  # of few registers
    programs = triton.cdiv(slots, run * at_once)
    estimate_kernel[rows, batch, programs](
        q, codes.view(torch.int16), spans, lengths, which, scores, keys, number, slots, blocks, run, scale * LOG2_E,
        block, **constants, QUARTER=half // 2, H1=tile_width(half // 2), BM=height, BN=at_once,
        STAGES=5 if pages is not None else 3, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4,
        **early(rows * batch * programs),
    )  # fmt: skip
    threshold_kernel[(batch * heads,)](
        scores, lengths, wanted, slots, blocks, float(p), LISTED=pages is not None, HEADS=heads, WHOLE=blocks == 1,
        BLOCK=block, STEP=min(block, TIES_STEP), num_warps=max(4, block * min(2, blocks) // WARP_WEIGHTS),
        maxnreg=128,  # so that two programs of a whole row share a multiprocessor: one counts while the other waits
        **early(),
    )  # fmt: skip
    at_once = min(block, LISTED_STEP)
    run = run_of(MOST_TILES, triton.cdiv(slots, at_once), batch * groups, PROGRAMS // 2)  # of many registers
    list_kernel[batch * groups, triton.cdiv(slots, run * at_once)](
        wanted, lengths, which, tokens, number, slots, blocks, run, **constants, BLOCK=block, STEP=at_once, num_warps=8,
        **early(),
    )  # fmt: skip
    return tokens
