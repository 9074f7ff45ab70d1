"""MInference's vertical-slash pattern in the form of its kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.importance.lines import block_lines, crossed_blocks, estimate_of, last_rows
from nsa.baselines.method import State
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.plan import Part, Plan, View
from nsa.baselines.prompt import by_kernels, mask_of


@dataclass(frozen=True, kw_only=True)
class VerticalSlashBlocks(VerticalSlash):
    """As `VerticalSlash`, in the form of the release's kernel: whole blocks along the diagonals, and more keys."""

    block: int = 64

    name = "vertical_slash_blocks"
    title = "MInference, vertical-slash by blocks"
    axes = VerticalSlash.axes._replace(unit="column and block of 64 along diagonals")
    formula = "prefill: k keys and values and the rest of the blocks that diagonals cross; decoding is dense"
    small = {**VerticalSlash.small, "block": 8}  # noqa: RUF012 - never changed

    def prefill_select(self, view: View, state: State) -> Plan | None:
        """A whole prompt's plan is a part of blocks and one of columns: no mask has queries times keys."""
        if not view.whole or self.size(view).min() >= view.seen.max():
            return super().prefill_select(view, state)
        rows = last_rows(view, self.num_queries)
        columns, diagonals = self.by_kernels(view) if by_kernels(view) else self.chosen(view, self.scores(view, rows))
        number = torch.arange(-(-view.q.shape[1] // self.block), device=view.q.device)
        back = number[:, None] - number
        blocks = crossed_blocks(diagonals, self.block)[:, :, back.clamp(min=0)]
        parts = Part(blocks, unit=self.block, tile=self.block), Part(columns[:, :, None])
        return Plan(parts, estimate=estimate_of(view, rows))

    def by_kernels(self, view: View) -> tuple[Tensor, Tensor]:
        """As `chosen`, of a whole prompt: all sequences have the same budget."""
        verticals, slashes = (int(number[0, 0]) for number in self.split(view))
        chosen = ops.vertical_slash_lines(
            view.q, view.k, num_columns=verticals, num_diagonals=slashes, num_queries=self.num_queries,
            num_initial=self.sinks, num_near=self.near, scale=view.scale,
        )  # fmt: skip
        columns, diagonals = (mask_of(numbers, view.k.shape[1]) for numbers in chosen)
        return columns, diagonals

    def tokens(self, view: View, columns: Tensor, diagonals: Tensor) -> Tensor:
        return block_lines(view, columns, diagonals, self.block)
