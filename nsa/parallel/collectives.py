"""Collectives with gradients. Each names what it carries (``what``), and its axis counts the bytes.

Ranks along an axis compute different parts of one loss. So the gradient of a tensor that several ranks read is the
sum of their gradients: the backward of an all-gather is a reduce-scatter, and the other way round.

``dim`` is the dimension that is sharded. None: the first two together, so that a rank has a run of all rows of (B, T,
..). It holds them as (B, T / ranks, ..), where B and T mean nothing, and no rows have to be copied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa.parallel.grid import Axis

# torch 2.11 has them under other names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, axis: Axis, dim: int | None, what: str) -> Tensor:
    """The parts of all ranks, concatenated along ``dim``; the gradient is reduce-scattered."""
    return x if axis.size == 1 else Gather(x, axis, dim, what).end()


def reduce_scatter(x: Tensor, axis: Axis, dim: int | None, what: str) -> Tensor:
    """This rank's part along ``dim`` of the sum over all ranks; the gradient is all-gathered."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim, what)


def all_reduce(x: Tensor, axis: Axis, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place. No gradient."""
    if axis.size > 1:
        dist.all_reduce(x, op, group=axis.group)
        axis.traffic.add(f"{axis.name}/{what}", 2 * x.nbytes * (axis.size - 1) // axis.size)
    return x


def exchange(rows: Tensor, axis: Axis, send: list[int], receive: list[int], what: str) -> Tensor:
    """Send ``send[i]`` consecutive rows to rank i and receive ``receive[i]`` from it, in order of rank."""
    return _Exchange.apply(rows, axis, send, receive, what)


class Gather:
    """An `all_gather` that overlaps with what is computed between the constructor and `end`.

    In the backward pass the reduce-scatter of the gradients overlaps with the backward of the same computation. It also
    overlaps with what the only consumer of the parts computes after their gradient: it calls their
    ``grad_fn.expect_sum()``, and in its backward pass what this returns, with the gradient (`nsa.layers.linear`).
    """

    def __init__(self, x: Tensor, axis: Axis, dim: int | None, what: str) -> None:
        self._way = _UnderWay((axis, dim, what))
        self._part = _Begin.apply(x, self._way)

    def end(self) -> Tensor:
        """The parts of all ranks. Must be called exactly once."""
        return _End.apply(self._part, self._way)


def gather_parts(x: Tensor, axis: Axis, dim: int | None, what: str) -> Tensor:
    """As `all_gather`, without gradient."""
    return _begin_gather(x, axis, dim, what).wait()


def sum_parts(x: Tensor, axis: Axis, dim: int | None, what: str) -> Tensor:
    """As `reduce_scatter`, without gradient."""
    return _begin_sum(x, axis, dim, what).wait()


@dataclass(frozen=True)
class _Transfer:
    """A collective that was started. ``result`` is valid after `wait`, and ``source`` must live until then."""

    result: Tensor
    source: Tensor
    work: Any

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


def _begin_gather(x: Tensor, axis: Axis, dim: int | None, what: str) -> _Transfer:
    rows = _rows(x, dim)
    whole = rows.new_empty(axis.size * rows.shape[0], *rows.shape[1:])
    work = _all_gather(whole, rows, group=axis.group, async_op=True)
    axis.traffic.add(f"{axis.name}/{what}", rows.nbytes * (axis.size - 1))
    return _Transfer(_like(x, whole, dim), rows, work)


def _begin_sum(x: Tensor, axis: Axis, dim: int | None, what: str) -> _Transfer:
    rows = _rows(x, dim)
    assert rows.shape[0] % axis.size == 0, (x.shape, axis.size)
    part = rows.new_empty(rows.shape[0] // axis.size, *rows.shape[1:])
    work = _reduce_scatter(part, rows, group=axis.group, async_op=True)
    axis.traffic.add(f"{axis.name}/{what}", part.nbytes * (axis.size - 1))
    return _Transfer(_like(x, part, dim), rows, work)


def _rows(x: Tensor, dim: int | None) -> Tensor:
    """x with the dimension that is sharded in front, contiguous."""
    return x.contiguous().flatten(0, 1) if dim is None else x.movedim(dim, 0).contiguous()


def _like(x: Tensor, rows: Tensor, dim: int | None) -> Tensor:
    """The inverse of `_rows`, for another number of rows."""
    return rows.unflatten(0, (x.shape[0], -1)) if dim is None else rows.movedim(0, dim)


@dataclass
class _UnderWay:
    """What `_Begin` and `_End` of a `Gather` share, in the forward and the backward pass."""

    how: tuple[Axis, int | None, str]
    transfer: _Transfer | None = None
    consumers: int = 0  # that asked to give their gradient early
    summed: Tensor | None = None  # the gradient that the only one of them gave

    def expect_sum(self) -> Callable[[Tensor], None]:
        """Register a consumer. Returns what starts to sum its gradient, if it is the only one."""
        self.consumers += 1
        return self._begin_sum

    def _begin_sum(self, gradient: Tensor) -> None:
        if self.consumers == 1:
            self.transfer, self.summed = _begin_sum(gradient, *self.how), gradient

    def take(self) -> _Transfer:
        assert self.transfer is not None, "ended twice"
        transfer, self.transfer = self.transfer, None
        return transfer


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _UnderWay) -> Tensor:
        ctx.way = way
        way.transfer = _begin_gather(x, *way.how)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.way.take().wait(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, way: _UnderWay) -> Tensor:
        ctx.way, ctx.expect_sum = way, way.expect_sum
        return way.take().wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        early, ctx.way.summed = ctx.way.summed, None
        if early is None or early.data_ptr() != gradient.data_ptr():
            if early is not None:  # there was a consumer that did not ask, and the gradient is a sum
                ctx.way.take().wait()
            ctx.way.transfer = _begin_sum(gradient, *ctx.way.how)
        return ctx.way.transfer.result, None  # not valid yet: `_Begin` waits for it


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int | None, what: str) -> Tensor:
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
