"""What the tests of methods share: random layers, and sessions over them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa.baselines import Budget, Method, Session, Turn

HEADS, GROUPS, WIDTH, LAYERS = 4, 2, 16, 3


@dataclass
class Inputs:
    """Queries (B, T, H, D), keys and values (B, T, G, D) of each layer, rotated by their positions."""

    layers: list[tuple[Tensor, Tensor, Tensor]]
    turn: Turn

    def cut(self, start: int, stop: int) -> list[tuple[Tensor, ...]]:
        return [tuple(x[:, start:stop] for x in layer) for layer in self.layers]

    def row(self, number: int, start: int = 0) -> "Inputs":
        return Inputs([tuple(x[number : number + 1, start:] for x in layer) for layer in self.layers], self.turn)


def inputs(
    tokens: int, *, batch: int = 2, layers: int = LAYERS, groups: int = GROUPS, seed: int = 0, scale: float = 2.0
) -> Inputs:
    """Random ones. The keys have some structure, so that attention is neither flat nor one token."""
    dice = torch.Generator().manual_seed(seed)
    turn = Turn(10000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH))
    positions = torch.arange(tokens).expand(batch, tokens)
    made = []
    for _ in range(layers):
        q, k, v = (torch.randn(batch, tokens, n, WIDTH, generator=dice) for n in (HEADS, groups, groups))
        made.append((turn(q * scale, positions), turn(k, positions), v))
    return Inputs(made, turn)


def run(
    method: Method,
    given: Inputs,
    *,
    prompt: int,
    chunks: Sequence[int] = (),
    padding: Tensor | None = None,
    decode: bool = True,
    **options: Any,
) -> tuple[list[Tensor], Session]:
    """Outputs of each layer (B, T, H, D): a prompt of so many tokens, in ``chunks`` or whole, the rest decoded."""
    session = Session(method, len(given.layers), turn=given.turn, **options)
    session.begin(padding)
    outs: list[list[Tensor]] = [[] for _ in given.layers]

    def step(start: int, stop: int) -> None:
        for layer, (q, k, v) in enumerate(given.cut(start, stop)):
            outs[layer].append(session.attend(layer, q, k, v, WIDTH**-0.5))

    borders = [0, *chunks, prompt]
    for start, stop in itertools.pairwise(borders):
        if stop < prompt:
            with session.more_to_come():
                step(start, stop)
        else:
            step(start, stop)
    session.end_prompt()
    if decode:
        for token in range(prompt, given.layers[0][0].shape[1]):
            step(token, token + 1)
    return [torch.cat(parts, 1) for parts in outs], session


def full(kind: type[Method], **settings: Any) -> Method:
    """The method with a budget that leaves nothing out."""
    method = kind(budget=Budget(share=1.0), **{**kind.small, **settings})
    return replace(method, **{kind.knob[0]: kind.knob[2]}) if kind.knob else method


def half(kind: type[Method], tokens: int = 16) -> Method:
    """The method with a budget that leaves much out: ``tokens``, or a knob in the middle."""
    method = kind(budget=Budget(tokens=tokens), **kind.small)
    return replace(method, **{kind.knob[0]: (kind.knob[1] + kind.knob[2]) / 2}) if kind.knob else method
