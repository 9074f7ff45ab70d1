"""SparQ: scores from the few dims in which the query is large."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nsa.baselines.importance.dims import add_values, largest_dims
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Part, Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class SparQ(Method):
    """Attends to the tokens with the highest approximate probabilities; the rest of the mass goes to a mean value.

    Attributes:
        dims: r, dims of the keys that are read. local: share of the budget that the latest tokens have in any case.
        temperature: divide approximate scores by the root of the share of the query that these dims have.
        mean_over: the mean value is over "all" tokens, as in the paper; over those "dropped", which is exact if their
            scores are equal; "": the mass that is left is not given to a mean value.
    """

    dims: int = 32
    local: float = 0.25
    temperature: bool = True
    mean_over: str = "all"

    name = "sparq"
    title = "SparQ"
    paper = "arXiv 2312.04985, section 4, Algorithm 1; groups as in its section on grouped queries"
    axes = Axes("token", "probabilities from r dims of the keys, summed over the group", "uniform", "all")
    phases = ("decode",)
    licence = "MIT"
    differs = (
        "differs from the release because that sums scores over the group, not probabilities, and attends to k + 1 "
        "tokens, the current one beside k: see sparq_released"
    )
    formula = "k keys and values, local ones and the current one included, r of D elements of every key, a mean value"
    small: ClassVar[dict[str, Any]] = {"dims": 8}

    def __post_init__(self) -> None:
        if self.dims < 1:
            raise ValueError(f"at least 1 dim must be read, got {self.dims}")
        if not 0 <= self.local <= 1:
            raise ValueError(f"the local share must be in [0, 1], got {self.local:g}")
        if self.mean_over not in ("all", "dropped", ""):
            raise ValueError(f"the mean value is over all or dropped, or '' for none, not {self.mean_over!r}")

    def decode_select(self, view: View, state: State) -> Plan | None:
        total = add_values(view, state)
        width, wide = view.k.shape[3], view.v.shape[3]
        dims = min(self.dims, width)
        scores = largest_dims(view, dims, temperature=self.temperature)
        share = scores.softmax(-1)
        budget = self.budget.each(view.seen, overhead=dims / (width + wide))
        rank = self.ranked(view, scores, share).masked_fill(self.recent(view, budget), torch.inf)
        keep = top(rank.masked_fill(~view.visible[:, :, 0], -torch.inf), self.count(budget, view))
        tokens = float(view.seen.double().mean())
        extra = wide if self.mean_over else 0
        estimate = Estimate(tokens * dims, tokens * dims / width * view.group, tokens * width + extra)
        if not self.mean_over:
            return Plan.of(keep[:, :, None], estimate)
        seen = view.seen[:, None, None].expand((*keep.shape[:2], 1))
        if self.mean_over == "dropped":
            total = total - torch.einsum("bgs,bsgd->bgd", keep.float(), view.v.float())
            seen = seen - keep.sum(-1, keepdim=True)
        mass = (share * view.per_head(keep)).sum(-1, keepdim=True)
        mass = torch.where(view.per_head(keep.sum(-1, keepdim=True)) == view.seen[:, None, None], 1, mass)
        return Plan((Part(keep[:, :, None]),), blend=(mass, total / seen.clamp(min=1)), estimate=estimate)

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        if view.prompt:
            add_values(view, state)

    def ranked(self, view: View, scores: Tensor, share: Tensor) -> Tensor:
        return view.per_group(share).sum(2)

    def recent(self, view: View, budget: Tensor) -> Tensor:
        return view.visible[:, :, 0] & (view.distance[:, :, 0] < (budget * self.local).long().clamp(min=1))

    def count(self, budget: Tensor, view: View) -> Tensor:
        return budget[..., 0]
