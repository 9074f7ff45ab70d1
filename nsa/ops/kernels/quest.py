"""Quest's pages of one query token per sequence: bounds of q . k from the least and greatest keys, and their top-k."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels import hardware, index_topk
from nsa.ops.kernels.decode import deep, run_of
from nsa.ops.kernels.device_functions import begin_launch, load_row_parts, scores
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, early, split_width, tile_width

PAGES = 64  # that a program takes at once,
MOST_TILES = 16  # and how often at most
FP8_FROM = 89  # compute capability from which Triton knows float8_e4m3fn


@triton.jit
def signed_parts(Q, row, ok, D, D1: tl.constexpr, D2: tl.constexpr, DTYPE: tl.constexpr):
    """Of query rows in two parts the numbers above 0, and those below, [BM, D1] and [BM, D2] each; the others are 0."""
    q1, q2 = load_row_parts(Q, row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    q1, q2 = q1.to(DTYPE), q2.to(DTYPE)
    above1, above2 = tl.where(q1 > 0, q1, 0.0).to(q1.dtype), tl.where(q2 > 0, q2, 0.0).to(q2.dtype)
    return above1, above2, q1 - above1, q2 - above2


@triton.jit(do_not_specialize=[*INTEGERS, "num_pages", "page_size", "topk", "run"])
def bound_kernel(Q, Low, High, Lengths, Bounds, Seen, Indices, num_pages, page_size, topk, run, SUM: tl.constexpr,
                 GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """Bounds (B, G, num_pages) fp32 of ``run`` times BN pages, joined over the heads of a KV head.

    Q (B, H, D); Low, High (B, num_pages, G, D), in fp8 or in Q's dtype. The first program of a KV head calls
    `index_topk.begin_rows`.
    """
    # fp16 holds all numbers of fp8, and an H100 converts two of them by one instruction.
    NARROW: tl.constexpr = Low.dtype.element_ty.primitive_bitwidth == 8
    WIDE: tl.constexpr = Q.dtype.element_ty.primitive_bitwidth == 32
    DTYPE: tl.constexpr = tl.float16 if NARROW and not WIDE else Q.dtype.element_ty
    begin_launch(EARLY)
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = batch * GROUPS + group
    there = (tl.load(Lengths + batch) + page_size - 1) // page_size
    if tl.program_id(2) == 0:
        index_topk.begin_rows(Seen, Indices, slot, tl.num_programs(1) * GROUPS, there - 1, topk, FILL)
    near = tl.arange(0, BM)  # [BM]
    own = signed_parts(Q, slot * HEADS + near, near < HEADS, D, D1, D2, DTYPE)
    begin = tl.program_id(2) * run * BN
    for start in tl.range(begin, tl.minimum(begin + run * BN, tl.minimum(there, num_pages)), BN):
        page = start + tl.arange(0, BN)  # [BN]
        ok = (page < num_pages) & (page < there)  # [BN]
        row = (batch * num_pages + page) * GROUPS + group  # [BN]
        low1, low2 = load_row_parts(Low, row, ok, D, D1, D2)  # [BN, D1], [BN, D2]
        high1, high2 = load_row_parts(High, row, ok, D, D1, D2)  # [BN, D1], [BN, D2]
        if NARROW:
            low1, low2, high1, high2 = low1.to(DTYPE), low2.to(DTYPE), high1.to(DTYPE), high2.to(DTYPE)
        total = tl.full([BN], 0.0 if SUM else float("-inf"), tl.float32)  # [BN]
        for head0 in tl.static_range(0, HEADS, BM):
            head = head0 + near  # [BM]
            if HEADS > BM:
                parts = signed_parts(Q, slot * HEADS + head, head < HEADS, D, D1, D2, DTYPE)
            else:
                parts = own
            s = scores(parts[0], parts[1], high1, high2, D2, PRECISION)  # [BM, BN]
            s += scores(parts[2], parts[3], low1, low2, D2, PRECISION)
            if SUM:
                total += tl.sum(tl.where((head < HEADS)[:, None], s, 0.0), 0)
            else:
                total = tl.maximum(total, tl.max(tl.where((head < HEADS)[:, None], s, float("-inf")), 0))
        tl.store(Bounds + slot * num_pages + page, total, mask=ok)


def pages(
    q: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page_size: int, topk: int, num_initial: int,
    num_local: int, over_group: str,
) -> Tensor:  # fmt: skip
    """(B, G, topk) int32, as `nsa.ops.quest_pages`. All inputs are contiguous."""
    if low.element_size() == 1 and not INTERPRETED and hardware.capability() < FP8_FROM:
        low, high = low.to(q.dtype), high.to(q.dtype)
    (batch, heads, width), (number, groups) = q.shape, low.shape[1:3]
    indices = q.new_empty(batch, groups, topk, dtype=torch.int32)
    if not batch * groups or not number:
        return indices.fill_(-1)
    bounds = q.new_empty(batch, groups, number, dtype=torch.float32)
    seen = q.new_empty(2, batch, groups, dtype=torch.int32)
    d1, d2 = split_width(width)
    narrow = low.element_size() == 1
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    block = 16 if INTERPRETED else PAGES * 2 if narrow and not d2 else PAGES  # as many bytes as of 16 bits
    run = run_of(MOST_TILES, triton.cdiv(number, block), batch * groups)
    programs = triton.cdiv(number, run * block)
    bound_kernel[groups, batch, programs](
        q, low, high, lengths, bounds, seen, indices, number, page_size, topk, run, SUM=over_group == "sum",
        GROUPS=groups, HEADS=heads // groups, D=width, D1=d1, D2=d2, BM=min(64, tile_width(heads // groups)), BN=block,
        FILL=index_topk.FILL, PRECISION=precision, num_warps=4,
        num_stages=4 if deep(width, q.element_size()) else 3,
        **early(groups * batch * programs),
    )  # fmt: skip
    index_topk.choose_rows(bounds.flatten(0, 1), seen.flatten(1), indices.flatten(0, 1), topk, num_initial, num_local)
    return indices
