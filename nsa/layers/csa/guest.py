"""What CSA looks at, for comparisons. It has no place for other methods: they choose tokens, and here are entries."""

from typing import Any

import torch
from torch import Tensor

from nsa.layers.kind import Guest, Spent, seen_keys


def spent(
    attend: Any,
    q: Tensor,
    near: tuple[Tensor],
    sink: Tensor,
    entries: tuple[Tensor],
    q_idx: Tensor | None = None,
    k_idx: tuple[Tensor] | None = None,
    weights: Tensor | None = None,
    *,
    offset: int = 0,
) -> Spent:
    """The window, the entries that are attended to, and all index keys. A row is key and value, and is read once."""
    heads, width = q.shape[2:]
    seen = seen_keys(q, offset)
    window, visible = (float(x.sum() * len(q)) for x in (seen.clamp(max=attend.window), seen // attend.ratio))
    rows, scored, index_width = window + visible, 0.0, 0
    if attend.choose is not None and attend.phase == "sparse":
        assert q_idx is not None and k_idx is not None
        rows = window + float((seen // attend.ratio).clamp(max=attend.choose.topk).sum() * len(q))
        scored, index_width = visible * q_idx.shape[2] * q_idx.shape[3] / width, q_idx.shape[3]
    one = torch.ones(1, dtype=torch.float64)
    return Spent(one * rows * heads, one * scored, one * (rows * width + visible * index_width))


GUEST = Guest(attention=None, spent=spent, beside=None, cached=True)
