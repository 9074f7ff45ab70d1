"""DSA's cache: keys and values of all tokens (or MLA's latents), and their index keys."""

from typing import Self

from torch import Tensor

from nsa.cache.rows import Position, Rows, taken
from nsa.ops.decode import append_rows


class IndexedCache:
    """What decoding with DSA keeps of its tokens; ``length`` is their number.

    ``position``: after `fix`, where decoding is; None before.
    """

    def __init__(self) -> None:
        self.rows: Rows[tuple[Tensor, ...]] = Rows()
        self.index: Rows[tuple[Tensor]] = Rows()
        self.position: Position | None = None

    @property
    def length(self) -> int:
        return self.rows.length

    def append(self, rows: tuple[Tensor, ...], k_idx: tuple[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor]]:
        """Add the rows (B, T, ...), such as keys and values, and the index keys (B, T, Di) of T tokens.

        Returns those of all. After `fix`: of the one token at ``position``; returns the whole memory.
        """
        if self.position is not None:
            append_rows((*self.rows.memory, *self.index.memory), (*rows, *k_idx), self.position.index)
            return self.rows.memory, self.index.memory
        return self.rows.append(rows), self.index.append(k_idx)

    def fix(self, tokens: int, position: Position) -> None:
        """As `nsa.cache.rows.Rows.fix`, with room for ``tokens`` in all."""
        self.rows.fix(tokens)
        self.index.fix(tokens)
        self.position = position

    def take(self, sequences: Tensor) -> Self:
        """As `Rows.take`."""
        return taken(self, sequences)
