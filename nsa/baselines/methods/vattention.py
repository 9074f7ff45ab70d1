"""vAttention: heavy hitters, and a sample of the rest that is as large as its certificate asks for."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nsa.baselines.budget import Budget
from nsa.baselines.importance import pages
from nsa.baselines.importance.draws import draws
from nsa.baselines.importance.sampling import BOUNDS, sample
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.methods.oracle import scored, true_mass
from nsa.baselines.plan import Estimate, Part, Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class VAttention(Method):
    """Attends to sinks, window and heavy hitters, and to tokens drawn from the rest, which stand for all of it.

    The denominator of attention is right to a share ``epsilon`` with probability 1 - ``delta``, per query head; a group
    shares its sample, as large as the head with the greatest need asks for. Drawn anew for each query, by a hash.

    Attributes:
        budget: of sinks, window and heavy hitters together; the sample comes on top. ranking: of heavy hitters, by
            "bounds" of pages (Quest) or by the "oracle", which reads all keys. bound: "clt", or valid for any number:
            "bernstein", "hoeffding", with the greatest bound of a page as the range. least, base_share: tokens, and
            share of the rest, in the base sample.
    """

    budget: Budget = Budget(share=0.05)  # noqa: RUF009 - frozen
    epsilon: float = 0.1
    delta: float = 0.1
    bound: str = "clt"
    ranking: str = "bounds"
    num_sinks: int = 4
    window: int = 32
    page: int = 16
    least: int = 64
    base_share: float = 0.01
    seed: int = 0

    name = "vattention"
    title = "vAttention (certified)"
    paper = "arXiv 2510.05688, sections 4.1 and 4.2, theorem 4.3 for the denominator"
    axes = Axes("token", "bounds of pages, and uniform sampling of the rest", "per query, by a certificate", "all")
    phases = ("decode",)
    licence = "MIT"
    differs = (
        "differs from the release because z is two-sided, the sample is drawn without replacement from what is not "
        "attended to anyway, and the base sample has at least 64 tokens: see vattention_released"
    )
    formula = "k keys and values, sinks and window included, b sampled ones, and 2 rows of D per page"
    knob = ("epsilon", 1.0, 0.0)
    small: ClassVar[dict[str, Any]] = {"page": 4, "window": 4, "least": 8}

    def __post_init__(self) -> None:
        if self.epsilon < 0 or not 0 < self.delta < 1:
            raise ValueError(f"epsilon must be at least 0, delta in (0, 1): got {self.epsilon:g} and {self.delta:g}")
        if self.bound not in BOUNDS or self.ranking not in ("bounds", "oracle"):
            raise ValueError(f"bound is one of {', '.join(BOUNDS)}; ranking is bounds or oracle")
        if min(self.num_sinks, self.base_share) < 0 or min(self.window, self.page, self.least) < 1:
            raise ValueError("window, page and base sample must have at least 1 token")

    def decode_select(self, view: View, state: State) -> Plan | None:
        fixed, residual, highest, estimate = self._heavy(view, state)
        size: dict[str, Any] = {"least": self.least, "share": self.base_share, "bound": self.bound, "ceiling": highest}
        scores, draw = view.scores()[:, :, 0], draws(view, self.seed)[:, :, 0]
        drawn = sample(scores, fixed, residual, draw, epsilon=self.epsilon, delta=self.delta, **size)
        weight = (drawn.whole / drawn.size.clamp(min=1)).log()[..., None]
        parts = Part(fixed[:, :, None]), Part(drawn.sampled[:, :, None], log_weight=weight)
        return Plan(parts, estimate=estimate)

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        if view.prompt:
            pages.fold(view, state, self.page)

    def _heavy(self, view: View, state: State) -> tuple[Tensor, Tensor, Tensor, Estimate]:
        """(B, G, S) bool: what is attended to in any case, and the rest; (B, H, 1): no score of the rest is higher."""
        low, high = pages.fold(view, state, self.page)
        bounds = pages.tokens_of(view, pages.upper(view, low, high), self.page)[:, :, 0]  # (B, H, S)
        visible, width = view.visible[:, :, 0], view.k.shape[3]
        number = float((-(-view.seen // self.page)).double().mean())
        estimate = Estimate(2 * width * number, 2 * view.group * number, 2 * width * number)
        if self.ranking == "oracle":
            estimate = (scored(view) + estimate) if self.bound != "clt" else scored(view)
        rank = view.per_group(bounds).sum(2) if self.ranking == "bounds" else true_mass(view)[:, :, 0]
        forced = ((view.positions < self.num_sinks).transpose(1, 2)) | (view.distance[:, :, 0] < self.window)
        overhead = 2 * width / self.page / (width + view.v.shape[3])
        budget = self.budget.each(view.seen, least=self.num_sinks + self.window, overhead=overhead)
        fixed = top(rank.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf), budget[..., 0])
        residual = visible & ~fixed
        highest = bounds.masked_fill(~view.per_head(residual), -torch.inf).amax(-1, keepdim=True)
        return fixed, residual, highest, estimate
