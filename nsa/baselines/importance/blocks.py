"""Blocks of consecutive tokens. Their borders are positions in the sequence, so padding moves none."""

import torch
from torch import Tensor

from nsa.baselines.plan import Part, View


def num_blocks(view: View, block: int) -> int:
    """Blocks of the longest sequence so far."""
    return -(-int(view.seen.max()) // block)


def summed(x: Tensor, positions: Tensor, block: int, blocks: int) -> Tensor:
    """Sums of x (B, T, N, ...) over the blocks of ``positions`` (B, T, N), -1: no token -> (B, N, blocks, ...) fp32."""
    batch, _, heads, *rest = x.shape
    # Each token has a place of its own, so that the sum has one order; what is no token goes behind the last block.
    place = positions.masked_fill(positions < 0, blocks * block).view(*positions.shape, *[1] * len(rest))
    placed = torch.zeros(batch, blocks * block + 1, heads, *rest, device=x.device)
    placed.scatter_(1, place.expand(x.shape), x.float())
    return placed[:, :-1].unflatten(1, (blocks, block)).sum(2).transpose(1, 2)


def pooled(x: Tensor, positions: Tensor, block: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Means of x (B, T, N, D) over blocks, (B, N, blocks, D) fp32, and how many tokens each has, (B, N, blocks).

    ``positions``: (B, T) or (B, T, N). A block without tokens has the mean 0.
    """
    where = (positions if positions.dim() == 3 else positions[..., None]).expand(x.shape[:3])
    counts = summed(torch.ones_like(where, dtype=torch.float32), where, block, blocks)
    return summed(x, where, block, blocks) / counts.clamp(min=1)[..., None], counts


def pooled_attention(view: View, block: int) -> tuple[Tensor, Tensor]:
    """Attention between means of blocks of queries and keys.

    Returns:
        probabilities (B, H, U, U) fp32, 0 for later blocks and in rows that have no query; whether a row has queries
        (B, 1, U, 1).
    """
    blocks = num_blocks(view, block)
    q, queries = pooled(view.q, view.query_positions, block, blocks)
    k, _ = pooled(view.k, view.positions, block, blocks)
    order = torch.arange(blocks, device=q.device)
    seen = order <= order[:, None]
    scores = (q @ view.per_head(k).transpose(-1, -2)) * view.scale
    there = queries[:, :1, :, None] > 0
    probabilities = scores.masked_fill(~(seen & there), -torch.inf).softmax(-1).nan_to_num(0.0)
    return probabilities, there


def by_blocks(view: View, keep: Tensor, block: int) -> Part:
    """``keep`` (B, N, U, U) bool, of blocks of queries and keys, as a part of a plan."""
    positions = view.query_positions
    if positions.shape[1] == view.k.shape[1] and bool((positions >= 0).all()):
        return Part(keep, unit=block, tile=block)
    return Part(of_tokens(view, keep, block))


def of_tokens(view: View, keep: Tensor, block: int, first: Tensor | None = None) -> Tensor:
    """``keep`` (B, N, R, U) bool, of blocks of queries and keys, for each token: (B, N, T, S).

    ``first``: (B,) int64, the block of queries that each sequence's row 0 stands for; None: block 0.
    """
    rows = (view.query_positions.clamp(min=0) // block)[:, None, :, None]
    if first is not None:
        rows = (rows - first[:, None, None, None]).clamp(min=0)
    keep = keep.gather(2, rows.expand(-1, keep.shape[1], -1, keep.shape[3]))
    columns = (view.positions.clamp(min=0) // block).transpose(1, 2)
    columns = columns if columns.shape[1] == keep.shape[1] else view.per_head(columns)
    return keep.gather(3, columns[:, :, None].expand(-1, -1, keep.shape[2], -1))
