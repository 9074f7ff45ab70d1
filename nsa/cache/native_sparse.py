"""NSA's three-part cache: compressed blocks with the tail of the next one, all selected tokens, the last window."""

from collections.abc import Callable, Sequence
from typing import Self

from torch import Tensor

from nsa.cache.rows import Pair, Position, Rows, taken
from nsa.ops.geometry import num_compressed


class NativeSparseCache:
    """What decoding with NSA keeps of its tokens (arXiv 2502.11089, section 3.3.3: independent K/V per branch).

    Attributes:
        length: tokens so far.
        compressed: keys and values of the (length - l) // d + 1 complete compression blocks.
        tail: uncompressed keys and values from the first token of the next block on, fewer than l tokens.
        selected: keys and values of all tokens.
        window: keys and values of the last ``window`` tokens at most.
        position: after `fix`, where decoding is; None before.
    """

    def __init__(self, stride: int, window: int) -> None:
        self.stride, self.window_size = stride, window
        self.compressed: Rows[Pair] = Rows()
        self.tail: Rows[Pair] = Rows()
        self.selected: Rows[Pair] = Rows()
        self.window: Rows[Pair] = Rows()
        self.position: Position | None = None

    @property
    def length(self) -> int:
        return self.selected.length

    def append(
        self, raw_cmp: Pair, slc: Pair, win: Pair, compress: Callable[[Pair, int], Pair]
    ) -> tuple[Pair, Pair, Pair]:
        """Add T new tokens.

        Args:
            raw_cmp, slc, win: keys (B, T, G, D) and values (B, T, G, Dv) of each branch; the compressed branch's
                before compression.
            compress: (keys and values of the tokens from a block's first one on, the position of that token) -> the
                compressed pair of their complete blocks.

        Returns:
            The pairs that the three branches attend to for these T queries.
        """
        blocks = compress(self.tail.append(raw_cmp), self.compressed.length * self.stride)
        compressed = self.compressed.append(blocks)
        self.tail.drop(blocks[0].shape[1] * self.stride)
        near = self.window.append(win)
        self.window.drop(max(0, self.window.length - self.window_size))
        return compressed, self.selected.append(slc), near

    def fix(self, tokens: int, length: int, position: Position) -> None:
        """As `nsa.cache.rows.Rows.fix`, with room for ``tokens`` in all; ``length``: of a compression block (l).

        The tail becomes a ring of l tokens, the window one of ``window_size``. There is room for a compressed block
        that is not complete yet.
        """
        before = self.length
        self.compressed.fix(num_compressed(tokens, length, self.stride) + 1)
        self.tail.fix(length, before - self.tail.length)
        self.selected.fix(tokens)
        self.window.fix(self.window_size, before - self.window.length)
        self.position = position

    def append_fixed(
        self, raw_cmp: Pair, slc: Pair, win: Pair, extend: Callable[[Sequence[Tensor], Sequence[Tensor], Pair], None]
    ) -> tuple[Pair, Pair, Pair]:
        """`append` after `fix`: the one token at ``position``.

        Args:
            extend: (memories, the first two of them rings of the last l raw keys and values; rows of the token;
                memory of the compressed ones) -> writes the rows to the memories, and the block that ends with the
                token, if there is one (`nsa.ops.compression.extend_compressed`).

        Returns:
            The memory of each branch.
        """
        assert self.position is not None
        compressed, tail, selected, window = (
            rows.memory for rows in (self.compressed, self.tail, self.selected, self.window)
        )
        extend((*tail, *selected, *window), (*raw_cmp, *slc, *win), compressed)
        return compressed, selected, window

    def take(self, sequences: Tensor) -> Self:
        """As `Rows.take`."""
        return taken(self, sequences)
