"""DSA's cache: keys and values of all tokens (or MLA's latents), and their index keys."""

from typing import Self

from torch import Tensor

from nsa.cache.rows import Rows, taken


class IndexedCache:
    """What decoding with DSA keeps of its tokens; ``length`` is their number."""

    def __init__(self) -> None:
        self.rows: Rows[tuple[Tensor, ...]] = Rows()
        self.index: Rows[tuple[Tensor]] = Rows()

    @property
    def length(self) -> int:
        return self.rows.length

    def append(self, rows: tuple[Tensor, ...], k_idx: tuple[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor]]:
        """Add the rows (B, T, ...), such as keys and values, and the index keys (B, T, Di) of T tokens.

        Returns those of all.
        """
        return self.rows.append(rows), self.index.append(k_idx)

    def take(self, sequences: Tensor) -> Self:
        """As `Rows.take`."""
        return taken(self, sequences)
