"""Random tokens: the control below which a method ranks nothing."""

from dataclasses import dataclass

from torch import Tensor

from nsa.baselines.importance.draws import seed_of
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View, chosen_by_rows
from nsa.baselines.prompt import on_gpu
from nsa.ops.choose import drawn

DRAWS = 2**27  # of query heads and keys, that are looked at together on a GPU


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
        budget, seed = self.budget.each(view.seen)[:, 0], seed_of(view, self.seed)

        def choose(rows: Tensor, num_keys: int) -> Tensor:
            return drawn(view.query_positions[:, rows], view.positions[:, :num_keys, 0], seed, budget)[:, None]

        keep = chosen_by_rows(view, 1, choose, DRAWS) if on_gpu(view) else chosen_by_rows(view, 1, choose)
        return Plan.of(keep.expand(-1, view.k.shape[2], -1, -1))

    decode_select = prefill_select
