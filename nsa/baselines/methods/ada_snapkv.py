"""Ada-SnapKV: SnapKV whose heads compete for the budget of their layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.method import Axes
from nsa.baselines.methods.snapkv import SnapKV
from nsa.baselines.plan import View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class AdaSnapKV(SnapKV):
    """A KV head keeps as many tokens as it has among the best of all heads, drawn towards the mean by the safeguard.

    As the release: round(count * (1 - safeguard) + floor(safeguard * mean)). Rounding may miss the budget by less than
    a token per head. The budget is a mean over the KV heads of a layer.

    Attributes:
        safeguard: 1: each head keeps as many as SnapKV; 0: only the competition counts.
    """

    kernel: int = 7
    pooling: str = "max"
    safeguard: float = 0.2

    name = "ada_snapkv"
    title = "Ada-SnapKV"
    paper = "arXiv 2407.11550, algorithms 1 and 2"
    axes = Axes("token", "as SnapKV, maximum of neighbours", "per KV head, by the best of all heads", "evicts")
    differs = (
        "differs from the release because its optional weights of heads (normalize) are left out, and as SnapKV "
        "differs at budgets below two windows"
    )
    licence = "MIT"
    formula = "k keys and values of the prompt, mean over the heads, and all decoded ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"{self.name}: safeguard must be in [0, 1], got {self.safeguard:g}")

    def counts(self, view: View, scores: Tensor, capacity: Tensor, recent: Tensor) -> Tensor:
        mean = (capacity - recent)[..., 0]
        won = _best(scores, mean).sum(-1)
        floor = (mean * self.safeguard).floor()
        counts = (won * (1 - self.safeguard) + floor).round().long()
        return torch.where(capacity[..., 0] >= view.seen[:, None], mean, counts)  # a short prompt stays whole


@dataclass(frozen=True, kw_only=True)
class AdaSnapKVSafeguard(AdaSnapKV):
    """Each KV head keeps its own best ``safeguard`` share first; the rest goes to the best of all heads.

    The total is exact, and the kept scores are the most that this safeguard allows: never less than SnapKV's.
    """

    name = "ada_snapkv_safeguard"
    title = "Ada-SnapKV, safeguard first"
    paper = "arXiv 2407.11550, section 4.2, as in kvpress and sparse-frontier"
    differs = (
        "differs from the release because heads take their own share before they compete, as in kvpress and "
        "sparse-frontier: the release mixes counts and rounds them, so its total is not exact"
    )
    licence = "Apache-2.0 (kvpress, sparse-frontier)"

    def counts(self, view: View, scores: Tensor, capacity: Tensor, recent: Tensor) -> Tensor:
        mean = (capacity - recent)[..., 0]
        own = top(scores, (mean * self.safeguard).floor().long())
        return _best(scores.masked_fill(own, torch.inf), mean).sum(-1)


def _best(scores: Tensor, mean: Tensor) -> Tensor:
    """(B, G, S) bool: the best of all heads together, ``mean`` (B, 1) of them per head."""
    return top(scores.flatten(1), mean[:, 0] * scores.shape[1]).view_as(scores)
