"""The cache of dense attention: every key and value."""

import torch
from torch import Tensor


class FullCache:
    """Keys (B, S, G, D) and values (B, S, G, Dv) of all tokens so far; ``length`` is S."""

    def __init__(self) -> None:
        self.length = 0
        self.kv: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of T new tokens; returns those of all S + T."""
        self.kv = grow(self.kv, (k, v))
        self.length += k.shape[1]
        return self.kv


def grow(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate pairs of (B, S, G, D) along the tokens."""
    if old is None:
        return new
    return torch.cat((old[0], new[0]), dim=1), torch.cat((old[1], new[1]), dim=1)
