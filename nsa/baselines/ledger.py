"""What attention has read, scored and kept, counted by looking at plans."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from nsa.baselines.attention import is_dense, kept
from nsa.baselines.plan import Plan, View, of_few_heads, row_blocks
from nsa.baselines.prompt import MASKED, pairs_of


@dataclass
class Counts:
    """Sums of one phase and layer, per KV head: fp64 tensors (G,).

    A pair is a query head with a key. Dense attention attends to all pairs that are visible.

    visible: pairs. attended: pairs. scored: pairs scored only to choose.
    dense_reads: elements of keys and values that dense attention reads. reads: those read here, with what choosing
        reads. A key is read once for all query heads of its KV head.
    dense_resident, resident: elements kept in memory after each call, for all tokens so far and as it was.
    """

    visible: Tensor
    attended: Tensor
    scored: Tensor
    dense_reads: Tensor
    reads: Tensor
    dense_resident: Tensor
    resident: Tensor

    @classmethod
    def zero(cls, groups: int) -> "Counts":
        return cls(*(torch.zeros(groups, dtype=torch.float64) for _ in fields(cls)))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Ledger:
    """Counts by phase ("prefill" or "decode") and layer.

    ``beside``: of what a layer attends to beside the method, such as other branches. ``ran``: where a plan was carried
    out.
    """

    counts: dict[tuple[str, int], Counts] = field(default_factory=dict)
    beside: dict[tuple[str, int], Counts] = field(default_factory=dict)
    ran: set[tuple[str, int]] = field(default_factory=set)

    def record(self, view: View, plan: Plan | None) -> None:
        """Count one call of attention; None: dense attention."""
        key = ("prefill" if view.prompt else "decode", view.layer)
        if plan is not None:
            self.ran.add(key)
        self.add(*key, _count(view, plan))

    def add(self, phase: str, layer: int, counts: Counts, *, beside: bool = False) -> None:
        """Count what was counted elsewhere."""
        key, into = (phase, layer), self.beside if beside else self.counts
        into[key] = into[key] + counts if key in into else counts

    def keep(self, view: View, stored: Tensor) -> None:
        """Count what is kept after a call. ``stored``: (B, G), tokens per sequence and KV head."""
        key = ("prefill" if view.prompt else "decode", view.layer)
        counts, width = self.counts[key], view.k.shape[3] + view.v.shape[3]
        *kept_here, seen = torch.cat([stored.sum(0), view.seen.sum()[None]]).tolist()  # one wait for a GPU
        counts.resident += torch.tensor(kept_here, dtype=torch.float64) * width
        counts.dense_resident += float(seen * width)

    def shares(self, layers: Iterable[int] | None = None, *, beside: bool = True) -> dict[str, float | None]:
        """What is spent, as shares of what dense attention spends; None: there was no such phase.

        reads: elements read while decoding. attended, scored: pairs while decoding. resident: elements kept while
        decoding. prefill: pairs attended to and scored in the prompt.

        Args:
            layers: of these only. beside: with what is attended to beside the method.
        """
        chosen = None if layers is None else set(layers)
        total: dict[str, Counts] = {}
        for (phase, layer), counts in [*self.counts.items(), *(self.beside.items() if beside else ())]:
            if chosen is None or layer in chosen:
                total[phase] = total[phase] + counts if phase in total else counts

        def share(phase: str, part: str, whole: str, extra: str = "") -> float | None:
            if phase not in total:
                return None
            counts = total[phase]
            spent = getattr(counts, part).sum() + (getattr(counts, extra).sum() if extra else 0)
            return float(spent / getattr(counts, whole).sum())

        return {
            "reads": share("decode", "reads", "dense_reads"),
            "attended": share("decode", "attended", "visible"),
            "scored": share("decode", "scored", "visible"),
            "resident": share("decode", "resident", "dense_resident"),
            "prefill": share("prefill", "attended", "visible", "scored"),
        }


def _count(view: View, plan: Plan | None) -> Counts:
    groups = view.k.shape[2]
    counts, width = Counts.zero(groups), view.k.shape[3] + view.v.shape[3]
    # Each query sees all tokens so far, if they are kept.
    seen = float((view.query_positions + 1).clamp(min=0).double().sum())
    counts.visible += seen * view.group
    counts.dense_reads += seen * width
    if is_dense(view, plan):
        counts.attended += counts.visible
        counts.reads += counts.dense_reads
    elif plan is not None and (pairs := pairs_of(view, plan)) is not None:
        pairs = pairs.sum(0).cpu()
        counts.attended += pairs * view.group
        counts.reads += pairs * width
    else:
        seeing, same = of_few_heads(view, plan)
        attended, read = [], []
        for rows in row_blocks(view, MASKED):
            mask = kept(seeing, same, rows)
            alone = mask.shape[1] in (1, groups)  # no query head has its own
            union = mask if alone else view.per_group(mask).any(2)
            pairs = mask.sum((0, 2, 3)).double()
            attended.append(pairs * view.group if alone else pairs.view(groups, -1).sum(1))
            read.append(union.sum((0, 2, 3)).double() * width)
        counts.attended += torch.stack(attended).sum(0).cpu()  # of one head: that of each
        counts.reads += torch.stack(read).sum(0).cpu()
    if plan is not None:
        batch = len(view.q)
        counts.scored += plan.estimate.pairs * batch
        counts.reads += plan.estimate.read * batch
        counts.resident += plan.estimate.resident * batch
        if plan.terms is not None:
            there = (plan.terms.scores > -torch.inf).double()
            counts.attended += view.per_group(there).sum((0, 2, 3, 4)).cpu()
            counts.reads += view.per_group(there).amax(2).sum((0, 2, 3)).cpu() * plan.terms.size
        if plan.blend is not None:
            counts.reads += float(batch * view.q.shape[1] * view.v.shape[3])
    return counts
