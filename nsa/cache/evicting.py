"""A cache that forgets: each KV head keeps its own tokens, and the memory shrinks with them."""

import torch
from torch import Tensor

from nsa.cache.rows import Rows, taken


class EvictingCache:
    """Keys, values and positions of the tokens that are kept.

    Slots of a KV head are in the order of their positions. Heads that keep fewer tokens than others have empty slots
    in front (position -1). ``extra``: further tensors per slot (B, S, G, ...), which follow it.
    """

    def __init__(self) -> None:
        self.rows: Rows[tuple[Tensor, ...]] = Rows()
        self.names: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        """S."""
        return self.rows.length

    @property
    def keys(self) -> Tensor:
        """(B, S, G, D)."""
        return self.rows.kept[0]

    @property
    def values(self) -> Tensor:
        """(B, S, G, Dv)."""
        return self.rows.kept[1]

    @property
    def positions(self) -> Tensor:
        """(B, S, G) int64, -1: empty."""
        return self.rows.kept[2]

    @property
    def extra(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.rows.kept[3:], strict=True))

    @property
    def stored(self) -> Tensor:
        """(B, G) int64: tokens that are kept."""
        return (self.positions >= 0).sum(1)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Add T tokens: k (B, T, G, D), v (B, T, G, Dv), positions (B, T) int64. Their extras are 0."""
        where = positions[..., None].expand(*positions.shape, k.shape[2])
        old = self.rows.kept[3:] if self.names else ()
        new = (x.new_zeros(x.shape[0], k.shape[1], *x.shape[2:]) for x in old)
        self.rows.append((k, v, where, *new))

    def set_extra(self, extra: dict[str, Tensor]) -> None:
        """Replace the extras: tensors (B, S, G, ...)."""
        self.names = tuple(extra)
        self._replace((*self.rows.kept[:3], *extra.values()))

    def keep(self, stays: Tensor) -> None:
        """Forget the slots (B, S, G) that are False in ``stays``; empty slots go, too."""
        stays = stays & (self.positions >= 0)
        slots = int(stays.sum(1).max())
        # A stable sort moves what goes to the front, and leaves the order of the rest.
        order = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, self.slots - slots :]
        filled = stays.gather(1, order)

        def moved(x: Tensor) -> Tensor:
            index = order.view(*order.shape, *[1] * (x.dim() - 3)).expand(*order.shape, *x.shape[3:])
            return x.gather(1, index)

        k, v, positions, *extra = (moved(x) for x in self.rows.kept)
        self._replace((k, v, positions.masked_fill(~filled, -1), *extra))

    def take(self, sequences: Tensor) -> "EvictingCache":
        """As `nsa.cache.rows.Rows.take`."""
        return taken(self, sequences)

    def _replace(self, rows: tuple[Tensor, ...]) -> None:
        self.rows = Rows()
        self.rows.append(rows)
