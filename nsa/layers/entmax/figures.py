"""Metrics of entmax attention for TensorBoard: how sparse it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa import ops
from nsa.layers.figure import Figure
from nsa.layers.kind import Pair
from nsa.ops.dispatch import softmax_scale
from nsa.ops.entmax import entmax_scores
from nsa.ops.geometry import Documents

QUERIES = 64  # of a pass that are looked at, evenly spread: all their weights are in memory


@torch.no_grad()
def measure(
    attend: Any,
    q: Tensor,
    kv: Pair | Callable[[], Pair],
    logit_scale: Tensor,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    earlier: dict[Any, Any] | None = None,
) -> dict[str, Figure]:
    """The metrics of one layer, from the inputs of its ``attend``. Means are over at most 64 queries, and heads.

    support: number of keys with a weight. zeros: share of the visible keys without one. entropy: of the weights, in
    nats. logit_scale: factor of the scores.
    """
    k, _ = kv() if callable(kv) else kv
    rows = torch.arange(0, q.shape[1], -(-q.shape[1] // QUERIES), device=q.device)
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    some = Documents(documents.bounds, documents.query_position[rows], documents.query_document[rows])
    z = entmax_scores(
        q[:, rows],
        k,
        some,
        scale=softmax_scale(None, q.shape[3]),
        logit_scale=logit_scale[:, rows],
        slopes=attend.slopes(q),
    )
    p = ops.entmax(z, attend.alpha)
    support, visible = (p > 0).sum(-1), (z > -torch.inf).sum(-1)
    return {
        "support": Figure.mean_of(support),
        "zeros": Figure.mean_of(1 - support / visible),
        "entropy": Figure.mean_of(-torch.xlogy(p, p).sum(-1)),
        "logit_scale": Figure.mean_of(logit_scale),
    }
