"""Linear projections: several of one input as a single matrix product, and those of a decoding step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nsa import ops
from nsa.ops.dispatch import autocasts


def joint_linear(x: Tensor, weights: list[Tensor], bias: Tensor | None = None) -> Tensor:
    """The projections of x by each weight, concatenated along the last dimension.

    Takes one matrix product forward and two backward for any number of weights: fewer launches, and no sum over the
    gradients of x. The weights are concatenated again for each product, which reads and writes a few MB, so no copy of
    them is kept between the passes, except within `kept_joined`.

    Args:
        x: (.., C). weights: (W_i, C) each, in x's dtype. bias: (sum of W_i,), added to the result.

    Returns:
        (.., sum of W_i).
    """
    if _step is not None and not torch.is_grad_enabled():
        key = tuple(map(id, weights))
        if key not in _step.joined:
            _step.joined[key] = torch.cat(weights)
        return ops.few_rows_linear(x, _step.joined[key], bias, backend=_step.products)
    return _joint_linear(x, weights, bias)


@autocasts("x", "weights", "bias")
def _joint_linear(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    return _JointLinear.apply(x, _begin_sum(x), bias, *weights)


class _Step(NamedTuple):
    joined: dict[tuple[int, ...], Tensor]
    products: str


_step: _Step | None = None


@contextmanager
def kept_joined(joined: dict[tuple[int, ...], Tensor], products: str = "auto") -> Iterator[None]:
    """Within, and without gradients: projections of a few rows, by weights that do not change.

    `joint_linear` concatenates the same weights once, and keeps them in ``joined``: to concatenate them costs more than
    the product of a few tokens. ``products``: the backend of `nsa.ops.few_rows_linear` for it, for `Linear`, and of
    `nsa.ops.few_rows_swiglu` for `swiglu_linear`.
    """
    global _step
    before, _step = _step, _Step(joined, products)
    try:
        yield
    finally:
        _step = before


class Linear(nn.Linear):
    """torch's. Within `kept_joined`, and without gradients, its product is that of `nsa.ops.few_rows_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        if _step is None or torch.is_grad_enabled():
            return super().forward(x)
        return ops.few_rows_linear(x, self.weight, self.bias, backend=_step.products)


def swiglu_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T).

    Args:
        x: (.., C). gate, up: (W, C), in x's dtype.

    Returns:
        (.., W).
    """
    if _step is None or torch.is_grad_enabled():
        return ops.swiglu(*parallel_linear(x, gate, up))
    return ops.few_rows_swiglu(x, gate, up, backend=_step.products)


@autocasts("x", "first", "second")
def parallel_linear(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The projections of x by two weights, as two tensors.

    In the backward pass the second product adds to the gradient of x of the first, so no kernel sums the two.

    Args:
        x: (.., C). first, second: (W, C), in x's dtype.

    Returns:
        (.., W) each.
    """
    return _ParallelLinear.apply(x, _begin_sum(x), first, second)


def _begin_sum(x: Tensor) -> Callable[[Tensor], None] | None:
    """What wants the gradient of x before those of weights are computed, to send it meanwhile: a gather over ranks."""
    expect_sum = getattr(x.grad_fn, "expect_sum", None)
    return expect_sum() if expect_sum else None


class _ParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, begin_sum: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.begin_sum = begin_sum
        ctx.save_for_backward(x, first, second)
        return linear(x, first), linear(x, second)

    @staticmethod
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        rows, *d_rows = (t.reshape(-1, t.shape[-1]) for t in (x, d_first, d_second))
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(d_rows[0], first).addmm_(d_rows[1], second).view(x.shape)
            if ctx.begin_sum:
                ctx.begin_sum(d_x)
        wanted = ctx.needs_input_grad[2:]  # a frozen weight needs none
        return d_x, None, *(d.T @ rows if want else None for d, want in zip(d_rows, wanted, strict=True))


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, begin_sum: Any, bias: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.begin_sum = begin_sum
        ctx.save_for_backward(x, *weights)
        return linear(x, torch.cat(weights), bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
        d_x = d_out @ torch.cat(weights) if ctx.needs_input_grad[0] else None
        if d_x is not None and ctx.begin_sum:
            ctx.begin_sum(d_x)
        d_rows = d_out.flatten(0, -2)
        d_bias = d_rows.sum(0) if ctx.needs_input_grad[2] else None
        if not any(ctx.needs_input_grad[3:]):  # frozen
            return d_x, None, d_bias, *[None] * len(weights)
        d_weights = d_rows.T @ x.flatten(0, -2)
        return d_x, None, d_bias, *d_weights.split([len(weight) for weight in weights])
