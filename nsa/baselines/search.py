"""Settings of a method that are found once, offline, on one sample: a pattern or a budget for each KV head.

session = Session(Calibration(find=partial(best_patterns, budget=Budget(tokens=1024))), num_layers, turn=turn)
...  # one forward pass over the sample
method = MInference(budget=Budget(tokens=1024), patterns=found(session))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa.baselines.attention import attend
from nsa.baselines.budget import Budget
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.methods.minference import CANDIDATES, MInference, Pattern
from nsa.baselines.plan import Plan, View
from nsa.baselines.session import Session


def recall(view: View, lse: Tensor, whole: Tensor) -> Tensor:
    """(G,) fp64: mean attention mass that is kept, exp(lse - whole), of lse (B, H, T) over queries and heads."""
    real = (view.query_positions >= 0)[:, None]
    mass = torch.where(real, (lse - whole).exp(), 0.0).double().sum((0, 2)) / real.sum()
    return mass.view(view.k.shape[2], -1).mean(1)


def best_patterns(
    view: View, budget: Budget, candidates: Sequence[Pattern] = CANDIDATES, **settings: Any
) -> tuple[Pattern, ...]:
    """For each KV head of a layer the candidate that keeps most attention mass at this budget (MInference's search).

    Equal ones: the earlier candidate. ``settings``: others of `MInference`, such as its block.
    """
    whole = attend(view, None)[1]
    kept = []
    for pattern in candidates:
        patterns = ((pattern,) * view.k.shape[2],) * view.num_layers
        plan = MInference(budget=budget, patterns=patterns, **settings).prefill_select(view, State())
        kept.append(recall(view, attend(view, plan)[1], whole))
    table = torch.stack(kept)
    return tuple(candidates[table[:, head].tolist().index(table[:, head].max())] for head in range(table.shape[1]))


@dataclass(frozen=True, kw_only=True)
class Calibration(Method):
    """Dense attention, while ``find`` looks at each layer of a prompt. It is no method of the list: see `found`."""

    find: Callable[[View], Any]

    name = "calibration"
    title = "dense attention that is looked at"
    paper = "ours"
    axes = Axes("none", "none", "all", "all")
    phases = ()
    formula = "reads all keys and values"

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        if not view.prompt:
            return
        if not view.last or view.q.shape[1] != view.k.shape[1]:
            raise ValueError("a sample for calibration must come in one piece, not in chunks")
        state.shared.setdefault("found", {})[view.layer] = self.find(view)


def found(session: Session) -> tuple[Any, ...]:
    """What a session with `Calibration` has found, of each layer.

    Raises:
        ValueError: no prompt has run, or some layers were left dense.
    """
    results = session.states[0].shared.get("found", {})
    missing = [layer for layer in range(session.num_layers) if layer not in results]
    if missing:
        raise ValueError(f"nothing was found for the layers {missing}: run one prompt, with no layer left dense")
    return tuple(results[layer] for layer in range(session.num_layers))
