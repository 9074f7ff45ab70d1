"""StreamingLLM: attention sinks and a window, at the positions that they have in the cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Part, Plan, View


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Keeps the first ``num_sinks`` tokens and the most recent ones; distances are those between places in the cache.

    Keys of the window keep their distances to the query. So only the query is turned, for the sinks alone, to its
    place in the cache: no key is rotated again.

    The budget is what a query attends to, its own token and the sinks included (the chat path of the release, which
    evicts before a step). ``evict_after``: it is what is kept between the steps (the perplexity path, which evicts
    after a step): then a query attends to one token more.

    In a prompt each query attends to what it would, were it decoded.
    """

    num_sinks: int = 4
    evict_after: bool = False

    name = "streaming_llm"
    title = "StreamingLLM"
    paper = "arXiv 2309.17453, section 3.2"
    axes = Axes("token", "position", "uniform", "evicts")
    phases = ("prefill", "decode")
    stepwise = True
    differs = (
        "differs from the release because attention in a prompt is sparse: its chat path attends to a whole prompt "
        "densely and then evicts, which is another model in each phase"
    )
    licence = "MIT"
    formula = "k keys and values, sinks and own token included (k + 1 with evict_after); k are resident"

    def prefill_select(self, view: View, state: State) -> Plan | None:
        window = self._window(view) + int(self.evict_after)
        one, heads = view.of_one_head, (-1, view.k.shape[2], -1, -1)
        near = one.distance < window[..., None]
        sinks = (one.positions < self.num_sinks).transpose(1, 2)[:, :, None] & ~near
        place = torch.minimum(view.query_positions, self.num_sinks + window[:, 0] - 1)
        return Plan((Part(near.expand(heads)), Part(sinks.expand(heads), query_at=place)))

    decode_select = prefill_select

    def evict(self, view: View, state: State) -> Tensor | None:
        if self.budget.tokens is None and not view.last:
            return None  # a share of a prompt that is not over
        stays = (view.positions < self.num_sinks).transpose(1, 2) | (view.age <= self._window(view))
        return stays.transpose(1, 2)

    def _window(self, view: View) -> Tensor:
        return self.budget.each(view.seen, least=self.num_sinks + 1) - self.num_sinks
