"""The embedding and the loss with the vocabulary split over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from nsa.ops.cross_entropy import IGNORED, add_up_gradients, chunk_rows, logit_gradients, statistics
from nsa.parallel.collectives import all_gather, all_reduce, reduce_scatter
from nsa.parallel.grid import Axis


class VocabularyEmbedding(nn.Module):
    """(B, T) token ids -> (B, T / ranks, C): this rank's part of the tokens. ``weight``: its part of the rows."""

    def __init__(self, weight: nn.Parameter, axis: Axis) -> None:
        super().__init__()
        self.weight, self.axis = weight, axis

    def forward(self, input_ids: Tensor) -> Tensor:
        row, elsewhere = _local(input_ids, self.weight.shape[0], self.axis)
        x = embedding(row, self.weight).masked_fill(elsewhere[..., None], 0)
        return reduce_scatter(x, self.axis, 1, "activations")


class VocabularyHead(nn.Module):
    """hidden (B, T / ranks, C), targets (B, T) -> the negative log-likelihood (B, T) fp32 of all tokens on every rank.

    Only three numbers per token are exchanged: the largest sum of exponentials (its logarithm), the sum of all and the
    target's logit. Logits are kept or computed again as in `nsa.ops.linear_cross_entropy`.
    """

    def __init__(self, weight: nn.Parameter, axis: Axis) -> None:
        super().__init__()
        self.weight, self.axis = weight, axis

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None, "a decoder that is split over ranks computes losses, no logits"
        hidden = all_gather(hidden, self.axis, 1, "activations")
        return _Losses.apply(hidden.flatten(0, 1), self.weight, targets.flatten(), self.axis).view(targets.shape)


def _local(token: Tensor, rows: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The rank's row of each token, and where the token is another rank's (there the row is 0)."""
    row = token - axis.rank * rows
    elsewhere = (row < 0) | (row >= rows)
    return row.masked_fill(elsewhere, 0), elsewhere


class _Losses(torch.autograd.Function):
    """rows (N, C), weight (V / ranks, C), labels (N,) -> (N,) fp32; the backward pass needs no other rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, axis: Axis) -> Tensor:
        ctx.size, ctx.first = chunk_rows(len(rows), len(weight)), axis.rank * len(weight)
        losses, lses, ctx.logits = [], [], None
        for x, label in zip(rows.split(ctx.size), labels.split(ctx.size), strict=True):
            logits = linear(x, weight)
            own, wanted = statistics(logits, label, ctx.first)
            largest = all_reduce(own.clone(), axis, "loss", dist.ReduceOp.MAX)
            total, wanted = all_reduce(torch.stack(((own - largest).exp(), wanted)), axis, "loss")
            lse = largest + total.log()
            losses.append((lse - wanted).masked_fill(label == IGNORED, 0))
            lses.append(lse)
        ctx.save_for_backward(rows, weight, labels, torch.cat(lses))
        if ctx.size >= len(rows) and any(ctx.needs_input_grad):
            ctx.logits = logits
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, labels, lses = ctx.saved_tensors
        kept, ctx.logits = ctx.logits, None  # lost here; a second backward pass computes them again

        def gradients(x: Tensor, label: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
            logits = linear(x, weight) if kept is None else kept
            return logit_gradients(logits, label, lse, scale, ctx.first)

        parts = rows, labels, lses, d_losses.masked_fill(labels == IGNORED, 0)
        return *add_up_gradients(gradients, weight, parts, ctx.size), None, None
