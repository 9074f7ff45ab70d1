"""What the tests of methods that choose while decoding share: each decoded query with its plan, and dense attention."""

import itertools
from typing import NamedTuple

import torch
from sessions import WIDTH, Inputs
from torch import Tensor

from nsa.baselines import Method, Plan, Session, View
from nsa.baselines.attention import kept
from nsa.baselines.method import State


class Step(NamedTuple):
    """One decoded query of one layer: out (B, H, D), mask (B, H, S) of the keys attended to."""

    view: View
    plan: Plan
    out: Tensor
    mask: Tensor


class Kept(Session):
    """A session that keeps what was planned."""

    last: tuple[View, Plan | None]

    def _watch(self, view: View, plan: Plan | None, lse: Tensor) -> None:
        self.last = view, plan


def decoded(
    method: Method, given: Inputs, prompt: int, padding: Tensor | None = None, chunks: tuple[int, ...] = ()
) -> tuple[list[Step], list[State]]:
    """All decoded queries of all layers, in order, and what the method remembers of each layer in the end."""
    session = Kept(method, len(given.layers), turn=given.turn, watch=("prefill", "decode"))
    session.begin(padding)
    steps: list[Step] = []
    tokens = given.layers[0][0].shape[1]
    borders = [0, *chunks, prompt, *range(prompt + 1, tokens + 1)]
    for start, stop in itertools.pairwise(borders):
        session.last_chunk = stop >= prompt
        for layer, (q, k, v) in enumerate(given.cut(start, stop)):
            out = session.attend(layer, q, k, v, WIDTH**-0.5)
            view, plan = session.last
            if not view.prompt:
                assert plan is not None
                mask = view.per_head(kept(view, plan, torch.arange(1)))[:, :, 0]
                steps.append(Step(view, plan, out[:, 0], mask))
        if stop >= prompt:
            session.end_prompt()
    return steps, session.states


def attention(step: Step, row: int, head: int, chosen: list[int]) -> Tensor:
    """Attention of one head to the slots ``chosen``, straight from the definition: (D,)."""
    view, group = step.view, step.view.group
    keys, values = view.k[row, chosen, head // group], view.v[row, chosen, head // group]
    return torch.softmax(keys @ view.q[row, 0, head] * view.scale, 0) @ values
