"""DSA's cache: keys and values of all tokens, and their index keys."""

from torch import Tensor

from nsa.cache.rows import Pair, Rows


class IndexedCache:
    """What decoding with DSA keeps of its tokens; ``length`` is their number."""

    def __init__(self) -> None:
        self.rows: Rows[Pair] = Rows()
        self.index: Rows[tuple[Tensor]] = Rows()

    @property
    def length(self) -> int:
        return self.rows.length

    def append(self, kv: Pair, k_idx: tuple[Tensor]) -> tuple[Pair, tuple[Tensor]]:
        """Add keys (B, T, G, D), values (B, T, G, Dv) and index keys (B, T, Di) of T tokens; returns those of all."""
        return self.rows.append(kv), self.index.append(k_idx)
