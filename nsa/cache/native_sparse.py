"""NSA's three-part cache: compressed blocks with the tail of the next one, all selected tokens, the last window."""

from collections.abc import Callable

from torch import Tensor

from nsa.cache.full import grow

Pair = tuple[Tensor, Tensor]


class NativeSparseCache:
    """What decoding with NSA keeps of S tokens (arXiv 2502.11089, section 3.3.3: independent K/V per branch).

    Attributes:
        length: S.
        compressed: keys and values of the (S - l) // d + 1 complete compression blocks.
        tail: uncompressed keys and values from the first token of the next block on, fewer than l tokens.
        selected: keys and values of all S tokens.
        window: keys and values of the last ``window`` tokens at most.
    """

    def __init__(self, block_length: int, stride: int, window: int) -> None:
        self.block_length, self.stride, self.window_size = block_length, stride, window
        self.length = 0
        self.compressed: Pair | None = None
        self.tail: Pair | None = None
        self.selected: Pair | None = None
        self.window: Pair | None = None

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
        self.tail = grow(self.tail, raw_cmp)
        first = 0 if self.compressed is None else self.compressed[0].shape[1] * self.stride
        new = compress(self.tail, first)
        self.compressed = grow(self.compressed, new)
        done = new[0].shape[1] * self.stride
        self.tail = (self.tail[0][:, done:], self.tail[1][:, done:])
        self.selected = grow(self.selected, slc)
        window = grow(self.window, win)
        self.window = (window[0][:, -self.window_size :], window[1][:, -self.window_size :])
        self.length += slc[0].shape[1]
        return self.compressed, self.selected, window
