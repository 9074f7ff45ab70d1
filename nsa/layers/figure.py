"""A figure of an attention layer, such as a recall, from parts that add up: chunks of the queries, ranks, heads."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Figure:
    """A mean, or the entropy of how often each of several things is chosen.

    Parts are exact: the figure of all tokens and heads is made of the sums of its parts, not of their values.

    Attributes:
        sums: (rows, n) fp64 on the CPU. Of a mean (n is 2): the total and how many there are, in any number of rows. Of
            an entropy: how often each thing is chosen; its figure is the mean over the rows of the entropy, as a share
            of the largest that so many things can have.
        entropy: which of the two. otherwise: the value of a mean over nothing.
    """

    def __init__(self, sums: Tensor, entropy: bool = False, otherwise: float = 1.0) -> None:
        self.sums, self.entropy, self.otherwise = sums.to("cpu", torch.float64), entropy, otherwise

    @classmethod
    def mean(cls, total: Tensor | float, count: Tensor | float, otherwise: float = 1.0) -> "Figure":
        """Of scalars."""
        return cls(torch.tensor([[float(total), float(count)]], dtype=torch.float64), otherwise=otherwise)

    @classmethod
    def mean_of(cls, values: Tensor, otherwise: float = 1.0) -> "Figure":
        """The mean of all elements of a tensor."""
        return cls.mean(values.sum(dtype=torch.float64), values.numel(), otherwise)

    @property
    def value(self) -> float:
        if not self.entropy:
            total, count = self.sums.sum(0).tolist()
            return total / count if count else self.otherwise
        return sum(map(_evenness, self.sums)) / len(self.sums)

    @staticmethod
    def added(parts: Sequence["Figure"]) -> "Figure":
        """Of all tokens, from parts that are of other tokens and the same heads."""
        return Figure(torch.stack(_as_wide(parts)).sum(0), parts[0].entropy, parts[0].otherwise)

    @staticmethod
    def joined(parts: Sequence["Figure"]) -> "Figure":
        """Of all heads, from parts that are of the same tokens and other heads."""
        return Figure(torch.cat(_as_wide(parts)), parts[0].entropy, parts[0].otherwise)

    def to_json(self) -> list[Any]:
        """The arguments that make it again, with lists in place of tensors."""
        return [self.sums.tolist(), self.entropy, self.otherwise]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Figure":
        return cls(torch.tensor(value[0], dtype=torch.float64), *value[1:])


def values(figures: dict[str, Figure]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


def _as_wide(parts: Sequence[Figure]) -> list[Tensor]:
    """The sums, with a count of 0 for what a part has not seen."""
    widest = max(part.sums.shape[1] for part in parts)
    return [torch.nn.functional.pad(part.sums, (0, widest - part.sums.shape[1])) for part in parts]


def _evenness(counts: Tensor) -> float:
    """Entropy of (n,) counts over the largest that as many can have; 0 if one alone is counted."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum()) / math.log(len(share)) if len(share) > 1 else 0.0
