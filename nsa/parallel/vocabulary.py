"""The embedding and the loss with the vocabulary sharded over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053)."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding

from nsa.ops.cross_entropy import Rows, sharded_cross_entropy
from nsa.parallel.collectives import all_reduce
from nsa.parallel.grid import Axis
from nsa.parallel.tokens import Tokens


class VocabularyEmbedding(nn.Module):
    """(B, T) token ids -> (B, T / ranks, C) for this rank's part of the tokens. ``weight``: its part of the rows."""

    def __init__(self, weight: nn.Parameter, tokens: Tokens) -> None:
        super().__init__()
        self.weight, self.tokens = weight, tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        row, elsewhere = _local(input_ids, self.weight.shape[0], self.tokens.axis)
        x = embedding(row, self.weight).masked_fill(elsewhere[..., None], 0)
        return self.tokens.sum_and_split(x)


class VocabularyHead(nn.Module):
    """hidden (B, T / ranks, C), targets (B, T) -> the negative log-likelihood (B, T) fp32 of all tokens on every rank.

    Besides the tokens, ranks exchange three numbers per token: the largest log-sum-exp of a rank, the sum of all ranks'
    exponentials, and the target's logit. Logits are kept or recomputed as in `nsa.ops.linear_cross_entropy`.
    """

    def __init__(self, weight: nn.Parameter, tokens: Tokens) -> None:
        super().__init__()
        self.weight, self.tokens = weight, tokens

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None, "a decoder that is split over ranks computes losses, no logits"
        hidden = self.tokens.gather(hidden)
        held, axis = len(self.weight), self.tokens.axis
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
