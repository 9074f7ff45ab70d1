"""Random tokens: the control below which a method ranks nothing."""

from dataclasses import dataclass

import torch

from nsa.baselines.importance.draws import draws
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Method):
    """Attends to the query's own token and to others drawn at random, without replacement, anew for each query."""

    seed: int = 0

    name = "random"
    title = "random tokens"
    paper = "control"
    axes = Axes("token", "none", "uniform", "all")
    phases = ("prefill", "decode")
    stepwise = True
    formula = "k keys and values"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        one = view.of_one_head
        queries, keys = view.query_positions[:, None, :, None], one.positions.transpose(1, 2)[:, :, None]
        draw = (draws(one, self.seed) >> 7).float().masked_fill(queries == keys, torch.inf)  # 24 bits: fp32 is exact
        keep = top(draw.masked_fill(~one.visible, -torch.inf), self.budget.each(view.seen))
        return Plan.of(keep.expand(-1, view.k.shape[2], -1, -1))

    decode_select = prefill_select
