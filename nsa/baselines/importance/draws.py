"""Numbers that look random, by hashing positions: the same in a batch, alone, whole or in chunks."""

from torch import Tensor

from nsa.baselines.plan import View
from nsa.ops.choose import pair_draws


def draws(view: View, seed: int) -> Tensor:
    """(B, G, T, S) int64 of 31 bits for each query and key of this layer; KV heads have the same."""
    return pair_draws(view.query_positions[:, None], view.positions.transpose(1, 2), seed_of(view, seed))


def seed_of(view: View, seed: int) -> int:
    """The seed of this layer's draws."""
    return seed * 7919 + view.layer * 104_729
