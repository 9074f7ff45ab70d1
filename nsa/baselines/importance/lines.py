"""Columns and diagonals of the attention of the last queries: what MInference calls verticals and slashes."""

from dataclasses import replace

import torch
from torch import Tensor

from nsa.baselines.plan import Estimate, View


def last_rows(view: View, count: int) -> Tensor:
    """Indices of the last ``count`` queries."""
    return torch.arange(max(0, view.q.shape[1] - count), view.q.shape[1], device=view.q.device)


def probabilities(scores: Tensor) -> Tensor:
    """Softmax over the keys; 0 where a query sees nothing."""
    return scores.softmax(-1).nan_to_num(0.0)


def column_mass(attention: Tensor) -> Tensor:
    """Mass of each key: (B, H, R, S), of the last R queries -> (B, H, S)."""
    return attention.sum(2)


def diagonal_mass(attention: Tensor) -> Tensor:
    """Mass of each distance: (B, H, R, S), of the last R queries -> (B, H, S); number d is the keys d back."""
    rows, keys = attention.shape[2:]
    distance = torch.arange(keys, device=attention.device)
    key = (keys - rows + torch.arange(rows, device=attention.device))[:, None] - distance
    found = attention.gather(3, key.clamp(min=0).expand(attention.shape))
    return found.masked_fill(key < 0, 0).sum(2)


def lines(view: View, columns: Tensor, diagonals: Tensor) -> Tensor:
    """Keys on the chosen columns or diagonals: (B, N, S) each, by slot and by distance -> (B, N, T, S) bool."""
    distance = view.distance.clamp(0, diagonals.shape[-1] - 1)
    if distance.shape[1] != diagonals.shape[1]:
        distance = view.per_head(distance)
    on = diagonals[:, :, None].expand(*distance.shape[:3], -1).gather(3, distance)
    return on | columns[:, :, None]


def block_lines(view: View, columns: Tensor, diagonals: Tensor, block: int) -> Tensor:
    """As `lines`, but all of each block of ``block`` queries and keys that a chosen diagonal crosses."""
    either = crossed_blocks(diagonals, block)
    back = (view.query_positions // block)[:, None, :, None] - (view.positions // block).transpose(1, 2)[:, :, None]
    on = either[:, :, None].expand(*back.shape[:3], -1).gather(3, back.clamp(0, either.shape[-1] - 1))
    return on | columns[:, :, None]


def crossed_blocks(diagonals: Tensor, block: int) -> Tensor:
    """(B, N, U + 1) bool: how many blocks back the diagonals (B, N, S) bool cross, for U = ceil(S / block)."""
    blocks = -(-diagonals.shape[-1] // block) + 1
    # Diagonal d crosses the blocks that are d // block and ceil(d / block) back.
    ends = [(0, blocks * block - diagonals.shape[-1])]
    ends.append((block - 1, ends[0][1] - block + 1))
    crossed = [torch.nn.functional.pad(diagonals, end).unflatten(-1, (blocks, block)).any(-1) for end in ends]
    return crossed[0] | crossed[1]


def first_and_near(view: View, first: int, near: int) -> tuple[Tensor, Tensor]:
    """The columns of the first ``first`` tokens and the diagonals nearer than ``near``: (B, G, S) and (S,) bool.

    The columns are senseless for empty slots.
    """
    return (view.positions < first).transpose(1, 2), torch.arange(view.k.shape[1], device=view.k.device) < near


def estimate_of(view: View, rows: Tensor) -> Estimate:
    """What the attention of the queries ``rows`` costs: all keys are read once for the heads of a KV head."""
    pairs = float((view.query_positions[:, rows] + 1).clamp(min=0).double().sum() / len(view.q)) * view.group
    return Estimate(read=keys_once(view), pairs=pairs)


def keys_once(view: View) -> float:
    """Elements of all keys of a KV head, mean over sequences and heads."""
    return float((view.positions >= 0).double().sum() / (len(view.q) * view.k.shape[2])) * view.k.shape[3]


def of_heads(view: View, heads: list[int]) -> View:
    """What these KV heads and their query heads see."""
    q = view.q.unflatten(2, (view.k.shape[2], view.group))[:, :, heads].flatten(2, 3)
    return replace(view, q=q, k=view.k[:, :, heads], v=view.v[:, :, heads], positions=view.positions[:, :, heads])
