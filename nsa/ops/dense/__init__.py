"""Causal attention, optionally within a sliding window."""

from typing import Literal, overload

import torch
from torch import Tensor

from nsa.ops.dense import libraries
from nsa.ops.dispatch import autocasts, check_attention, check_places, check_positions, resolve_backend, softmax_scale
from nsa.ops.geometry import Documents, KnownLengths, known_lengths, window_ranges
from nsa.ops.naive import masked_attention
from nsa.ops.tiles import Runs, tiled_attention


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
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
    positions: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@autocasts("q", "k", "v")
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal (grouped-query) attention; with ``window`` w query t sees keys t-w+1 .. t (NSA's third branch).

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); G divides H. With S > T (decoding on a cache, a
            chunk of a sequence) the queries are the last T of the S positions.
        window: number of keys that a query sees, its own included; None: all up to its own.
        scale: factor of the scores; None: D ** -0.5.
        cu_seqlens: (N+1,) int32 boundaries of packed documents among the S positions, with B = 1; no query attends
            across one.
        positions: (T,) int32, rising: the places of the queries among the S positions; None: the last T.
        return_lse: also return the log-sum-exp of the scores.
        backend: auto, triton, torch, naive, or the name of a library (`nsa.ops.dense.libraries`). A library computes
            the calls that it supports: no window, ``positions`` or ``return_lse``, as many queries as keys, and for
            cuDNN documents of one length. Our kernels compute the others. auto: the fastest that was measured on this
            kind of GPU.

    Returns:
        (B, T, H, Dv) in q's dtype; with ``return_lse`` also (B, H, T) fp32 (float64 for float64).

    Raises:
        ValueError: inconsistent shapes, window < 1, unknown backend, a library that is not available.
    """
    check_attention(q, k, v, cu_seqlens)
    if positions is not None:
        check_places(positions, q.shape[1], k.shape[1])
    check_window(window)
    scale = softmax_scale(scale, q.shape[3])
    if backend in libraries.NAMES or (backend == "auto" and q.is_cuda):
        plain = window is None and positions is None and not return_lse
        if library := _library(backend, q, k, v, cu_seqlens, plain):
            name, lengths = library
            return libraries.attend(name, q, k, v, scale, cu_seqlens, lengths)
        backend = "auto"
    if positions is None:
        documents = Documents.of(q.shape[1], check_positions(q, k), cu_seqlens, q.device)
    else:
        documents = Documents.at(positions, k.shape[1], cu_seqlens)
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
            out, lse = tiled_attention(q, k, v, Runs(visible), scale)
    return (out, lse) if return_lse else out


def _library(
    backend: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, plain: bool
) -> tuple[str, KnownLengths] | None:
    """The library for this call, and the lengths of its documents; None: our kernels compute it."""
    lengths = KnownLengths(q.shape[1], True) if cu_seqlens is None else known_lengths(cu_seqlens)
    if backend in libraries.NAMES and (obstacle := libraries.not_here(backend)):
        raise ValueError(f"backend={backend!r}: {obstacle}; or use 'auto'")
    name = libraries.library_for(backend, q, k, v, lengths) if plain else None
    return None if name is None else (name, lengths or KnownLengths(q.shape[1], False))


def check_window(window: int | None) -> None:
    """Raise ValueError for a window that excludes the query's own token."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query's own token), got {window}")


def naive_mask(documents: Documents, num_keys: int, reach: int) -> Tensor:
    """(T, S) bool: key s is in query t's document, at or before it and nearer than ``reach``."""
    query, key = documents.query_position[:, None], torch.arange(num_keys, device=documents.bounds.device)
    border = documents.bounds[1:-1]
    same_document = (query[..., None] >= border).sum(-1) == (key[:, None] >= border).sum(-1)
    return same_document & (key <= query) & (query - key < reach)
