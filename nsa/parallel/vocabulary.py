"""The embedding and the loss with the vocabulary split over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from nsa.models.head import CHUNK_LOGITS, IGNORED
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

    Only three numbers per token are exchanged: the largest logit, the sum of exponentials and the target's logit. As
    in `nsa.models.head` the logits of one chunk of tokens exist at a time.
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
        size = max(1, CHUNK_LOGITS // len(weight))
        losses, lses = [], []
        for x, label in zip(rows.split(size), labels.split(size), strict=True):
            logits = linear(x, weight).float()
            largest = all_reduce(logits.amax(-1), axis, "loss", dist.ReduceOp.MAX)
            row, elsewhere = _local(label, len(weight), axis)
            wanted = logits.gather(1, row[:, None])[:, 0].masked_fill(elsewhere, 0)
            total = logits.sub_(largest[:, None]).exp_().sum(-1)
            total, wanted = all_reduce(torch.stack((total, wanted)), axis, "loss")
            lse = largest + total.log()
            losses.append((lse - wanted).masked_fill(label == IGNORED, 0))
            lses.append(lse)
        ctx.save_for_backward(rows, weight, labels, torch.cat(lses))
        ctx.axis, ctx.size = axis, size
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, labels, lses = ctx.saved_tensors
        d_rows, d_weight = torch.empty_like(rows), torch.zeros_like(weight, dtype=torch.float32)
        d_losses = d_losses.masked_fill(labels == IGNORED, 0)
        parts = (t.split(ctx.size) for t in (rows, labels, lses, d_losses, d_rows))
        for x, label, lse, scale, d_x in zip(*parts, strict=True):
            p = linear(x, weight).float().sub_(lse[:, None]).exp_()
            row, elsewhere = _local(label, len(weight), ctx.axis)
            p.scatter_add_(1, row[:, None], (elsewhere.to(p.dtype) - 1)[:, None])
            p = p.mul_(scale[:, None]).to(weight.dtype)
            d_x.copy_(p @ weight)
            d_weight += (p.mT @ x).float()
        return d_rows, d_weight.to(weight.dtype), None, None
