"""Sink and window: the control that looks at no content."""

from dataclasses import dataclass

from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Plan, View


@dataclass(frozen=True, kw_only=True)
class SinkWindow(Method):
    """Attends to the first ``num_sinks`` tokens and the most recent ones; positions stay as they are."""

    num_sinks: int = 4

    name = "sink_window"
    title = "sink and window"
    paper = "control; the mask of StreamingLLM (arXiv 2309.17453) without its positions"
    axes = Axes("token", "position", "uniform", "all")
    phases = ("prefill", "decode")
    stepwise = True
    formula = "k keys and values, sinks included"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        budget = self.budget.each(view.seen, least=self.num_sinks + 1)[..., None]
        one = view.of_one_head
        sinks = (one.positions < self.num_sinks).transpose(1, 2)[:, :, None]
        keep = sinks | (one.distance < budget - self.num_sinks)
        return Plan.of(keep.expand(-1, view.k.shape[2], -1, -1))

    decode_select = prefill_select
