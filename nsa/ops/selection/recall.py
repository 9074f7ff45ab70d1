"""Lets a recomputed forward pass take the blocks that the first one chose.

Activation checkpointing runs a layer's forward pass again during the backward pass. The choice of blocks is its most
expensive integer: T x G x n numbers, a hundredth of the layer's activations, for a pass over all compressed scores; and
the recomputed pass must attend to the very blocks of the first. `contexts` is what torch.utils.checkpoint takes as
``context_fn``. (Its own selective checkpointing would do too, but intercepts every operator of the layer, at three
times the host's time: 14 ms against 6 per layer and step, measured on a CPU where the operators cost nothing.)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor

Choose = Callable[[], Tensor]

_handler: ContextVar[Callable[[Choose], Tensor] | None] = ContextVar("nsa_selection_handler", default=None)


def recalled(choose: Choose) -> Tensor:
    """``choose()``, or in a recomputed pass what it gave at this place in the first one."""
    handler = None if torch.compiler.is_compiling() else _handler.get()
    return choose() if handler is None else handler(choose)


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass, which keeps its choices, and for each recomputation of it, which is given them in order."""
    kept: list[Tensor] = []

    def keep(choose: Choose) -> Tensor:
        kept.append(choose())
        return kept[-1]

    return _Handling(lambda: keep), _Handling(lambda: _given(iter(kept)))


class _Handling(AbstractContextManager[None]):
    """May be entered again: a graph that is retained is recomputed each time."""

    def __init__(self, make: Callable[[], Callable[[Choose], Tensor]]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.token = _handler.set(self.make())

    def __exit__(self, *_: object) -> None:
        _handler.reset(self.token)


def _given(kept: Iterator[Tensor]) -> Callable[[Choose], Tensor]:
    return lambda _choose: next(kept)
