"""The tokens that DSA's lightning indexer selects for each query (DeepSeek-V3.2, arXiv 2512.02556, Eq. 1-2)."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from nsa.ops.dispatch import accumulation_dtype, autocasts, check_packing, check_positions, resolve_backend
from nsa.ops.geometry import Documents, Ranges, visible_blocks
from nsa.ops.index_topk.fp8 import rounded_to_fp8
from nsa.ops.tiles import Runs

ORDERS = ("index", "score")


@torch.no_grad()
@autocasts("q_idx", "k_idx")
def index_topk(
    q_idx: Tensor,
    k_idx: Tensor,
    weights: Tensor,
    *,
    topk: int,
    num_initial: int = 0,
    num_local: int = 0,
    ratio: int = 1,
    cu_seqlens: Tensor | None = None,
    offset: int | None = None,
    order: Literal["index", "score"] = "index",
    fp8: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``topk`` visible tokens of each query with the highest index scores.

    I[t, s] = sum_j weights[t, j] relu(q_idx[t, j] . k_idx[s]). It is exact and deterministic. Ties go to the lower
    index: the ReLU makes plateaus of equal zeros (+0 equals -0).

    Keys are tokens, or, with a ``ratio`` above 1, compressed entries (DeepSeek-V4, arXiv 2606.19348): entry i of a
    document stands for its tokens up to (i + 1) ratio - 1, and the query at token t sees it iff i < (t + 1) // ratio.

    Args:
        q_idx: (B, T, Hi, Di). k_idx: (B, S, Di). weights: (B, T, Hi), with all scales in it. With S > T (decoding on a
            cache, a chunk of a sequence) the queries are the last T of the S positions. With a ratio S is the number of
            entries: those of each document, concatenated in order; what follows the last is ignored.
        topk: tokens per query. Among them are always the ``num_initial`` first of the query's document and the
            ``num_local`` most recent ones (the query's own included), as far as there are so many.
        ratio: tokens per key. Where it is above 1, topk, num_initial and num_local count entries.
        cu_seqlens: (N+1,) int32 boundaries of packed documents among the S positions, with B = 1. With a ratio: among
            the tokens up to the last query.
        offset: position of the first query, for a ratio above 1 (None: 0); else S tells it.
        order: of the result: ascending "index", or descending "score".
        fp8: whether the scores are of q_idx and k_idx in fp8 (e4m3), with one scale per query's head and per key, a
            power of two. On a Hopper GPU they are multiplied as such. Elsewhere they are rounded, and multiplied as
            before, so the scores are the same but for the order of sums.
        backend: auto, triton, torch or naive.

    Returns:
        indices (B, T, topk) int32, positions among the S keys, padded with -1; their scores (B, T, topk) fp32
        (float64 for float64), -inf for the padding. Not differentiable (`indexer_kl` trains the indexer).

    Raises:
        ValueError: inconsistent shapes, fewer keys than the queries can see, ``topk`` < 1, more forced tokens than
            ``topk``, unknown order or backend.
    """
    visible = check_indexer(q_idx, k_idx, weights, cu_seqlens, ratio, offset)
    _check_topk(topk, num_initial, num_local)
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    implementation = resolve_backend(backend, q_idx, k_idx)
    if fp8 and implementation != "triton":
        q_idx, k_idx = rounded_to_fp8(q_idx), rounded_to_fp8(k_idx)
    if implementation == "triton":
        from nsa.ops.kernels import dsa_operators as operators

        ahead = k_idx.shape[1] - (q_idx.shape[1] if ratio == 1 else 0)  # of a query's number is its last key at most
        found = operators.index_topk(q_idx, k_idx, weights, visible, ahead, topk, num_initial, num_local, fp8)
        return found if order == "index" else _by_score(*found)
    if implementation == "naive":
        tiles = iter([(slice(0, q_idx.shape[1]), 0, naive_scores(q_idx, k_idx, weights))])
    else:
        tiles = _score_tiles(q_idx, k_idx, weights, visible)
    first, own, forced = visible.first, visible.last - 1, (num_initial, num_local)
    picked = [_pick(scores, start, first[rows], own[rows], topk, *forced, order) for rows, start, scores in tiles]
    return torch.cat([indices for indices, _ in picked], 1), torch.cat([scores for _, scores in picked], 1)


@torch.no_grad()
@autocasts("q_idx", "k_idx")
def index_topk_decode(
    q_idx: Tensor,
    k_idx: Tensor,
    weights: Tensor,
    lengths: Tensor,
    *,
    topk: int,
    num_initial: int = 0,
    num_local: int = 0,
    fp8: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`index_topk` of the last token of each sequence, on the memory of a cache, without a wait for the host.

    Shapes alone decide what is launched, so a CUDA graph can capture the call.

    Args:
        q_idx: (B, Hi, Di). k_idx: (B, S, Di), memory of the index keys, contiguous for the kernels. weights: (B, Hi).
        lengths: (B,) int32, tokens of each sequence, the new one included.
        topk, num_initial, num_local: as for `index_topk`.
        fp8: as for `index_topk`, which then selects the same, if the keys were rounded as they were written
            (`nsa.ops.index_topk.fp8.rounded_to_fp8`): here only q_idx is.
        backend: auto, triton, torch or naive.

    Returns:
        (B, topk) int32, ascending, padded with -1. Not differentiable.

    Raises:
        ValueError: as `index_topk`; lengths that are not (B,) int32.
    """
    check_index_shapes(q_idx[:, None], k_idx, weights[:, None])
    _check_topk(topk, num_initial, num_local)
    if lengths.shape != q_idx.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be ({len(q_idx)},) int32, got {tuple(lengths.shape)} {lengths.dtype}")
    if fp8:
        q_idx = rounded_to_fp8(q_idx)
    if resolve_backend(backend, q_idx, k_idx) == "triton":
        from nsa.ops.kernels import inference_operators as operators

        return operators.index_topk_decode(q_idx, k_idx, weights, lengths, topk, num_initial, num_local)
    scores = naive_scores(q_idx[:, None], k_idx, weights[:, None]).transpose(0, 1)  # sequences in place of queries
    own = lengths.long() - 1
    return _pick(scores, 0, torch.zeros_like(own), own, topk, num_initial, num_local, "index")[0][0]


def check_indexer(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, cu_seqlens: Tensor | None, ratio: int, offset: int | None
) -> Ranges:
    """The keys that each query sees.

    Raises:
        ValueError: q_idx (B, T, Hi, Di), k_idx (B, S, Di) and weights (B, T, Hi) are not consistent, or there are fewer
            keys than the queries can see.
    """
    check_index_shapes(q_idx, k_idx, weights)
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1 token per key, got {ratio}")
    if ratio == 1:
        first = check_positions(q_idx, k_idx)
        if offset not in (None, first):
            raise ValueError(f"offset ({offset}) must be {first}: without a ratio the queries are of the last keys")
    else:
        first = offset or 0
    tokens = first + q_idx.shape[1]
    check_packing(q_idx, cu_seqlens, tokens)
    if cu_seqlens is None and k_idx.shape[1] < tokens // ratio:
        raise ValueError(f"{tokens} tokens have {tokens // ratio} entries of {ratio}, got {k_idx.shape[1]} keys")
    return visible_blocks(Documents.of(q_idx.shape[1], first, cu_seqlens, q_idx.device), ratio, ratio)


def check_index_shapes(q_idx: Tensor, k_idx: Tensor, weights: Tensor) -> None:
    """Raise ValueError unless q_idx (B, T, Hi, Di), k_idx (B, S, Di) and weights (B, T, Hi) are consistent."""
    if q_idx.dim() != 4 or k_idx.dim() != 3:
        raise ValueError(
            "q_idx must be (batch, tokens, heads, width) and k_idx (batch, tokens, width); got "
            f"{tuple(q_idx.shape)}, {tuple(k_idx.shape)}"
        )
    if q_idx.shape[0] != k_idx.shape[0] or q_idx.shape[3] != k_idx.shape[2]:
        raise ValueError(f"q_idx {tuple(q_idx.shape)} and k_idx {tuple(k_idx.shape)} must share batch and width")
    if weights.shape != q_idx.shape[:3]:
        raise ValueError(f"weights must be {tuple(q_idx.shape[:3])}, one per index head, got {tuple(weights.shape)}")


def _check_topk(topk: int, num_initial: int, num_local: int) -> None:
    if topk < 1 or num_initial < 0 or num_local < 0 or num_initial + num_local > topk:
        raise ValueError(
            f"topk ({topk}) must be at least 1 and hold the forced tokens: num_initial ({num_initial}) + num_local "
            f"({num_local})"
        )


def naive_scores(q_idx: Tensor, k_idx: Tensor, weights: Tensor) -> Tensor:
    """(B, T, S) index score of each pair, by its definition."""
    dtype = accumulation_dtype(q_idx)
    products = torch.einsum("bthd,bsd->bths", q_idx.to(dtype), k_idx.to(dtype))
    return torch.einsum("bth,bths->bts", weights.to(dtype), products.relu())


def _score_tiles(q_idx: Tensor, k_idx: Tensor, weights: Tensor, visible: Ranges) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield (queries, first key, scores (B, t, U) of the keys from there on) by tiles."""
    for tile in Runs(visible).tiles(q_idx.shape[1], k_idx.shape[1], q_idx.shape[0] * q_idx.shape[2]):
        assert isinstance(tile.keys, slice)
        rows = slice(tile.start, tile.stop)
        yield rows, tile.keys.start, naive_scores(q_idx[:, rows], k_idx[:, tile.keys], weights[:, rows])


def _pick(
    scores: Tensor, start: int, first: Tensor, own: Tensor, topk: int, num_initial: int, num_local: int, order: str
) -> tuple[Tensor, Tensor]:
    """The top ``topk`` of each query's scores (B, t, U), of the keys from ``start`` on: their positions and scores.

    ``first``, ``own``: (t,) the first and the last position that each query sees.
    """
    key, first, own = torch.arange(start, start + scores.shape[2], device=scores.device), first[:, None], own[:, None]
    visible = (key >= first) & (key <= own)
    forced = visible & ((key < first + num_initial) | (key > own - num_local))
    rank = scores.masked_fill(~visible, -torch.inf).masked_fill(forced, torch.inf)
    rank, column = rank.sort(dim=-1, descending=True, stable=True)
    none = scores.shape[2]
    column = column.masked_fill(rank == -torch.inf, none)[..., :topk].sort(dim=-1).values
    column = torch.nn.functional.pad(column, (0, topk - column.shape[2]), value=none)
    chosen = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf).gather(2, column)
    indices = (column + start).masked_fill(column == none, -1).to(torch.int32)
    return (indices, chosen) if order == "index" else _by_score(indices, chosen)


def _by_score(indices: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """From ascending indices to descending scores."""
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    return indices.gather(2, order), scores
