"""Exact quotas: which source sample i of a blend comes from, and which of that source's samples it is."""

from collections.abc import Sequence
from fractions import Fraction


class Blend:
    """Shares out samples 0, 1, 2, ... by weight.

    The sources are the leaves of a binary tree. A node with k samples hands floor(k * share + 1/2) of them to its left
    child, so after any number of samples a two-way split is off by at most half a sample, and a node that is off by e
    passes on at most e * share + 1/2: a sample or two from its weight, for the sources far down. All in exact
    fractions: no drift, whatever i.
    """

    def __init__(self, weights: Sequence[float]):
        assert weights and min(weights) > 0
        self.weights = [Fraction(str(w)) for w in weights]

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, sample of that source) of global sample `index`. Raises IndexError for a negative one."""
        if index < 0:
            raise IndexError(f"samples count from 0, not {index}")
        first, last = 0, len(self.weights)
        while last - first > 1:
            middle, share = self._split(first, last)
            left = _rounded(index * share)
            if _rounded((index + 1) * share) > left:
                last, index = middle, left
            else:
                first, index = middle, index - left
        return first, index

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each source."""
        result = [0] * len(self.weights)
        nodes = [(0, len(self.weights), samples)]
        while nodes:
            first, last, count = nodes.pop()
            if last - first == 1:
                result[first] = count
                continue
            middle, share = self._split(first, last)
            left = _rounded(count * share)
            nodes += [(first, middle, left), (middle, last, count - left)]
        return result

    def _split(self, first: int, last: int) -> tuple[int, Fraction]:
        """The most even cut of sources first..last-1, and the left part's share."""
        total = sum(self.weights[first:last], Fraction())
        shares = [sum(self.weights[first:m], Fraction()) / total for m in range(first + 1, last)]
        best = min(range(len(shares)), key=lambda i: abs(shares[i] - Fraction(1, 2)))
        return first + 1 + best, shares[best]


def _rounded(x: Fraction) -> int:
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)
