"""Random tokens: the control below which a method ranks nothing."""

from dataclasses import dataclass

import torch

from nsa.baselines.choose import top
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View


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
        # A hash of (seed, layer, query, key): the same draw in a batch, alone, whole or token by token.
        queries = view.query_positions[:, None, :, None]
        keys = view.positions.transpose(1, 2)[:, :, None]
        draw = _mixed(_mixed(queries * 1_000_003 + keys) + self.seed * 7919 + view.layer * 104_729)
        draw = draw.double().masked_fill(queries == keys, torch.inf)
        return Plan.of(top(draw.masked_fill(~view.visible, -torch.inf), self.budget.each(view.seen)))

    decode_select = prefill_select


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Numbers of 31 bits that look random (the finaliser of MurmurHash3)."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF
