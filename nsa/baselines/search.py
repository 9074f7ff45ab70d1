"""Settings of a method that are found once, offline, on one sample: a pattern or a budget for each KV head.

session = Session(Calibration(find=partial(best_patterns, budget=Budget(tokens=1024))), num_layers, turn=turn)
...  # one forward pass over the sample
method = MInference(budget=Budget(tokens=1024), patterns=found(session))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa.baselines.attention import attend
from nsa.baselines.budget import Budget
from nsa.baselines.importance.patterns import CANDIDATES, Pattern
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.methods.dense import Dense
from nsa.baselines.methods.dual_chunk import dual_chunk_parts
from nsa.baselines.methods.minference import MInference
from nsa.baselines.methods.qwen_1m import Qwen1M
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


def refined(view: View, method: Qwen1M, *, threshold: float = 0.9, growth: float = 1.5) -> tuple[float, ...]:
    """For each KV head of a layer the factor of its budget at which ``threshold`` of the mass is kept.

    Sparsity refinement (arXiv 2501.15383, algorithm 1): while a head keeps less, its budget grows by ``growth``. The
    mass is exp(LSE of what is kept - LSE of all), both at dual chunk positions, mean over all queries of the sample.

    Raises:
        ValueError: ``threshold`` is not in (0, 1], or ``growth`` is not above 1.
    """
    if not 0 < threshold <= 1 or growth <= 1:
        raise ValueError(f"threshold must be in (0, 1] and growth above 1, got {threshold:g} and {growth:g}")
    whole = attend(view, Plan(dual_chunk_parts(view, method.chunk, method.local)))[1]
    factors = [1.0] * view.k.shape[2]
    while True:
        trial = replace(method, factors=(tuple(factors),) * view.num_layers)
        kept = recall(view, attend(view, trial.prefill_select(view, State()))[1], whole)
        grows = (kept < threshold) & (trial.size(view) < view.seen[:, None]).any(0)
        if not grows.any():
            return tuple(factors)
        factors = [f * growth if more else f for f, more in zip(factors, grows.tolist(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Calibration(Method):
    """Attention as ``under`` has it, while ``find`` looks at each layer of a prompt: see `found`. Not in the list.

    Attributes:
        find: of one layer's view. under: a method that is dense in keys.
    """

    find: Callable[[View], Any]
    under: Method = Dense()  # noqa: RUF009 - frozen

    name = "calibration"
    title = "dense attention that is looked at"
    paper = "ours"
    axes = Axes("none", "none", "all", "all")
    phases = ()
    formula = "reads all keys and values"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        return self.under.prefill_select(view, state)

    def decode_select(self, view: View, state: State) -> Plan | None:
        return self.under.decode_select(view, state)

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
