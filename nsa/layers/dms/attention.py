"""Attention with delayed eviction, in portable torch: it has no kernel yet."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa.ops.dispatch import accumulation_dtype, without_autocast

ROWS = 128  # queries whose scores exist at a time


def delayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    *,
    window: int,
    scale: float,
    query_positions: Tensor,
    key_positions: Tensor,
    first: Tensor | None = None,
    rows: int = ROWS,
) -> Tensor:
    """Causal attention; ``log_keep`` of a key is added to its scores for queries more than ``window`` after it.

    Memory is linear in the tokens: scores exist for ``rows`` queries at a time, and again in the backward pass.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv).
        log_keep: (B, S, G), log of what is left of each key; 0: all, -inf: nothing.
        query_positions: (T,). key_positions: (B or 1, S, G or 1), -1: no key.
        first: (T,) first position that each query may see, of its document; None: 0.

    Returns:
        (B, T, H, Dv) in q's dtype.
    """
    dtype, groups = accumulation_dtype(q), k.shape[2]
    key_positions = key_positions.transpose(1, 2)[:, :, None]  # (B, G, 1, S)

    def attend(q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, at: Tensor, start: Tensor) -> Tensor:
        distance = at[:, None] - key_positions
        visible = (key_positions >= start[:, None]) & (distance >= 0)
        scores = torch.einsum("btgjd,bsgd->bgjts", q.to(dtype).unflatten(2, (groups, -1)), k.to(dtype)) * scale
        bias = torch.where(distance > window, log_keep.to(dtype).transpose(1, 2)[:, :, None], 0.0)
        bias = bias.masked_fill(~visible, -torch.inf)
        return torch.einsum("bgjts,bsgd->btgjd", (scores + bias[:, :, None]).softmax(-1), v.to(dtype)).flatten(2, 3)

    first = torch.zeros_like(query_positions) if first is None else first
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, log_keep))
    outs = []
    with without_autocast(q.device.type):
        for at, start, some in zip(query_positions.split(rows), first.split(rows), q.split(rows, 1), strict=True):
            inputs = (some, k, v, log_keep, at, start)
            outs.append(checkpoint(attend, *inputs, use_reentrant=False) if graph else attend(*inputs))
    return torch.cat(outs, 1).to(q.dtype)


def shifted(log_keep: Tensor) -> Tensor:
    """(B, S, G): the decision about a key is made at the token after it; none is made yet about the last."""
    return torch.cat([log_keep[:, 1:], torch.zeros_like(log_keep[:, :1])], 1)
