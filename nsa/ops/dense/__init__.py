"""Causal attention, optionally within a sliding window."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa.ops.dispatch import check_attention, check_positions, resolve_backend, softmax_scale
from nsa.ops.naive import masked_attention
from nsa.ops.packing import Documents, cached
from nsa.ops.tiles import Ranges, tiled_attention


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal (grouped-query) attention; with ``window`` w query t sees keys t-w+1 .. t (NSA's third branch).

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); G divides H. With S > T (decoding on a cache, a
            chunk of a sequence) the queries are the last T of the S positions.
        window: keys seen by a query, its own included; None: all before it.
        scale: factor of the scores; None: D ** -0.5.
        cu_seqlens: (N+1,) int32 borders of packed documents among the S positions, with B = 1; no query looks across
            one.
        return_lse: also return the log of the softmax's denominator.
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, H, Dv) in q's dtype; with ``return_lse`` also (B, H, T) fp32, not differentiable.

    Raises:
        ValueError: shapes that do not belong together, window < 1, unknown backend.
    """
    check_attention(q, k, v, cu_seqlens)
    check_window(window)
    scale = softmax_scale(scale, q.shape[3])
    plain = window is None and cu_seqlens is None and not return_lse and q.shape[1] == k.shape[1]
    if backend == "auto" and plain and _cudnn_is_faster(q, v):
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            out = scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    documents = Documents.of(q.shape[1], check_positions(q, k), cu_seqlens, q.device)
    reach = k.shape[1] if window is None else window
    implementation = resolve_backend(backend, q, k, v)
    if implementation == "naive":
        out, lse = masked_attention(q, k, v, naive_mask(documents, k.shape[1], reach), scale)
    else:
        visible = window_ranges(documents, reach)
        if implementation == "triton":
            from nsa.ops.kernels import operators

            out, lse = operators.range_attention(q, k, v, visible, scale)
        else:
            out, lse = tiled_attention(q, k, v, visible, scale)
    return (out, lse) if return_lse else out


def _cudnn_is_faster(q: Tensor, v: Tensor) -> bool:
    """Whether torch's cuDNN attention takes plain causal attention: measured ahead of our kernels on Hopper, most
    of all backward (five products for our seven; docs/performance.md). Its gradients differ from run to run in the last
    bits, so that ours stay where determinism is asked for (`torch.use_deterministic_algorithms`)."""
    if not q.is_cuda or torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling():
        return False
    widths = q.shape[3] == v.shape[3] and q.shape[3] in (64, 128)
    return q.element_size() == 2 and widths and torch.cuda.get_device_capability(q.device)[0] == 9


def check_window(window: int | None) -> None:
    """Raise ValueError for a window in which a query does not see itself."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query's own token), got {window}")


@cached
def window_ranges(documents: Documents, reach: int) -> Ranges:
    """The run of keys that each query sees: its own and the ``reach`` - 1 before it, of its document."""
    first = torch.maximum(documents.bounds[documents.query_document], documents.query_position - reach + 1)
    return Ranges(first, documents.query_position + 1)


def naive_mask(documents: Documents, num_keys: int, reach: int) -> Tensor:
    """(T, S) bool: key s is in query t's document, at or before it and nearer than ``reach``."""
    query, key = documents.query_position[:, None], torch.arange(num_keys, device=documents.bounds.device)
    border = documents.bounds[1:-1]
    same_document = (query[..., None] >= border).sum(-1) == (key[:, None] >= border).sum(-1)
    return same_document & (key <= query) & (query - key < reach)
