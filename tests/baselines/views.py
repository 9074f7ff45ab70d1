"""One layer's view, for tests of one method, and the words that loop definitions are written in."""

import math
from dataclasses import replace
from typing import Any

import torch
from sessions import GROUPS, HEADS, WIDTH, inputs
from torch import Tensor

from nsa.baselines import Method, View
from nsa.baselines.attention import kept
from nsa.baselines.method import State

GROUP, SCALE = HEADS // GROUPS, WIDTH**-0.5


def view_of(tokens: int, *, batch: int = 1, seed: int = 0, scale: float = 2.0, **changes: Any) -> View:
    """A whole prompt of random tokens; ``changes``: fields of the view."""
    given = inputs(tokens, batch=batch, layers=1, seed=seed, scale=scale)
    q, k, v = given.layers[0]
    place = torch.arange(tokens).expand(batch, tokens)
    slots, seen = place[..., None].expand(-1, -1, GROUPS), torch.full((batch,), tokens)
    view = View(q, k, v, place, slots, seen, SCALE, 0, 1, True, True, given.turn)
    return replace(view, **changes)


def mask_of(method: Method, view: View) -> Tensor:
    """(N, T, S) bool of the only sequence."""
    return kept(view, method.prefill_select(view, State()), torch.arange(view.q.shape[1]))[0]


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the highest; ties to the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]
