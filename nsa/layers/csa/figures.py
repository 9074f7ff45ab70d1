"""Metrics of Compressed Sparse Attention for TensorBoard: where the attention goes, and what the indexer misses."""

from typing import Any

import torch
from torch import Tensor

from nsa import ops
from nsa.ops.geometry import Documents, visible_blocks
from nsa.ops.token_sparse import joined, with_sink


@torch.no_grad()
def measure(
    attend: Any,
    q: Tensor,
    near: tuple[Tensor],
    sink: Tensor,
    entries: tuple[Tensor],
    q_idx: Tensor | None = None,
    k_idx: tuple[Tensor] | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    earlier: dict[Any, Any] | None = None,
) -> dict[str, float]:
    """The metrics of one layer, from the inputs of its ``attend``. Means are over heads and queries that see an entry.

    window_mass, sink_mass: probability of the window and of the sink, among window, sink and all entries.
    entry_recall: with an indexer, share of the probability of all entries that the selected ones have; mean over
    queries that see more than k entries. Without such queries: 1.
    """
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    visible = visible_blocks(documents, attend.ratio, attend.ratio)
    seen = visible.last - visible.first
    where: dict[str, Any] = {"cu_seqlens": cu_seqlens, "offset": offset}
    far, window = attend.to_entries(q, entries, **where), attend.to_window(q, near, **where)
    lse = with_sink(*joined(far, window), sink)[1]

    def mean(share: Tensor, rows: Tensor, otherwise: float) -> float:
        return share[..., rows].mean().item() if rows.any() else otherwise

    found = {
        "window_mass": mean((window[1] - lse).exp(), seen > 0, 1.0),
        "sink_mass": mean((sink.to(lse.dtype)[:, None] - lse).exp(), seen > 0, 0.0),
    }
    if attend.choose is None:
        return found
    assert q_idx is not None and k_idx is not None and weights is not None
    options: dict[str, Any] = {"topk": attend.choose.topk, "ratio": attend.ratio, "backend": attend.backend}
    sets, _ = ops.index_topk(q_idx, k_idx[0].squeeze(2), weights, **options, **where)
    rows = (entries[0], entries[0])
    _, chosen = ops.token_sparse_attention(q, *rows, sets, return_lse=True, backend=attend.backend)
    return found | {"entry_recall": mean((chosen - far[1]).exp(), seen > attend.choose.topk, 1.0)}
