"""Attention that queries have paid so far, or in a window of recent ones: what methods that evict rank keys by."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from nsa.baselines.plan import Estimate, View, row_blocks


def probabilities(view: View, rows: Tensor) -> Tensor:
    """(B, H, len(rows), S) fp32: the attention of the queries ``rows`` to all that is kept; 0 for padding."""
    scores = view.scores(rows)
    return torch.nan_to_num((scores - scores.logsumexp(-1, keepdim=True)).exp(), nan=0.0)


def column_sums(view: View) -> Tensor:
    """(B, G, S) fp32: the attention to each key, summed over all queries and over the heads of a KV head.

    Memory is linear in the tokens: it is a second pass over the scores, by blocks of queries.
    """
    blocks = (view.per_group(probabilities(view, rows)).sum((2, 3)) for rows in row_blocks(view))
    return torch.stack(list(blocks)).sum(0)


def window_sums(view: View, queries: Tensor, positions: Tensor, group: str) -> Tensor:
    """(B, G, S) fp32: the attention to each key, summed over some queries.

    Args:
        queries: (B, W, H, D). positions: (B, W) int64, theirs; -1: padding.
        group: "mean" or "max" of the heads of a KV head.
    """
    window = replace(view, q=queries, query_positions=positions)
    sums = view.per_group(probabilities(window, torch.arange(queries.shape[1], device=queries.device)).sum(2))
    return sums.amax(2) if group == "max" else sums.mean(2)


def pooled(sums: Tensor, kernel: int, pooling: str) -> Tensor:
    """(B, G, S): the mean ("avg") or maximum ("max") of ``kernel`` neighbours; beyond the ends there are zeros."""
    pool = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    return pool(sums, kernel, stride=1, padding=kernel // 2)


def cost(view: View, positions: Tensor, resident: float = 0.0) -> Estimate:
    """What one more pass over the scores costs, of the queries at ``positions`` (B, W): they read all keys so far."""
    pairs = float((positions + 1).clamp(min=0).double().sum() / len(positions))
    return Estimate(read=pairs * view.k.shape[3], pairs=pairs * view.group, resident=resident)
