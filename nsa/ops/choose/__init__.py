"""Choosing the best of many, the same way everywhere: exact, deterministic, ties to the earlier."""

import torch
from torch import Tensor

from nsa.ops.dispatch import resolve_backend

WIDEST = 16384  # entries of a row that a kernel takes: a program holds them in registers


def top(scores: Tensor, count: int | Tensor, *, backend: str = "auto") -> Tensor:
    """The ``count`` highest of the last dim, as a mask of its shape; ties go to the lower index.

    Args:
        scores: -inf is never chosen, NaN is an error of the caller.
        count: a number, or (...) int64 for each row, broadcast to the rows.
        backend: auto, triton, torch or naive. The kernel takes rows of 16 or 32 bits with at most 16,384 entries.

    Raises:
        ValueError: unknown backend, or one that cannot take these rows.
    """
    if _by_kernel(backend, scores):
        from nsa.ops.kernels import row_masks

        return row_masks.top(scores, count)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    limit = count[..., None] if isinstance(count, Tensor) else count
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, order, (rank < limit).expand(scores.shape)) & (scores > -torch.inf)


def cover(weights: Tensor, share: float | Tensor, *, backend: str = "auto") -> Tensor:
    """The fewest of the last dim whose sum is at least ``share`` of the whole, as a mask; ties go to the lower index.

    Sums are in fp64. In another order they differ in their last bits, and so may the choice if it hangs on them.

    Args:
        weights: not negative. share: a number, or (...) for each row, broadcast to the rows. All that weigh something
            are chosen for 1.
        backend: as for `top`.
    """
    if _by_kernel(backend, weights):
        from nsa.ops.kernels import row_masks

        return row_masks.cover(weights, share)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered
    total = ordered.double().sum(-1, keepdim=True)
    wanted = share[..., None] if isinstance(share, Tensor) else share
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    return chosen.scatter_(-1, order, (before < wanted * total) | (wanted >= 1)) & (weights > 0)


def drawn(queries: Tensor, keys: Tensor, seed: int, count: int | Tensor, *, backend: str = "auto") -> Tensor:
    """Each query's own key and others before it, drawn at random without replacement, as a mask (B, T, S).

    Those with the highest `pair_draws` are chosen, by their upper 24 bits; ties go to the lower index.

    Args:
        queries: (B, T) int64 positions. keys: (B, S) int64 positions; negative: none.
        seed: of the draws. count: of each query, its own key included: a number, or int64 that broadcasts to (B, T).
        backend: as for `top`. The kernel keeps no draw in memory.
    """
    if _by_kernel(backend, keys.new_empty(0, keys.shape[1], dtype=torch.float32)):  # a stand-in: a choice of numbers
        from nsa.ops.kernels import row_masks

        return row_masks.drawn(queries, keys, seed, count)
    query, key = queries[:, :, None], keys[:, None]
    draw = (pair_draws(queries, keys, seed) >> 7).float()  # 24 bits: fp32 is exact
    draw = draw.masked_fill(query == key, torch.inf).masked_fill((key < 0) | (key > query), -torch.inf)
    return top(draw, count, backend="auto" if backend == "auto" else "torch")


def pair_draws(queries: Tensor, keys: Tensor, seed: int) -> Tensor:
    """(..., T, S) int64 of 31 bits that look random, for pairs of positions (..., T) and (..., S) int64."""
    return mixed(mixed(queries[..., :, None] * 1_000_003 + keys[..., None, :]) + seed)


def mixed(x: Tensor) -> Tensor:
    """Numbers of 31 bits that look random (the finaliser of MurmurHash3)."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF


def _by_kernel(backend: str, rows: Tensor) -> bool:
    short = rows.shape[-1] <= WIDEST
    if backend == "triton" and not short:
        raise ValueError(f"backend='triton': rows may have {WIDEST} entries, these have {rows.shape[-1]}")
    return resolve_backend(backend, rows, heads=False) == "triton" and short
