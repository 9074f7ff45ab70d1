"""Losses of a layer beside the model's: the balance of experts today, an indexer's divergence tomorrow.

A layer attaches its loss to what it hands on, and needs no second result for it, however deep in the model or in
which stage of a pipeline it is. What it saw is tallied on the device, in the backward pass: once, however often a layer
is recomputed, not in validation, and again in every replay of a recording.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AuxiliaryLoss(nn.Module):
    """A loss of one layer, and what is counted beside it.

    Attributes:
        weight: of the loss in the objective.
        scale: of the loss of a token; None: such that its mean over a pass counts. The trainer's is that of a mean
            over the global batch.
        tally: (1 + counts,) fp64 of the backward passes since the last `clear`: the loss, summed over tokens, and the
            counts. None before the first one.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.scale: float | None = None
        self.tally: Tensor | None = None

    def forward(self, x: Tensor, losses: Tensor | None, counts: Tensor) -> Tensor:
        """``x`` as it is. Its backward pass sends weight x scale into every loss, as if they were in the objective.

        Args:
            x: any shape, what the layer hands on. losses: (B, T), each token's; None: only the counts matter.
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
    """Backward passes of ``model`` inside leave no trace in any tally. The tallies are made, where there were none."""
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
