"""h = x + delta and its RMSNorm in one kernel, and the gradients of both in another.

A program holds whole rows. In the backward pass it goes through its share of the rows, and keeps its part of the
weight's gradient in registers. The parts are then added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import begin_launch
from nsa.ops.kernels.hardware import INTEGERS, early, vector_of

PARTS = 528  # programs of the backward pass, at most: four for each multiprocessor of an H100
ELEMENTS = 2048  # of the rows that a program holds at a time
PART_ROWS, PART_COLUMNS = 64, 32  # tile of the parts in `sum_parts_kernel`


@triton.jit(do_not_specialize=INTEGERS)
def norm_kernel(X, Delta, Weight, H, Normed, Rstd, eps, num_rows, num_vectors, VECTOR: tl.constexpr, R: tl.constexpr,
                BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """H, Normed (rows, C) and Rstd (rows,) from X, Delta (rows, C), in tiles of R rows.

    Delta may be None. H is not written then. BLOCK is C up to a power of two.
    """
    begin_launch(EARLY)
    width = num_vectors * VECTOR
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # [R]
    column = tl.arange(0, BLOCK)  # [BLOCK]
    ok = (row < num_rows)[:, None] & (column < width)[None, :]  # [R, BLOCK]
    at = row[:, None] * width + column[None, :]  # [R, BLOCK]
    h = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)  # [R, BLOCK]
    if Delta is not None:
        h += tl.load(Delta + at, mask=ok, other=0.0).to(tl.float32)
        rounded = h.to(H.dtype.element_ty)  # [R, BLOCK]
        tl.store(H + at, rounded, mask=ok)
        h = rounded.to(tl.float32)  # the norm is that of what was stored
    rstd = tl.rsqrt(tl.sum(h * h, 1) / width + eps)  # [R]
    weight = tl.load(Weight + column, mask=column < width, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(Normed + at, (h * rstd[:, None] * weight[None, :]).to(Normed.dtype.element_ty), mask=ok)
    tl.store(Rstd + row, rstd, mask=row < num_rows)


@triton.jit(do_not_specialize=INTEGERS)
def norm_backward_kernel(DNormed, DH, H, Weight, Rstd, DX, Parts, num_rows, num_vectors, VECTOR: tl.constexpr,
                         R: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """DX (rows, C), and Parts (programs, C) fp32 of the weight's gradient, in tiles of R rows.

    DH (rows, C) is the gradient that reaches H past the norm, or None.
    """
    width = num_vectors * VECTOR
    column = tl.arange(0, BLOCK)  # [BLOCK]
    weight = tl.load(Weight + column, mask=column < width, other=0.0).to(tl.float32)  # [BLOCK]
    d_weight = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    for first in tl.range(tl.program_id(0) * R, num_rows, tl.num_programs(0) * R):
        row = first + tl.arange(0, R).to(tl.int64)  # [R]
        ok = (row < num_rows)[:, None] & (column < width)[None, :]  # [R, BLOCK]
        at = row[:, None] * width + column[None, :]  # [R, BLOCK]
        rstd = tl.load(Rstd + row, mask=row < num_rows, other=0.0)  # [R]
        h = tl.load(H + at, mask=ok, other=0.0).to(tl.float32) * rstd[:, None]  # [R, BLOCK], normalized
        d_normed = tl.load(DNormed + at, mask=ok, other=0.0).to(tl.float32)  # [R, BLOCK]
        d_weight += tl.sum(d_normed * h, 0)
        d_normed *= weight[None, :]
        d_x = (d_normed - h * (tl.sum(d_normed * h, 1) / width)[:, None]) * rstd[:, None]  # [R, BLOCK]
        if DH is not None:
            d_x += tl.load(DH + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(DX + at, d_x.to(DX.dtype.element_ty), mask=ok)
    tl.store(Parts + tl.program_id(0) * width + column, d_weight, mask=column < width)


@triton.jit(do_not_specialize=["num_parts", "width"])
def sum_parts_kernel(Parts, DWeight, num_parts, width, P: tl.constexpr, BLOCK: tl.constexpr):
    """DWeight (width,): the sum of Parts (num_parts, width) fp32, in tiles of P parts."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros([P, BLOCK], tl.float32)  # [P, BLOCK]
    for first in tl.range(0, num_parts, P):
        part = first + tl.arange(0, P)  # [P]
        ok = (part < num_parts)[:, None] & (column < width)[None, :]  # [P, BLOCK]
        total += tl.load(Parts + part[:, None] * width + column[None, :], mask=ok, other=0.0)
    tl.store(DWeight + column, tl.sum(total, 0).to(DWeight.dtype.element_ty), mask=column < width)


def _sizes(width: int) -> dict[str, int]:
    """Constants and launch options of both norm kernels."""
    vector, block = vector_of(width), triton.next_power_of_2(width)
    return {
        "num_vectors": width // vector,
        "VECTOR": vector,
        "BLOCK": block,
        "R": max(1, ELEMENTS // block),
        "num_warps": min(16, max(4, block // 512)),
    }


@torch.library.custom_op("nsa::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    width, sizes = x.shape[-1], _sizes(x.shape[-1])
    h, normed = x.new_empty(0) if delta is None else torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        programs = triton.cdiv(rstd.numel(), sizes["R"])
        norm_kernel[(programs,)](
            x, delta, weight, h, normed, rstd, eps, x.numel() // width, **sizes, **early(programs, each=2)
        )
    return h, normed, rstd


@_add_rms_norm.register_fake
def _add_rms_norm_fake(x, weight, eps, delta):
    h = x.new_empty(0) if delta is None else torch.empty_like(x)
    return h, torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("nsa::add_rms_norm_backward", mutates_args=())
def _add_rms_norm_backward(
    d_normed: Tensor, d_h: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    width, sizes = h.shape[-1], _sizes(h.shape[-1])
    d_x, d_weight = torch.empty_like(h), torch.empty_like(weight)
    if not h.numel():
        return d_x, d_weight.zero_()
    programs = min(PARTS, triton.cdiv(rstd.numel(), sizes["R"]))
    parts = h.new_empty(programs, width, dtype=torch.float32)
    norm_backward_kernel[(programs,)](d_normed, d_h, h, weight, rstd, d_x, parts, h.numel() // width, **sizes)
    sum_parts_kernel[(triton.cdiv(width, PART_COLUMNS),)](
        parts, d_weight, programs, width, P=PART_ROWS, BLOCK=PART_COLUMNS, num_warps=4
    )
    return d_x, d_weight


@_add_rms_norm_backward.register_fake
def _add_rms_norm_backward_fake(d_normed, d_h, h, weight, rstd):
    return torch.empty_like(h), torch.empty_like(weight)


class _AddNorm(torch.autograd.Function):
    """h and normed (.., C) from x, delta (.., C) and weight (C,). Without delta h is x itself."""

    @staticmethod
    def forward(ctx, x, weight, eps, delta):
        h, normed, rstd = _add_rms_norm(x, weight, eps, delta)
        h = x if delta is None else h
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, rstd)
        ctx.alone = delta is None
        return (x.view_as(x) if ctx.alone else h), normed

    @staticmethod
    def backward(ctx, d_h, d_normed):
        h, weight, rstd = ctx.saved_tensors
        if d_normed is None:  # only h was used
            return d_h, None, None, None if ctx.alone else d_h
        d_h = None if d_h is None else d_h.contiguous()
        d_x, d_weight = _add_rms_norm_backward(d_normed.contiguous(), d_h, h, weight, rstd)
        return d_x, d_weight, None, None if ctx.alone else d_x


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `nsa.ops.add_rms_norm`."""
    return _AddNorm.apply(x.contiguous(), weight, eps, None if delta is None else delta.contiguous())
