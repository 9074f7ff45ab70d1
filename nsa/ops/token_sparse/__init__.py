"""Attention to a list of tokens for each query: DSA's second part (DeepSeek-V3.2, arXiv 2512.02556, Eq. 2)."""

from typing import Literal, overload

import torch
from torch import Tensor

from nsa.ops.dense import dense_attention
from nsa.ops.dispatch import autocasts, check_attention, check_listed, resolve_backend, softmax_scale
from nsa.ops.geometry import longest_document, share_gradient
from nsa.ops.naive import masked_attention
from nsa.ops.tiles import Lists, tiled_attention


@overload
def token_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_indices: Tensor,
    *,
    sink: Tensor | None = None,
    window: tuple[Tensor, Tensor, int] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def token_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_indices: Tensor,
    *,
    sink: Tensor | None = None,
    window: tuple[Tensor, Tensor, int] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@autocasts("q", "k", "v")
def token_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_indices: Tensor,
    *,
    sink: Tensor | None = None,
    window: tuple[Tensor, Tensor, int] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query attends to the keys of its list, which all its heads share.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); G divides H. The latent of MLA is G = 1, D = 576, Dv = 512,
            with v = k[..., :512]. The kernels for such keys need v to be a view of k, or both of another tensor; then
            all of the gradient goes to k, and v itself gets none.
        token_indices: (B, T, K) int32 positions among the S keys, in any order, each at most once; -1 is none. The
            caller lists visible keys only (`index_topk` does): nothing is masked here.
        sink: (H,) logits that take part in the denominator only.
        window: (k_win (B, S', G, D), v_win (B, S', G, Dv), w): query t attends also to the last w of these, its own
            included, in the same softmax; as in `dense_attention`. A list with a window holds compressed entries (CSA).
        scale: factor of the scores; None: D ** -0.5.
        cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1. The window needs them; the kernels are
            faster for lists that hold a large part of a document if the host knows its length.
        return_lse: also return the log-sum-exp of the scores, with the sink and the window.
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, H, Dv) in q's dtype; with ``return_lse`` also (B, H, T) fp32 (float64 for float64). A query that sees
        nothing gives 0, and -inf without a sink.

    Raises:
        ValueError: inconsistent shapes or types, unknown backend; on a CPU also tokens that are not there.
    """
    check_attention(q, k, v, None)
    check_lists(token_indices, q, k)
    if sink is not None and sink.shape != q.shape[2:3]:
        raise ValueError(f"sink must be ({q.shape[2]},), one logit per query head, got {tuple(sink.shape)}")
    scale = softmax_scale(scale, q.shape[3])
    latent = takes_latents(backend, q, k, v)
    implementation = "triton" if latent else resolve_backend(backend, q, k, v)
    if latent:
        from nsa.ops.kernels import latent_operators

        out, lse = latent_operators.attention(q, k, v.shape[3], token_indices, scale)
    elif implementation == "triton":
        from nsa.ops.kernels import dsa_operators as operators

        out, lse = operators.token_attention(q, k, v, token_indices, longest_document(cu_seqlens, k.shape[1]), scale)
    elif implementation == "naive":
        out, lse = masked_attention(q, k, v, naive_mask(token_indices, k.shape[1]), scale)
    else:
        out, lse = tiled_attention(q, k, v, Lists(token_indices.long()), scale)
    if window is not None:
        near = dense_attention(
            q, *window[:2], window=window[2], scale=scale, cu_seqlens=cu_seqlens, return_lse=True, backend=backend
        )
        out, lse = joined((out, lse), near)
    if sink is not None:
        out, lse = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


def takes_latents(backend: str, q: Tensor, k: Tensor, v: Tensor | None) -> bool:
    """Whether the kernels of latents run: for keys wider than the others take, whose first columns are the values.

    ``v``: None if only the scores are wanted.
    """
    if backend not in ("auto", "triton") or (v is not None and not share_gradient(v, k)):
        return False
    if resolve_backend(backend, q, k, heads=False) != "triton":
        return False
    from nsa.ops.kernels import latents

    return latents.fits(q, k, 0 if v is None else v.shape[3])


def check_lists(token_indices: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless token_indices is (B, T, K) for q (B, T, H, D), and lists keys of k (B, S, G, D)."""
    if token_indices.dim() != 3 or token_indices.shape[:2] != q.shape[:2]:
        raise ValueError(f"token_indices must be {(*q.shape[:2], 'K')}, got {tuple(token_indices.shape)}")
    check_listed("token_indices", token_indices, k.shape[1])


def naive_mask(token_indices: Tensor, num_keys: int) -> Tensor:
    """(B, 1, T, S) bool: query t lists key s."""
    key = torch.arange(num_keys, device=token_indices.device)
    return (token_indices[..., None] == key).any(2)[:, None]


def joined(listed: tuple[Tensor, Tensor], near: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention to both sets of keys, from the output (B, T, H, Dv) and LSE (B, H, T) of each.

    The list may be empty (LSE -inf). The window has at least the query's own token.
    """
    lse = torch.logaddexp(listed[1], near[1])
    weights = [(part[1] - lse).exp().transpose(1, 2)[..., None] for part in (listed, near)]
    return (listed[0] * weights[0] + near[0] * weights[1]).to(near[0].dtype), lse


def with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """The attention whose denominator has exp(sink), too."""
    logit = sink.to(lse.dtype)[:, None]
    weight = torch.sigmoid(lse - logit)
    return (out * weight.transpose(1, 2)[..., None]).to(out.dtype), torch.logaddexp(lse, logit.expand_as(lse))
