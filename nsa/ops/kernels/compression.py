"""Compression of overlapping blocks through an MLP, without laying the blocks out.

Row (b, i, g) is block i of KV head g of batch b, its number ((b * M) + i) * G + g. Token s of the block is a row of
x (B, T, G, D) whose address rises by G * D with s: the inner product walks over the block's tokens with the rows'
first addresses fixed, so that an operand is read where it lies. What neighbouring blocks share comes from the L2 cache.

Backward, with pre = inner x + inner p, h = silu(pre), out = outer h:
    dpre = silu'(pre) (dout outer)                          rows outside
    dx[token s of segment n] = sum_k dpre[block n - k] inner[:, k * stride + s]      segments outside: a gather
    dinner = sum over rows of dpre (x) x, + (sum of dpre) (x) p     columns outside, rows split into a few runs
The runs' partial sums are added in order: the same inputs give the same bits.
"""

import functools
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import CompressionLayout
from nsa.ops.kernels import launch

ROWS_PER_SPLIT, MOST_SPLITS = 1024, 16  # of the sum over rows; a function of the shape alone
INTEGERS = ("num_rows", "num_tokens", "num_segments", "num_blocks", "rows_per_split", "num_splits")


@triton.jit
def _load(X, row, row_ok, column, width):
    """(rows, columns) of a row-major X (.., width) at int64 rows; 0 where there is none."""
    return tl.load(X + row[:, None] * width + column[None, :], mask=row_ok[:, None] & (column[None, :] < width),
                   other=0.0)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(X, Inner, Bias, Outer, Start, Pre, Out, num_rows, num_tokens, num_blocks, GROUPS: tl.constexpr,
                   LENGTH: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, DV: tl.constexpr, H1: tl.constexpr,
                   DV1: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Pre (rows, hidden) and Out (rows, Dv) of BM rows."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < num_rows
    block = row // GROUPS % num_blocks
    start = tl.load(Start + block, mask=ok, other=-1)
    there = start >= 0
    x_row = (row // GROUPS // num_blocks * num_tokens + tl.maximum(start, 0)) * GROUPS + row % GROUPS
    part, unit, out_column = tl.arange(0, BK), tl.arange(0, H1), tl.arange(0, DV1)
    chunks: tl.constexpr = (D + BK - 1) // BK
    acc = tl.zeros([BM, H1], tl.float32)
    for step in tl.range(0, LENGTH * chunks):
        token, column = step // chunks, step % chunks * BK + part
        x = _load(X, x_row + token * GROUPS, there, column, D)
        at = unit[:, None] * (LENGTH * D) + token * D + column[None, :]
        w = tl.load(Inner + at, mask=(unit[:, None] < HIDDEN) & (column[None, :] < D), other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    acc += tl.load(Bias + unit, mask=unit < HIDDEN, other=0.0).to(tl.float32)[None, :]
    pre = acc.to(X.dtype.element_ty)
    tl.store(Pre + row[:, None] * HIDDEN + unit[None, :], pre, mask=ok[:, None] & (unit[None, :] < HIDDEN))
    h = (acc * tl.sigmoid(acc)).to(X.dtype.element_ty)
    outer = _load(Outer, out_column.to(tl.int64), out_column < DV, unit, HIDDEN)
    out = tl.where(there[:, None], tl.dot(h, outer.T, input_precision=PRECISION), 0.0).to(X.dtype.element_ty)
    tl.store(Out + row[:, None] * DV + out_column[None, :], out, mask=ok[:, None] & (out_column[None, :] < DV))


@triton.jit(do_not_specialize=INTEGERS)
def hidden_kernel(DOut, Pre, Outer, Start, H, DPre, num_rows, num_blocks, GROUPS: tl.constexpr, HIDDEN: tl.constexpr,
                  DV: tl.constexpr, H1: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """H and DPre (rows, hidden): what the weights' gradients are made of; 0 for blocks that are not there."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < num_rows
    there = tl.load(Start + row // GROUPS % num_blocks, mask=ok, other=-1) >= 0
    unit, out_column = tl.arange(0, H1), tl.arange(0, DV1)
    d_out = _load(DOut, row, there, out_column, DV)
    outer = _load(Outer, out_column.to(tl.int64), out_column < DV, unit, HIDDEN)
    dh = tl.dot(d_out, outer, input_precision=PRECISION)
    pre = _load(Pre, row, there, unit, HIDDEN).to(tl.float32)
    gate = tl.sigmoid(pre)
    mask, at = ok[:, None] & (unit[None, :] < HIDDEN), row[:, None] * HIDDEN + unit[None, :]
    tl.store(H + at, (pre * gate).to(H.dtype.element_ty), mask=mask)
    tl.store(DPre + at, (dh * gate * (1 + pre * (1 - gate))).to(H.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def input_kernel(DPre, Inner, Token, End, Block, First, Last, DX, num_rows, num_tokens, num_segments, num_blocks,
                 GROUPS: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
                 HIDDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """DX (B, T, G, D) at one token of BM segments: from the blocks, at most length / stride, that cover it."""
    column_tiles: tl.constexpr = (D + BN - 1) // BN
    slot = tl.program_id(0) % (STRIDE * column_tiles)  # neighbours in time share the rows of DPre
    s, column = slot // column_tiles, slot % column_tiles * BN + tl.arange(0, BN)
    row = (tl.program_id(0) // (STRIDE * column_tiles)).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < num_rows
    segment, batch, group = row // GROUPS % num_segments, row // GROUPS // num_segments, row % GROUPS
    token = tl.load(Token + segment, mask=ok, other=0) + s
    ok &= token < tl.load(End + segment, mask=ok, other=0)
    block = tl.load(Block + segment, mask=ok, other=0)
    first = tl.load(First + segment, mask=ok, other=0)
    last = tl.load(Last + segment, mask=ok, other=0)
    part = tl.arange(0, BK)
    chunks: tl.constexpr = (HIDDEN + BK - 1) // BK
    acc = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, LENGTH // STRIDE * chunks):
        k, unit = step // chunks, step % chunks * BK + part
        source = (batch * num_blocks + block - k) * GROUPS + group
        dp = _load(DPre, source, ok & (block - k >= first) & (block - k < last), unit, HIDDEN)
        at = unit[:, None] * (LENGTH * D) + (k * STRIDE + s) * D + column[None, :]
        w = tl.load(Inner + at, mask=(unit[:, None] < HIDDEN) & (column[None, :] < D), other=0.0)
        acc = tl.dot(dp, w, acc, input_precision=PRECISION)
    at = ((batch * num_tokens + token) * GROUPS + group)[:, None] * D + column[None, :]
    tl.store(DX + at, acc.to(DX.dtype.element_ty), mask=ok[:, None] & (column[None, :] < D))


@triton.jit(do_not_specialize=INTEGERS)
def weight_kernel(X, DPre, Start, Partial, num_rows, num_tokens, num_blocks, rows_per_split, GROUPS: tl.constexpr,
                  LENGTH: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, H1: tl.constexpr, BK: tl.constexpr,
                  BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Partial (splits, hidden, length * D) fp32: sums over a run of rows."""
    column_tiles: tl.constexpr = (D + BN - 1) // BN
    slot = tl.program_id(0) % (LENGTH * column_tiles)  # neighbours in time share the rows of X and DPre
    split = (tl.program_id(0) // (LENGTH * column_tiles)).to(tl.int64)
    token, column = slot // column_tiles, slot % column_tiles * BN + tl.arange(0, BN)
    unit = tl.arange(0, H1)
    acc = tl.zeros([H1, BN], tl.float32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, num_rows)
    for row0 in tl.range(begin, end, BK):
        row = row0 + tl.arange(0, BK).to(tl.int64)
        ok = row < end
        start = tl.load(Start + row // GROUPS % num_blocks, mask=ok, other=-1)
        dp = _load(DPre, row, ok, unit, HIDDEN)
        x_row = (row // GROUPS // num_blocks * num_tokens + start + token) * GROUPS + row % GROUPS
        x = _load(X, x_row, start >= 0, column, D)
        acc = tl.dot(dp.T, x, acc, input_precision=PRECISION)
    at = (split * HIDDEN + unit)[:, None] * (LENGTH * D) + token * D + column[None, :]
    tl.store(Partial + at, acc, mask=(unit[:, None] < HIDDEN) & (column[None, :] < D))


@triton.jit(do_not_specialize=INTEGERS)
def reduce_kernel(Partial, DBias, Inner, Position, DInner, DPosition, num_splits, WIDTH: tl.constexpr,
                  HIDDEN: tl.constexpr, H1: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """DInner (hidden, width) and DPosition (width,) at BN columns: the partial sums, added in order, and what comes by
    way of the bias inner @ position, whose gradient is DBias (hidden,) fp32."""
    column, unit = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, H1)
    mask, at = (unit[:, None] < HIDDEN) & (column[None, :] < WIDTH), unit[:, None] * WIDTH + column[None, :]
    total = tl.zeros([H1, BN], tl.float32)
    part = at.to(tl.int64)
    for _ in tl.range(0, num_splits):
        total += tl.load(Partial + part, mask=mask, other=0.0)
        part += HIDDEN * WIDTH
    bias = tl.load(DBias + unit, mask=unit < HIDDEN, other=0.0)
    position = tl.load(Position + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    total += bias[:, None] * position[None, :]
    tl.store(DInner + at, total.to(DInner.dtype.element_ty), mask=mask)
    inner = tl.load(Inner + at, mask=mask, other=0.0).to(tl.float32)
    d_position = tl.sum(inner * bias[:, None], 0)
    tl.store(DPosition + column, d_position.to(DPosition.dtype.element_ty), mask=column < WIDTH)


@functools.cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("compression_tiles.json").read_text())


@functools.cache
def _tile(arch: str, kernel: str, width: int, itemsize: int) -> dict[str, int]:
    table = _table()
    for entry in table[arch if arch in table else "sm_80"][kernel]:
        if width <= entry.get("max_width", launch.MAX_WIDTH) and itemsize <= entry.get("max_itemsize", 4):
            return {key: value for key, value in entry.items() if not key.startswith("max_")}
    raise AssertionError(f"no tile sizes for {kernel} at width {width} on {arch}")


def _tile_sizes(kernel: str, x: Tensor, outer: Tensor) -> dict[str, int]:
    """Tile constants and launch options: the first entry for (x (.., D), outer (Dv, hidden))."""
    return _tile(launch.architecture(), kernel, max(x.shape[-1], *outer.shape), x.element_size())


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _precision(x: Tensor) -> dict[str, str]:
    return {"PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32"}


def forward(
    x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, start: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """out (B, M, G, Dv) and pre (B, M, G, hidden), both in x's dtype.

    Args:
        x (B, T, G, D), inner (hidden, length * D), position (length, D), outer (Dv, hidden), start (M,) int32: all
            contiguous. start: first token of each block, -1 where there is none.
    """
    (batch, tokens, groups, width), blocks, (v_width, hidden) = x.shape, len(start), outer.shape
    out, pre = x.new_empty(batch, blocks, groups, v_width), x.new_empty(batch, blocks, groups, hidden)
    rows = batch * blocks * groups
    tile = _tile_sizes("compress_forward", x, outer)
    if rows:
        bias = inner @ position.flatten()
        forward_kernel[(triton.cdiv(rows, tile["BM"]),)](
            x, inner, bias, outer, start, pre, out, rows, tokens, blocks, GROUPS=groups, LENGTH=length, D=width,
            HIDDEN=hidden, DV=v_width, H1=_power(hidden), DV1=_power(v_width), **_precision(x), **tile,
        )  # fmt: skip
    return out, pre


def backward(
    d_out: Tensor, x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, pre: Tensor, layout: CompressionLayout,
    length: int, stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, inner, position and outer, in their dtypes; all arguments contiguous, pre from `forward`."""
    (batch, tokens, groups, width), blocks, (v_width, hidden) = x.shape, d_out.shape[1], outer.shape
    rows, segments = batch * blocks * groups, len(layout.segment_token)
    constants = {"GROUPS": groups, "HIDDEN": hidden, **_precision(x)}
    h, d_pre = torch.empty_like(pre), torch.empty_like(pre)
    tile = _tile_sizes("compress_hidden", x, outer)
    hidden_kernel[(triton.cdiv(rows, tile["BM"]),)](
        d_out, pre, outer, layout.start, h, d_pre, rows, blocks, DV=v_width, H1=_power(hidden), DV1=_power(v_width),
        **constants, **tile,
    )  # fmt: skip
    # Rows of blocks that are not there are 0 in h.
    d_outer = d_out.flatten(0, 2).T @ h.flatten(0, 2)

    dx, tile = torch.empty_like(x), _tile_sizes("compress_input", x, outer)
    input_rows = batch * segments * groups
    input_kernel[(triton.cdiv(input_rows, tile["BM"]) * stride * triton.cdiv(width, tile["BN"]),)](
        d_pre, inner, layout.segment_token, layout.segment_end, layout.segment_block, layout.block_first,
        layout.block_last, dx, input_rows, tokens, segments, blocks, LENGTH=length, STRIDE=stride, D=width, **constants,
        **tile,
    )  # fmt: skip

    splits = min(MOST_SPLITS, triton.cdiv(rows, ROWS_PER_SPLIT))
    partial = x.new_empty(splits, hidden, length * width, dtype=torch.float32)
    d_bias = d_pre.flatten(0, 2).sum(0, dtype=torch.float32)
    tile = _tile_sizes("compress_weight", x, outer)
    weight_kernel[(splits * length * triton.cdiv(width, tile["BN"]),)](
        x, d_pre, layout.start, partial, rows, tokens, blocks, triton.cdiv(rows, splits), LENGTH=length, D=width,
        H1=_power(hidden), **constants, **tile,
    )  # fmt: skip
    d_inner, d_position = torch.empty_like(inner), torch.empty_like(position)
    tile = _tile_sizes("compress_reduce", x, outer)
    reduce_kernel[(triton.cdiv(length * width, tile["BN"]),)](
        partial, d_bias, inner, position, d_inner, d_position, splits, WIDTH=length * width, HIDDEN=hidden,
        H1=_power(hidden), **tile,
    )  # fmt: skip
    return dx, d_inner, d_position, d_outer
