"""Quest: the pages whose keys can have the highest scores."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nsa.baselines.importance import pages
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class Quest(Method):
    """Attends to the current page and to as many others as fit into the budget, those with the highest bounds.

    Attributes:
        page: tokens of a page. over_group: how the query heads of a KV head agree on pages: "sum" of their bounds (a
            page that two heads want goes before one that a single head wants a little more), or "max". fp8: whether
            bounds are kept in 8 bits, rounded outwards (`nsa.ops.page_bounds`), which the paper does not do.
    """

    page: int = 16
    over_group: str = "sum"
    fp8: bool = False

    name = "quest"
    title = "Quest"
    paper = "arXiv 2406.10774, section 3.2, Algorithm 1"
    axes = Axes(
        "page of 16", "bound of q.k from the page's least and greatest keys, summed over the group", "uniform", "all"
    )
    phases = ("decode",)
    licence = "none seen in the repository: rewritten from the paper"
    differs = (
        "differs from the release because its kernels know no groups: there each query head has a KV head of its own. "
        "Its first two layers are dense: give them as dense layers"
    )
    formula = "k keys and values, the current page included, and 2 rows of D per page before it (with fp8 1)"
    small: ClassVar[dict[str, Any]] = {"page": 4}

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ValueError(f"a page must have at least 1 token, got {self.page}")
        if self.over_group not in ("sum", "max"):
            raise ValueError(f"bounds are joined over a group by sum or max, not {self.over_group!r}")

    def decode_select(self, view: View, state: State) -> Plan | None:
        pages.fold(view, state, self.page)
        current = (view.seen - 1) // self.page
        budget = self.budget.each(view.seen, least=self.page, overhead=self._overhead(view))[:, 0, 0]
        others = (budget - (view.seen - current * self.page)) // self.page
        chosen = pages.best(view, state, 1 + others, self.page, self.over_group, self.fp8)
        return Plan.of(pages.tokens_of(view, chosen, self.page), self._cost(view, current))

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        if view.prompt:
            pages.fold(view, state, self.page)

    def _overhead(self, view: View) -> float:
        width = view.k.shape[3]
        return self._row * width / self.page / (width + view.v.shape[3])

    @property
    def _row(self) -> float:
        """Rows of keys that the two bounds of a page take; keys have 16 bits."""
        return 1 if self.fp8 else 2

    def _cost(self, view: View, scored: Tensor) -> Estimate:
        """``scored``: (B, ...), pages whose bounds are read; a bound is two products."""
        number, width = float(scored.double().mean()), view.k.shape[3]
        held = float((-(-view.seen // self.page)).double().mean())
        return Estimate(self._row * width * number, 2 * view.group * number, self._row * width * held)


@dataclass(frozen=True, kw_only=True)
class QuestEval(Quest):
    """The release's evaluation: each query head has its own pages, at least three; the current one is not forced."""

    name = "quest_eval"
    title = "Quest (evaluation code)"
    axes = Axes("page of 16", "bound of q.k from the page's least and greatest keys, per query head", "uniform", "all")
    differs = (
        "differs from the release because a budget of all tokens keeps all pages: there the last is lost at lengths "
        "that are no multiple of 16. Its first two layers are dense: give them as dense layers"
    )
    formula = "union over the group of max(3, k // 16) pages per query head, and 2 rows of D per page (with fp8 1)"

    def decode_select(self, view: View, state: State) -> Plan | None:
        low, high = pages.rounded(pages.fold(view, state, self.page), self.fp8)
        budget = self.budget.each(view.seen, overhead=self._overhead(view))
        held = -(-view.seen // self.page)[:, None, None]
        count = torch.where(budget >= view.seen[:, None, None], held, (budget // self.page).clamp(min=3))
        chosen = top(pages.upper(view, low, high), count[..., 0])
        return Plan.of(pages.tokens_of(view, chosen, self.page), self._cost(view, held))
