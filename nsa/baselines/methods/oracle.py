"""Oracles: the choice by the true attention. They cost a pass of dense scores, and bound what a ranking can do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Part, Plan, View, chosen_by_rows, row_blocks
from nsa.baselines.prompt import by_kernels
from nsa.ops.choose import cover, top

MASSES = 2**26  # of query heads and keys, that are looked at together by kernels


def true_mass(view: View, rows: Tensor | None = None) -> Tensor:
    """(B, G, T, S) fp32: attention probabilities of each key, mean over the query heads of a KV head."""
    return view.per_group(view.scores(rows).softmax(-1).nan_to_num_(0)).mean(2)  # NaN: such as padding, sees nothing


def scored(view: View) -> Estimate:
    """What the scores of all pairs cost: all keys are read."""
    pairs = float((view.query_positions + 1).clamp(min=0).double().sum() / len(view.q)) * view.group
    return Estimate(read=pairs / view.group * view.k.shape[3], pairs=pairs)


@dataclass(frozen=True, kw_only=True)
class OracleTopK(Method):
    """Attends to the tokens with the highest true attention, summed over the heads of a KV head."""

    name = "oracle_topk"
    title = "oracle top-k"
    paper = "control"
    axes = Axes("token", "true attention probabilities, mean over the group", "uniform", "all")
    phases = ("prefill", "decode")
    stepwise = True
    formula = "k keys and values; not counted in its budget: all keys, which an oracle reads to choose"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        budget = self.budget.each(view.seen)
        return _chosen(view, lambda mass: top(mass, budget))

    decode_select = prefill_select


@dataclass(frozen=True, kw_only=True)
class OracleTopP(Method):
    """Attends to the fewest tokens that have the share ``p`` of the true attention."""

    p: float = 0.95

    name = "oracle_topp"
    title = "oracle top-p"
    paper = "control"
    axes = Axes("token", "true attention probabilities, mean over the group", "per query, by mass", "all")
    phases = ("prefill", "decode")
    stepwise = True
    formula = "as many keys and values as hold the mass p"
    knob = ("p", 0.0, 1.0)

    def prefill_select(self, view: View, state: State) -> Plan | None:
        if self.p >= 1:
            return Plan((Part(view.visible),))
        return _chosen(view, lambda mass: cover(mass, self.p))

    decode_select = prefill_select


def _chosen(view: View, choose: Callable[[Tensor], Tensor]) -> Plan:
    """The keys that ``choose`` takes by the true mass of each query, (B, G, rows, keys); not visible: 0."""
    if not by_kernels(view):
        return Plan((Part(torch.cat([choose(true_mass(view, rows)) for rows in row_blocks(view)], 2)),))

    def choose_of(rows: Tensor, keys: int) -> Tensor:
        queries = slice(keys - len(rows), keys)
        return choose(ops.attention_mass(view.q[:, queries], view.k[:, :keys], scale=view.scale))

    return Plan((Part(chosen_by_rows(view, view.k.shape[2], choose_of, MASSES)),))
