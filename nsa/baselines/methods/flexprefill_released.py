"""FlexPrefill as its authors' code does it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.importance.agreement import divergence, mean_query_attention
from nsa.baselines.importance.blocks import by_blocks, num_blocks, pooled_attention, summed
from nsa.baselines.importance.lines import column_mass, diagonal_mass, last_rows, probabilities
from nsa.baselines.method import State
from nsa.baselines.methods.flexprefill import FlexPrefill
from nsa.baselines.plan import Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class FlexPrefillReleased(FlexPrefill):
    """As the authors' code does it: per query head, in blocks, the mass below ``gamma`` instead of above."""

    name = "flexprefill_released"
    title = "FlexPrefill as released"
    paper = "ByteDance-Seed/FlexPrefill, get_active_blocks, of arXiv 2502.20766"
    axes = FlexPrefill.axes._replace(unit="block of 128", importance="as flexprefill, per query head")
    differs = (
        "differs from the paper because the release does: columns and diagonals become tokens // 128 + 1 blocks, "
        "whatever the block is; those with at most gamma of the mass count; heads that take blocks have min_budget "
        "blocks of columns and of diagonals beside them; up to max(2 blocks, min_budget) tokens are dense. Not taken "
        "over: a mask that outlives the block size, a batch of one"
    )
    formula = "prefill: keys and values of the union of the group's blocks, all keys once; decoding is dense"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        if self.gamma >= 1:
            return Plan.of(view.visible)
        rows, blocks = last_rows(view, self.block), num_blocks(view, self.block)
        attention = probabilities(view.scores(rows))
        columns, diagonals = column_mass(attention), diagonal_mass(attention)
        by_means = mean_query_attention(view, rows, self.block)
        aware = divergence(view, rows, by_means, columns, self.block) < self.tau
        gamma = self.gamma * (view.query_positions[:, rows] >= 0).sum(1)[:, None, None]
        least = -(-self.min_budget // self.block)

        def counted(mass: Tensor) -> Tensor:
            covered = (mass.sort(dim=-1, descending=True, stable=True).values.cumsum(-1) <= gamma).sum(-1) + 1
            return torch.where(aware, least, (covered // 128 + 1).clamp(min=least)).clamp(max=blocks)

        # Diagonals come in blocks from the farthest on, so the nearest block may be a part of one.
        place = view.seen[:, None] - 1 - torch.arange(view.k.shape[1], device=view.k.device)
        place = place[..., None].expand(-1, -1, columns.shape[1])
        slots = view.positions[..., :1].expand_as(place)
        by_column = summed(columns.transpose(1, 2), slots, self.block, blocks)
        by_diagonal = summed(diagonals.transpose(1, 2), place, self.block, blocks)
        back = (-(-view.seen // self.block) - 1)[:, None] - torch.arange(blocks, device=view.k.device)
        by_diagonal = by_diagonal.gather(2, back.clamp(min=0)[:, None].expand_as(by_diagonal))
        by_diagonal = by_diagonal.masked_fill((back < 0)[:, None], -torch.inf)
        by_column[..., 0] = by_diagonal[..., 0] = torch.inf
        on_column, on_diagonal = top(by_column, counted(columns)), top(by_diagonal, counted(diagonals))

        number = torch.arange(blocks, device=view.k.device)
        keep = on_diagonal[:, :, (number[:, None] - number).clamp(min=0)] | on_column[:, :, None]
        means, there = pooled_attention(view, self.block)
        ordered, order = means.flatten(2).sort(dim=-1, descending=True, stable=True)
        limit = self.gamma * there.sum(2)
        below = torch.zeros_like(ordered, dtype=torch.bool).scatter_(2, order, ordered.cumsum(-1) <= limit)
        keep |= below.view_as(means) & aware[..., None, None]
        # Two blocks are all kept here, and those of min_budget tokens; the release leaves such prompts dense at once.
        return Plan((by_blocks(view, keep, self.block),), estimate=self.cost(view, rows, there, aware))
