"""What is kept of the tokens so far, such as keys and values, in memory that is asked for in advance."""

import copy
from typing import Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from nsa.ops.decode import append_rows

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
        self._fixed = False

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
        assert not self._fixed, "launches write to fixed memory"
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

    def fix(self, slots: int, first: int = 0) -> None:
        """Move what is kept to memory that stays where it is, for CUDA graphs: launches write to it, the host does not.

        From now on ``length`` stays as it is, and `append` cannot be called.

        Args:
            slots: of the memory. first: position of the first token that is kept. Token t goes to slot t mod slots.
        """
        assert self._memory is not None and not self._fixed and self.length <= slots
        slot = (first + torch.arange(self.length, device=self._memory[0].device)) % slots
        with torch.inference_mode(False):
            fixed = cast(Tensors, tuple(x.new_zeros(len(x), slots, *x.shape[2:]) for x in self._memory))
        for memory, old in zip(fixed, self.kept, strict=True):
            memory[:, slot] = old.detach()
        self._memory, self._fixed = fixed, True

    @property
    def memory(self) -> Tensors:
        """After `fix`: all of the memory (B, slots, ...)."""
        assert self._fixed and self._memory is not None
        return self._memory

    def take(self, sequences: Tensor) -> "Rows[Tensors]":
        """A copy with these sequences of the batch, by index, in this order; one may stand several times."""
        assert not self._fixed, "fixed memory belongs to its launches"
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


class Position:
    """Where decoding is, on the device: launches read it and count it up, and the host never waits for it.

    All sequences of the batch have the same length.

    Attributes:
        index: (1,) int64, position of the token that is read. lengths: (B,) int32, tokens with it.
    """

    def __init__(self, batch: int, index: int, device: torch.device) -> None:
        self.index = torch.full((1,), index, dtype=torch.int64, device=device)
        self.lengths = torch.full((batch,), index + 1, dtype=torch.int32, device=device)

    def advance(self, tokens: int = 1) -> None:
        """Go to the next token (or some back, if negative)."""
        self.index.add_(tokens)
        self.lengths.add_(tokens)


class FullCache:
    """The cache of attention to all tokens; ``length`` is their number.

    What is kept of a token is what its projection says: keys and values, or MLA's latent with the rotated key.

    ``position``: after `fix`, where decoding is; None before.
    """

    def __init__(self) -> None:
        self.rows: Rows[tuple[Tensor, ...]] = Rows()
        self.position: Position | None = None

    @property
    def length(self) -> int:
        return self.rows.length

    def append(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Add the rows (B, T, ...) of T new tokens, such as keys and values; returns those of all.

        After `fix`: of the one token at ``position``; returns the whole memory.
        """
        if self.position is None:
            return self.rows.append(rows)
        append_rows(self.rows.memory, rows, self.position.index)
        return self.rows.memory

    def fix(self, tokens: int, position: Position) -> None:
        """As `Rows.fix`, with room for ``tokens`` in all."""
        self.rows.fix(tokens)
        self.position = position

    def take(self, sequences: Tensor) -> Self:
        """As `Rows.take`."""
        return taken(self, sequences)
