"""Attention to listed tokens from which DSA's indexer learns in the backward pass (DeepSeek-V3.2, arXiv 2512.02556)."""

from typing import Any

import torch
from torch import Tensor

from nsa.ops.dispatch import autocasts, check_attention, check_positions, resolve_backend, softmax_scale
from nsa.ops.geometry import longest_document
from nsa.ops.index_topk import check_index_shapes
from nsa.ops.indexer_kl import check_together, indexer_kl
from nsa.ops.token_sparse import check_lists, takes_latents, token_sparse_attention


@autocasts("q", "k", "v", "q_idx", "k_idx")
def token_sparse_attention_kl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_indices: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    weights: Tensor,
    kl_weight: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`token_sparse_attention` with the indexer's loss attached: whatever objective the output is part of, its backward
    pass is that of the objective + ``kl_weight`` x `indexer_kl` over the lists.

    The target of the loss is this attention, which gets no gradient from it. So the gradients of q, k and v do not
    depend on ``kl_weight``. The gradient of ``kl_weight`` is the loss itself: that is how to read it. The kernels know
    it in the backward pass only, where they have the probabilities anyway.

    Args:
        q, k, v, token_indices, scale, cu_seqlens: as for `token_sparse_attention`.
        q_idx (B, T, Hi, Di), k_idx (B, S, Di), weights (B, T, Hi): as for `index_topk`.
        kl_weight: () fp32 (float64 for float64), on the same device.
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, H, Dv) in q's dtype.

    Raises:
        ValueError: inconsistent shapes, unknown backend.
    """
    check_attention(q, k, v, None)
    check_lists(token_indices, q, k)
    check_index_shapes(q_idx, k_idx, weights)
    check_positions(q_idx, k_idx)
    check_together(q_idx, k_idx, q, k)
    if kl_weight.dim():
        raise ValueError(f"kl_weight must be a tensor without dimensions, got {tuple(kl_weight.shape)}")
    scale, index = softmax_scale(scale, q.shape[3]), (q_idx, k_idx, weights, kl_weight)
    if takes_latents(backend, q, k, v) and resolve_backend(backend, q_idx, k_idx, q, heads=False) == "triton":
        from nsa.ops.kernels import latent_operators

        return latent_operators.attention_kl(q, k, v.shape[3], token_indices, *index, scale)
    if resolve_backend(backend, q_idx, k_idx, q, k, v) == "triton":
        from nsa.ops.kernels import dsa_operators as operators

        longest = longest_document(cu_seqlens, k.shape[1])
        if not operators.by_tiles(q, k, v, token_indices, longest):
            return operators.token_attention_kl(q, k, v, token_indices, *index, longest, scale)
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "backend": backend}
    out, lse = token_sparse_attention(q, k, v, token_indices, **options, return_lse=True)
    loss = indexer_kl(q_idx, k_idx, weights, q, k, lse, token_indices=token_indices, **options)
    return _Attach.apply(out, loss, kl_weight)


class _Attach(torch.autograd.Function):
    """The output as it is. Its backward pass adds weight x loss to the objective."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(loss, weight)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, weight = ctx.saved_tensors
        return d_out, weight.to(loss.dtype), loss.to(weight.dtype)
