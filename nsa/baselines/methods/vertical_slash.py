"""MInference's vertical-slash pattern: columns and diagonals by the attention of the last queries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.importance.lines import (
    column_mass,
    diagonal_mass,
    estimate_of,
    first_and_near,
    last_rows,
    lines,
    probabilities,
)
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(Method):
    """All queries attend to the columns and the diagonals that have most of the last queries' attention.

    Of the budget, ``vertical_share`` are columns, the rest are diagonals. ``sinks`` first columns and ``near``
    diagonals come first, inside the budget; if it has no room for all, the earliest and the nearest: the diagonal
    itself is always in. Probabilities of the heads of a KV head are summed.

    Attributes:
        num_queries: how many last queries are looked at.
        vertical_share: in (0, 1). The release's pattern of all heads has 1000 columns and 6096 diagonals.
    """

    num_queries: int = 64
    vertical_share: float = 1000 / 7096
    sinks: int = 30
    near: int = 100

    name = "vertical_slash"
    title = "MInference, vertical-slash"
    paper = "arXiv 2407.02490, section 3.2 and algorithm 2"
    axes = Axes("column and diagonal", "attention of the last 64 queries, sum over the group", "uniform", "all")
    phases = ("prefill",)
    causal = False  # the last queries choose for all
    chunkable = False
    licence = "MIT (microsoft/MInference)"
    differs = (
        "differs from the release because it chooses per KV head, not per query head; never takes more lines than its "
        "budget (the release: at least 30 columns and 50 diagonals); with fewer than 100 diagonals it takes the "
        "nearest, where the release picks any of 100 infinities and may drop the diagonal itself"
    )
    formula = "prefill: at most k keys and values, all keys once for the last queries; decoding is dense"
    small = {"num_queries": 16, "vertical_share": 0.5, "sinks": 2, "near": 2}  # noqa: RUF012 - never changed

    def __post_init__(self) -> None:
        if not 0 < self.vertical_share < 1:
            raise ValueError(f"vertical_share must be in (0, 1), got {self.vertical_share:g}")

    def prefill_select(self, view: View, state: State) -> Plan | None:
        rows = last_rows(view, self.num_queries)
        columns, diagonals = self.chosen(view, self.scores(view, rows))
        return Plan.of(self.tokens(view, columns, diagonals), estimate_of(view, rows))

    def scores(self, view: View, rows: Tensor) -> Tensor:
        """(B, H, R, S) fp32 of the last queries, by which lines are chosen."""
        return view.scores(rows)

    def size(self, view: View) -> Tensor:
        """(B, G or 1) int64: lines of each KV head."""
        return self.budget.each(view.seen, least=2)[..., 0]

    def split(self, view: View) -> tuple[Tensor, Tensor]:
        """How many columns and diagonals, (B, G or 1) int64 each."""
        size, seen = self.size(view), view.seen[:, None]
        verticals = torch.minimum((self.vertical_share * size).round().long().clamp(min=1), size - 1)
        return torch.where(size >= seen, seen, verticals), torch.where(size >= seen, seen, size - verticals)

    def tokens(self, view: View, columns: Tensor, diagonals: Tensor) -> Tensor:
        return lines(view, columns, diagonals)

    def chosen(self, view: View, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The columns by slot and the diagonals by distance, (B, G, S) bool each."""
        attention = view.per_group(probabilities(scores)).sum(2)
        first, near = first_and_near(view, self.sinks, self.near)
        verticals, slashes = self.split(view)
        empty = (view.positions < 0).transpose(1, 2)
        mass = column_mass(attention).masked_fill(first, torch.inf).masked_fill(empty, -torch.inf)
        return top(mass, verticals), top(diagonal_mass(attention).masked_fill(near, torch.inf), slashes)
