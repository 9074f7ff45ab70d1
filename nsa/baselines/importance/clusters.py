"""Clusters of keys: k-means as in RetroInfer (arXiv 2505.02922), whose index Double-P builds on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from nsa.baselines.method import State
from nsa.baselines.plan import View


@dataclass(frozen=True)
class Clusters:
    """C clusters of some tokens of each sequence and KV head.

    means (B, C, G, D) fp32: of the keys. sums (B, C, G, Dv) fp32: of the values. sizes (B, C, G) int64: tokens; 0:
    there is no such cluster. labels (B, M, G) int64: the number of each token's cluster from 1; 0: the token is in
    none. products: of a key with a centroid, per KV head, mean over the sequences.
    """

    means: Tensor
    sums: Tensor
    sizes: Tensor
    labels: Tensor
    products: float


def cluster(view: View, start: Tensor, stop: Tensor, *, size: int, iterations: int, segment: int) -> Clusters:
    """Cluster the tokens at positions ``start`` .. ``stop - 1`` (B,) int64 of each sequence, none of them evicted.

    ``size``: tokens of a cluster on average. Tokens of ``segment`` consecutive ones are clustered among themselves.
    ``labels`` are of the tokens from ``start`` on.
    """
    tokens = stop - start
    found = []
    for first in range(0, max(1, int(tokens.max())), segment):
        found.append(_segment(view, start + first, (tokens - first).clamp(max=segment), size, iterations))
    labels, before = [], 0
    for part in found:
        labels.append(torch.where(part.labels > 0, part.labels + before, 0))
        before += part.sizes.shape[1]
    means, sums, sizes = (torch.cat([getattr(part, n) for part in found], 1) for n in ("means", "sums", "sizes"))
    return Clusters(means, sums, sizes, torch.cat(labels, 1), sum(part.products for part in found))


def _segment(view: View, start: Tensor, tokens: Tensor, size: int, iterations: int) -> Clusters:
    """One run of ``tokens`` (B,) from ``start`` (B,) on; a sequence may have none (0 or less)."""
    number = torch.arange(max(1, int(tokens.max())), device=start.device)
    there = number < tokens[:, None]
    slot = (start + view.k.shape[1] - view.seen)[:, None] + number  # the last slot has the latest token
    slot = torch.where(there, slot, 0)
    keys, values = (x[torch.arange(len(x), device=x.device)[:, None], slot].float() for x in (view.k, view.v))
    real = there[..., None, None]
    mean = (keys * real).sum(1, keepdim=True) / tokens.clamp(min=1)[:, None, None, None]
    centred = (keys - mean) * real
    count = (-(-tokens // size)).clamp(min=0)
    centre = torch.arange(max(1, int(count.max())), device=start.device)
    exists = centre < count[:, None]
    first = torch.where(exists, centre * tokens[:, None] // count.clamp(min=1)[:, None], 0)  # spread evenly
    centroids = normalize(centred[torch.arange(len(first), device=first.device)[:, None], first], dim=-1)
    for step in range(iterations):
        scores = torch.einsum("bmgd,bcgd->bmgc", centred, centroids)
        scores = scores.masked_fill(~exists[:, None, None], -torch.inf)
        best = torch.where(scores == scores.amax(-1, keepdim=True), centre, len(centre)).amin(-1)  # ties: the first
        member = one_hot(best, len(centre)).float() * real
        sizes = member.sum(1).transpose(1, 2)
        if step < iterations - 1:
            total = torch.einsum("bmgc,bmgd->bcgd", member, centred)
            centroids = torch.where(sizes[..., None] > 0, normalize(total, dim=-1), centroids)
    means = torch.einsum("bmgc,bmgd->bcgd", member, keys) / sizes.clamp(min=1)[..., None]
    sums = torch.einsum("bmgc,bmgd->bcgd", member, values)
    products = float((count * tokens.clamp(min=0)).double().mean()) * iterations
    return Clusters(means, sums, sizes.long(), torch.where(there[..., None], best + 1, 0), products)


def remember(state: State, made: Clusters, start: Tensor, stop: Tensor) -> None:
    """Put clusters of the tokens ``start`` .. ``stop - 1`` (B,) beside those in ``state.rest``.

    There: means, sums and sizes of all clusters, ``labels`` (B, P, G) by position in the sequence, and ``until`` (B,),
    the position that clusters reach to.
    """
    rest = state.rest
    old = rest["sizes"].shape[1] if "sizes" in rest else 0
    labels = made.labels.new_zeros(len(start), max(1, int(stop.max())), made.labels.shape[2])
    if old:
        labels[:, : rest["labels"].shape[1]] = rest["labels"]
    where = start[:, None] + torch.arange(made.labels.shape[1], device=start.device)
    row = torch.arange(len(start), device=start.device)[:, None].expand_as(where)
    real = where < stop[:, None]
    labels[row[real], where[real]] = made.labels[real] + old
    for name in ("means", "sums", "sizes"):
        rest[name] = torch.cat([rest[name], getattr(made, name)], 1) if old else getattr(made, name)
    rest.update(labels=labels, until=stop)


def tokens_of(view: View, exact: Tensor, labels: Tensor) -> Tensor:
    """(B, G, 1, S) bool: tokens of the clusters ``exact`` (B, G, C), and those that are in no cluster."""
    where, labels = view.positions.transpose(1, 2), labels.transpose(1, 2)
    label = labels.gather(2, where.clamp(min=0, max=labels.shape[2] - 1))
    label = torch.where((where >= 0) & (where < labels.shape[2]), label, 0)
    return torch.where(label > 0, exact.gather(2, (label - 1).clamp(min=0)), True)[:, :, None]
