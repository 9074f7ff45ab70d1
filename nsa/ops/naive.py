"""The reference implementation of all attention operators: softmax over the keys that a mask allows."""

import torch
from torch import Tensor

from nsa.ops.dispatch import accumulation_dtype


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out = softmax(q k^T * scale | mask) v, with quadratic memory.

    Args:
        q: (B, T, H, D); k: (B, S, G, D); v: (B, S, G, Dv).
        mask: bool, broadcastable to (B, G, T, S); True where the query sees the key.

    Returns:
        out (B, T, H, Dv) in q's dtype; lse (B, H, T) in the accumulation dtype. A query that sees no key has out 0,
        lse -inf and no gradient.
    """
    groups = k.shape[2]
    heads_per_group = q.shape[2] // groups
    dtype = accumulation_dtype(q)
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    k_, v_ = (x.repeat_interleave(heads_per_group, dim=2) for x in (k_, v_))
    mask = mask.expand(q.shape[0], groups, q.shape[1], k.shape[1]).repeat_interleave(heads_per_group, dim=1)

    scores = torch.einsum("bthd,bshd->bhts", q_, k_) * scale
    sees = mask.any(-1, keepdim=True)
    # Queries that see no key are computed without the mask and overwritten afterwards, so that no gradient is NaN.
    lse = scores.masked_fill(~mask & sees, -torch.inf).logsumexp(-1).masked_fill(~sees.squeeze(-1), -torch.inf)
    probabilities = scores.masked_fill(~mask & sees, -torch.inf).softmax(-1) * sees
    return torch.einsum("bhts,bshe->bthe", probabilities, v_).to(q.dtype), lse
