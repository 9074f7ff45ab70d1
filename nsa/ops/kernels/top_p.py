"""Twilight's tokens of one query token per sequence: scores from 4-bit keys, a threshold per head, a list per KV head.

1. Scores of the candidates (`estimate_kernel`).
2. Their softmax weights, and of each query head the weight from which on they have the share p (`threshold_kernel`).
3. What one head of a KV head wants, in the order of the candidates (`list_kernel`).

The grids depend on shapes alone, and the search has a fixed number of steps: nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.decode import COUNTS
from nsa.ops.kernels.device_functions import load_rows
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, tile_width

CANDIDATES = 128  # of a program of `estimate_kernel`
WEIGHTS = 4096  # that a program of the others loads at once
STEPS = 30  # the bits of floats from 0 to 1 are fewer than 2^30 integers
ONE_BITS = tl.constexpr(0x3F800000)  # of 1.0
NO_BITS = tl.constexpr(0x7FFFFFFF)  # above those of every weight


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


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def estimate_kernel(Q, Codes, Spans, Lengths, Pages, Scores, num_keys, num_pages, num_slots, scale_log2,
                    LISTED: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                    HALF: tl.constexpr, H1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Scores (B, H, num_slots) fp32, to base 2, of BN candidates of a KV head; -inf for what is not there.

    Q (B, H, 2 HALF); Codes (B, S, G, HALF) uint8; Spans (B, S, G, 2) fp32: least and step; Pages (B, G, num_pages).
    Without lists, scores of candidates from the length on are not written.
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(Lengths + batch)
    pair = batch * GROUPS + group
    first = tl.program_id(0) * BN
    if LISTED or first < length:
        slot = first + tl.arange(0, BN)  # [BN]
        token, ok = token_of(Pages + pair * num_pages, slot, num_slots, length, LISTED, PAGE)
        ok = ok & (token < num_keys)
        row = (batch * num_keys + token) * GROUPS + group  # [BN]
        column = tl.arange(0, H1)  # [H1]
        half = column < HALF  # [H1]
        codes = tl.load(Codes + row[:, None] * HALF + column[None, :], mask=ok[:, None] & half[None, :], other=0)
        lower = (codes & 15).to(Q.dtype.element_ty)  # [BN, H1]
        upper = (codes >> 4).to(Q.dtype.element_ty)  # [BN, H1]
        least = tl.load(Spans + row * 2, mask=ok, other=0.0)  # [BN]
        step = tl.load(Spans + row * 2 + 1, mask=ok, other=0.0)  # [BN]
        for head0 in tl.static_range(0, HEADS, BM):
            head = head0 + tl.arange(0, BM)  # [BM]
            q_row = pair * HEADS + head  # [BM]
            q1 = load_rows(Q, q_row, head < HEADS, column, 2 * HALF)  # [BM, H1]
            q1 = tl.where(half[None, :], q1, 0.0).to(Q.dtype.element_ty)  # [BM, H1]
            q2 = load_rows(Q, q_row, head < HEADS, HALF + column, 2 * HALF)  # [BM, H1]
            whole = tl.sum(q1.to(tl.float32), 1) + tl.sum(q2.to(tl.float32), 1)  # [BM]
            s = tl.dot(q1, lower.T, input_precision=PRECISION)  # [BM, BN]
            s = tl.dot(q2, upper.T, s, input_precision=PRECISION)  # [BM, BN]
            s = (s * step[None, :] + whole[:, None] * least[None, :]) * scale_log2
            s = tl.where(ok[None, :], s, float("-inf"))
            at = q_row[:, None] * num_slots + slot[None, :]
            tl.store(Scores + at, s, mask=(head < HEADS)[:, None] & (slot < num_slots)[None, :])


@triton.jit
def mass_from(Weights, count, bits, BLOCK: tl.constexpr):
    """Sum of the weights whose bits are at least ``bits``, which is not negative; always in the same order."""
    total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    for start in tl.range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        weight = tl.load(Weights + slot, mask=slot < count, other=-1.0)  # [BLOCK]
        total += tl.where(weight.to(tl.int32, bitcast=True) >= bits, weight, 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=[*INTEGERS, "p"])
def threshold_kernel(Scores, Lengths, Bounds, Ties, num_slots, p, LISTED: tl.constexpr, HEADS: tl.constexpr,
                     STEPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Bounds, Ties (B, H) int32 of a query head: the bits above which weights are taken, and how many that equal them.

    Scores (B, H, num_slots) become weights: the highest is 1, and what is not there -1. HEADS: all of a sequence.
    """
    row = tl.program_id(0).to(tl.int64)
    count = num_slots
    if not LISTED:
        count = tl.minimum(count, tl.load(Lengths + row // HEADS))
    Scores += row * num_slots
    tops = tl.full([BLOCK], float("-inf"), tl.float32)  # [BLOCK]
    for start in tl.range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        tops = tl.maximum(tops, tl.load(Scores + slot, mask=slot < count, other=float("-inf")))
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    for start in tl.range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        score = tl.load(Scores + slot, mask=slot < count, other=float("-inf"))  # [BLOCK]
        weight = tl.where(score == float("-inf"), -1.0, tl.exp2(score - base))  # [BLOCK]
        tl.store(Scores + slot, weight, mask=slot < count)
    tl.debug_barrier()  # what other threads of the program stored is there
    low = tl.full([], 0, tl.int32)  # the weights from here on suffice,
    high = tl.full([], ONE_BITS + 1, tl.int32)  # those from here on do not
    wanted = p * mass_from(Scores, count, low, BLOCK)
    for _ in tl.range(0, STEPS):
        middle = low + (high - low) // 2
        enough = mass_from(Scores, count, middle, BLOCK) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    above = mass_from(Scores, count, low + 1, BLOCK)
    each = low.to(tl.float32, bitcast=True)
    ties = tl.ceil((wanted - above) / tl.where(low > 0, each, 1.0)).to(tl.int32)
    ties = tl.where(above > 0, ties, tl.maximum(ties, 1))
    ties = tl.where(low > 0, ties, 0)  # what weighs nothing is not taken, unless all are
    tl.store(Bounds + row, tl.where(p >= 1, -1, low))
    tl.store(Ties + row, ties)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def list_kernel(Weights, Lengths, Pages, Bounds, Ties, Tokens, num_pages, num_slots, LISTED: tl.constexpr,
                PAGE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BH: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Tokens (B, G, num_slots) int32 of a KV head: those that one of its heads wants, then -1."""
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(Lengths + pair // GROUPS)
    count = num_slots
    if not LISTED:
        count = tl.minimum(count, length)
    Pages += pair * num_pages
    Tokens += pair * num_slots
    head = tl.arange(0, BH)  # [BH]
    row = pair * HEADS + head  # [BH]
    bound = tl.load(Bounds + row, mask=head < HEADS, other=NO_BITS)  # [BH]
    ties = tl.load(Ties + row, mask=head < HEADS, other=0)  # [BH]
    seen = tl.zeros([BH], tl.int32)  # [BH], weights that equal the bound, so far
    taken = tl.full([], 0, tl.int32)
    for start in tl.range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        there = (head < HEADS)[:, None] & (slot < count)[None, :]
        weight = tl.load(Weights + row[:, None] * num_slots + slot[None, :], mask=there, other=-1.0)  # [BH, BLOCK]
        bits = weight.to(tl.int32, bitcast=True)  # [BH, BLOCK]
        equal = (bits == bound[:, None]).to(tl.int32)  # [BH, BLOCK]
        first = (equal > 0) & (seen[:, None] + tl.cumsum(equal, 1) <= ties[:, None])
        wanted = tl.max(((bits > bound[:, None]) | first).to(tl.int32), 0)  # [BLOCK]
        token, _ok = token_of(Pages, slot, count, length, LISTED, PAGE)
        tl.store(Tokens + taken + tl.cumsum(wanted, 0) - 1, token, mask=wanted > 0)
        taken += tl.sum(wanted, 0)
        seen += tl.sum(equal, 1)
    for start in tl.range(taken, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(Tokens + slot, tl.full([BLOCK], -1, tl.int32), mask=slot < num_slots)


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
    scores = q.new_empty(batch, heads, slots, dtype=torch.float32)
    bounds, ties = q.new_empty(2, batch, heads, dtype=torch.int32)
    which = lengths if pages is None else pages
    constants = {"LISTED": pages is not None, "PAGE": page_size, "GROUPS": groups, "HEADS": heads // groups}
    at_once = 16 if INTERPRETED else CANDIDATES
    estimate_kernel[triton.cdiv(slots, at_once), groups, batch](
        q, codes, spans, lengths, which, scores, keys, number, slots, scale * LOG2_E, **constants, HALF=half,
        H1=tile_width(half), BM=min(64, tile_width(heads // groups)), BN=at_once,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    block = 32 if INTERPRETED else min(WEIGHTS, max(256, triton.next_power_of_2(slots)))
    threshold_kernel[(batch * heads,)](
        scores, lengths, bounds, ties, slots, float(p), LISTED=pages is not None, HEADS=heads, STEPS=STEPS,
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    height = triton.next_power_of_2(heads // groups)
    list_kernel[(batch * groups,)](
        scores, lengths, which, bounds, ties, tokens, number, slots, **constants, BH=height,
        BLOCK=max(32, min(block, WEIGHTS // height)), num_warps=8,
    )  # fmt: skip
    return tokens
