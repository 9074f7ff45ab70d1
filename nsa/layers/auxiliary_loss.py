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

from nsa.ops.dispatch import accumulation_dtype


class AuxiliaryLoss(nn.Module):
    """An auxiliary loss of one layer, and counts that are summed with it.

    Attributes:
        weight: of the loss in the objective.
        share: of this rank, if ranks compute parts of the loss, whose sum is the loss.
        scale: factor of each token's loss; None: 1 / tokens of the pass, for a mean over it. The trainer sets it such
            that the mean is over the global batch.
        kept: losses that could not be attached, since nothing before the layer is trained, times weight, share and
            scale. A context-parallel rank has one for each of its chunks. `take` hands their sum out.
        tally: (1 + counts,) fp64, sums over the backward passes since the last `clear`: of the loss over tokens, and of
            the counts. None before the first backward pass.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.share = weight, 1.0
        self.scale: float | None = None
        self.tally: Tensor | None = None
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, loss: Tensor | None, tokens: int, counts: Tensor | None = None) -> Tensor:
        """Returns ``x`` unchanged. Its backward pass gives the loss the gradient weight x scale.

        Args:
            x: the layer's output, any shape. loss: a scalar, the sum over ``tokens`` tokens; None: only the counts are
                summed. counts: (n,) integers; None: there are none.
        """
        scale = self._scale(tokens)
        if x.requires_grad:
            loss = x.new_zeros((), dtype=torch.float32) if loss is None else loss
            return _Attach.apply(x, loss, counts, scale, self)
        if loss is not None and loss.requires_grad:
            self.kept = loss * scale if self.kept is None else self.kept + loss * scale
            self.add(loss.detach(), counts)
        return x

    def factor(self, x: Tensor, tokens: int) -> Tensor:
        """weight x scale as a tensor (), for an operator that attaches its loss to ``x`` itself, and whose loss is the
        gradient of this factor (`nsa.ops.token_sparse_attention_kl`). That gradient is summed in the tally.

        Args:
            x: a tensor of the layer through which gradients go on; the factor has its device, and fp32 (float64 for
                float64). tokens: of the pass.
        """
        scale = torch.full((), self._scale(tokens), dtype=accumulation_dtype(x), device=x.device)
        return _Factor.apply(scale.requires_grad_(), x, self)

    def take(self) -> Tensor | None:
        """The sum of the losses kept since the last call, a scalar; None: they were attached, or there were none."""
        kept, self.kept = self.kept, None
        return kept

    def _scale(self, tokens: int) -> float:
        return self.weight * self.share * (1 / tokens if self.scale is None else self.scale)

    def add(self, loss: Tensor, counts: Tensor | None) -> None:
        """loss: a scalar. counts: (n,)."""
        seen = loss.double().view(1) * self.share
        self.add_tally(seen if counts is None else torch.cat((seen, counts.double())))

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
    def forward(
        ctx: Any, x: Tensor, loss: Tensor, counts: Tensor | None, scale: float, auxiliary: AuxiliaryLoss
    ) -> Tensor:
        ctx.loss, ctx.counts, ctx.scale, ctx.auxiliary = loss.detach(), counts, scale, auxiliary
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.auxiliary.add(ctx.loss, ctx.counts)
        return gradient, torch.full_like(ctx.loss, ctx.scale), None, None, None


class _Factor(torch.autograd.Function):
    """``x`` is an input so that this backward pass is run, too, where gradients of some tensors alone are asked for
    (`torch.autograd.grad`, as a recording of CUDA graphs does)."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, x: Tensor, auxiliary: AuxiliaryLoss) -> Tensor:
        ctx.auxiliary = auxiliary
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, loss: Tensor) -> tuple[None, None, None]:
        ctx.auxiliary.add(loss, None)
        return None, None, None
