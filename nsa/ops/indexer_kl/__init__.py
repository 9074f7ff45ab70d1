"""The loss of DSA's lightning indexer (DeepSeek-V3.2, arXiv 2512.02556, Eq. 3-4)."""

from typing import Any

import torch
from torch import Tensor

from nsa.ops.compressed import naive_mask as complete
from nsa.ops.dense import naive_mask as causal
from nsa.ops.dispatch import (
    accumulation_dtype,
    autocasts,
    check_attention,
    differentiable_once,
    resolve_backend,
    softmax_scale,
)
from nsa.ops.geometry import Documents, Ranges, longest_document
from nsa.ops.index_topk import check_indexer, naive_scores
from nsa.ops.tiles import Lists, Pattern, Runs, add, take
from nsa.ops.token_sparse import check_lists, takes_latents
from nsa.ops.token_sparse import naive_mask as listed


@autocasts("q_idx", "k_idx", "q", "k")
def indexer_kl(
    q_idx: Tensor,
    k_idx: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    token_indices: Tensor | None = None,
    scale: float | None = None,
    ratio: int = 1,
    cu_seqlens: Tensor | None = None,
    offset: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum over the queries of KL(p || softmax(I)): how far the index scores are from the attention that they predict.

    The target p[t, s] is the sum over the heads of exp(scale q[t, h] k[s] - lse[h, t]), divided by its sum over s. Both
    distributions are over the tokens that the query sees (the dense warm-up), or over those of its list (the sparse
    stage). Which target it is depends on ``lse``:

    - the second result of `dense_attention`: the dense attention, renormalised over a list;
    - that of `token_sparse_attention` without sink and window: a softmax of each head over the list (DeepSeek-V3.2);
    - that with sink and window: their joint softmax, renormalised over the list (DeepSeek-V4).

    Args:
        q_idx: (B, T, Hi, Di). k_idx: (B, S, Di). weights: (B, T, Hi). As for `index_topk`; these have gradients.
        q: (B, T, H, D). k: (B, S, G, D). lse: (B, H, T). They are the target and have no gradient.
        token_indices: (B, T, K) int32 positions among the S keys; -1 is none. None: all that the query sees.
        scale: factor of the attention's scores; None: D ** -0.5.
        ratio, cu_seqlens, offset: as for `index_topk`: which keys a query sees, where those are compressed entries.
        backend: auto, triton, torch or naive.

    Returns:
        Scalar, fp32 (float64 for float64). A query that sees nothing adds 0. Memory is linear in T and S.

    Raises:
        ValueError: inconsistent shapes, unknown backend.
    """
    visible = check_indexer(q_idx, k_idx, weights, cu_seqlens, ratio, offset)
    offset = k.shape[1] - q.shape[1] if ratio == 1 else offset or 0
    check_attention(q, k, k, cu_seqlens, offset)
    check_together(q_idx, k_idx, q, k)
    if lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(f"lse must be {(q.shape[0], q.shape[2], q.shape[1])}, got {tuple(lse.shape)}")
    if token_indices is not None:
        check_lists(token_indices, q, k)
    scale = softmax_scale(scale, q.shape[3])
    q, k, lse = q.detach(), k.detach(), lse.detach()
    latent = token_indices is not None and takes_latents(backend, q, k, None)
    implementation = resolve_backend(backend, q_idx, k_idx, q, *([] if latent else [k]), heads=not latent)
    if implementation == "naive":
        documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
        mask = naive_mask(documents, k.shape[1], token_indices, ratio)
        return naive_kl(q_idx, k_idx, weights, head_sum(q, k, lse, scale), mask)
    if implementation == "triton" and latent:
        return _FusedKL.apply(q_idx, k_idx, weights, q, k, lse, token_indices, None, 0, scale)
    if implementation == "triton":
        longest = longest_document(cu_seqlens, k.shape[1])
        return _FusedKL.apply(q_idx, k_idx, weights, q, k, lse, token_indices, visible, longest, scale)
    pattern: Pattern = Runs(visible)
    if token_indices is not None:
        pattern = Lists(token_indices.long())
    return _IndexerKL.apply(q_idx, k_idx, weights, q, k, lse, pattern, scale)


def check_together(q_idx: Tensor, k_idx: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless indexer and attention have the same sequences, queries and keys."""
    if q.shape[:2] != q_idx.shape[:2] or k.shape[:2] != k_idx.shape[:2]:
        raise ValueError(
            f"attention and indexer must share batch and tokens: q {tuple(q.shape)}, q_idx {tuple(q_idx.shape)}, "
            f"k {tuple(k.shape)}, k_idx {tuple(k_idx.shape)}"
        )


def naive_mask(documents: Documents, num_keys: int, token_indices: Tensor | None, ratio: int = 1) -> Tensor:
    """(B or 1, T, S) bool: the keys that the query sees, or lists."""
    if token_indices is not None:
        return listed(token_indices, num_keys)[:, 0]
    if ratio > 1:
        return complete(documents, num_keys, ratio, ratio)[None]
    return causal(documents, num_keys, num_keys)[None]


def head_sum(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """(B, T, S): the sum over the heads of exp(scale q k - lse); 0 for queries whose LSE is -inf."""
    dtype = accumulation_dtype(q)
    keys = k.to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), keys) * scale
    return (scores - lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp().sum(1)


def naive_kl(q_idx: Tensor, k_idx: Tensor, weights: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
    """The definition, from attention (B, T, S) and a mask: scalar."""
    target = normalised(attention.where(mask, 0))
    scores = naive_scores(q_idx, k_idx, weights).masked_fill(~mask, -torch.inf)
    scores = scores.masked_fill(~mask.any(-1, keepdim=True), 0)
    log_ratio = torch.xlogy(target, target) - target * scores.log_softmax(-1).where(mask, 0)
    return log_ratio.sum()


def normalised(attention: Tensor) -> Tensor:
    """Divided by its sum over the last dimension. Only a sum of 0 is replaced: a larger floor would clip a target."""
    return attention / attention.sum(-1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)


class _FusedKL(torch.autograd.Function):
    """The kernels. As below, the gradients are computed along with the loss. ``visible``: None for lists of latents."""

    @staticmethod
    def forward(
        ctx: Any, q_idx: Tensor, k_idx: Tensor, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor,
        lists: Tensor | None, visible: Ranges | None, longest: int, scale: float,
    ) -> Tensor:  # fmt: skip
        from nsa.ops.kernels import dsa_operators, latent_operators

        inputs = q_idx, k_idx, weights, q, k, lse
        if visible is None:
            assert lists is not None
            loss, d_q, d_k, d_w = latent_operators.indexer_kl(*inputs, lists, scale)
        else:
            loss, d_q, d_k, d_w = dsa_operators.indexer_kl(*inputs, lists, visible, longest, scale)
        ctx.save_for_backward(d_q, d_k, d_w.to(weights.dtype))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(x * d_total.to(x.dtype) for x in ctx.saved_tensors), *(None,) * 7


class _IndexerKL(torch.autograd.Function):
    """In tiles of queries. The gradients are computed along with the loss: a scalar's are the same up to a factor."""

    @staticmethod
    def forward(
        ctx: Any,
        q_idx: Tensor,
        k_idx: Tensor,
        weights: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        pattern: Pattern,
        scale: float,
    ) -> Tensor:
        dtype = accumulation_dtype(q_idx)
        total = torch.zeros((), dtype=dtype, device=q.device)
        d_q, d_k, d_w = (torch.zeros_like(x, dtype=dtype) for x in (q_idx, k_idx, weights))
        heads = q.shape[0] * max(q.shape[2], q_idx.shape[2])
        for tile in pattern.tiles(q.shape[1], k.shape[1], heads):
            if not tile.mask.shape[-1]:
                continue
            rows, mask = slice(tile.start, tile.stop), tile.mask.reshape(-1, *tile.mask.shape[-2:])  # (B or 1, t, U)
            index_keys = take(k_idx[:, None], tile.keys)[:, 0].to(dtype)
            keys = take(k.transpose(1, 2), tile.keys).transpose(1, 2)
            target = normalised(head_sum(q[:, rows], keys, lse[:, :, rows], scale).where(mask, 0))
            queries, w = q_idx[:, rows].to(dtype), weights[:, rows].to(dtype)
            products = torch.einsum("bthd,bsd->bths", queries, index_keys)
            scores = torch.einsum("bth,bths->bts", w, products.relu()).masked_fill_(~mask, -torch.inf)
            scores.masked_fill_(~mask.any(-1, keepdim=True), 0)
            log_q = scores.log_softmax(-1)
            total += (torch.xlogy(target, target) - target * log_q.where(mask, 0)).sum()
            d_scores = (log_q.exp() * target.sum(-1, keepdim=True) - target).where(mask, 0)
            d_w[:, rows] = torch.einsum("bts,bths->bth", d_scores, products.relu())
            d_products = (d_scores[:, :, None] * w[..., None]).where(products > 0, 0)
            d_q[:, rows] = torch.einsum("bths,bsd->bthd", d_products, index_keys)
            add(d_k[:, None], tile.keys, torch.einsum("bths,bthd->bsd", d_products, queries)[:, None])
        ctx.save_for_backward(d_q.to(q_idx.dtype), d_k.to(k_idx.dtype), d_w.to(weights.dtype))
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(x * d_total.to(x.dtype) for x in ctx.saved_tensors), None, None, None, None, None
