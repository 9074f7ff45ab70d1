"""What is kept of the tokens so far, such as keys and values, in memory that is asked for in advance."""

import copy
from collections.abc import Callable
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
        self._where: Callable[[], Tensor] | None = None  # of fixed memory: the slot of the next token, on the device

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
        """Add T tokens; returns what is kept, the new ones included. After `fix`: add one; returns the whole memory."""
        tokens = new[0].shape[1]
        if self._where is not None:
            assert tokens == 1 and self._memory is not None, "fixed memory takes one token at a time"
            slot = self._where()
            for memory, x in zip(self._memory, new, strict=True):
                memory.index_copy_(1, slot, x.detach())
            return self._memory
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

    def fix(self, slots: int, where: Callable[[], Tensor], first: int = 0) -> None:
        """Move what is kept to memory that stays where it is, for CUDA graphs: launches write to it, the host does not.

        From now on `append` takes one token, and ``length`` is not updated.

        Args:
            slots: of the memory. where: returns the slot (1,) int64 of the next token, on the device.
            first: slot of the first token that is kept; the next ones follow, round the end of the memory.
        """
        assert self._memory is not None and self._where is None and self.length <= slots
        slot = (first + torch.arange(self.length, device=self._memory[0].device)) % slots
        with torch.inference_mode(False):
            fixed = cast(Tensors, tuple(x.new_zeros(len(x), slots, *x.shape[2:]) for x in self._memory))
        for memory, old in zip(fixed, self.kept, strict=True):
            memory[:, slot] = old.detach()
        self._memory, self._where = fixed, where

    def take(self, sequences: Tensor) -> "Rows[Tensors]":
        """A copy with these sequences of the batch, by index, in this order; one may stand several times."""
        assert self._where is None, "fixed memory belongs to its launches"
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

    All sequences of the batch have the same length. What layers need of it is computed once per token.

    Attributes:
        index: (1,) int64, position of the token that is read. lengths: (B,) int32, tokens with it.
    """

    def __init__(self, batch: int, index: int, device: torch.device) -> None:
        self.index = torch.full((1,), index, dtype=torch.int64, device=device)
        self.lengths = torch.full((batch,), index + 1, dtype=torch.int32, device=device)
        self._made: dict[tuple[str, int, int], Tensor] = {}

    def advance(self, tokens: int = 1) -> None:
        """Go to the next token (or some back, if negative)."""
        self.index.add_(tokens)
        self.lengths.add_(tokens)
        self._made.clear()

    def slot(self, ring: int) -> Tensor:
        """(1,) int64: the token's slot in a ring of so many slots."""
        return self._once(("slot", ring, 0), lambda: self.index % ring)

    def newest(self, ring: int) -> Tensor:
        """(ring,) int64: the slots of the last ``ring`` tokens in their order, in a ring of so many slots."""
        return self._once(
            ("newest", ring, 0), lambda: (self.index + torch.arange(1, ring + 1, device=self.index.device)) % ring
        )

    def block(self, length: int, stride: int) -> Tensor:
        """(1,) int64: the compression block that ends with the token, or else the first one that ends later."""
        return self._once(
            ("block", length, stride), lambda: ((self.index + 1 - length).clamp(min=0) + stride - 1) // stride
        )

    def _once(self, name: tuple[str, int, int], make: Callable[[], Tensor]) -> Tensor:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


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
        """Add the rows (B, T, ...) of T new tokens, such as keys and values; returns those of all."""
        return self.rows.append(rows)

    def fix(self, tokens: int, position: Position) -> None:
        """As `Rows.fix`, with room for ``tokens`` in all; `append` then returns the whole memory."""
        self.rows.fix(tokens, lambda: position.index)
        self.position = position

    def take(self, sequences: Tensor) -> Self:
        """As `Rows.take`."""
        return taken(self, sequences)
