"""Hadamard sketches, short vectors whose products are those of long ones on average; and attention between them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.baselines.importance.blocks import summed
from nsa.baselines.plan import View


@cache
def hadamard_sketch(width: int, size: int, seed: int) -> Tensor:
    """(width, min(size, W)) fp32, the subsampled randomised Hadamard transform: x @ it is the sketch of x (..., width).

    Random signs, an orthonormal Hadamard matrix, ``size`` of its W coordinates without replacement (W: the power of
    two at or above ``width``), times sqrt(W / size). Products of two sketches are unbiased, their variance falls with
    1 / size, and with all coordinates they are exact.
    """
    full = 1 << (width - 1).bit_length()
    matrix = torch.ones(1, 1)
    while len(matrix) < full:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    size = min(size, full)
    dice = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width, 1), generator=dice) * 2 - 1
    # Columns are orthonormal after / sqrt(W); sqrt(W / size) brings it to / sqrt(size).
    return signs * matrix[:width, torch.randperm(full, generator=dice)[:size]] / size**0.5


def grow(kept: dict[str, Any], view: View, rows: Tensor, block: int, blocks: int, heads: int, matrix: Tensor) -> None:
    """Add new tokens to the sums of sketched blocks in ``kept``: queries and keys (B, N, U, k), counts (B, N, U, 1).

    ``rows`` (B, R) int64: the blocks of the new tokens. ``heads``: N, each the mean of as many heads as fall to it.
    """
    new = view.q.shape[1]
    place = (view.query_positions - rows[:, :1] * block).masked_fill(view.query_positions < 0, -1)
    place = place[..., None].expand(-1, -1, heads)
    parts = {"queries": view.q, "keys": view.k[:, -new:]}
    means = {name: x.float().unflatten(2, (heads, -1)).mean(3) @ matrix for name, x in parts.items()}
    means["counts"] = torch.ones(*place.shape, 1, device=place.device)
    for name, mean in means.items():
        local = summed(mean, place, block, rows.shape[1])
        old = kept.get(name, local[:, :, :0])
        index = rows[:, None, :, None].expand(local.shape)
        kept[name] = pad(old, (0, 0, 0, blocks - old.shape[2])).scatter_add(2, index, local)


def step(kept: dict[str, Any], rows: Tensor, scale: float, power: float, normalise: bool) -> Tensor:
    """Attention between block means to the ``power``, (B, N, U, U) fp64, with ``rows`` made anew from ``kept``."""
    counts, index = kept["counts"].clamp(min=1), rows[:, None, :, None]
    keys = kept["keys"] / counts
    queries = (kept["queries"] / counts).gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3]))
    hidden = torch.arange(keys.shape[2], device=rows.device) > index
    scores = ((queries @ keys.transpose(2, 3)).double() * scale).masked_fill(hidden, -torch.inf)
    # softmax(x)^s with rows that sum to 1 is softmax(s x).
    made = (scores * power).softmax(-1) if normalise else scores.softmax(-1) ** power
    old = kept.get("walk", made[:, :, :0, :0])
    grown = pad(old, (0, keys.shape[2] - old.shape[3], 0, keys.shape[2] - old.shape[2]))
    kept["walk"] = grown.scatter(2, index.expand(made.shape), made)
    return kept["walk"]


def looked_at(blocks: int, size: int, chained: bool) -> float:
    """Elements that a walk reads to choose: a sketch for each block; the layer's own step, if others came before."""
    return blocks * size + chained * blocks * (blocks + 1) / 2


def reached(
    shared: dict[str, Any], walk: Tensor, rows: Tensor, layer: int, direct: float, normalise: bool
) -> tuple[Tensor, bool]:
    """Rows of the walk through all layers so far, (B, N, R, U), and whether there were layers before this one.

    ``shared``: has them of the layer before, and gets this one's. ``walk``: (B, N, U, U), the layer's own step.
    ``direct``: the share of its own rows beside the product. Without ``normalise`` the rows of the product are scaled.
    """
    chained = shared.get("layer", layer) < layer
    reach = walk.gather(2, rows[:, None, :, None].expand(-1, walk.shape[1], -1, walk.shape[3]))
    if chained:
        reach = direct * reach + (1 - direct) * (shared["reach"] @ walk)
    if not normalise:
        reach = reach / reach.amax(-1, keepdim=True).clamp(min=1e-300)
    shared["layer"], shared["reach"] = layer, reach
    return reach, chained
