"""H2O: heavy hitters, the tokens that had the most attention so far, and recent tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.importance.observed import column_sums, cost
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class H2O(Method):
    """Keeps the most recent tokens, and of the others those with the largest sum of attention probabilities.

    The sums are over all queries that saw a token and over the heads of a KV head. A sum, and not a mean of the
    group's ranks: the release sums probabilities too, and heads that share keys must share the choice. Attention in
    the prompt is dense; its sums come from a second pass over the scores, in linear memory.

    The budget is what a decoded query attends to, its own token included.

    Attributes:
        recent_share: of the budget, for the most recent tokens.
        normalise: rank by the mean over the queries that saw a token; sums favour early tokens.
    """

    recent_share: float = 0.5
    normalise: bool = False

    name = "h2o"
    title = "H2O (heavy-hitter oracle)"
    paper = "arXiv 2306.14048, algorithm 1"
    axes = Axes("token", "sum of attention probabilities so far, over the group", "uniform", "evicts")
    phases = ("decode",)
    differs = (
        "differs from the release because its evaluation code takes the sums from all rows of the attention matrix, "
        "those of later queries included, and its cache sums over the batch; the release keeps one recent token more"
    )
    licence = "none: from the paper"
    formula = "k keys and values; one sum per token is resident; the prompt's scores are computed twice"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        return Plan.all(view, cost(view, view.query_positions, resident=view.k.shape[1]))

    def decode_select(self, view: View, state: State) -> Plan | None:
        return Plan.all(view, Estimate(resident=view.k.shape[1]))

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        sums = column_sums(view).transpose(1, 2)
        state.slots = {"mass": state.slots["mass"] + sums if state.slots else sums}

    def evict(self, view: View, state: State) -> Tensor | None:
        if view.prompt and not view.last:
            return None
        room = self.budget.each(view.seen + 1, least=3) - 1  # the next query's own token is in the budget
        recent = (room.double() * self.recent_share).round().long()
        mass = state.slots["mass"].transpose(1, 2)
        if self.normalise:
            mass = mass / view.age
        old = (view.positions >= 0).transpose(1, 2) & (view.age > recent)
        heavy = top(mass.masked_fill(~old, -torch.inf), (room - recent)[..., 0])
        return (heavy | ~old).transpose(1, 2)
