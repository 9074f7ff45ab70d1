"""TOVA: the cache as a multi-state RNN that drops the token with the least attention of the last query."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.importance.observed import cost, probabilities
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class Tova(Method):
    """Keeps the tokens with the most attention of the last query, mean over all heads of the layer, as in the paper.

    So all heads of a layer keep the same tokens. Attention in the prompt is dense. The budget is what a decoded query
    attends to, its own token included.
    """

    name = "tova"
    title = "TOVA (token omission via attention)"
    paper = "arXiv 2401.06104, section 3.2"
    axes = Axes("token", "attention probabilities of the last query, mean over the layer's heads", "uniform", "evicts")
    phases = ("decode",)
    licence = "not looked at: from the paper"
    formula = "k keys and values; the prompt's last query is scored twice"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        return Plan.all(view, cost(view, view.query_positions[:, -1:])) if view.last else None

    def decode_select(self, view: View, state: State) -> Plan | None:
        return Plan.all(view)

    def evict(self, view: View, state: State) -> Tensor | None:
        if view.prompt and not view.last:
            return None
        room = self.budget.each(view.seen + 1, least=2) - 1  # the next query's own token is in the budget
        last = torch.tensor([view.q.shape[1] - 1], device=view.q.device)
        mass = probabilities(view, last).mean(1)  # (B, 1, S)
        kept = top(mass.masked_fill(view.positions[:, None, :, 0] < 0, -torch.inf), room[..., 0])
        return kept.transpose(1, 2).expand(view.positions.shape)
