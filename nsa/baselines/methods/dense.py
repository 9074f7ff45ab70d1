"""Dense attention: the control that everything is compared with."""

from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View

GIVEN = "given"  # in the state of `DenseForOthers`


class Dense(Method):
    """Attends to all tokens, in every phase."""

    name = "dense"
    title = "dense attention"
    paper = "arXiv 1706.03762"
    axes = Axes("none", "none", "all", "all")
    phases = ()
    formula = "reads all keys and values"


class DenseForOthers(Dense):
    """Keeps what the layers were given with the prompt, for sessions that go on from it (`Session.follow`)."""

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        if view.prompt:
            state.rest[GIVEN] = view
