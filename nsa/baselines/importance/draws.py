"""Numbers that look random, by hashing positions: the same in a batch, alone, whole or in chunks."""

from torch import Tensor

from nsa.baselines.plan import View


def draws(view: View, seed: int, rows: Tensor | slice = slice(None), num_keys: int | None = None) -> Tensor:
    """(B, G, T, S) int64 of 31 bits for each query and key of this layer; KV heads have the same.

    Of the queries ``rows`` and the first ``num_keys`` slots only, if they are given.
    """
    queries = view.query_positions[:, None, rows, None]
    keys = view.positions[:, :num_keys].transpose(1, 2)[:, :, None]
    return mixed(mixed(queries * 1_000_003 + keys) + seed * 7919 + view.layer * 104_729)


def mixed(x: Tensor) -> Tensor:
    """Numbers of 31 bits that look random (the finaliser of MurmurHash3)."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF
