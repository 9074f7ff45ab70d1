"""SnapKV: at the end of a prompt its last queries say what stays."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.importance.observed import cost, pooled, window_sums
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class SnapKV(Method):
    """Keeps the tokens of the prompt with the most attention of its last ``window`` queries, smoothed, and these last.

    The budget is what stays of the prompt, the window included. What is decoded later is kept, too: it comes on top.

    Attributes:
        window: queries that are observed, and most recent tokens that stay, of these at most half of the budget.
        kernel, pooling: each score becomes the "avg" or "max" of so many neighbours; the kernel is odd.
        group: "mean" or "max" of the heads of a KV head, before the pooling. The mean, as in kvpress: keys are kept for
            all heads of the group, and the release's choice per query head keeps up to g times as many.
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    group: str = "mean"

    name = "snapkv"
    title = "SnapKV"
    paper = "arXiv 2404.14469, section 4.1"
    axes = Axes("token", "attention of the prompt's last queries, pooled, mean over the group", "uniform", "evicts")
    phases = ("decode",)
    differs = (
        "differs from the release because it chooses per KV head, where the release keeps a copy per query head, and "
        "because a budget below two windows keeps half of it as window, where the release stops"
    )
    licence = "not stated in the copy we saw: from the paper"
    formula = "k keys and values of the prompt and all decoded ones; the window's scores are computed twice"

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0 or self.window < 1:
            raise ValueError(f"{self.name}: the kernel must be odd and the window at least 1, got {self.settings()}")
        if self.pooling not in ("avg", "max") or self.group not in ("mean", "max"):
            raise ValueError(f"{self.name}: pooling is avg or max, group is mean or max, got {self.settings()}")

    def prefill_select(self, view: View, state: State) -> Plan | None:
        return Plan.all(view, cost(view, self._observed(view, state)[1])) if view.last else None

    def decode_select(self, view: View, state: State) -> Plan | None:
        return Plan.all(view)

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        if view.prompt and not view.last:  # the last chunk may be shorter than the window
            state.rest["queries"], state.rest["positions"] = self._observed(view, state)

    def evict(self, view: View, state: State) -> Tensor | None:
        if not (view.prompt and view.last):
            return None
        capacity = self.budget.each(view.seen, least=2)
        recent = (capacity // 2).clamp(max=self.window)
        old = (view.positions >= 0).transpose(1, 2) & (view.age > recent)
        sums = window_sums(view, *self._observed(view, state), self.group)
        state.rest.clear()
        scores = pooled(sums.masked_fill(~old, 0.0), self.kernel, self.pooling).masked_fill(~old, -torch.inf)
        return (~old | top(scores, self.counts(view, scores, capacity, recent))).transpose(1, 2)

    def counts(self, view: View, scores: Tensor, capacity: Tensor, recent: Tensor) -> Tensor:
        """Tokens that are chosen beside the ``recent`` ones, (B, 1) or (B, G) int64.

        scores: (B, G, S), -inf: not to be chosen. capacity, recent: (B, 1, 1).
        """
        return (capacity - recent)[..., 0]

    def _observed(self, view: View, state: State) -> tuple[Tensor, Tensor]:
        """The last queries of the prompt so far, (B, W, H, D), and their positions (B, W)."""
        q, positions = view.q, view.query_positions
        if state.rest:
            q = torch.cat([state.rest["queries"], q], 1)
            positions = torch.cat([state.rest["positions"], positions], 1)
        return q[:, -self.window :], positions[:, -self.window :]
