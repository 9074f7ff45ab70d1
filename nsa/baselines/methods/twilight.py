"""Twilight: of the tokens that another method chose, the fewest that have the share p of the attention."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nsa.baselines.attention import kept
from nsa.baselines.budget import Budget
from nsa.baselines.importance.quantised import forget_sketch, nucleus_of_sketch, quantised
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.methods.quest import Quest
from nsa.baselines.plan import Estimate, Plan, View, score
from nsa.ops.top_p import nucleus


@dataclass(frozen=True, kw_only=True)
class Twilight(Method):
    """Attends to the fewest candidates that have the share ``p`` of their attention, as seen through 4-bit keys.

    Attributes:
        budget: of the candidates. base: the method that chooses them, with this budget; only its choice counts, no
            mean values or weights. p: share of the attention to the candidates, per query head; a token that one head
            wants is attended to by its group, since it is read. bits: of a number of a key, to estimate; 16: the key.
    """

    budget: Budget = Budget(share=0.25)  # noqa: RUF009 - frozen
    base: Method = Quest()  # noqa: RUF009 - frozen
    p: float = 0.95
    bits: int = 4

    name = "twilight"
    title = "Twilight"
    paper = "arXiv 2502.02770, section 4, Algorithm 1"
    axes = Axes("token", "probabilities from 4-bit keys, among candidates", "per query and head, by mass", "all")
    phases = ("decode",)
    licence = "none in the repository: rewritten from the paper"
    differs = (
        "differs from the release because its Python code masks each query head; here a group shares the union, as in "
        "its kernels. Its first two layers are dense: give them as dense layers"
    )
    formula = "keys and values with the mass p, D / 4 + 2 elements per candidate, and what its base reads to choose"
    knob = ("p", 0.0, 1.0)
    small: ClassVar[dict[str, Any]] = {"base": Quest(page=4)}

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be in [0, 1], got {self.p:g}")
        if not 2 <= self.bits <= 16:
            raise ValueError(f"a number has 2 to 16 bits, got {self.bits}")
        if "decode" not in self.base.phases:
            raise ValueError(f"{self.base.name} chooses nothing while decoding: it gives no candidates")

    def decode_select(self, view: View, state: State) -> Plan | None:
        plan = replace(self.base, budget=self.budget).decode_select(view, state)
        first = torch.zeros(1, dtype=torch.int64, device=view.q.device)
        among = kept(view, plan, first)
        candidates = view.per_head(among)
        estimate = self._cost(view, candidates) + (plan.estimate if plan is not None else Estimate())
        if self.bits == 4 and among.shape[1] == view.k.shape[2] and view.k.shape[3] % 2 == 0:
            return Plan.of(nucleus_of_sketch(view, state, among[:, :, 0], self.p)[:, :, None], estimate)
        scores = score(view.q, quantised(view.k, self.bits), view.scale).masked_fill(~candidates, -torch.inf)
        chosen = nucleus(torch.nan_to_num(scores.softmax(-1)), self.p, candidates)
        return Plan.of(view.per_group(chosen).any(2), estimate)

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        self.base.observe(view, plan, state)

    def evict(self, view: View, state: State) -> Tensor | None:
        stays = replace(self.base, budget=self.budget).evict(view, state)
        if stays is not None:
            forget_sketch(state)
        return stays

    def _cost(self, view: View, candidates: Tensor) -> Estimate:
        rows = len(view.q) * view.k.shape[2]
        key = view.k.shape[3] * self.bits / 16 + 2 if self.bits < 16 else view.k.shape[3]  # with its least and its step
        read = float(view.per_group(candidates).any(2).sum()) / rows * key
        copy = float(view.seen.double().mean()) * key if self.bits < 16 else 0.0
        return Estimate(read, float(candidates.sum()) / rows, copy)
