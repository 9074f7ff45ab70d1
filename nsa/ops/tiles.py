"""The PyTorch fallback of attention: tiles of queries against the keys that they see, in memory linear in the tokens.

A pattern divides the queries into tiles. For each tile it says which keys to load and which of them each query sees.
Scores exist for one tile at a time, forward and backward (FlashAttention's recomputation, arXiv 2205.14135, section
3.1, with torch operators). There are three patterns: `Runs` if each query sees a contiguous range of keys (causal,
window, compressed), `Blocks` if it sees a list of blocks (selected), `Lists` if it sees a list of keys.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nsa.ops.dispatch import accumulation_dtype, differentiable_once
from nsa.ops.geometry import Ranges

# Scores are in units of log2: on a CPU exp2 is several times faster than exp if many arguments are -inf.
LOG2_E = 1 / math.log(2)
MAX_ROWS = 128
MAX_SCORES = 2**25  # scores of one tile: 128 MiB in fp32


@dataclass(frozen=True)
class Tile:
    """Queries ``start .. stop-1`` and the keys they need.

    Attributes:
        keys: a slice of the keys' dimension, or (B, G or 1, U) int64 positions to gather.
        mask: bool, broadcastable to (B, G, 1, stop - start, U).
    """

    start: int
    stop: int
    keys: slice | Tensor
    mask: Tensor


class Pattern(Protocol):
    def tiles(self, num_queries: int, num_keys: int, num_heads: int) -> Iterator[Tile]: ...


def tile_bounds(num_queries: int, num_keys: int, num_heads: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of tiles of queries whose scores against ``num_keys`` keys are at most MAX_SCORES."""
    rows = max(1, min(MAX_ROWS, MAX_SCORES // max(1, num_heads * num_keys)))
    for start in range(0, num_queries, rows):
        yield start, min(start + rows, num_queries)


@dataclass(frozen=True, eq=False)
class Runs:
    """The pattern of `nsa.ops.geometry.Ranges`: each query sees a contiguous range of keys."""

    ranges: Ranges

    def tiles(self, num_queries: int, num_keys: int, num_heads: int) -> Iterator[Tile]:
        if self.ranges.first.is_meta:  # has no values: those of one document
            first, last = [0] * num_queries, list(range(num_keys - num_queries + 1, num_keys + 1))
        else:
            first, last = self.ranges.first.tolist(), self.ranges.last.tolist()
        for start, stop in tile_bounds(num_queries, num_keys, num_heads):
            keys = slice(min(first[start], num_keys), max(last[stop - 1], first[start]))
            position = torch.arange(keys.start, keys.stop, device=self.ranges.first.device)
            rows = slice(start, stop)
            mask = (position >= self.ranges.first[rows, None]) & (position < self.ranges.last[rows, None])
            yield Tile(start, stop, keys, mask)


@dataclass(frozen=True)
class Blocks:
    """Query t of group g sees the tokens of blocks ``blocks[:, t, g]`` at or before itself.

    A tile loads the union of its queries' blocks, since neighbouring queries select mostly the same blocks.

    Attributes:
        blocks: (B, T, G, n) int64 indices into ``block_start``; -1 is none.
        block_start: (M,) first token of each block.
        block_size: tokens of a block.
        query_position: (T,) token index of each query.
    """

    blocks: Tensor
    block_start: Tensor
    block_size: int
    query_position: Tensor

    def tiles(self, num_queries: int, num_keys: int, num_heads: int) -> Iterator[Tile]:
        within = torch.arange(self.block_size, device=self.blocks.device)
        for start, stop in tile_bounds(num_queries, num_keys, num_heads):
            union, member = _union(self.blocks[:, start:stop].transpose(1, 2), len(self.block_start))
            keys = (self.block_start[union][..., None] + within).flatten(2)
            mask = member.repeat_interleave(self.block_size, dim=3)
            mask &= keys[:, :, None] <= self.query_position[start:stop, None]
            # A block may extend past the end of the sequence; the causal mask excludes that part.
            yield Tile(start, stop, keys.clamp(max=num_keys - 1), mask[:, :, None])


@dataclass(frozen=True)
class Lists:
    """Query t sees the keys ``keys[:, t]``, in all groups: (B, T, n) int64, each at most once; -1 is none."""

    keys: Tensor

    def tiles(self, num_queries: int, num_keys: int, num_heads: int) -> Iterator[Tile]:
        for start, stop in tile_bounds(num_queries, num_keys, num_heads):
            union, member = _union(self.keys[:, None, start:stop], num_keys)
            yield Tile(start, stop, union, member[:, :, None])


def _union(lists: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The numbers below ``count`` in the lists (B, G, t, n) of any query of a tile; -1 is none.

    Returns:
        (B, G, U) int64, those used first, in ascending order; (B, G, t, U) bool, whether the query lists it.
    """
    # An additional column takes the -1s.
    chosen = torch.zeros(*lists.shape[:3], count + 1, dtype=torch.bool, device=lists.device)
    chosen = chosen.scatter_(3, torch.where(lists < 0, count, lists), True)[..., :-1]
    used = chosen.any(2)
    width = int(used.sum(-1).max()) if len(used) else 0
    # The rest is padding for groups that use fewer.
    union = used.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    return union, chosen.gather(3, union[:, :, None].expand(-1, -1, lists.shape[2], -1))


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """Attention along ``pattern``.

    Args:
        q: (B, T, H, D); k: (B, S, G, D); v: (B, S, G, Dv).

    Returns:
        out (B, T, H, Dv) in q's dtype; lse (B, H, T) in the accumulation dtype.
    """
    return _TiledAttention.apply(q, k, v, pattern, scale)


def take(x: Tensor, keys: slice | Tensor) -> Tensor:
    """(B, G, S, D) at ``keys`` -> (B, G, U, D)."""
    if isinstance(keys, slice):
        return x[:, :, keys]
    return x.gather(2, keys[..., None].expand(-1, x.shape[1], -1, x.shape[3]))


def add(total: Tensor, keys: slice | Tensor, part: Tensor) -> None:
    """Add (B, G, U, D) into (B, G, S, D) at ``keys``."""
    if isinstance(keys, slice):
        total[:, :, keys] += part
    else:
        total.scatter_add_(2, keys[..., None].expand(-1, part.shape[1], -1, part.shape[3]), part)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
        (batch, num_queries, heads, _), groups = q.shape, k.shape[2]
        q_, k_, v_ = grouped(q, groups) * (scale * LOG2_E), keys_first(k), keys_first(v)
        out = q_.new_zeros(batch, groups, heads // groups, num_queries, v.shape[3])
        lse = q_.new_full(out.shape[:4], -torch.inf)
        for tile in pattern.tiles(num_queries, k.shape[1], batch * heads):
            if not tile.mask.shape[-1]:
                continue
            rows = slice(tile.start, tile.stop)
            scores = masked_scores(q_[:, :, :, rows], take(k_, tile.keys), tile.mask)
            # For a query that sees no key: exp(-inf - 0) = 0, but -inf - -inf would be NaN.
            largest = scores.amax(-1, keepdim=True)
            largest.masked_fill_(largest == -torch.inf, 0)
            p = scores.sub_(largest).exp2_()
            total = p.sum(-1, keepdim=True)
            lse[:, :, :, rows] = (largest + total.log2()).squeeze(-1) / LOG2_E
            out[:, :, :, rows] = rows_by_keys(p, take(v_, tile.keys)) / total.masked_fill(total == 0, 1)
        lse = lse.flatten(1, 2)
        result = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.pattern, ctx.scale = pattern, scale
        ctx.set_materialize_grads(False)
        return result, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_result: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_result is None and d_lse is None:
            return (None,) * 5
        q, k, v, result, lse = ctx.saved_tensors
        groups = k.shape[2]
        d_result = torch.zeros_like(result) if d_result is None else d_result
        q_, k_, v_ = grouped(q, groups) * (ctx.scale * LOG2_E), keys_first(k), keys_first(v)
        d_out = grouped(d_result, groups)
        delta = (d_out * grouped(result, groups)).sum(-1, keepdim=True)
        if d_lse is not None:  # of a score s, with probability p: p (d_p - delta) from the output, and p d_lse
            delta -= d_lse.unflatten(1, (groups, -1))[..., None]
        lse = lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (groups, -1))[..., None] * LOG2_E
        dq, dk, dv = torch.zeros_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
        for tile in ctx.pattern.tiles(q.shape[1], k.shape[1], q.shape[0] * q.shape[2]):
            if not tile.mask.shape[-1]:
                continue
            rows = slice(tile.start, tile.stop)
            q_tile, d_tile = q_[:, :, :, rows], d_out[:, :, :, rows]
            k_tile, v_tile = take(k_, tile.keys), take(v_, tile.keys)
            p = masked_scores(q_tile, k_tile, tile.mask).sub_(lse[:, :, :, rows]).exp2_()
            d_scores = rows_by_keys(d_tile, v_tile.mT).sub_(delta[:, :, :, rows]).mul_(p)
            dq[:, :, :, rows] = rows_by_keys(d_scores, k_tile)
            add(dk, tile.keys, d_scores.flatten(2, 3).mT @ q_tile.flatten(2, 3))
            add(dv, tile.keys, p.flatten(2, 3).mT @ d_tile.flatten(2, 3))
        dq = (dq * ctx.scale).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return dq.to(q.dtype), (dk / LOG2_E).transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), None, None


def grouped(x: Tensor, groups: int) -> Tensor:
    """(B, T, H, D) -> (B, G, H/G, T, D) in the accumulation dtype."""
    return x.to(accumulation_dtype(x)).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()


def keys_first(x: Tensor) -> Tensor:
    """(B, S, G, D) -> (B, G, S, D) in the accumulation dtype."""
    return x.to(accumulation_dtype(x)).transpose(1, 2).contiguous()


def rows_by_keys(x: Tensor, y: Tensor) -> Tensor:
    """(B, G, h, t, A) @ (B, G, A, C) -> (B, G, h, t, C), the heads of a group as rows of one product."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def masked_scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return rows_by_keys(q, k.mT).add_(torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf))
