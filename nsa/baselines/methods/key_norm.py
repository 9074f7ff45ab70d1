"""Key norm: the cache keeps the keys with the smallest L2 norm, whatever any query looks at."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Method):
    """Keeps, in each KV head, the tokens whose keys have the smallest L2 norm; recent ones have no place of their own.

    A rotary embedding changes no norm, so it does not matter where keys are rotated. Attention in the prompt is dense.
    The budget is what a decoded query attends to, its own token included.
    """

    name = "key_norm"
    title = "key norm (L2)"
    paper = "arXiv 2406.11430, section 3"
    axes = Axes("token", "norm of the key", "uniform", "evicts")
    phases = ("decode",)
    differs = (
        "differs from the release because it goes on evicting while it decodes, where the release compresses what a "
        "pass has left, once. The paper's layers 0 and 1 are dense: give them as dense layers"
    )
    licence = "none in the copy we saw: from the paper"
    formula = "k keys and values; one norm per token is made once, and is resident"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        return Plan.all(view, Estimate(pairs=view.q.shape[1], resident=view.k.shape[1]))

    decode_select = prefill_select

    def evict(self, view: View, state: State) -> Tensor | None:
        if view.prompt and not view.last:
            return None
        room = self.budget.each(view.seen + 1, least=2) - 1  # the next query's own token is in the budget
        there = (view.positions >= 0).transpose(1, 2)
        small = -view.k.float().norm(dim=-1).transpose(1, 2)
        return top(small.masked_fill(~there, -torch.inf), room[..., 0]).transpose(1, 2)
