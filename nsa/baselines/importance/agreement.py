"""Whether attention by means of blocks is true to attention itself (FlexPrefill, arXiv 2502.20766, algorithm 2)."""

import torch
from torch import Tensor

from nsa.baselines.importance.blocks import num_blocks, pooled, summed
from nsa.baselines.importance.lines import probabilities
from nsa.baselines.plan import View


def mean_query_attention(view: View, rows: Tensor, block: int) -> Tensor:
    """(B, H, U): attention of the mean of the queries ``rows`` to the means of blocks of keys."""
    keys, counts = pooled(view.k, view.positions, block, num_blocks(view, block))
    real = (view.query_positions[:, rows] >= 0).float()
    query = torch.einsum("brhd,br->bhd", view.q[:, rows].float(), real / real.sum(1, keepdim=True).clamp(min=1))
    scores = torch.einsum("bhd,bhud->bhu", query, view.per_head(keys)) * view.scale
    return probabilities(scores.masked_fill(view.per_head(counts) == 0, -torch.inf))


def divergence(view: View, rows: Tensor, means: Tensor, columns: Tensor, block: int) -> Tensor:
    """(B, N): square root of the Jensen-Shannon divergence, in nats, of ``means`` (B, N, U) and of true mass.

    ``columns``: (B, N, S), the attention of the queries ``rows`` to each key, summed over them.
    """
    positions = view.positions[..., :1].expand(-1, -1, columns.shape[1])
    true = summed(columns.transpose(1, 2), positions, block, means.shape[-1])
    true = true / (view.query_positions[:, rows] >= 0).sum(1).clamp(min=1)[:, None, None]
    middle = (means + true) / 2
    parts = (torch.xlogy(p, p / middle.clamp(min=1e-38)).sum(-1) / 2 for p in (means, true))
    return sum(parts, torch.zeros_like(means[..., 0])).clamp(min=0).sqrt()
