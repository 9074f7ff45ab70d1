"""Collectives with gradients. Each names what it carries, and its axis counts the bytes.

The gradient of a gather is a sum and the other way round: ranks along an axis compute different parts of one loss, so
what reaches a tensor that many of them read is the sum of what each sends back.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa.parallel.grid import Axis


def all_gather(x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
    """The parts of all ranks one after the other along ``dim``; the gradient is summed and cut again."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim, what)


def reduce_scatter(x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
    """This rank's part along ``dim`` of the sum over all ranks; the gradient is gathered."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim, what)


def all_reduce(x: Tensor, axis: Axis, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place, without gradient."""
    if axis.size > 1:
        dist.all_reduce(x, op, group=axis.group)
        axis.traffic.add(f"{axis.name}/{what}", 2 * x.nbytes * (axis.size - 1) // axis.size)
    return x


def exchange(rows: Tensor, axis: Axis, send: list[int], receive: list[int], what: str) -> Tensor:
    """Send ``send[i]`` consecutive rows to rank i and receive ``receive[i]`` from it, in order of rank."""
    return _Exchange.apply(rows, axis, send, receive, what)


def gather_parts(x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
    """`all_gather` without gradient."""
    x = x.movedim(dim, 0).contiguous()
    whole = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    dist.all_gather_single(whole, x, group=axis.group)
    axis.traffic.add(f"{axis.name}/{what}", x.nbytes * (axis.size - 1))
    return whole.movedim(0, dim)


def sum_parts(x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
    """`reduce_scatter` without gradient."""
    x = x.movedim(dim, 0).contiguous()
    assert x.shape[0] % axis.size == 0, (x.shape, axis.size)
    part = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    dist.reduce_scatter_single(part, x, group=axis.group)
    axis.traffic.add(f"{axis.name}/{what}", part.nbytes * (axis.size - 1))
    return part.movedim(0, dim)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
        ctx.how = axis, dim, what
        return gather_parts(x, axis, dim, what)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return sum_parts(gradient, *ctx.how), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
        ctx.how = axis, dim, what
        return sum_parts(x, axis, dim, what)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gather_parts(gradient, *ctx.how), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis, send: list[int], receive: list[int], what: str) -> Tensor:
        ctx.how = axis, receive, send, what
        return _swap(rows, axis, send, receive, what)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _swap(gradient, *ctx.how), None, None, None, None


def _swap(rows: Tensor, axis: Axis, send: list[int], receive: list[int], what: str) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=axis.group)
    row = rows[:1].nbytes if len(rows) else 0
    axis.traffic.add(f"{axis.name}/{what}", row * (sum(send) - send[axis.rank]))
    return received
