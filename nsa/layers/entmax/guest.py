"""Other methods in the place of entmax attention. They attend with a softmax, for which the layer was not trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa.layers.kind import Guest, Pair, Spent, newest, seen_keys
from nsa.ops.dispatch import softmax_scale


def attention(
    attend: Any, method: Callable[..., Tensor], q: Tensor, kv: Pair, logit_scale: Tensor, *, offset: int = 0
) -> Tensor:
    """With the scaled scores.

    Raises:
        ValueError: the layer has ALiBi, which a method does not know.
    """
    if attend.alibi_heads:
        raise ValueError(
            "a method cannot be put onto entmax layers with attention.entmax.position alibi: compare models with rotary"
        )
    scaled = (q * logit_scale[..., None]).to(q.dtype)
    return method(scaled, *newest(kv, q.shape[1]), softmax_scale(None, q.shape[3]))


def spent(attend: Any, q: Tensor, kv: Pair, logit_scale: Tensor, *, offset: int = 0) -> Spent:
    """All keys and values: those whose weight is 0 are read, too."""
    k, v = kv
    keys = torch.full((k.shape[2],), float(seen_keys(q, offset).sum() * len(q)), dtype=torch.float64)
    return Spent(keys * (q.shape[2] // k.shape[2]), torch.zeros_like(keys), keys * (k.shape[3] + v.shape[3]))


GUEST = Guest(attention, spent, beside=None, cached=False)
