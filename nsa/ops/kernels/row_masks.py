"""Masks of the best of each row: so many, those that hold a share of its sum, or random ones. See `nsa.ops.choose`.

A program holds a row. The threshold is the greatest bit pattern that enough entries reach. The search ends as soon as a
single entry can be it, which it is after about log2 of their number steps, unless several are equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import TOP, largest
from nsa.ops.kernels.hardware import INTEGERS

WARP_ENTRIES = 512  # of a row, for each warp of its program


@triton.jit
def _in_order(x):
    """uint32 that are in the order of these fp32 numbers; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit(do_not_specialize=[*INTEGERS, "size"])
def top_kernel(Scores, Counts, Masks, size, WIDTH: tl.constexpr):
    """Masks (rows, size) of the Counts (rows,) int32 highest Scores of each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)  # [WIDTH]
    score = tl.load(Scores + row * size + column, mask=column < size, other=float("-inf")).to(tl.float32)  # [WIDTH]
    there, count = score > float("-inf"), tl.load(Counts + row)
    mask = largest(tl.where(there, tl.maximum(_in_order(score), 1), 0), count)  # [WIDTH]
    tl.store(Masks + row * size + column, mask.to(tl.uint8), mask=column < size)


@triton.jit(do_not_specialize=[*INTEGERS, "size"])
def cover_kernel(Weights, Shares, Masks, size, WIDTH: tl.constexpr):
    """Masks (rows, size) of the fewest Weights of each row that hold the Shares (rows,) fp64 of their sum."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)  # [WIDTH]
    weight = tl.load(Weights + row * size + column, mask=column < size, other=0.0).to(tl.float32)  # [WIDTH]
    there, share, exact = weight > 0, tl.load(Shares + row), weight.to(tl.float64)
    wanted = share * tl.sum(exact, 0)
    ordered = tl.where(there, weight, 0.0).to(tl.uint32, bitcast=True)  # [WIDTH]; none is negative
    # The sum of all from low on suffices, that from high on does not. Several entries may be left between them.
    low, high, left = tl.min(ordered - 1, 0) + 1, tl.max(ordered, 0) + 1, tl.sum(there.to(tl.int32), 0)
    while (left > 1) & (high - low > 1):
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(ordered >= middle, exact, 0.0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        left = tl.sum(((ordered >= low) & (ordered < high)).to(tl.int32), 0)
    threshold = tl.max(tl.where(ordered < high, ordered, 0), 0)
    above = tl.sum(tl.where(ordered > threshold, exact, 0.0), 0)
    equal = there & (ordered == threshold)
    each = tl.max(tl.where(equal, exact, 0.0), 0)
    ties = tl.ceil((wanted - above) / tl.where(each > 0, each, 1.0)).to(tl.int32)
    fewest = (ordered > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= ties))
    mask = tl.where(share >= 1, there, fewest)
    tl.store(Masks + row * size + column, mask.to(tl.uint8), mask=column < size)


@triton.jit
def _mixed(x):
    """As `nsa.ops.choose.mixed`, of int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF


@triton.jit(do_not_specialize=[*INTEGERS, "num_queries", "seed"])
def drawn_kernel(Queries, Keys, Counts, Masks, num_queries, num_keys, seed, WIDTH: tl.constexpr):
    """Masks (B, T, S) of the Counts (B, T) int32 keys drawn for a query. Queries (B, T), Keys (B, S) int64."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)  # [WIDTH]
    query, ok = tl.load(Queries + row), column < num_keys
    key = tl.load(Keys + row // num_queries * num_keys + column, mask=ok, other=-1)  # [WIDTH]
    draw = (_mixed(_mixed(query * 1_000_003 + key) + seed) >> 7).to(tl.uint32) + 1  # [WIDTH]
    draw = tl.where(key == query, TOP, draw).to(tl.uint32)
    draw = tl.where((key >= 0) & (key <= query), draw, 0).to(tl.uint32)
    mask = largest(draw, tl.load(Counts + row))  # [WIDTH]
    tl.store(Masks + row * num_keys + column, mask.to(tl.uint8), mask=ok)


def top(scores: Tensor, count: int | Tensor) -> Tensor:
    """As `nsa.ops.choose.top`."""
    return _masks(top_kernel, scores, _int32(count, scores))


def cover(weights: Tensor, share: float | Tensor) -> Tensor:
    """As `nsa.ops.choose.cover`."""
    return _masks(cover_kernel, weights, torch.as_tensor(share, dtype=torch.float64, device=weights.device))


def drawn(queries: Tensor, keys: Tensor, seed: int, count: int | Tensor) -> Tensor:
    """As `nsa.ops.choose.drawn`."""
    (batch, number), size = queries.shape, keys.shape[1]
    masks = torch.empty(batch, number, size, dtype=torch.bool, device=keys.device)
    if masks.numel():
        counts = _int32(count, keys).expand(batch, number).contiguous()
        drawn_kernel[(batch * number,)](
            queries.contiguous(), keys.contiguous(), counts, masks.view(torch.uint8), number, size, seed,
            **_program(size),
        )  # fmt: skip
    return masks


def _int32(count: int | Tensor, beside: Tensor) -> Tensor:
    return torch.as_tensor(count, device=beside.device).clamp(max=2**31 - 1).int()


def _program(size: int) -> dict[str, int]:
    """Of rows of so many entries."""
    width = triton.next_power_of_2(size)
    return {"WIDTH": width, "num_warps": max(1, min(32, width // WARP_ENTRIES))}


def _masks(kernel: triton.JITFunction, rows: Tensor, limits: Tensor) -> Tensor:
    """(..., size) bool for rows (..., size) and a limit for each, (...) or broadcast."""
    masks = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    if rows.numel():
        kernel[(rows.numel() // rows.shape[-1],)](
            rows.contiguous(), limits.expand(rows.shape[:-1]).contiguous(), masks.view(torch.uint8), rows.shape[-1],
            **_program(rows.shape[-1]),
        )  # fmt: skip
    return masks
