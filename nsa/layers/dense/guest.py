"""Other methods in the place of dense attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa.layers.kind import Guest, Pair, Spent, newest, seen_keys
from nsa.ops.dispatch import softmax_scale


def attention(attend: Any, method: Callable[..., Tensor], q: Tensor, kv: Pair, *, offset: int = 0) -> Tensor:
    return method(q, *newest(kv, q.shape[1]), softmax_scale(attend.scale, q.shape[3]))


def spent(attend: Any, q: Tensor, kv: Pair, *, offset: int = 0) -> Spent:
    """All keys."""
    k, v = kv
    keys = torch.full((k.shape[2],), float(seen_keys(q, offset).sum() * len(q)), dtype=torch.float64)
    return Spent(keys * (q.shape[2] // k.shape[2]), torch.zeros_like(keys), keys * (k.shape[3] + v.shape[3]))


GUEST = Guest(attention, spent, beside=None, cached=False)
