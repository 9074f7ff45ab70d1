"""vAttention as its authors released it: what its sampling does to the certificate can be measured."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

from nsa.baselines.method import Axes, State
from nsa.baselines.methods.vattention import VAttention
from nsa.baselines.plan import Estimate, Part, Plan, View
from nsa.ops.choose import mixed


@dataclass(frozen=True, kw_only=True)
class VAttentionReleased(VAttention):
    """One-sided z; drawn with replacement, per query head, from all tokens between sinks and window.

    Tokens drawn twice count once, and heavy hitters that are drawn count as themselves. The base sample, at least two
    tokens, only says how large the sample must be: it is drawn apart. ``bound`` and ``least`` do not apply.
    """

    name = "vattention_released"
    title = "vAttention (released code)"
    axes = Axes("token", "bounds of pages, and uniform sampling of all", "per query and head, by a one-sided z", "all")
    differs = "differs from the release because draws follow from positions, and only tokens of the samples are scored"
    formula = "k keys and values, union over the group of b sampled ones, keys of a base sample, 2 rows of D per page"
    small: ClassVar[dict[str, Any]] = {"page": 4, "window": 4}

    def decode_select(self, view: View, state: State) -> Plan | None:
        fixed, _, _, estimate = self._heavy(view, state)
        span = (view.seen - self.num_sinks - self.window)[:, None, None]  # (B, 1, 1)
        if int(span.max()) < 2:
            return Plan.of(view.visible, estimate)
        scores = view.scores()[:, :, 0]
        weight = (scores.double() - scores.amax(-1, keepdim=True)).exp()
        base = (span * self.base_share).long().clamp(min=2)
        slots, seen = self._drawn(view, span, 0), view.per_head(fixed)
        number = torch.arange(slots.shape[-1], device=slots.device)
        drawn = torch.where(number < base, slots, -1)
        values = weight.gather(-1, slots.clamp(min=0))
        mean = (values * (drawn >= 0)).sum(-1, keepdim=True) / base
        spread = ((values - mean).square() * (drawn >= 0)).sum(-1, keepdim=True) / (base - 1)
        total = torch.where(seen, weight, 0).sum(-1, keepdim=True)
        total = total + torch.where(_distinct(drawn, scores), weight, 0).sum(-1, keepdim=True) * span / base
        z = NormalDist().inv_cdf(1 - self.delta)
        need = (z * spread.sqrt().clamp(min=1e-8) * span / (self.epsilon * total).clamp(min=1e-8)) ** 2
        size = torch.minimum(need.clamp(min=1), span.clamp(min=1).double()).long()
        sampled = _distinct(torch.where(number < size, self._drawn(view, span, 1), -1), scores)
        sampled = torch.where(span < 2, view.per_head(view.visible)[:, :, 0], sampled) & ~seen
        log_weight = torch.where(span < 2, 0, (span / size).log())[..., None]
        rows = len(view.q) * view.k.shape[2]
        read = float(view.per_group(_distinct(drawn, scores)).any(2).sum()) / rows * view.k.shape[3]
        estimate = estimate + Estimate(read, float(base.double().mean()) * view.group)
        return Plan((Part(fixed[:, :, None]), Part(sampled[:, :, None], log_weight=log_weight)), estimate=estimate)

    def _drawn(self, view: View, span: Tensor, stream: int) -> Tensor:
        """(B, H, draws) int64: slots, drawn with replacement between sinks and window, in the order of the draws."""
        number = torch.arange(int(span.max()), device=span.device)
        head = torch.arange(view.q.shape[2], device=span.device)[:, None]
        place = mixed(number * 1_000_003 + head * 65_537 + stream) + view.query_positions[:, None] * 31_337
        place = mixed(mixed(place) + self.seed * 7919 + view.layer * 104_729) % span.clamp(min=1)
        place = place + self.num_sinks + (view.k.shape[1] - view.seen)[:, None, None]
        return place.clamp(max=view.k.shape[1] - 1)


def _distinct(slots: Tensor, scores: Tensor) -> Tensor:
    """Slots (B, H, n), -1 for none, as a mask of the shape of ``scores`` (B, H, S)."""
    counts = torch.zeros_like(scores, dtype=torch.int64)
    return counts.scatter_add_(-1, slots.clamp(min=0), (slots >= 0).long()) > 0
