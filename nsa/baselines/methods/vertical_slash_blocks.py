"""MInference's vertical-slash pattern in the form of its kernel."""

from dataclasses import dataclass

from torch import Tensor

from nsa.baselines.importance.lines import block_lines
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.plan import View


@dataclass(frozen=True, kw_only=True)
class VerticalSlashBlocks(VerticalSlash):
    """As `VerticalSlash`, in the form of the release's kernel: whole blocks along the diagonals, and more keys."""

    block: int = 64

    name = "vertical_slash_blocks"
    title = "MInference, vertical-slash by blocks"
    axes = VerticalSlash.axes._replace(unit="column and block of 64 along diagonals")
    formula = "prefill: k keys and values and the rest of the blocks that diagonals cross; decoding is dense"
    small = {**VerticalSlash.small, "block": 8}  # noqa: RUF012 - never changed

    def tokens(self, view: View, columns: Tensor, diagonals: Tensor) -> Tensor:
        return block_lines(view, columns, diagonals, self.block)
