"""Compression of overlapping blocks by an MLP, without a copy of the blocks.

Row ((b * M) + i) * G + g is block i of KV head g of batch b. Token s of the block is a row of x (B, T, G, D), whose
address rises by G * D with s. So the inner product loops over the block's tokens and reads each in place. Tokens that
neighbouring blocks share come from the L2 cache.

Backward, with pre = inner x + inner p (p: position), h = silu(pre) and out = outer h:

- dpre = silu'(pre) (dout outer); programs take rows.
- dx[token s of segment n] = sum_k dpre[block n - k] inner[:, k * stride + s]. A segment is ``stride`` tokens. Programs
  take segments, and gather from the blocks that cover them.
- dinner = sum over rows of dpre (x) x, + (sum of dpre) (x) p. Programs take columns of inner and a share of the rows.

The shares' partial sums are added in order, so the result is bitwise deterministic.

Shapes in the comments: BM rows, H1 hidden units, DV1 output columns, BN and BK columns of a tile.
"""

import functools
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import CompressionLayout
from nsa.ops.kernels import hardware
from nsa.ops.kernels.decode import put_row, widths_of
from nsa.ops.kernels.device_functions import begin_launch, load_rows

# The split of the sum over rows depends on the shape alone, so the result is bitwise identical on every GPU.
ROWS_PER_SPLIT, MOST_SPLITS = 1024, 16
INTEGERS = ("num_rows", "num_tokens", "num_segments", "num_blocks", "rows_per_split", "num_splits")


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(X, Inner, Bias, Outer, Start, Pre, Out, num_rows, num_tokens, num_blocks, GROUPS: tl.constexpr,
                   LENGTH: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, DV: tl.constexpr, H1: tl.constexpr,
                   DV1: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Pre (rows, hidden) and Out (rows, Dv) of BM rows.

    X (B, T, G, D); Inner (hidden, LENGTH * D); Bias (hidden,), inner @ position; Outer (Dv, hidden); Start (M,), the
    first token of each block, -1 where there is none.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    ok = row < num_rows  # [BM]
    block = row // GROUPS % num_blocks  # [BM]
    start = tl.load(Start + block, mask=ok, other=-1)  # [BM]
    exists = start >= 0  # [BM]
    x_row = (row // GROUPS // num_blocks * num_tokens + tl.maximum(start, 0)) * GROUPS + row % GROUPS  # [BM]
    part, unit, out_column = tl.arange(0, BK), tl.arange(0, H1), tl.arange(0, DV1)  # [BK], [H1], [DV1]
    chunks: tl.constexpr = (D + BK - 1) // BK  # of a token's columns
    acc = tl.zeros([BM, H1], tl.float32)  # [BM, H1]
    for step in tl.range(0, LENGTH * chunks):
        token, column = step // chunks, step % chunks * BK + part  # scalar, [BK]
        x = load_rows(X, x_row + token * GROUPS, exists, column, D)  # [BM, BK]
        at = unit[:, None] * (LENGTH * D) + token * D + column[None, :]  # [H1, BK]
        w = tl.load(Inner + at, mask=(unit[:, None] < HIDDEN) & (column[None, :] < D), other=0.0)  # [H1, BK]
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    acc += tl.load(Bias + unit, mask=unit < HIDDEN, other=0.0).to(tl.float32)[None, :]
    pre = acc.to(X.dtype.element_ty)  # [BM, H1]
    tl.store(Pre + row[:, None] * HIDDEN + unit[None, :], pre, mask=ok[:, None] & (unit[None, :] < HIDDEN))
    h = (acc * tl.sigmoid(acc)).to(X.dtype.element_ty)  # [BM, H1]
    outer = load_rows(Outer, out_column.to(tl.int64), out_column < DV, unit, HIDDEN)  # [DV1, H1]
    out = tl.where(exists[:, None], tl.dot(h, outer.T, input_precision=PRECISION), 0.0)  # [BM, DV1]
    out = out.to(X.dtype.element_ty)
    tl.store(Out + row[:, None] * DV + out_column[None, :], out, mask=ok[:, None] & (out_column[None, :] < DV))


@triton.jit
def _newest(X, Ring, Inner, Position, Outer, Out, Cos, Sin, index, block, tile, num_rows, num_blocks,
            GROUPS: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, DV: tl.constexpr,
            HALF: tl.constexpr, H1: tl.constexpr, HALF1: tl.constexpr, ROTATE: tl.constexpr, BM: tl.constexpr,
            BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The block of `newest_kernel`, of keys (ROTATE) or values; X (B, 1, G, D): of the newest token."""
    row = tile * BM + tl.arange(0, BM).to(tl.int64)  # [BM]
    ok, batch, group = row < num_rows, row // GROUPS, row % GROUPS  # [BM] each
    part, unit, half = tl.arange(0, BK), tl.arange(0, H1), tl.arange(0, HALF1)  # [BK], [H1], [HALF1]
    chunks: tl.constexpr = (D + BK - 1) // BK  # of a token's columns
    acc = tl.zeros([BM, H1], tl.float32)  # [BM, H1]
    for step in tl.range(0, LENGTH * chunks):
        token, column = step // chunks, step % chunks * BK + part  # scalar, [BK]
        slot = (index + 1 + token) % LENGTH
        # The newest token is not taken from its slot, which another program writes now.
        older = load_rows(Ring, (batch * LENGTH + slot) * GROUPS + group, ok & (token < LENGTH - 1), column, D)
        x = older.to(tl.float32) + load_rows(X, row, ok & (token == LENGTH - 1), column, D).to(tl.float32)  # [BM, BK]
        p = tl.load(Position + token * D + column, mask=column < D, other=0.0).to(tl.float32)  # [BK]
        at = unit[:, None] * (LENGTH * D) + token * D + column[None, :]  # [H1, BK]
        w = tl.load(Inner + at, mask=(unit[:, None] < HIDDEN) & (column[None, :] < D), other=0.0)  # [H1, BK]
        acc = tl.dot((x + p[None, :]).to(w.dtype), w.T, acc, input_precision=PRECISION)
    h = (acc * tl.sigmoid(acc)).to(X.dtype.element_ty)  # [BM, H1]
    first = load_rows(Outer, half.to(tl.int64), half < HALF, unit, HIDDEN)  # [HALF1, H1]
    second = load_rows(Outer, HALF + half.to(tl.int64), HALF + half < DV, unit, HIDDEN)  # [HALF1, H1]
    a = tl.dot(h, first.T, input_precision=PRECISION).to(X.dtype.element_ty)  # [BM, HALF1]
    b = tl.dot(h, second.T, input_precision=PRECISION).to(X.dtype.element_ty)  # [BM, HALF1]
    if ROTATE:
        cos = tl.load(Cos + half, mask=half < HALF, other=1.0)[None, :]  # [1, HALF1]
        sin = tl.load(Sin + half, mask=half < HALF, other=0.0)[None, :]  # [1, HALF1]
        a1, b1 = a.to(tl.float32), b.to(tl.float32)  # [BM, HALF1], [BM, HALF1]
        a, b = (a1 * cos - b1 * sin).to(a.dtype), (b1 * cos + a1 * sin).to(b.dtype)
    out = ((batch * num_blocks + block) * GROUPS + group) * DV  # [BM]
    tl.store(Out + out[:, None] + half[None, :], a, mask=ok[:, None] & (half < HALF)[None, :])
    tl.store(Out + out[:, None] + HALF + half[None, :], b, mask=ok[:, None] & (HALF + half < DV)[None, :])


@triton.jit(do_not_specialize=[*INTEGERS, "num_sequences"])
def newest_kernel(Rows, Memories, Slots, Inner, Position, Outer, Compressed, Cos, Sin, Index, num_rows, num_sequences,
                  num_blocks, WIDTHS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, LENGTH: tl.constexpr,
                  STRIDE: tl.constexpr, SIZES: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
                  EARLY: tl.constexpr):  # fmt: skip
    """Rows of the token Index, to their memories, and the compression block that ends with it, if there is one.

    Of two programs that have the same BM pairs of a sequence and a KV head one computes the key of the block, one the
    value. Those after them have one row each, as in `nsa.ops.kernels.decode.append_kernel`. The first two memories are
    rings (B, LENGTH, G, D) of the last keys and values. The weights are tuples, for keys and for values, and so is
    Compressed (B, num_blocks, G, Dv). Keys are rotated by Cos and Sin (1, D / 2). SIZES of each: D, hidden, Dv, half of
    it, hidden and half up to powers of two, columns of D at a time.
    """
    begin_launch(EARLY)
    index = tl.load(Index)
    program, computing = tl.program_id(0), 2 * tl.cdiv(num_rows, BM)
    if program < computing:
        begin = index + 1 - LENGTH
        if (begin >= 0) & (begin % STRIDE == 0):
            for i in tl.static_range(2):
                if program % 2 == i:
                    _newest(Rows[i], Memories[i], Inner[i], Position[i], Outer[i], Compressed[i], Cos, Sin, index,
                            begin // STRIDE, program // 2, num_rows, num_blocks, GROUPS, LENGTH, SIZES[i][0],
                            SIZES[i][1], SIZES[i][2], SIZES[i][3], SIZES[i][4], SIZES[i][5], i == 0, BM, SIZES[i][6],
                            PRECISION)  # fmt: skip
    else:
        program -= computing
        put_row(Rows, Memories, Slots, index, program // num_sequences, (program % num_sequences).to(tl.int64), WIDTHS,
                BLOCK)  # fmt: skip


def extend(
    memories: list[Tensor], rows: list[Tensor], inner: list[Tensor], position: list[Tensor], outer: list[Tensor],
    compressed: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor, stride: int,
) -> None:  # fmt: skip
    """As `nsa.ops.compression.extend_compressed`; all contiguous, weights as lists for keys and for values."""
    batch, length, groups, _ = memories[0].shape
    if not batch * groups:
        return
    sizes = []
    for x, weight, last in zip(memories, inner, outer, strict=False):  # the first two
        half, width = (len(last) + 1) // 2, hardware.tile_width(x.shape[3])
        powers = hardware.tile_width(len(weight)), hardware.tile_width(half), min(64, width)
        sizes.append((x.shape[3], len(weight), len(last), half, *powers))
    newest_kernel[(len(rows) * batch + 2 * triton.cdiv(batch * groups, 16),)](
        tuple(rows), tuple(memories), tuple(x.shape[1] for x in memories), tuple(inner), tuple(position), tuple(outer),
        tuple(compressed), cos, sin, index, batch * groups, batch, compressed[0].shape[1], *widths_of(rows),
        GROUPS=groups, LENGTH=length, STRIDE=stride, SIZES=tuple(sizes), BM=16,
        PRECISION="tf32x3" if rows[0].dtype == torch.float32 else "tf32",
        num_warps=8 if max(size[4] for size in sizes) > 128 else 4, num_stages=2, **hardware.early(),
    )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def hidden_kernel(DOut, Pre, Outer, Start, H, DPre, num_rows, num_blocks, GROUPS: tl.constexpr, HIDDEN: tl.constexpr,
                  DV: tl.constexpr, H1: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """H and DPre (rows, hidden), from which the weights' gradients are computed; 0 for blocks that do not exist."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    ok = row < num_rows  # [BM]
    exists = tl.load(Start + row // GROUPS % num_blocks, mask=ok, other=-1) >= 0  # [BM]
    unit, out_column = tl.arange(0, H1), tl.arange(0, DV1)  # [H1], [DV1]
    d_out = load_rows(DOut, row, exists, out_column, DV)  # [BM, DV1]
    outer = load_rows(Outer, out_column.to(tl.int64), out_column < DV, unit, HIDDEN)  # [DV1, H1]
    dh = tl.dot(d_out, outer, input_precision=PRECISION)  # [BM, H1]
    pre = load_rows(Pre, row, exists, unit, HIDDEN).to(tl.float32)  # [BM, H1]
    gate = tl.sigmoid(pre)  # [BM, H1]
    mask, at = ok[:, None] & (unit[None, :] < HIDDEN), row[:, None] * HIDDEN + unit[None, :]  # [BM, H1], [BM, H1]
    tl.store(H + at, (pre * gate).to(H.dtype.element_ty), mask=mask)
    tl.store(DPre + at, (dh * gate * (1 + pre * (1 - gate))).to(H.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def input_kernel(DPre, Inner, Token, End, Block, First, Last, DX, num_rows, num_tokens, num_segments, num_blocks,
                 GROUPS: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
                 HIDDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """DX (B, T, G, D) at token s of BM segments, from the blocks that cover it: at most LENGTH / STRIDE.

    Token, End, Block, First, Last (segments,): see `nsa.ops.compression.CompressionLayout`.
    """
    column_tiles: tl.constexpr = (D + BN - 1) // BN
    slot = tl.program_id(0) % (STRIDE * column_tiles)  # programs that run side by side share the rows of DPre
    s, column = slot // column_tiles, slot % column_tiles * BN + tl.arange(0, BN)  # scalar, [BN]
    row = (tl.program_id(0) // (STRIDE * column_tiles)).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    ok = row < num_rows  # [BM]
    segment, batch, group = row // GROUPS % num_segments, row // GROUPS // num_segments, row % GROUPS  # [BM] each
    token = tl.load(Token + segment, mask=ok, other=0) + s  # [BM]
    ok &= token < tl.load(End + segment, mask=ok, other=0)
    block = tl.load(Block + segment, mask=ok, other=0)  # [BM]
    first = tl.load(First + segment, mask=ok, other=0)  # [BM]
    last = tl.load(Last + segment, mask=ok, other=0)  # [BM]
    part = tl.arange(0, BK)  # [BK]
    chunks: tl.constexpr = (HIDDEN + BK - 1) // BK  # of the hidden units
    acc = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
    for step in tl.range(0, LENGTH // STRIDE * chunks):
        k, unit = step // chunks, step % chunks * BK + part  # scalar, [BK]
        source = (batch * num_blocks + block - k) * GROUPS + group  # [BM]
        dp = load_rows(DPre, source, ok & (block - k >= first) & (block - k < last), unit, HIDDEN)  # [BM, BK]
        at = unit[:, None] * (LENGTH * D) + (k * STRIDE + s) * D + column[None, :]  # [BK, BN]
        w = tl.load(Inner + at, mask=(unit[:, None] < HIDDEN) & (column[None, :] < D), other=0.0)  # [BK, BN]
        acc = tl.dot(dp, w, acc, input_precision=PRECISION)
    at = ((batch * num_tokens + token) * GROUPS + group)[:, None] * D + column[None, :]  # [BM, BN]
    tl.store(DX + at, acc.to(DX.dtype.element_ty), mask=ok[:, None] & (column[None, :] < D))


@triton.jit(do_not_specialize=INTEGERS)
def weight_kernel(X, DPre, Start, Partial, num_rows, num_tokens, num_blocks, rows_per_split, GROUPS: tl.constexpr,
                  LENGTH: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, H1: tl.constexpr, BK: tl.constexpr,
                  BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Partial (splits, hidden, LENGTH * D) fp32: the products of DPre and X, summed over one split's rows."""
    column_tiles: tl.constexpr = (D + BN - 1) // BN
    slot = tl.program_id(0) % (LENGTH * column_tiles)  # programs that run side by side share the rows of X and DPre
    split = (tl.program_id(0) // (LENGTH * column_tiles)).to(tl.int64)
    token, column = slot // column_tiles, slot % column_tiles * BN + tl.arange(0, BN)  # scalar, [BN]
    unit = tl.arange(0, H1)  # [H1]
    acc = tl.zeros([H1, BN], tl.float32)  # [H1, BN]
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, num_rows)
    for row0 in tl.range(begin, end, BK):
        row = row0 + tl.arange(0, BK).to(tl.int64)  # [BK]
        ok = row < end  # [BK]
        start = tl.load(Start + row // GROUPS % num_blocks, mask=ok, other=-1)  # [BK]
        dp = load_rows(DPre, row, ok, unit, HIDDEN)  # [BK, H1]
        x_row = (row // GROUPS // num_blocks * num_tokens + start + token) * GROUPS + row % GROUPS  # [BK]
        x = load_rows(X, x_row, start >= 0, column, D)  # [BK, BN]
        acc = tl.dot(dp.T, x, acc, input_precision=PRECISION)
    at = (split * HIDDEN + unit)[:, None] * (LENGTH * D) + token * D + column[None, :]  # [H1, BN]
    tl.store(Partial + at, acc, mask=(unit[:, None] < HIDDEN) & (column[None, :] < D))


@triton.jit(do_not_specialize=INTEGERS)
def reduce_kernel(Partial, DBias, Inner, Position, DInner, DPosition, num_splits, WIDTH: tl.constexpr,
                  HIDDEN: tl.constexpr, H1: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """DInner (hidden, WIDTH) and DPosition (WIDTH,) at BN columns; WIDTH is LENGTH * D.

    DInner is the sum of Partial, in order, and the gradient through the bias inner @ position. The gradient of the bias
    is DBias (hidden,) fp32.
    """
    column, unit = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, H1)  # [BN], [H1]
    mask = (unit[:, None] < HIDDEN) & (column[None, :] < WIDTH)  # [H1, BN]
    at = unit[:, None] * WIDTH + column[None, :]  # [H1, BN]
    total = tl.zeros([H1, BN], tl.float32)  # [H1, BN]
    part = at.to(tl.int64)  # [H1, BN]
    for _ in tl.range(0, num_splits):
        total += tl.load(Partial + part, mask=mask, other=0.0)
        part += HIDDEN * WIDTH
    d_bias = tl.load(DBias + unit, mask=unit < HIDDEN, other=0.0)  # [H1]
    position = tl.load(Position + column, mask=column < WIDTH, other=0.0).to(tl.float32)  # [BN]
    total += d_bias[:, None] * position[None, :]
    tl.store(DInner + at, total.to(DInner.dtype.element_ty), mask=mask)
    inner = tl.load(Inner + at, mask=mask, other=0.0).to(tl.float32)  # [H1, BN]
    d_position = tl.sum(inner * d_bias[:, None], 0)  # [BN]
    tl.store(DPosition + column, d_position.to(DPosition.dtype.element_ty), mask=column < WIDTH)


@functools.cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("compression_tiles.json").read_text())


@functools.cache
def _tile(arch: str, kernel: str, width: int, itemsize: int) -> dict[str, int]:
    table = _table()
    for entry in table[arch if arch in table else "sm_80"][kernel]:
        if width <= entry.get("max_width", hardware.MAX_WIDTH) and itemsize <= entry.get("max_itemsize", 4):
            return {key: value for key, value in entry.items() if not key.startswith("max_")}
    raise AssertionError(f"no tile sizes for {kernel} at width {width} on {arch}")


def _tile_sizes(kernel: str, x: Tensor, outer: Tensor) -> dict[str, int]:
    """Tile constants and launch options from compression_tiles.json, for x (.., D) and outer (Dv, hidden)."""
    return _tile(hardware.architecture(), kernel, max(x.shape[-1], *outer.shape), x.element_size())


def _precision(x: Tensor) -> dict[str, str]:
    return {"PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32"}


def forward(
    x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, start: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """out (B, M, G, Dv) and pre (B, M, G, hidden), both in x's dtype.

    Args:
        x: (B, T, G, D). inner: (hidden, length * D). position: (length, D). outer: (Dv, hidden). All contiguous.
        start: (M,) int32, first token of each block, -1 where there is none.
    """
    (batch, tokens, groups, width), blocks, (v_width, hidden) = x.shape, len(start), outer.shape
    out, pre = x.new_empty(batch, blocks, groups, v_width), x.new_empty(batch, blocks, groups, hidden)
    rows = batch * blocks * groups
    tile = _tile_sizes("compress_forward", x, outer)
    if rows:
        bias = inner @ position.flatten()
        forward_kernel[(triton.cdiv(rows, tile["BM"]),)](
            x, inner, bias, outer, start, pre, out, rows, tokens, blocks, GROUPS=groups, LENGTH=length, D=width,
            HIDDEN=hidden, DV=v_width, H1=hardware.tile_width(hidden), DV1=hardware.tile_width(v_width),
            **_precision(x), **tile,
        )  # fmt: skip
    return out, pre


def backward(
    d_out: Tensor, x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, pre: Tensor, layout: CompressionLayout,
    length: int, stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, inner, position and outer, in their dtypes.

    Args:
        d_out: (B, M, G, Dv). pre: (B, M, G, hidden), from `forward`. All contiguous; the others as for `forward`.
        layout: where blocks and segments lie. length, stride: tokens.
    """
    (batch, tokens, groups, width), blocks, (v_width, hidden) = x.shape, d_out.shape[1], outer.shape
    rows, segments = batch * blocks * groups, len(layout.segment_token)
    constants = {"GROUPS": groups, "HIDDEN": hidden, **_precision(x)}
    h, d_pre = torch.empty_like(pre), torch.empty_like(pre)
    tile = _tile_sizes("compress_hidden", x, outer)
    hidden_kernel[(triton.cdiv(rows, tile["BM"]),)](
        d_out, pre, outer, layout.start, h, d_pre, rows, blocks, DV=v_width,
        H1=hardware.tile_width(hidden), DV1=hardware.tile_width(v_width), **constants, **tile,
    )  # fmt: skip
    # h is 0 in rows of blocks that do not exist.
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
        H1=hardware.tile_width(hidden), **constants, **tile,
    )  # fmt: skip
    d_inner, d_position = torch.empty_like(inner), torch.empty_like(position)
    tile = _tile_sizes("compress_reduce", x, outer)
    reduce_kernel[(triton.cdiv(length * width, tile["BN"]),)](
        partial, d_bias, inner, position, d_inner, d_position, splits, WIDTH=length * width, HIDDEN=hidden,
        H1=hardware.tile_width(hidden), **tile,
    )  # fmt: skip
    return dx, d_inner, d_position, d_outer
