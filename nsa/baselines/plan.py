"""What queries attend to: the one form in which every method hands over its choice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """A part as lists, for kernels: row r has the ``counts[r]`` units ``members[starts[r] : starts[r] + counts[r]]``.

    starts, counts: (B, N, R) int64. members: (total,) int32, ascending within a row.
    """

    starts: Tensor
    members: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Part:
    """Keys that are attended to, by rows of ``tile`` queries and units of ``unit`` keys.

    Attributes:
        keep: (B, N, R, U) bool. N is G (all heads of a KV head share the choice) or H (each query head has its own).
            R = ceil(T / tile), U = ceil(S / unit); a size of 1 in R stands for all rows. Keys after the query, and
            empty slots, are left out whatever it says.
        log_weight: broadcastable to (B, N, T, S), added to the scores: log(1 / p) of a key that was drawn with
            probability p, a temperature's offset; None: 0.
        query_at: (B, T) int64, positions at which these queries are rotated instead of their own; None: their own.
        key_at: (B, S, G) int64, the same for keys.
    """

    keep: Tensor
    unit: int = 1
    tile: int = 1
    log_weight: Tensor | None = None
    query_at: Tensor | None = None
    key_at: Tensor | None = None

    def mask(self, rows: Tensor, num_keys: int) -> Tensor:
        """(B, N, len(rows), S) bool: which keys the queries ``rows`` (int64 indices) attend to."""
        row = rows // self.tile if self.keep.shape[2] > 1 else torch.zeros_like(rows)
        keep = self.keep[:, :, row]
        return keep.repeat_interleave(self.unit, -1)[..., :num_keys] if self.unit > 1 else keep

    def lists(self) -> Lists:
        """The same, as lists of units."""
        counts = self.keep.sum(-1)
        starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
        return Lists(starts, self.keep.nonzero()[:, -1].int(), counts)


@dataclass(frozen=True)
class Terms:
    """Values that stand for many keys each, such as those of a cluster, in the same softmax.

    scores: (B, H, T, N) fp32, log of the weight of each; -inf: none. values: (B, G, N, Dv).
    size: elements read for each term, per KV head.
    """

    scores: Tensor
    values: Tensor
    size: int


@dataclass(frozen=True)
class Estimate:
    """What choosing has cost, beside the keys attended to; counted from the tensors that were read.

    read: elements read from memory per sequence and KV head, for these queries together, in the width of the cache
        (4-bit numbers count a quarter). pairs: products of a query head with a key or with what stands for keys, per
        sequence and KV head, in units of a whole key. resident: elements kept beside the cache, likewise.
    """

    read: float = 0.0
    pairs: float = 0.0
    resident: float = 0.0

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.read + other.read, self.pairs + other.pairs, self.resident + other.resident)


@dataclass(frozen=True)
class Plan:
    """What T queries attend to.

    Attributes:
        parts: sets of keys, of one softmax. A key counts once; in several parts it has the same position and weight.
        terms: see `Terms`.
        blend: (share, value): share (B, H, T) of the output, the rest is value (B, G, Dv) or (B, T, G, Dv).
        estimate: what choosing has cost.
    """

    parts: tuple[Part, ...]
    terms: Terms | None = None
    blend: tuple[Tensor, Tensor] | None = None
    estimate: Estimate = Estimate()

    @classmethod
    def of(cls, keep: Tensor, estimate: Estimate = Estimate(), *, unit: int = 1, tile: int = 1) -> "Plan":
        """A plan of one part: see `Part`."""
        return cls((Part(keep, unit, tile),), estimate=estimate)

    @classmethod
    def all(cls, view: "View", estimate: Estimate = Estimate()) -> "Plan":
        """All that is visible, of what the cache still has."""
        return cls.of((view.positions >= 0).transpose(1, 2)[:, :, None], estimate)


@dataclass(frozen=True)
class View:
    """What a layer's attention sees: T new queries and all keys that are kept, those of the queries included.

    A slot is a place in the cache. Slots are in the order of their positions. After an eviction the KV heads of a
    layer may keep different tokens, then some slots of some heads are empty.

    Attributes:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); q and k are rotated to their positions.
        query_positions: (B, T) int64, of each query in its sequence; -1: padding.
        positions: (B, S, G) int64, of each key; -1: the slot is empty, or padding.
        seen: (B,) int64, tokens of each sequence so far, evicted ones included.
        scale: factor of the scores.
        layer, num_layers: which layer this is, from 0.
        prompt: whether these are queries of the prompt. last: its last ones, if the prompt comes in chunks.
        turn: rotates by positions; None: the model has no rotary embedding, or not one that can be turned.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_positions: Tensor
    positions: Tensor
    seen: Tensor
    scale: float
    layer: int
    num_layers: int
    prompt: bool
    last: bool
    turn: "Turn | None" = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[2] // self.k.shape[2]

    @cached_property
    def visible(self) -> Tensor:
        """(B, G, T, S) bool: keys at or before each query."""
        return self.visible_to(torch.arange(self.q.shape[1], device=self.q.device))

    @cached_property
    def whole(self) -> bool:
        """Whether these are all tokens of their sequences: a prompt in one piece, without padding or an eviction."""
        same = self.prompt and self.q.shape[1] == self.k.shape[1]
        return same and bool((self.query_positions >= 0).all() & (self.positions >= 0).all())

    @property
    def of_one_head(self) -> "View":
        """With the positions of the first KV head alone: what a method needs that never tells the heads apart."""
        return replace(self, positions=self.positions[..., :1])

    def visible_to(self, rows: Tensor) -> Tensor:
        """(B, G, len(rows), S) bool, for the queries ``rows`` (int64 indices)."""
        keys = self.positions.transpose(1, 2)[:, :, None]
        return (keys >= 0) & (keys <= self.query_positions[:, None, rows, None])

    @property
    def age(self) -> Tensor:
        """(B, G, S) int64: how many tokens there are from each key on, itself included; senseless for empty slots."""
        return self.seen[:, None, None] - self.positions.transpose(1, 2)

    @property
    def distance(self) -> Tensor:
        """(B, G, T, S) int64: how far back each key is; senseless where not visible."""
        return self.query_positions[:, None, :, None] - self.positions.transpose(1, 2)[:, :, None]

    def scores(self, rows: Tensor | None = None) -> Tensor:
        """(B, H, T, S) fp32, -inf where not visible. ``rows``: of these queries (int64 indices) only."""
        if rows is None:
            rows = torch.arange(self.q.shape[1], device=self.q.device)
        return score(self.q[:, rows], self.k, self.scale).masked_fill(~self.per_head(self.visible_to(rows)), -torch.inf)

    def per_head(self, x: Tensor) -> Tensor:
        """(B, G, ...) -> (B, H, ...)."""
        return x.repeat_interleave(self.group, 1) if x.shape[1] != self.q.shape[2] else x

    def per_group(self, x: Tensor) -> Tensor:
        """(B, H, ...) -> (B, G, g, ...)."""
        return x.unflatten(1, (self.k.shape[2], self.group))


def of_one_head(keep: Tensor) -> Tensor:
    """A mask (B, N, ...) of the first head alone, where it is an expanded one, the same for all; else as it is."""
    return keep[:, :1] if keep.stride(1) == 0 else keep


def of_few_heads(view: View, plan: Plan | None) -> tuple[View, Plan | None]:
    """For masks: a whole prompt and its plan for the first KV head alone, where all keep the same; else as they are."""
    if plan is None or not view.whole:
        return view, plan
    parts = tuple(replace(part, keep=of_one_head(part.keep)) for part in plan.parts)
    if any(part.keep.shape[1] != 1 for part in parts):
        return view, plan
    return view.of_one_head, replace(plan, parts=parts)


def score(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q (B, T, H, D) times k (B, S, G, D): (B, H, T, S) fp32."""
    groups = k.shape[2]
    grouped = q.float().unflatten(2, (groups, q.shape[2] // groups))
    return torch.einsum("btgjd,bsgd->bgjts", grouped, k.float()).flatten(1, 2) * scale


@dataclass(frozen=True)
class Turn:
    """Rotates queries and keys by positions, as the model's rotary embedding does.

    frequencies: (W,) fp32, radians per token; 2 W dims are rotated, the first of a head. interleaved: whether dims
    2i and 2i+1 are a pair; else i and i+W are.
    """

    frequencies: Tensor
    interleaved: bool = False

    def __call__(self, x: Tensor, by: Tensor) -> Tensor:
        """x (B, T, N, D) rotated by ``by`` (B, T) or (B, T, N) positions, which may be negative."""
        width = 2 * len(self.frequencies)
        if by.dim() == 2:
            by = by[..., None]
        angles = by[..., None].float() * self.frequencies.to(x.device)
        cos, sin = angles.cos(), angles.sin()
        part = x[..., :width].float()
        first, second = (part[..., 0::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        turned = first * cos - second * sin, second * cos + first * sin
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat([joined.to(x.dtype), x[..., width:]], -1)


def chosen_by_rows(view: View, heads: int, choose: Callable[[Tensor, int], Tensor], elements: int = 2**25) -> Tensor:
    """(B, heads, T, S) bool: what ``choose`` takes for some queries at a time, of the keys up to the last of them.

    Args:
        choose: (rows, keys) -> (B, heads, len(rows), keys) bool, for the queries ``rows`` (int64 indices). Slots are in
            the order of positions, so those behind the first ``keys`` come after these queries.
        elements: as for `row_blocks`.
    """
    batch, queries, keys = len(view.q), view.q.shape[1], view.k.shape[1]
    keep = torch.zeros(batch, heads, queries, keys, dtype=torch.bool, device=view.q.device)
    begin, before = 0, keys - queries
    for rows in row_blocks(view, elements):
        end = begin + len(rows)
        keep[:, :, begin:end, : before + end] = choose(rows, before + end)
        begin = end
    return keep


def row_blocks(view: View, elements: int = 2**25) -> Iterator[Tensor]:
    """Indices of the queries, so many at a time that their scores have at most ``elements`` elements."""
    batch, queries, heads, _ = view.q.shape
    size = max(1, elements // max(1, batch * heads * view.k.shape[1]))
    yield from torch.arange(queries, device=view.q.device).split(size)
