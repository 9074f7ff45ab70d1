"""LM-Infinite: a Lambda-shaped mask whose distances have a ceiling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Part, Plan, View


@dataclass(frozen=True, kw_only=True)
class LMInfinite(Method):
    """Attends to the first ``num_global`` tokens and to a window; further away than the window is as far as its end.

    The budget is both together, the query's own token included. A global token inside the window has its own distance;
    beyond it the query is rotated to the window's length and the key to 0.
    """

    num_global: int = 10

    name = "lm_infinite"
    title = "LM-Infinite"
    paper = "arXiv 2308.16137, section 4"
    axes = Axes("token", "position", "uniform", "evicts")
    phases = ("prefill", "decode")
    stepwise = True
    differs = (
        "differs from the release because the ceiling is always the window's length, and no middle tokens (its "
        "optional top 5) come back: they are evicted"
    )
    licence = "MIT"
    formula = "k keys and values, global tokens and own token included; k are resident"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        window = self._window(view)
        one, heads = view.of_one_head, (-1, view.k.shape[2], -1, -1)
        near = one.distance < window[..., None]
        first = (one.positions < self.num_global).transpose(1, 2)[:, :, None] & ~near
        ceiling, start = window[:, 0].expand_as(view.query_positions), torch.zeros_like(view.positions)
        return Plan((Part(near.expand(heads)), Part(first.expand(heads), query_at=ceiling, key_at=start)))

    decode_select = prefill_select

    def evict(self, view: View, state: State) -> Tensor | None:
        if self.budget.tokens is None and not view.last:
            return None  # a share of a prompt that is not over
        stays = (view.positions < self.num_global).transpose(1, 2) | (view.age <= self._window(view))
        return stays.transpose(1, 2)

    def _window(self, view: View) -> Tensor:
        """(B, 1, 1) int64. It is the same at all lengths, if the budget is a number of tokens."""
        if self.budget.full:
            return view.seen[:, None, None]
        tokens = view.seen.clamp(min=self.budget.tokens or 0)
        return self.budget.each(tokens, least=self.num_global + 1) - self.num_global
