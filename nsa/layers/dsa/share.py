"""Index sets that neighbouring layers share (IndexShare of GLM-5.2; IndexCache, arXiv 2603.12201)."""

from typing import Any

from torch import Tensor, nn

from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.layers.index_sets import IndexChoice

Index = tuple[Any, Any, Any]  # q_idx, k_idx, weights, as the attention of a layer takes them


class IndexShare:
    """What the first layer of a group, which has the indexer, hands to the others in a forward pass.

    These are the index sets, and what the indexer made: each layer trains the indexer to predict its attention, with an
    equal part of the weight. The gradient is that of one loss whose target is the mean of their attentions.

    Args:
        kl_weight: of the group's loss.
    """

    def __init__(self, kl_weight: float) -> None:
        self.kl_weight = kl_weight
        self.losses: list[AuxiliaryLoss] = []  # of the layers of the group, in order
        self.index: Index | None = None
        self.sets: dict[int, Tensor] = {}  # by the position of the first query

    def join(self, loss: AuxiliaryLoss) -> int:
        """A layer with this loss joins. Returns its number in the group."""
        self.losses.append(loss)
        for each in self.losses:
            each.weight = self.kl_weight / len(self.losses)
        return len(self.losses) - 1

    def is_last(self, number: int) -> bool:
        return number == len(self.losses) - 1


class HandOver(nn.Module):
    """In the first layer: hands over what the indexer made. A recomputed pass does not (`Kind.choices`)."""

    def __init__(self, share: IndexShare) -> None:
        super().__init__()
        self.share = share

    def forward(self, *index: Any) -> None:
        if not self.share.is_last(0):
            self.share.sets.clear()
            self.share.index = index


class TakeOver(nn.Module):
    """In the others: what the indexer made. The last one of the group releases it."""

    def __init__(self, share: IndexShare, number: int) -> None:
        super().__init__()
        self.share, self.number = share, number

    def forward(self) -> Index:
        index = self.share.index
        if index is None:
            raise ValueError(NOTHING)
        if self.share.is_last(self.number):
            self.share.index = None
        return index


class SharedChoice(IndexChoice):
    """In the others: the sets that the first layer selected. ``sizes``: as for `nsa.ops.index_topk`."""

    scores = False

    def __init__(self, share: IndexShare, number: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.share, self.number, self.sizes, self.topk = share, number, sizes, sizes["topk"]

    def select(self, *inputs: Tensor, cu_seqlens: Tensor | None, offset: int) -> Tensor:
        if offset not in self.share.sets:
            raise ValueError(NOTHING)
        sets = self.share.sets
        return sets.pop(offset) if self.share.is_last(self.number) else sets[offset]

    def decode(self, *inputs: Tensor) -> Tensor:
        """The sets of the one token that the layers decode: (B, topk)."""
        return self.select(cu_seqlens=None, offset=DECODED)


DECODED = -1  # in place of the position of the first query, which only the device knows

NOTHING = (
    "this layer attends to the index sets of the layer that it shares them with, which has not selected any in this "
    "pass: call the layers of a group one after the other, and recompute them with activation_checkpointing alone"
)
