"""Double-P: the best clusters token by token, the next ones as their means, the rest not at all."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nsa.baselines.importance.clusters import cluster, remember, tokens_of
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Part, Plan, Terms, View
from nsa.ops.top_p import nucleus


@dataclass(frozen=True, kw_only=True)
class DoubleP(Method):
    """Two-stage top-p over clusters of keys; sinks, the recent window and the tokens after it are exact.

    A cluster's mass is estimated as its size times the exponential of its mean key's score, never too much (Jensen),
    so its share of the true mass is not certain. What one head wants its group attends to.

    Attributes:
        p1: share of the estimated mass of all clusters that is attended to at all; at least p2. p2: share that is
            attended to token by token. relative: p2 is of what p1 left, not of all clusters (the paper leaves it open).
        cluster_size: tokens of a cluster on average. iterations, segment: of k-means. num_sinks, recent: tokens outside
            clusters. refresh: so many tokens after the recent window make clusters of their own.
    """

    p1: float = 0.95
    p2: float = 0.7
    relative: bool = False
    num_sinks: int = 4
    recent: int = 64
    cluster_size: int = 16
    iterations: int = 10
    segment: int = 8192
    refresh: int = 1024

    name = "double_p"
    title = "Double-P"
    paper = "arXiv 2602.05191, sections 3 and 4: from the paper, no code found; k-means as in RetroInfer"
    axes = Axes("cluster of 16 on average", "size-weighted score of the mean key", "per query, by mass", "all")
    phases = ("decode",)
    licence = "no code found"
    formula = (
        "sinks, window and tokens of S2, Dv elements per cluster of S1 without S2, D + 1 per cluster; k-means once"
    )
    knob = ("p2", 0.0, 1.0)
    small: ClassVar[dict[str, Any]] = {"recent": 8, "cluster_size": 4}

    def __post_init__(self) -> None:
        if not 0 <= self.p1 <= 1 or not 0 <= self.p2 <= 1:
            raise ValueError(f"p1 and p2 must be in [0, 1], got {self.p1:g} and {self.p2:g}")
        if min(self.cluster_size, self.iterations, self.segment, self.refresh, self.recent) < 1 or self.num_sinks < 0:
            raise ValueError("sizes of clusters, segments and windows, and iterations, must be at least 1")

    def prefill_select(self, view: View, state: State) -> Plan | None:
        """Attention of the prompt is dense; its end pays for the clusters."""
        if not view.last:
            return None
        return Plan.of(view.positions.transpose(1, 2)[:, :, None] >= 0, self._add(view, state))

    def decode_select(self, view: View, state: State) -> Plan | None:
        more = Estimate()
        until = state.rest.get("until")
        if until is None or bool((view.seen - until >= self.recent + self.refresh).any()):
            more = self._add(view, state)
        means, sums, sizes, labels = (state.rest[n] for n in ("means", "sums", "sizes", "labels"))
        there = (sizes > 0).transpose(1, 2)  # (B, G, C)
        q = view.q[:, 0].float().unflatten(1, (view.k.shape[2], view.group))
        mass = torch.einsum("bgjd,bcgd->bgjc", q, means) * view.scale + sizes.log().transpose(1, 2)[:, :, None]
        share = torch.nan_to_num(mass.softmax(-1))
        first = nucleus(share, max(self.p1, self.p2), there[:, :, None])
        second = nucleus(share * first if self.relative else share, self.p2, first)
        some, exact = first.any(2), second.any(2)
        rough = (some & ~exact)[:, :, None]
        number = float(there.double().sum((1, 2)).mean()) / there.shape[1]
        width, wide = view.k.shape[3], view.v.shape[3]
        held = number * (width + wide + 1) + float(view.seen.double().mean())  # and the label of each token
        terms = Terms(
            mass.masked_fill(~rough, -torch.inf).flatten(1, 2)[:, :, None],
            (sums / sizes.clamp(min=1)[..., None]).transpose(1, 2),
            wide,
        )
        estimate = Estimate(number * (width + 1), number * view.group, held) + more
        return Plan((Part(tokens_of(view, exact, labels)),), terms, estimate=estimate)

    def _add(self, view: View, state: State) -> Estimate:
        """Cluster the tokens that are in no cluster yet, up to the recent window; later on ``refresh`` at once."""
        until = state.rest.get("until")
        start = torch.full_like(view.seen, self.num_sinks) if until is None else until
        stop = torch.maximum(start, view.seen - self.recent)
        stop = torch.where(stop - start >= (0 if until is None else self.refresh), stop, start)
        made = cluster(view, start, stop, size=self.cluster_size, iterations=self.iterations, segment=self.segment)
        remember(state, made, start, stop)
        tokens = float((stop - start).double().mean())
        return Estimate(tokens * view.k.shape[3] * self.iterations, made.products)
