"""CSA's cache: the last tokens as they are, and an entry for every few tokens."""

from collections.abc import Callable
from typing import Self

from torch import Tensor

from nsa.cache.rows import Rows, taken

Tensors = tuple[Tensor, ...]
Compress = Callable[[Tensors, int], Tensors]


class EntryCache:
    """What decoding with CSA keeps of its tokens; ``length`` is their number.

    Attributes:
        window: rows of the last tokens, as many as a query sees.
        entries, index_entries: those that are complete, for the attention and for the indexer (empty without one).
        tail, index_tail: what the next entry is made of, from its first token on, or with an overlap from the first
            token of the entry before it on.
    """

    def __init__(self, ratio: int, overlap: bool, window: int) -> None:
        self.ratio, self.overlap, self.window_size, self.length = ratio, overlap, window, 0
        self.window: Rows[tuple[Tensor]] = Rows()
        self.entries: Rows[Tensors] = Rows()
        self.tail: Rows[Tensors] = Rows()
        self.index_entries: Rows[Tensors] = Rows()
        self.index_tail: Rows[Tensors] = Rows()

    def append_window(self, rows: tuple[Tensor]) -> tuple[Tensor]:
        """Add the rows (B, T, ...) of T tokens; returns those that their queries see."""
        near = self.window.append(rows)
        self.window.drop(max(0, self.window.length - self.window_size))
        self.length += rows[0].shape[1]
        return near

    def append(self, raw: Tensors, compress: Compress) -> Tensors:
        """Add what the entries of T tokens are made of (B, T, ...); returns all entries.

        ``compress``: (rows from the first token of an entry on, the position of that token) -> the entries of these.
        """
        return self._grow(self.tail, self.entries, raw, compress)

    def append_index(self, raw: Tensors, compress: Compress) -> Tensors:
        """As `append`, for the indexer."""
        return self._grow(self.index_tail, self.index_entries, raw, compress)

    def _grow(self, tail: Rows[Tensors], entries: Rows[Tensors], raw: Tensors, compress: Compress) -> Tensors:
        known = int(self.overlap and entries.length > 0)  # entries at the start of the tail
        first = (entries.length - known) * self.ratio
        made = compress(tail.append(raw), first)
        found = entries.append(tuple(x[:, known:] for x in made))
        known = int(self.overlap and entries.length > 0)
        tail.drop((entries.length - known) * self.ratio - first)
        return found

    def take(self, sequences: Tensor) -> Self:
        """As `Rows.take`."""
        return taken(self, sequences)
