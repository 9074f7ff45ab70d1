"""Recomputation of layers in the backward pass, put on from outside of the model (arXiv 1604.06174)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nsa.layers.around import Around

KEPT_OF_TORCH = (torch.ops.aten._cudnn_attention_forward.default, torch.ops.aten._flash_attention_forward.default)


def checkpoint_layers(layers: nn.ModuleList, mode: str = "full") -> None:
    """Let the forward pass of each decoder layer run again in the backward pass.

    Args:
        mode: ``full`` keeps the inputs of a layer and what it chose to attend to; ``selective`` also the results of
            its attention kernels, which do not run again (the portable operators do).
    """
    for number, layer in enumerate(layers):
        layers[number] = Recomputed(layer, mode)


class Recomputed(Around):
    """A decoder layer whose forward pass runs again in the backward pass; ``mode``: as for `checkpoint_layers`."""

    def __init__(self, inside: nn.Module, mode: str) -> None:
        super().__init__(inside)
        layer: Any = inside
        kind = getattr(layer, "kind", None)  # None: the layer lies on another stage
        choices = [_keep_choice(layer.attention, path) for path in kind.choices] if kind else []
        expensive = kind.expensive if kind and mode == "selective" else ()
        self.contexts: Callable[[], Any] = partial(_contexts, choices, expensive)

    def forward(self, *inputs: Any, **others: Any) -> Any:
        # No layer draws random numbers, so there is no generator state to restore.
        return checkpoint(
            self.inside, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts, **others
        )


class KeptChoice(Around):
    """A module that chooses what a layer attends to, as integers without gradient.

    The choice is the most expensive integer of a layer: for NSA T x G x n numbers, a hundredth of the layer's
    activations, for a pass over all compressed scores. And the recomputed pass must attend to what the first one
    attended to. So it takes the choices of the first one, in their order. (Torch's selective checkpointing would do,
    but it intercepts every operator of the layer, at three times the host's time: 14 ms against 6 per layer and step,
    measured on a CPU where the operators cost nothing.)
    """

    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        self.kept: list[Tensor] | None = None  # in a first pass: its choices so far
        self.given: Iterator[Tensor] | None = None  # in a recomputed pass: the choices that are left

    def forward(self, *inputs: Any, **others: Any) -> Tensor:
        if self.given is not None:
            return next(self.given)
        choice = self.inside(*inputs, **others)
        if self.kept is not None:
            self.kept.append(choice)
        return choice


def _keep_choice(attention: nn.Module, path: str) -> KeptChoice:
    parent, _, child = path.rpartition(".")
    choice = KeptChoice(attention.get_submodule(path))
    setattr(attention.get_submodule(parent), child, choice)
    return choice


def _contexts(
    choices: Sequence[KeptChoice], expensive: Sequence[str]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of one forward pass, and of each recomputation of it: what torch.utils.checkpoint takes as ``context_fn``.

    Args:
        expensive: operators of torch.ops.nsa whose results are kept (arXiv 2205.05198: what costs much time for its
            memory); none: torch does not look at the operators.
    """
    kept: list[list[Tensor]] = [[] for _ in choices]
    first, again = (_Pass(choices, kept, recomputed) for recomputed in (False, True))
    if not expensive:
        return first, again
    operators: list[Any] = [getattr(torch.ops.nsa, name).default for name in expensive if hasattr(torch.ops.nsa, name)]
    selective = create_selective_checkpoint_contexts([*operators, *KEPT_OF_TORCH])
    return _Both(first, selective[0]), _Both(again, selective[1])


class _Pass(AbstractContextManager[None]):
    """May be entered again: a graph that is retained is recomputed each time."""

    def __init__(self, choices: Sequence[KeptChoice], kept: Sequence[list[Tensor]], recomputed: bool) -> None:
        self.choices, self.kept, self.recomputed = choices, kept, recomputed

    def __enter__(self) -> None:
        for choice, kept in zip(self.choices, self.kept, strict=True):
            if self.recomputed:
                choice.given = iter(kept)
            else:
                choice.kept = kept

    def __exit__(self, *_: object) -> None:
        for choice in self.choices:
            choice.kept = choice.given = None


class _Both(AbstractContextManager[None]):
    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        self.stack = ExitStack()
        for context in self.contexts:
            self.stack.enter_context(context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, trace)
