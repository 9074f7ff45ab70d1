"""Scores from a few dims of the keys (SparQ, arXiv 2312.04985, section 4), and the sum of all values."""

import torch
from torch import Tensor

from nsa.baselines.method import State
from nsa.baselines.plan import View
from nsa.ops.choose import top


def largest_dims(view: View, dims: int, *, temperature: bool) -> Tensor:
    """Scores of the one query from its ``dims`` largest dims, summed over the group: (B, H, S) fp32.

    ``temperature``: divided by the root of the share of the query's L1 norm that these dims have. -inf where not
    visible.
    """
    q = view.q[:, 0].float().unflatten(1, (view.k.shape[2], view.group))
    chosen = top(q.abs().sum(2), dims)[:, :, None]
    scores = torch.einsum("bgjd,bsgd->bgjs", q * chosen, view.k.float()) * view.scale
    if temperature:
        least = torch.finfo(q.dtype).tiny
        part = (q.abs() * chosen).sum(-1) / q.abs().sum(-1).clamp(min=least)
        scores = scores / part.clamp(min=least).sqrt()[..., None]
    return scores.flatten(1, 2).masked_fill(~view.per_head(view.visible)[:, :, 0], -torch.inf)


def add_values(view: View, state: State) -> Tensor:
    """(B, G, Dv) fp32: the sum of all values so far, in ``state.rest``, to which the new ones are added."""
    new = view.v[:, -view.q.shape[1] :].float() * (view.query_positions >= 0)[..., None, None]
    state.rest["values"] = new.sum(1) + state.rest.get("values", 0)
    return state.rest["values"]
