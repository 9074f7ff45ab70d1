"""A cache of tokens that are forgotten when they are a window back, if their KV head has decided so."""

from torch import Tensor

from nsa.cache.evicting import EvictingCache

GONE = "gone"


class DelayedCache(EvictingCache):
    """``length``: tokens seen, forgotten ones included. KV heads keep different tokens.

    ``window``: a query sees this many tokens before its own, whatever was decided.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.length = window, 0

    @property
    def gone(self) -> Tensor:
        """(B, S, G) bool: tokens that are to be forgotten."""
        return self.extra[GONE]

    def append_decided(self, k: Tensor, v: Tensor, positions: Tensor, evicts: Tensor) -> None:
        """Add T tokens as `append` does. ``evicts``: (B, T, G) bool, each about the token before it."""
        tokens = k.shape[1]
        self.append(k, v, positions)
        self.length += tokens
        gone = self.extra[GONE].clone() if self.names else evicts.new_zeros(self.positions.shape)
        # The newest tokens are in the last slots of all heads: the window is at least 1.
        about = min(tokens, self.slots - 1)
        if about:
            gone[:, -1 - about : -1] = evicts[:, -about:]
        self.set_extra({GONE: gone})

    def forget(self) -> None:
        """Evict what no later query will see."""
        stays = ~self.gone | (self.length - self.positions <= self.window)
        if not bool(stays.all()):
            self.keep(stays)
