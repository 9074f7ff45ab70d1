"""MInference: each head has the pattern that suits it best, found offline (`nsa.baselines.search`)."""

from dataclasses import dataclass

import torch

from nsa.baselines.importance.lines import lines, of_heads
from nsa.baselines.importance.patterns import Pattern, checked
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.methods.block_sparse import BlockSparse
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.plan import Estimate, Plan, View


class _AShape(VerticalSlash):
    """The first tokens and the nearest ones."""

    def prefill_select(self, view: View, state: State) -> Plan | None:
        first, near = self.split(view)
        positions = view.positions.transpose(1, 2)
        distance = torch.arange(view.k.shape[1], device=view.k.device)
        diagonals = (distance < near[..., None]).expand(positions.shape)
        return Plan.of(lines(view, (positions >= 0) & (positions < first[..., None]), diagonals))


@dataclass(frozen=True, kw_only=True)
class MInference(Method):
    """Each KV head has one of three patterns: vertical-slash, A-shape (first and nearest tokens) or block-sparse.

    Attributes:
        patterns: of each layer, of each KV head, (kind, columns, diagonals): the budget is divided in this proportion.
            (): all are vertical-slash with 1000 : 6096, the release's fixed pattern.
        block, num_queries, sinks, near: see `BlockSparse` and `VerticalSlash`.
    """

    patterns: tuple[tuple[Pattern, ...], ...] = ()
    block: int = 64
    num_queries: int = 64
    sinks: int = 30
    near: int = 100

    name = "minference"
    title = "MInference"
    paper = "arXiv 2407.02490, section 3 and algorithm 1"
    axes = Axes("column and diagonal, or block of 64", "by head: last queries, means, or position", "uniform", "all")
    phases = ("prefill",)
    causal = False
    chunkable = False
    licence = "MIT (microsoft/MInference)"
    differs = (
        "differs from the release because a pattern is one KV head's and all spend the same budget; the release's "
        "second search scores without the factor 1 / sqrt(d)"
    )
    formula = "prefill: k keys and values, and what the pattern of each KV head reads to choose; decoding is dense"
    small = {"num_queries": 16, "sinks": 1, "near": 1, "block": 8}  # noqa: RUF012 - never changed

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", checked(self.patterns))

    def prefill_select(self, view: View, state: State) -> Plan | None:
        batch, keys, groups, _ = view.k.shape
        keep = torch.zeros(batch, groups, view.q.shape[1], keys, dtype=torch.bool, device=view.k.device)
        rows, cost = torch.arange(view.q.shape[1], device=view.k.device), Estimate()
        patterns = self.of_layer(view)
        for pattern in dict.fromkeys(patterns):
            heads = [head for head, its in enumerate(patterns) if its == pattern]
            plan = self.method_of(pattern).prefill_select(of_heads(view, heads), state)
            assert plan is not None
            keep[:, heads] = plan.parts[0].mask(rows, keys)
            share = len(heads) / groups
            cost += Estimate(plan.estimate.read * share, plan.estimate.pairs * share)
        return Plan.of(keep, cost)

    def of_layer(self, view: View) -> tuple[Pattern, ...]:
        """The pattern of each KV head of a layer."""
        if not self.patterns:
            return (("vertical_slash", 1000, 6096),) * view.k.shape[2]
        if len(self.patterns) != view.num_layers or len(self.patterns[view.layer]) != view.k.shape[2]:
            raise ValueError(
                f"patterns are of {len(self.patterns)} layers with {len(self.patterns[0])} KV heads, the model has "
                f"{view.num_layers} with {view.k.shape[2]}: search them anew (nsa.baselines.search)"
            )
        return self.patterns[view.layer]

    def method_of(self, pattern: Pattern) -> Method:
        kind, columns, diagonals = pattern
        if kind == "block_sparse":
            return BlockSparse(budget=self.budget, block=self.block)
        method = _AShape if kind == "a_shape" else VerticalSlash
        share = columns / (columns + diagonals)
        lists = {"num_queries": self.num_queries, "sinks": self.sinks, "near": self.near}
        return method(budget=self.budget, vertical_share=share, **lists)
