"""Whether an arm reads what its plans leave out: other values there must not change what the model says.

The plans are those that the ledger counts. Values are changed, not keys, since choices follow from keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsa.baselines import Ledger, Method, Plan, Session, View
from nsa.baselines.attention import kept


def changes(open_reader: Callable[[Ledger], Any], method: Method, ids: Tensor) -> dict[str, list[float]]:
    """By how much a logit changes if values change, by phase: [those that the plans leave out, those attended to].

    The first must be 0, the second must not. In the prompt, where most tokens are attended to by some query, the last
    layer is looked at, for the last query: later layers would hand on what the others have read. So it is while
    decoding, if the cache evicts: then what went is changed before the prompt is thinned out. A phase in which nothing
    is left out is missing.

    Args:
        open_reader: a reader with the method put onto it, and a session, that counts into a ledger.
        ids: (1, T) int64, a prompt; its last token is decoded.
    """
    watched = _Watched()
    reader = open_reader(watched)

    def prompt(where: Tensor | None = None) -> Tensor:
        reader.begin()
        with _handed_over(reader.session, where):
            logits: Tensor = reader.read(ids[:, :-1])
        reader.end_prompt()
        return logits

    found: dict[str, list[float]] = {}
    after, last = prompt(), reader.session.num_layers - 1  # logits after the prompt
    of_prompt = _left_out(*watched.plans[last])
    if "decode" in method.phases:
        one = torch.tensor([0])
        clean = reader.take(one).read(ids[:, -1:])
        if method.axes.cache == "evicts":
            there = _by_position(watched.plans[last][0], ids.shape[1] - 1)
            parts = [] if there.all() else [~there, there]
            for where in parts:
                prompt(where)
                found.setdefault("decode", []).append(_far(reader.read(ids[:, -1:]), clean))
        else:
            plans = [_left_out(*watched.plans[layer]) for layer in range(last + 1)]
            numbers = range(2) if any(plan[0][:, :-1].any() for plan in plans) else ()
            for number in numbers:
                other = reader.take(one)
                for cache, plan in zip(other.session.caches, plans, strict=True):
                    where = plan[number][:, :-1]  # without the query's own token, which is not there yet
                    cache.values[where] = _other(cache.values)[where]
                found.setdefault("decode", []).append(_far(other.read(ids[:, -1:]), clean))
    if "prefill" in method.phases and of_prompt[0].any():
        found["prefill"] = [_far(prompt(where), after) for where in of_prompt]
    return found


@dataclass
class _Watched(Ledger):
    """A ledger that keeps the last plan of each layer that it has counted."""

    plans: dict[int, tuple[View, Plan | None]] = field(default_factory=dict)

    def record(self, view: View, plan: Plan | None) -> None:
        self.plans[view.layer] = view, plan
        super().record(view, plan)


@contextmanager
def _handed_over(session: Session, where: Tensor | None) -> Iterator[None]:
    """Within: the last layer hands over other values of the tokens ``where`` (1, T, G) bool; None: its own."""
    attend, last = session.attend, session.num_layers - 1

    def changed(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer == last and where is not None:
            v = torch.where(where[..., None], _other(v), v)
        return attend(layer, q, k, v, scale)

    session.attend = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del session.attend


def _left_out(view: View, plan: Plan | None) -> tuple[Tensor, Tensor]:
    """(1, S, G) bool each: slots that the last query does not attend to, and the others."""
    mask = kept(view, plan, torch.tensor([view.q.shape[1] - 1], device=view.q.device))[:, :, 0]
    read = mask if mask.shape[1] == view.k.shape[2] else view.per_group(mask).any(2)
    return ~read.transpose(1, 2), read.transpose(1, 2)


def _by_position(view: View, tokens: int) -> Tensor:
    """(1, tokens, G) bool: which tokens of the prompt each KV head still has."""
    where = torch.arange(tokens, device=view.positions.device)[None, :, None, None]
    return (view.positions[:, None] == where).any(2)


def _other(values: Tensor) -> Tensor:
    return values + (1 + values.abs().amax())


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().amax())
