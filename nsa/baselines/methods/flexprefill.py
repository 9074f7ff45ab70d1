"""FlexPrefill: per head and prompt either columns and diagonals or blocks, as many as a share of the mass needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.importance.agreement import divergence, mean_query_attention
from nsa.baselines.importance.blocks import of_tokens, pooled_attention
from nsa.baselines.importance.lines import column_mass, diagonal_mass, estimate_of, last_rows, lines, probabilities
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Plan, View
from nsa.ops.choose import cover, top


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """Columns and diagonals, each the fewest with the share ``gamma`` of the attention of the last block of queries;
    or, in heads whose attention by means of blocks is true to their attention, the fewest blocks with that share.

    The last block's attention, the means' and the divergence are of a KV head: mean over its query heads. The query's
    own token (in the other heads its block) is always in.

    Attributes:
        gamma: share of the mass, 1 is dense. tau: the square root of the Jensen-Shannon divergence (nats) below which
            a head takes blocks. block: tokens.
        min_budget: at least so many columns, and so many diagonals; or as many blocks, for each block of queries.
    """

    gamma: float = 0.95
    tau: float = 0.1
    block: int = 128
    min_budget: int = 1024

    name = "flexprefill"
    title = "FlexPrefill"
    paper = "arXiv 2502.20766, algorithms 1 to 4"
    axes = Axes(
        "column and diagonal, or block of 128",
        "attention of the last block of queries, or between means; mean over the group",
        "per head and prompt, by mass",
        "all",
    )
    phases = ("prefill",)
    causal = False  # the last queries choose for all
    chunkable = False
    licence = "Apache-2.0 (ByteDance-Seed/FlexPrefill)"
    differs = (
        "differs from the release because it follows the paper: the fewest with at least gamma, lines of tokens, "
        "blocks without lines beside them; and it chooses per KV head: see flexprefill_released"
    )
    formula = "prefill: keys and values of the lines or blocks, all keys once to choose; decoding is dense"
    knob = ("gamma", 0.5, 1.0)
    small = {"block": 16, "min_budget": 8, "tau": 0.2}  # noqa: RUF012 - never changed

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or self.tau < 0:
            raise ValueError(f"gamma must be in (0, 1], tau at least 0: got {self.gamma:g} and {self.tau:g}")
        if min(self.block, self.min_budget) < 1:
            raise ValueError(f"block and min_budget must be at least 1, got {self.block} and {self.min_budget}")

    def prefill_select(self, view: View, state: State) -> Plan | None:
        if self.gamma >= 1:
            return Plan.of(view.visible)
        rows = last_rows(view, self.block)
        attention = view.per_group(probabilities(view.scores(rows))).mean(2)
        columns, diagonals = column_mass(attention), diagonal_mass(attention)
        blocks, there = pooled_attention(view, self.block)
        blocks = view.per_group(blocks).mean(2)
        by_means = view.per_group(mean_query_attention(view, rows, self.block)).mean(2)
        distance = divergence(view, rows, by_means, columns, self.block)
        aware = (distance < self.tau)[..., None, None]

        some = (cover(x, self.gamma) | top(x, self.min_budget) for x in (columns, diagonals))
        on_columns, on_diagonals = some
        on_diagonals[..., 0] = True
        keep = cover(blocks.flatten(2), self.gamma).view_as(blocks)
        keep |= top(blocks, -(-self.min_budget // self.block))
        keep |= torch.eye(keep.shape[-1], dtype=torch.bool, device=keep.device)
        mask = torch.where(aware, of_tokens(view, keep, self.block), lines(view, on_columns, on_diagonals))
        return Plan.of(mask, self.cost(view, rows, there, aware))

    def cost(self, view: View, rows: Tensor, there: Tensor, aware: Tensor) -> Estimate:
        """The last queries', their mean's and, in heads that take blocks, the block means' products."""
        pairs = there.double().cumsum(2).mul(there).sum() / len(there) * aware.double().mean() * view.group
        return estimate_of(view, rows) + Estimate(pairs=float(pairs) + there.shape[2] * view.group)
