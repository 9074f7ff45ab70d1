"""SparQ as its authors released it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.method import Axes
from nsa.baselines.methods.sparq import SparQ
from nsa.baselines.plan import View


@dataclass(frozen=True, kw_only=True)
class SparQReleased(SparQ):
    """The release: ranks by scores summed over the group, and attends to the current token beside its budget."""

    name = "sparq_released"
    title = "SparQ (released code)"
    axes = Axes("token", "scores from r dims of the keys, summed over the group", "uniform", "all")
    differs = ""
    formula = "k + 1 keys and values, r of D elements of every key, a mean value"

    def ranked(self, view: View, scores: Tensor, share: Tensor) -> Tensor:
        return view.per_group(scores).sum(2)

    def recent(self, view: View, budget: Tensor) -> Tensor:
        return view.visible[:, :, 0] & (view.distance[:, :, 0] <= (budget * self.local).long())

    def count(self, budget: Tensor, view: View) -> Tensor:
        return torch.minimum(budget + 1, view.seen[:, None, None])[..., 0]
