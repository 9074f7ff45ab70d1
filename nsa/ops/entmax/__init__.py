"""alpha-entmax, and causal attention with it in the place of softmax."""

from typing import Any

import torch
from torch import Tensor

from nsa.ops.dispatch import (
    accumulation_dtype,
    autocasts,
    check_attention,
    check_positions,
    resolve_backend,
    softmax_scale,
)
from nsa.ops.entmax import adasplash
from nsa.ops.entmax.threshold import bisected_threshold, centred, check_alpha, power, sorted_threshold
from nsa.ops.entmax.tiled import TiledEntmax
from nsa.ops.geometry import Documents, window_ranges
from nsa.ops.tiles import Runs


def entmax(z: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """The probabilities p = [(alpha - 1) z - tau]_+^(1 / (alpha - 1)), with tau such that they sum to 1.

    alpha 2 is sparsemax (arXiv 1602.02068); towards 1 it becomes softmax. Keys below the threshold have the weight 0,
    and change no weight of others. The threshold is exact for 1.5 and 2 (by sorting), else found by bisection, and
    computed in float64. It has first and second derivatives.

    Args:
        z: scores, any shape; -inf is a masked key. dim: along which the weights sum to 1.

    Returns:
        As z, in its dtype. Where all of ``dim`` is -inf, 0.

    Raises:
        ValueError: alpha is not above 1 and at most 2.
    """
    check_alpha(alpha)
    return _Entmax.apply(z.movedim(dim, -1), alpha).movedim(-1, dim)


@autocasts("q", "k", "v")
def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    logit_scale: Tensor | None = None,
    slopes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal (grouped-query) attention with alpha-entmax: out = entmax(z) v.

    z[t, s] = scale logit_scale[t, h] q[t, h] k[s] - slopes[h] (t - s), over the keys s <= t of the query's document.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); G divides H. With S > T the queries are the last T of the S
            positions.
        alpha: above 1 (towards softmax) and at most 2 (sparsemax).
        scale: factor of the scores; None: D ** -0.5.
        cu_seqlens: (N+1,) int32 boundaries of packed documents among the S positions, with B = 1.
        logit_scale: (B, T, H) factors of the scores, such as those of ASEntmax; None: 1. They have a gradient.
        slopes: (H,) of ALiBi (arXiv 2108.12409), in score per token of distance; None: 0. They have no gradient.
        backend: auto, torch, naive, or adasplash: the package of this name, on CUDA devices, for alpha 1.5, one
            document and no slopes. auto is torch.

    Returns:
        (B, T, H, Dv) in q's dtype. Memory is linear in T and S (naive: quadratic). A query that sees nothing gets 0.

    Raises:
        ValueError: inconsistent shapes, alpha out of range, unknown backend, a call that adasplash cannot compute.
    """
    check_attention(q, k, v, cu_seqlens)
    check_alpha(alpha)
    if logit_scale is not None and logit_scale.shape != q.shape[:3]:
        raise ValueError(f"logit_scale must be {tuple(q.shape[:3])}, got {tuple(logit_scale.shape)}")
    if slopes is not None and slopes.shape != q.shape[2:3]:
        raise ValueError(f"slopes must be ({q.shape[2]},), one for each query head, got {tuple(slopes.shape)}")
    scale = softmax_scale(scale, q.shape[3])
    library = backend == "adasplash"
    if library and (why := adasplash.obstacle(q, k, v, alpha, cu_seqlens, slopes)):
        raise ValueError(f"backend='adasplash': {why}; or use 'auto'")
    implementation = backend if library else resolve_backend(backend, q, k, v, kernels=False)
    documents = Documents.of(q.shape[1], check_positions(q, k), cu_seqlens, q.device)
    if implementation == "naive":
        z = entmax_scores(q, k, documents, scale=scale, logit_scale=logit_scale, slopes=slopes)
        values = v.to(z.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        return torch.einsum("bhts,bshe->bthe", entmax(z, alpha), values).to(q.dtype)
    dtype = accumulation_dtype(q)
    scaled = q if logit_scale is None else q.to(dtype) * logit_scale[..., None].to(dtype)
    if library:
        return adasplash.attend(scaled, k, v, scale).to(q.dtype)
    fixed: Any = None if slopes is None else slopes.detach().to(dtype)
    wide = [x.to(dtype) for x in (scaled, k, v)]
    pattern = Runs(window_ranges(documents, k.shape[1]))
    return TiledEntmax.apply(*wide, fixed, pattern, documents, scale, alpha).to(q.dtype)


def entmax_scores(
    q: Tensor,
    k: Tensor,
    documents: Documents,
    *,
    scale: float,
    logit_scale: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """z (B, H, T, S) of `entmax_attention`, -inf where the query does not see the key; ``documents``: of its T queries.

    In the accumulation dtype, and in quadratic memory.
    """
    dtype = accumulation_dtype(q)
    keys = k.to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    z = torch.einsum("bthd,bshd->bhts", q.to(dtype), keys) * scale
    if logit_scale is not None:
        z = z * logit_scale.to(dtype).transpose(1, 2)[..., None]
    query, key = documents.query_position[:, None], torch.arange(k.shape[1], device=q.device)
    if slopes is not None:
        z = z - slopes.detach().to(dtype)[:, None, None] * (query - key)
    seen = (key >= documents.bounds[documents.query_document][:, None]) & (key <= query)
    return z.masked_fill(~seen, -torch.inf)


class _Entmax(torch.autograd.Function):
    """Along the last dimension. Its backward pass is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        w = centred(z.double(), alpha)
        find = sorted_threshold if alpha in (1.5, 2) else bisected_threshold
        p = (power(w, find(w, alpha), 1 / (alpha - 1)) if w.shape[-1] else w).to(z.dtype)
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        (p,) = ctx.saved_tensors
        u = torch.where(p > 0, p, 1) ** (2 - ctx.alpha) * (p > 0)
        total = u.sum(-1, keepdim=True)
        mean = (u * dp).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
        return u * (dp - mean), None
