"""Auxiliary losses of a layer, such as the balance loss of experts.

A layer attaches its loss to its output, so it needs no second result, wherever in the model or pipeline it is. Losses
and counts are summed on the device (the tally) in the backward pass: once per pass even if the layer is recomputed, not
in validation, and in every replay of a CUDA graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AuxiliaryLoss(nn.Module):
    """An auxiliary loss of one layer, and counts that are summed with it.

    Attributes:
        weight: of the loss in the objective.
        scale: factor of each token's loss; None: 1 / tokens of the pass, for a mean over it. The trainer sets it such
            that the mean is over the global batch.
        tally: (1 + counts,) fp64, sums over the backward passes since the last `clear`: of the loss over tokens, and of
            the counts. None before the first backward pass.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.scale: float | None = None
        self.tally: Tensor | None = None

    def forward(self, x: Tensor, losses: Tensor | None, counts: Tensor) -> Tensor:
        """Returns ``x`` unchanged. Its backward pass gives every loss the gradient weight x scale.

        Args:
            x: the layer's output, any shape. losses: (B, T), of each token; None: only the counts are summed.
            counts: (n,) integers.
        """
        if not x.requires_grad:
            return x
        loss = x.new_zeros((), dtype=torch.float32) if losses is None else losses.sum()
        number = 1 if losses is None else losses.numel()
        scale = 1 / number if self.scale is None else self.scale
        return _Attach.apply(x, loss, counts, self.weight * scale, self)

    def add(self, loss: Tensor, counts: Tensor) -> None:
        """loss: a scalar. counts: (n,)."""
        self.add_tally(torch.cat((loss.double().view(1), counts.double())))

    def add_tally(self, seen: Tensor) -> None:
        """seen: (1 + counts,) fp64."""
        if self.tally is None:
            self.tally = seen
        else:
            self.tally += seen

    def clear(self) -> None:
        if self.tally is not None:
            self.tally.zero_()


@contextmanager
def untallied(model: nn.Module) -> Iterator[None]:
    """Restore all tallies after the backward passes of ``model`` in this context. Creates tallies that are missing."""
    auxiliaries = [module for module in model.modules() if isinstance(module, AuxiliaryLoss)]
    before = [None if auxiliary.tally is None else auxiliary.tally.clone() for auxiliary in auxiliaries]
    yield
    for auxiliary, tally in zip(auxiliaries, before, strict=True):
        auxiliary.clear()
        if tally is not None:
            auxiliary.add_tally(tally)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, counts: Tensor, scale: float, auxiliary: AuxiliaryLoss) -> Tensor:
        ctx.loss, ctx.counts, ctx.scale, ctx.auxiliary = loss.detach(), counts, scale, auxiliary
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.auxiliary.add(ctx.loss, ctx.counts)
        return gradient, torch.full_like(ctx.loss, ctx.scale), None, None, None
