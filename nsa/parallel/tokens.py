"""How tensor-parallel ranks share the tokens between attention and MLP (sequence parallelism, arXiv 2205.05198)."""

from dataclasses import dataclass

from torch import Tensor

from nsa.parallel.collectives import all_gather, reduce_scatter
from nsa.parallel.grid import Axis


@dataclass(frozen=True)
class Tokens:
    """Each rank holds an equal part of the tokens of a micro batch: (B, T / ranks, C) of (B, T, C).

    Attributes:
        by_sequence: a rank has its part of every sequence, in the order of their tokens. A mixture of experts needs
            this, since it balances its load within sequences. Otherwise a rank has one run of all B x T tokens, and its
            B and T / ranks mean nothing: so collectives send and receive memory as it is, without a copy.
    """

    axis: Axis
    by_sequence: bool

    def gather(self, part: Tensor) -> Tensor:
        """(B, T / ranks, C) -> (B, T, C)."""
        if self.by_sequence:
            return all_gather(part, self.axis, 1, "activations")
        batch, tokens, width = part.shape
        return all_gather(part.flatten(0, 1), self.axis, 0, "activations").view(batch, self.axis.size * tokens, width)

    def sum_and_split(self, x: Tensor) -> Tensor:
        """(B, T, C), of which each rank has a summand -> (B, T / ranks, C)."""
        if self.by_sequence:
            return reduce_scatter(x, self.axis, 1, "activations")
        batch, tokens, width = x.shape
        return reduce_scatter(x.flatten(0, 1), self.axis, 0, "activations").view(batch, tokens // self.axis.size, width)
