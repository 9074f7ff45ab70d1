"""Metrics of DeepSeek Sparse Attention for TensorBoard: what the indexer selects, and what it misses."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa import ops
from nsa.layers.figure import Figure
from nsa.layers.kind import Pair
from nsa.ops.dispatch import softmax_scale
from nsa.ops.geometry import Documents
from nsa.ops.indexer_kl import head_sum


@torch.no_grad()
def measure(
    attend: Any,
    q: Tensor,
    kv: Pair | Callable[[], Pair],
    q_idx: Tensor,
    k_idx: tuple[Tensor] | Callable[[], tuple[Tensor]],
    weights: Tensor,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    earlier: dict[Any, Any] | None = None,
) -> dict[str, Figure]:
    """The metrics of one layer, from the inputs of its ``attend``. Means are over queries that see more than k tokens.

    recall: probability, in dense attention, of the selected tokens; mean over heads. Without such queries: 1.
    recall_bound: the most that any k tokens can have of it, over at most 64 queries.
    first_token_mass: probability, in dense attention, of the document's first token.
    token_overlap: share of a query's selected tokens that the previous query selected as well.
    layer_overlap: share of them that the DSA layer before selects as well; not in the first one.
    score_entropy: entropy of the index distribution over the selected tokens, from 0 (one token) to 1.
    """
    k, v = kv() if callable(kv) else kv
    (index_keys,) = k_idx() if callable(k_idx) else k_idx
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": attend.backend}
    tokens, scores = ops.index_topk(q_idx, index_keys, weights, **attend.choose.sizes, **options)
    _, dense = ops.dense_attention(q, k, v, scale=attend.scale, **options, return_lse=True)
    more = documents.query_local >= tokens.shape[2]

    def mass(lists: Tensor) -> Figure:
        options = {"scale": attend.scale, "return_lse": True, "backend": attend.backend}
        _, lse = ops.token_sparse_attention(q, k, v, lists, **options)
        return Figure.mean_of((lse - dense).exp()[..., more])

    first = documents.bounds[documents.query_document].to(torch.int32)[None, :, None].expand(len(q), -1, -1)
    overlap = {}
    if earlier is not None:
        before = earlier.get(("dsa", offset))
        if before is not None:
            overlap["layer_overlap"] = shared(before[:, more], tokens[:, more])
        earlier["dsa", offset] = tokens
    p = scores.softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1) / math.log(max(2, tokens.shape[2]))
    return {
        "recall": mass(tokens),
        "recall_bound": recall_bound(q, k, dense, documents, more, attend.scale, tokens.shape[2], attend.together),
        "first_token_mass": mass(first),
        "token_overlap": token_overlap(tokens, documents, more),
        **overlap,
        "score_entropy": Figure.mean_of(entropy[:, more]),
    }


def recall_bound(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    documents: Documents,
    more: Tensor,
    scale: float | None,
    topk: int,
    together: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> Figure:
    """The largest probability, mean over heads, of any ``topk`` tokens; 1 without queries of ``more`` (T,).

    Args:
        q (B, T, H, D), k (B, S, G, D). lse: (B, H, T), of dense attention.
        together: of a mean over these heads, that over all heads which choose together.
    """
    every = more.nonzero().flatten()
    rows = every[:: -(-len(every) // 64) or 1]  # as many as fit in memory
    if not len(rows):
        return Figure.mean(0, 0)
    attention = head_sum(q[:, rows], k, lse[:, :, rows], softmax_scale(scale, q.shape[3])) / q.shape[2]
    attention = together(attention)
    key = torch.arange(k.shape[1], device=q.device)
    first, last = documents.bounds[documents.query_document[rows]], documents.query_position[rows]
    visible = (key >= first[:, None]) & (key <= last[:, None])
    found = attention.where(visible, 0).topk(topk, -1).values.sum(-1).mean()
    return Figure.mean(found * len(every), len(every))


def token_overlap(tokens: Tensor, documents: Documents, more: Tensor) -> Figure:
    """Share of the tokens (B, T, K) of a query that its predecessor in the document selected as well; 1 without any."""
    pairs = more[1:] & (documents.query_document[1:] == documents.query_document[:-1])
    rows = pairs.nonzero().flatten()
    return shared(tokens[:, rows], tokens[:, rows + 1])


def shared(one: Tensor, other: Tensor) -> Figure:
    """Share of tokens (B, T, K) that two lists have in common, mean over their rows; at most 1,024 are looked at."""
    if not one.shape[1]:
        return Figure.mean(0, 0)
    rows = slice(None, None, -(-one.shape[1] // 1024))  # as many as fit in memory
    both = torch.cat((one[:, rows], other[:, rows]), -1).sort(-1).values
    share = ((both[..., 1:] == both[..., :-1]).sum(-1) / one.shape[2]).mean()
    return Figure.mean(share * one.shape[1], one.shape[1])
