"""Attention of one new token per sequence to what a cache holds of the tokens before: decoding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.ops.dispatch import accumulation_dtype, autocasts, resolve_backend, softmax_scale
from nsa.ops.geometry import first_columns, memory_rows

LATENT_BYTES = 1152  # the longest row of a latent that the kernels take: 576 columns in 16 bits


class Terms(NamedTuple):
    """Keys and values that stand for many tokens each, such as the means of clusters (Double-P, arXiv 2602.05191).

    Attributes:
        keys: (B, C, G, D). values: (B, C, G, Dv).
        indices: (B, N, M) int32: the terms that take part, each at most once; -1 is none. N as for pages.
        log_counts: (B, N, M) fp32, added to the score of each: the log of the number of tokens that it stands for.
    """

    keys: Tensor
    values: Tensor
    indices: Tensor
    log_counts: Tensor


@torch.no_grad()
@autocasts("q", "k", "v")
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    pages: Tensor | None = None,
    page_size: int = 1,
    log_weights: Tensor | None = None,
    terms: Terms | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One query token per sequence attends to listed pages of a cache, or to all of it (dense decoding).

    Shapes alone decide what is launched, and no value is read by the host: a CUDA graph can capture the call, and
    replay it while ``lengths``, lists and caches change in place. Not differentiable.

    Args:
        q: (B, H, D). k: (B, S, G, D). v: (B, S, G, Dv): the memory of a cache, contiguous for the kernels (or the first
            S tokens of more); G divides H. v may be the first columns of k, as a view: latents, from which both come
            (MLA, DeepSeek-V2, arXiv 2405.04434, with W_UK in q, and W_UV after the output). The kernels then load them
            once. They take D up to 576 in 16 bits, and Dv up to the greatest power of two below D.
        lengths: (B,) int32, tokens of each sequence, the new one included. What lies after them in memory is not read.
        pages: (B, N, P) int32 in any order, each page at most once; -1 is none. Page j has tokens
            ``page_size * j .. page_size * (j + 1) - 1``, as far as they are there. N is G (all heads of a KV head share
            a list) or H. None: all tokens.
        page_size: tokens of a page; 1: the lists are of tokens.
        log_weights: (B, N, P) fp32, added to the scores of a page's tokens: log(1 / p) of what was drawn with
            probability p (vAttention, arXiv 2510.05688); None: 0.
        terms: attended to beside the tokens, in the same softmax.
        scale: factor of the scores; None: D ** -0.5.
        backend: auto, triton, torch or naive.

    Returns:
        out (B, H, Dv) in q's dtype; lse (B, H) fp32 (float64 for float64), weights and terms included. A sequence that
        sees nothing gives 0 and -inf.

    Raises:
        ValueError: inconsistent shapes or dtypes, memory that is not contiguous (for the kernels), unknown backend.
    """
    check(q, k, v, lengths)
    if pages is None and (page_size != 1 or log_weights is not None):
        raise ValueError("page_size and log_weights belong to lists: give pages, or leave them out")
    if page_size < 1:
        raise ValueError(f"a page must have at least 1 token, got page_size {page_size}")
    _check_lists("pages", pages, q, k)
    if pages is not None and log_weights is not None and log_weights.shape != pages.shape:
        raise ValueError(f"log_weights must have the shape of pages, {tuple(pages.shape)}: {tuple(log_weights.shape)}")
    if terms is not None:
        _check_terms(terms, q, k, v, pages)
    scale = softmax_scale(scale, q.shape[2])
    others = () if terms is None else terms[:2]
    latent = first_columns(v, k)
    implementation = resolve_backend(backend, q, k, v, *others, heads=not latent)
    if latent and implementation == "triton" and (obstacle := _latent_obstacle(k, v, terms)):
        if backend == "triton":
            raise ValueError(f"backend='triton': {obstacle}; or use 'auto' or 'torch'")
        implementation = "torch"
    if implementation == "triton":
        from nsa.ops.kernels import inference_operators as operators

        _check_memory(k, k if latent else v)
        return operators.decode_attention(q, k, v, lengths, pages, page_size, log_weights, terms, scale)
    if implementation == "naive":
        return _naive(q, k, v, lengths, pages, page_size, log_weights, terms, scale)
    return _portable(q, k, v, lengths, pages, page_size, log_weights, terms, scale)


@torch.no_grad()
def append_rows(memories: Sequence[Tensor], rows: Sequence[Tensor], index: Tensor, *, backend: str = "auto") -> None:
    """Write the new token of each sequence into the memory of caches, in place, and without a wait for the host.

    Args:
        memories: (B, slots, ...) each, contiguous for the kernel. rows: (B, 1, ...), of the new token.
        index: (1,) int64, position of the token; it goes to slot ``index % slots``, so that a short memory is a ring.
        backend: auto, triton, torch or naive.
    """
    if resolve_backend(backend, *memories, heads=False) == "triton":
        from nsa.ops.kernels import inference_operators as operators

        operators.append_rows(list(memories), list(rows), index)
        return
    for memory, x in zip(memories, rows, strict=True):
        memory.index_copy_(1, index % memory.shape[1], x)


def check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless q (B, H, D), k (B, S, G, D), v (B, S, G, Dv), lengths (B,) int32 belong together."""
    if q.dim() != 3 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "q must be (batch, heads, width), and k and v (batch, tokens, heads, width) of the same tokens; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if len(q) != len(k) or q.shape[2] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must share batch and head width")
    if q.shape[1] % k.shape[2]:
        raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of key/value heads ({k.shape[2]})")
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be ({len(q)},) int32, got {tuple(lengths.shape)} {lengths.dtype}")


def check_contiguous(**memory: Tensor) -> None:
    """Raise ValueError for memory that a kernel would have to copy."""
    for name, x in memory.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous: give the whole memory of the cache, and lengths")


def _latent_obstacle(k: Tensor, v: Tensor, terms: Terms | None) -> str | None:
    """Why the kernels cannot take v as a view of k's first columns; None if they can."""
    from nsa.ops.kernels.hardware import split_width

    if k.shape[3] * k.element_size() > LATENT_BYTES or k.shape[3] * k.element_size() % 16:
        return f"rows of latents must be multiples of 16 bytes, at most {LATENT_BYTES}"
    if v.shape[3] > (most := split_width(k.shape[3])[0]):
        return f"of {k.shape[3]} columns of k, v may be the first {most}, got {v.shape[3]}"
    return None if terms is None else "latents have no terms"


def _check_memory(k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the tokens of a sequence are contiguous; sequences may lie apart."""
    for name, x in (("k", k), ("v", v)):
        if len(x) and not x[0].is_contiguous():
            raise ValueError(f"{name} must be contiguous from token to token: give the cache's memory, and lengths")
    if memory_rows(k) != memory_rows(v):
        raise ValueError("k and v must lie alike in memory: sequences are not equally far apart")


def _check_lists(name: str, lists: Tensor | None, q: Tensor, k: Tensor) -> None:
    if lists is None:
        return
    if lists.dim() != 3 or len(lists) != len(q) or lists.shape[1] not in (k.shape[2], q.shape[1]):
        raise ValueError(f"{name} must be ({len(q)}, {k.shape[2]} or {q.shape[1]}, number), got {tuple(lists.shape)}")
    if lists.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {lists.dtype}")


def _check_terms(terms: Terms, q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None) -> None:
    keys, values, indices, log_counts = terms
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or (len(keys), *keys.shape[2:]) != (len(k), *k.shape[2:]):
        raise ValueError(f"the keys of terms {tuple(keys.shape)} must be like k {tuple(k.shape)}, as many as values")
    if values.shape[3] != v.shape[3]:
        raise ValueError(f"values of terms have {v.shape[3]} columns, as v has; got {values.shape[3]}")
    _check_lists("indices of terms", indices, q, k)
    if log_counts.shape != indices.shape:
        raise ValueError(f"log_counts must have the shape of indices {tuple(indices.shape)}: {tuple(log_counts.shape)}")
    if indices.shape[1] != (k.shape[2] if pages is None else pages.shape[1]):
        raise ValueError(f"tokens and terms must share a number of lists, got {indices.shape[1]} of terms")


def _naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
    page_size: int,
    log_weights: Tensor | None,
    terms: Terms | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax over all tokens and all terms, with the weight 0 for what is not listed."""
    dtype, device = accumulation_dtype(q), q.device
    token = torch.arange(k.shape[1], device=device)
    there = token < lengths[:, None]  # (B, S)
    weights = torch.where(there, 0.0, -torch.inf).to(dtype)[:, None]
    if pages is not None:
        weights = weights + _spread(token // page_size, pages, log_weights, dtype)
    keys, values = (x.where(there[..., None, None], 0) for x in (k, v))
    if terms is not None:
        number = torch.arange(terms.keys.shape[1], device=device)
        ours = _spread(number, terms.indices, terms.log_counts, dtype)
        weights = torch.cat((weights.expand(-1, ours.shape[1], -1), ours), -1)
        keys, values = (torch.cat(both, 1) for both in ((keys, terms.keys), (values, terms.values)))
    keys, values = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[2], 2) for x in (keys, values))
    scores = torch.einsum("bhd,bshd->bhs", q.to(dtype), keys) * scale
    scores = scores + weights.repeat_interleave(q.shape[1] // weights.shape[1], 1)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return torch.einsum("bhs,bshe->bhe", probabilities, values).to(q.dtype), lse


def _spread(unit: Tensor, lists: Tensor, log_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, N, S) log weight of what belongs to ``unit`` (S,): that of the unit in the lists (B, N, P), -inf if none."""
    listed = unit[:, None] == lists[:, :, None]  # (B, N, S, P)
    logs = torch.zeros_like(lists, dtype=dtype) if log_weights is None else log_weights.to(dtype)
    return torch.where(listed, logs[:, :, None], -torch.inf).logsumexp(-1)


def _portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
    page_size: int,
    log_weights: Tensor | None,
    terms: Terms | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gathers what is listed."""
    dtype = accumulation_dtype(q)
    found = []
    if pages is None:
        absent = torch.arange(k.shape[1], device=q.device) >= lengths[:, None]
        keys, values = (x.to(dtype).masked_fill(absent[..., None, None], 0).transpose(1, 2) for x in (k, v))
        weights = torch.zeros(absent.shape, dtype=dtype, device=q.device).masked_fill_(absent, -torch.inf)
        found.append((keys, values, weights[:, None].expand(-1, k.shape[2], -1)))
    else:
        token = pages.long()[..., None] * page_size + torch.arange(page_size, device=q.device)
        absent = (pages[..., None] < 0) | (token >= lengths[:, None, None, None])
        logs = torch.zeros_like(token, dtype=dtype)
        if log_weights is not None:
            logs = logs + log_weights.to(dtype)[..., None]
        found.append(_gathered(k, v, token.flatten(2), logs.masked_fill(absent, -torch.inf).flatten(2), dtype))
    if terms is not None:
        logs = terms.log_counts.to(dtype).masked_fill(terms.indices < 0, -torch.inf)
        found.append(_gathered(terms.keys, terms.values, terms.indices.long(), logs, dtype))
    keys, values, weights = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    grouped = q.to(dtype).unflatten(1, (keys.shape[1], -1))  # (B, N, h, D)
    scores = grouped @ keys.mT * scale + weights[:, :, None]
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp() @ values
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1)


def _gathered(
    k: Tensor, v: Tensor, index: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (B, N, U, D) and values (B, N, U, Dv) of the tokens ``index`` (B, N, U), and weights (B, N, U).

    What has the weight -inf is 0: memory that nothing was written to may hold anything.
    """
    batch = torch.arange(len(k), device=k.device)[:, None, None]
    group = torch.arange(index.shape[1], device=k.device)[:, None] * k.shape[2] // index.shape[1]
    absent = (weights == -torch.inf)[..., None]
    at = index.clamp(0, max(0, k.shape[1] - 1))
    keys, values = (x[batch, at, group].to(dtype).masked_fill(absent, 0) for x in (k, v))
    return keys, values, weights
