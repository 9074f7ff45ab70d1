"""Random tokens: the control below which a method ranks nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.importance.draws import draws
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View, chosen_by_rows
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
        one, budget = view.of_one_head, self.budget.each(view.seen)

        def choose(rows: Tensor, num_keys: int) -> Tensor:
            queries = view.query_positions[:, None, rows, None]
            keys = one.positions[:, :num_keys].transpose(1, 2)[:, :, None]
            draw = (draws(one, self.seed, rows, num_keys) >> 7).float()  # 24 bits: fp32 is exact
            draw = draw.masked_fill(queries == keys, torch.inf).masked_fill((keys < 0) | (keys > queries), -torch.inf)
            return top(draw, budget)

        return Plan.of(chosen_by_rows(view, 1, choose).expand(-1, view.k.shape[2], -1, -1))

    decode_select = prefill_select
