"""Other methods in the place of the lightning indexer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa import ops
from nsa.layers.kind import Guest, Pair, Spent, newest, seen_keys
from nsa.ops.dispatch import softmax_scale


def attention(
    attend: Any, method: Callable[..., Tensor], q: Tensor, kv: Pair, *indexer: Any, offset: int = 0
) -> Tensor:
    return method(q, *newest(kv, q.shape[1]), softmax_scale(attend.scale, q.shape[3]))


def spent(
    attend: Any, q: Tensor, kv: Pair, q_idx: Tensor, k_idx: tuple[Tensor], weights: Tensor, *, offset: int = 0
) -> Spent:
    """The selected tokens, and all index keys. The indexer is one for all KV heads: each has its share of it.

    A layer that attends to the sets of another reads no index keys.
    """
    k, v = kv
    groups, width = k.shape[2], k.shape[3] + v.shape[3]
    seen = float(seen_keys(q, offset).sum() * len(q))
    if attend.phase == "warm-up":
        keys, index = seen, 0.0
    else:
        tokens, _ = ops.index_topk(q_idx, k_idx[0], weights, **attend.choose.sizes, backend=attend.backend)
        keys, index = float((tokens >= 0).sum()), seen * attend.choose.scores
    one = torch.ones(groups, dtype=torch.float64)
    scored = index * q_idx.shape[2] * q_idx.shape[3] / k.shape[3] / groups
    return Spent(
        one * keys * (q.shape[2] // groups), one * scored, one * (keys * width + index * k_idx[0].shape[-1] / groups)
    )


GUEST = Guest(attention, spent, beside=None, cached=False)
