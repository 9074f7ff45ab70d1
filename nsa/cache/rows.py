"""What is kept of the tokens so far, such as keys and values, in memory that is asked for in advance."""

import copy
from typing import Generic, Self, TypeVar, cast

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
LEAST = 64  # tokens that memory is first asked for


Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


class Rows(Generic[Tensors]):
    """A tuple of tensors (B, S, ...), such as keys and values. Tokens are appended; the first ones may be dropped.

    A token is written once. When the memory is full, twice as much as is kept is asked for, and what is kept is copied:
    so a token costs the same at any length. Gradients stop here: a cache is for decoding.
    """

    def __init__(self) -> None:
        self.start = self.stop = 0
        self._memory: Tensors | None = None

    @property
    def length(self) -> int:
        """S."""
        return self.stop - self.start

    @property
    def kept(self) -> Tensors:
        """What is kept: views, which the next `append` leaves as they are."""
        assert self._memory is not None, "nothing was appended yet"
        return cast(Tensors, tuple(x[:, self.start : self.stop] for x in self._memory))

    def append(self, new: Tensors) -> Tensors:
        """Add T tokens; returns what is kept, the new ones included."""
        tokens = new[0].shape[1]
        if self._memory is None or self.stop + tokens > self._memory[0].shape[1]:
            kept = self.kept if self._memory is not None else tuple(x[:, :0] for x in new)
            size = max(LEAST, 2 * (self.length + tokens))
            self.start, self.stop = 0, self.length
            with torch.inference_mode(False):  # else only inference mode could write to it later
                larger = cast(Tensors, tuple(x.new_empty(len(x), size, *x.shape[2:]) for x in new))
            for memory, old in zip(larger, kept, strict=True):
                memory[:, : self.stop] = old.detach()
            self._memory = larger
        for memory, x in zip(self._memory, new, strict=True):
            memory[:, self.stop : self.stop + tokens] = x.detach()
        self.stop += tokens
        return self.kept

    def take(self, sequences: Tensor) -> "Rows[Tensors]":
        """A copy with these sequences of the batch, by index, in this order; one may stand several times."""
        other: Rows[Tensors] = Rows()
        if self._memory is not None:
            other.append(cast(Tensors, tuple(x[sequences] for x in self.kept)))
        return other

    def drop(self, tokens: int) -> None:
        """Forget the first ``tokens``, which must be there."""
        assert 0 <= tokens <= self.length
        self.start += tokens


AnyCache = TypeVar("AnyCache")


def taken(cache: AnyCache, sequences: Tensor) -> AnyCache:
    """A copy of a cache with these sequences of its batch: see `Rows.take`."""
    other = copy.copy(cache)
    for name, part in vars(cache).items():
        if isinstance(part, Rows):
            setattr(other, name, part.take(sequences))
    return other


class FullCache:
    """The cache of attention to all tokens; ``length`` is their number.

    What is kept of a token is what its projection says: keys and values, or MLA's latent with the rotated key.
    """

    def __init__(self) -> None:
        self.rows: Rows[tuple[Tensor, ...]] = Rows()

    @property
    def length(self) -> int:
        return self.rows.length

    def append(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Add the rows (B, T, ...) of T new tokens, such as keys and values; returns those of all."""
        return self.rows.append(rows)

    def take(self, sequences: Tensor) -> Self:
        """As `Rows.take`."""
        return taken(self, sequences)
