"""The embedding and the loss with the vocabulary sharded over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053)."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding

from nsa.ops.cross_entropy import Rows, sharded_cross_entropy
from nsa.parallel.collectives import all_gather, all_reduce, reduce_scatter
from nsa.parallel.grid import Axis


class VocabularyEmbedding(nn.Module):
    """(B, T) token ids -> (B, T / ranks, C) for this rank's part of the tokens.

    Args:
        weight: its part of the rows. tokens: how they are sharded (`nsa.parallel.collectives`: ``dim``).
    """

    def __init__(self, weight: nn.Parameter, axis: Axis, tokens: int | None) -> None:
        super().__init__()
        self.weight, self.axis, self.tokens = weight, axis, tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        row, elsewhere = _local(input_ids, self.weight.shape[0], self.axis)
        x = embedding(row, self.weight).masked_fill(elsewhere[..., None], 0)
        return reduce_scatter(x, self.axis, self.tokens, "activations")


class VocabularyHead(nn.Module):
    """hidden (B, T / ranks, C), targets (B, T) -> the negative log-likelihood (B, T) fp32 of all tokens on every rank.

    Besides the tokens, ranks exchange three numbers per token: the largest log-sum-exp of a rank, the sum of all ranks'
    exponentials, and the target's logit. Logits are kept or recomputed as in `nsa.ops.linear_cross_entropy`.
    """

    def __init__(self, weight: nn.Parameter, axis: Axis, tokens: int | None) -> None:
        super().__init__()
        self.weight, self.axis, self.tokens = weight, axis, tokens

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None, "a decoder that is split over ranks computes losses, no logits"
        hidden = all_gather(hidden, self.axis, self.tokens, "activations")
        held, axis = len(self.weight), self.axis
        rows = Rows(axis.rank * held, axis.size * held, partial(_combine, axis))
        losses = sharded_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), rows)
        return losses.float().view(targets.shape)


def _local(token: Tensor, rows: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The rank's row of each token, and a mask of the tokens whose row another rank holds (there the row is 0)."""
    row = token - axis.rank * rows
    elsewhere = (row < 0) | (row >= rows)
    return row.masked_fill(elsewhere, 0), elsewhere


def _combine(axis: Axis, own: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """From this rank's log-sum-exp and targets' logits (0 where another rank's) to those of the whole vocabulary."""
    largest = all_reduce(own.clone(), axis, "loss", dist.ReduceOp.MAX)
    total, wanted = all_reduce(torch.stack(((own - largest).exp(), wanted)), axis, "loss")
    return largest + total.log(), wanted
