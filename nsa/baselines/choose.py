"""Choosing the best of many, the same way everywhere: exact, deterministic, ties to the earlier."""

import torch
from torch import Tensor


def top(scores: Tensor, count: int | Tensor) -> Tensor:
    """The ``count`` highest of the last dim, as a mask of its shape; ties go to the lower index.

    ``count``: a number, or (...) int64 for each row. -inf is never chosen, NaN is an error of the caller.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    limit = count[..., None] if isinstance(count, Tensor) else count
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, order, (rank < limit).expand(scores.shape)) & (scores > -torch.inf)


def cover(weights: Tensor, share: float | Tensor) -> Tensor:
    """The fewest of the last dim whose sum is at least ``share`` of the whole, as a mask; ties go to the lower index.

    ``weights``: not negative. ``share``: a number, or (...) for each row. All that weigh something are chosen for 1.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered
    total = ordered.double().sum(-1, keepdim=True)
    wanted = share[..., None] if isinstance(share, Tensor) else share
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    full = torch.as_tensor(wanted, device=weights.device) >= 1
    return chosen.scatter_(-1, order, (before < wanted * total) | full) & (weights > 0)
