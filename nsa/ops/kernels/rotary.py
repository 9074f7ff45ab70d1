"""Splits a joint projection into heads, with rotation or sigmoid, and computes the gradient: one launch each.

A program takes BM tokens of one slot. A slot is one head, or all gates. It holds the two halves of a head in registers,
so a rotation, which pairs an element of each, needs no exchange. The columns of every part are compile-time constants,
and its tensor is one of a tuple.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import Heads
from nsa.ops.kernels.device_functions import begin_launch
from nsa.ops.kernels.hardware import INTEGERS, early

COPY, ROTATE, SIGMOID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WAYS = {"copy": COPY.value, "rotate": ROTATE.value, "sigmoid": SIGMOID.value}
ELEMENTS, MOST_TOKENS = 2048, 64  # of one program: elements of half a head, and tokens at most


@triton.jit
def _pairs(column, half: tl.constexpr, turning: tl.constexpr, start: tl.constexpr, interleaved: tl.constexpr):
    """The first dim of each pair [half1], and how far behind it the second is: first the pairs that turn, then any two
    of the dims that do not."""
    other: tl.constexpr = 2 * turning if start == 0 else 0  # first dim that does not turn
    turns = column < turning
    if interleaved:
        first, apart = start + 2 * column, 1
    else:
        first, apart = start + column, turning
    return tl.where(turns, first, other + column - turning), tl.where(turns, apart, half - turning)


@triton.jit
def _convert(X, Part, Cos, Sin, Rows, Extra, row, ok, slot, num_tokens, COLUMNS: tl.constexpr, TABLE: tl.constexpr,
             BACKWARD: tl.constexpr, slots: tl.constexpr, width: tl.constexpr, half: tl.constexpr,
             half1: tl.constexpr, first_column: tl.constexpr, how: tl.constexpr, turning: tl.constexpr,
             start: tl.constexpr, interleaved: tl.constexpr):  # fmt: skip
    """`heads_kernel` for one slot of one part. ``half1`` is half the width, up to a power of two."""
    column = tl.arange(0, half1)  # [half1]
    ok1 = ok[:, None] & (column < half)[None, :]  # [BM, half1]
    ok2 = ok[:, None] & (column + half < width)[None, :]  # [BM, half1]
    first, apart = column, half  # a pair is an element of each half
    if how == ROTATE and (turning < half or interleaved):
        first, apart = _pairs(column, half, turning, start, interleaved)
    source = X + row[:, None] * COLUMNS + first_column + slot * width + first[None, :]  # [BM, half1]
    target = Part + row[:, None] * (slots * width) + slot * width + first[None, :]  # [BM, half1]
    if BACKWARD:
        source, target = target, source
    a = tl.load(source, mask=ok1, other=0.0).to(tl.float32)  # [BM, half1], the first of each pair
    b = tl.load(source + apart, mask=ok2, other=0.0).to(tl.float32)  # [BM, half1], the second
    if how == ROTATE:
        angle = row.to(tl.int32) % num_tokens  # [BM], row of the tables
        if Rows is not None:
            angle = tl.load(Rows + angle, mask=ok, other=0)
        at = angle[:, None] * TABLE + column[None, :]  # [BM, half1]
        turns = ok[:, None] & (column < turning)[None, :]  # [BM, half1]
        # [BM, half1], [BM, half1]
        cos, sin = tl.load(Cos + at, mask=turns, other=1.0), tl.load(Sin + at, mask=turns, other=0.0)
        if BACKWARD:
            sin = -sin
        a, b = a * cos - b * sin, b * cos + a * sin
    elif how == SIGMOID:
        if BACKWARD:
            gates = Extra + row[:, None] * width + column[None, :]  # [BM, half1]
            g1 = tl.load(gates, mask=ok1, other=0.0).to(tl.float32)  # [BM, half1]
            g2 = tl.load(gates + half, mask=ok2, other=0.0).to(tl.float32)  # [BM, half1]
            a, b = a * g1 * (1 - g1), b * g2 * (1 - g2)
        else:
            # [half1], [half1]
            bias1 = tl.load(Extra + column, mask=column < half, other=0.0).to(tl.float32)
            bias2 = tl.load(Extra + half + column, mask=column + half < width, other=0.0).to(tl.float32)
            a, b = tl.sigmoid(a + bias1[None, :]), tl.sigmoid(b + bias2[None, :])
    tl.store(target, a.to(X.dtype.element_ty), mask=ok1)
    tl.store(target + apart, b.to(X.dtype.element_ty), mask=ok2)


@triton.jit(do_not_specialize=INTEGERS)
def heads_kernel(X, Parts, Cos, Sin, Rows, Extra, num_rows, num_tokens, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
                 TABLE: tl.constexpr, BM: tl.constexpr, BACKWARD: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Parts, each (rows, slots * width), from X (rows, COLUMNS). If BACKWARD, X's gradient from those of the Parts.

    Args:
        Cos, Sin: tables (.., TABLE) fp32. Rows: (T,) rows of the tables, or None: row t for token t.
        Extra: forward the bias (slot width,) of the sigmoid, backward its results (rows, slot width).
        SLOTS: for each part its first slot, number of slots, slot width, half of that, half up to a power of two, first
            column of X, what to do (COPY, ROTATE or SIGMOID), and of ROTATE pairs that turn, their first dim, and
            whether they are interleaved.
    """
    begin_launch(EARLY)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    slot = tl.program_id(1)
    ok = row < num_rows  # [BM]
    for p in tl.static_range(len(SLOTS)):
        if (slot >= SLOTS[p][0]) & (slot < SLOTS[p][0] + SLOTS[p][1]):
            _convert(X, Parts[p], Cos, Sin, Rows, Extra, row, ok, slot - SLOTS[p][0], num_tokens, COLUMNS, TABLE,
                     BACKWARD, SLOTS[p][1], SLOTS[p][2], SLOTS[p][3], SLOTS[p][4], SLOTS[p][5],
                     SLOTS[p][6], SLOTS[p][7], SLOTS[p][8], SLOTS[p][9])  # fmt: skip


@functools.lru_cache(maxsize=64)
def _slots(
    counts: tuple[int, ...], widths: tuple[int, ...], ways: tuple[int, ...], layouts: tuple[int, ...]
) -> tuple[tuple, int, int]:
    """SLOTS of the kernel, the number of slots, and the tokens of a program."""
    result, slot, column, widest = [], 0, 0, 1
    for count, width, how, *layout in zip(counts, widths, ways, *(layouts[i::3] for i in range(3)), strict=True):
        slots, slot_width = (1, count * width) if how == SIGMOID.value else (count, width)
        half = (slot_width + 1) // 2
        power = triton.next_power_of_2(half)
        result.append((slot, slots, slot_width, half, power, column, how, *layout))
        slot, column, widest = slot + slots, column + count * width, max(widest, power)
    return tuple(result), slot, max(1, min(MOST_TOKENS, ELEMENTS // widest))


def _launch(
    x: Tensor, parts: list[Tensor], cos: Tensor, sin: Tensor, rows: Tensor | None, extra: Tensor | None,
    counts: list[int], widths: list[int], ways: list[int], layouts: list[int], backward: bool,
) -> None:  # fmt: skip
    slots, total, block = _slots(tuple(counts), tuple(widths), tuple(ways), tuple(layouts))
    tokens = x.shape[0] * x.shape[1]
    if tokens:
        tiles = triton.cdiv(tokens, block)
        heads_kernel[(tiles, total)](
            x, tuple(parts), cos, sin, rows, extra, tokens, x.shape[1], SLOTS=slots, COLUMNS=x.shape[2],
            TABLE=cos.shape[1], BM=block, BACKWARD=backward, num_warps=4, **early(tiles * total, each=2),
        )  # fmt: skip


@torch.library.custom_op("nsa::split_heads", mutates_args=())
def _split_heads(
    x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, bias: Tensor | None, counts: list[int],
    widths: list[int], ways: list[int], layouts: list[int],
) -> list[Tensor]:  # fmt: skip
    outs = [x.new_empty(*x.shape[:2], count, width) for count, width in zip(counts, widths, strict=True)]
    _launch(x, outs, cos, sin, rows, bias, counts, widths, ways, layouts, backward=False)
    return outs


@_split_heads.register_fake
def _split_heads_fake(x, cos, sin, rows, bias, counts, widths, ways, layouts):
    return [x.new_empty(*x.shape[:2], count, width) for count, width in zip(counts, widths, strict=True)]


@torch.library.custom_op("nsa::join_heads", mutates_args=())
def _join_heads(
    gradients: list[Tensor], cos: Tensor, sin: Tensor, rows: Tensor | None, gates: Tensor | None, counts: list[int],
    widths: list[int], ways: list[int], layouts: list[int],
) -> Tensor:  # fmt: skip
    d_x = gradients[0].new_empty(*gradients[0].shape[:2], sum(c * w for c, w in zip(counts, widths, strict=True)))
    _launch(d_x, gradients, cos, sin, rows, gates, counts, widths, ways, layouts, backward=True)
    return d_x


@_join_heads.register_fake
def _join_heads_fake(gradients, cos, sin, rows, gates, counts, widths, ways, layouts):
    return gradients[0].new_empty(*gradients[0].shape[:2], sum(c * w for c, w in zip(counts, widths, strict=True)))


def _save(ctx, inputs, output):
    _, cos, sin, rows, bias, ctx.counts, ctx.widths, ctx.ways, ctx.layouts = inputs
    ctx.given = rows is not None, bias is not None
    gates = [output[ctx.ways.index(SIGMOID.value)]] if bias is not None else []
    ctx.save_for_backward(cos, sin, *([rows] if rows is not None else []), *gates)


def _differentiate(ctx, gradients):
    cos, sin, *rest = ctx.saved_tensors
    rows = rest.pop(0) if ctx.given[0] else None
    gates = rest.pop(0) if ctx.given[1] else None
    gradients = [d.contiguous() for d in gradients]
    d_x = _join_heads(gradients, cos, sin, rows, gates, ctx.counts, ctx.widths, ctx.ways, ctx.layouts)
    d_bias = None
    if gates is not None:
        number = ctx.ways.index(SIGMOID.value)
        first = sum(c * w for c, w in zip(ctx.counts[:number], ctx.widths[:number], strict=True))
        d_bias = d_x[..., first : first + ctx.counts[number] * ctx.widths[number]].sum((0, 1))
    return d_x, None, None, None, d_bias, None, None, None, None


_split_heads.register_autograd(_differentiate, setup_context=_save)


def split_heads(
    x: Tensor, parts: list[Heads], cos: Tensor, sin: Tensor, rows: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """As `nsa.ops.rotary.split_heads`."""
    counts, widths, ways = zip(*((part.number, part.width, WAYS[part.how]) for part in parts), strict=True)
    layouts = [number for part in parts for number in _layout(part)]
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return _split_heads(x.contiguous(), cos, sin, rows, bias, list(counts), list(widths), list(ways), layouts)


def _layout(part: Heads) -> tuple[int, int, int]:
    """Number of rotated pairs, their first dim, and whether they are interleaved, for heads that are rotated."""
    if part.how != "rotate":
        return 0, 0, 0
    width, start = part.layout.turning(part.width)
    return width // 2, start, part.layout.pairs == "interleaved"
