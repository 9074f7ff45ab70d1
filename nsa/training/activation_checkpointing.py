"""Activation checkpointing: layers are recomputed in the backward pass (arXiv 1604.06174). The model is unchanged."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from nsa.layers.around import Around

KEPT_OF_TORCH = (torch.ops.aten._cudnn_attention_forward.default, torch.ops.aten._flash_attention_forward.default)


def checkpoint_layers(layers: nn.ModuleList, mode: str = "full") -> None:
    """Wrap each decoder layer such that its forward pass is recomputed in the backward pass.

    Args:
        mode: ``full`` keeps the inputs of a layer and the blocks that it selected. ``selective`` also keeps the
            results of its attention kernels, which are then not recomputed (those of the PyTorch fallback are).
    """
    for number, layer in enumerate(layers):
        layers[number] = Recomputed(layer, mode)


class Recomputed(Around):
    """A decoder layer that is recomputed in the backward pass; ``mode``: as for `checkpoint_layers`."""

    def __init__(self, inside: nn.Module, mode: str) -> None:
        super().__init__(inside)
        layer: Any = inside
        kind = getattr(layer, "kind", None)  # None: the layer is on another stage
        choices = [_keep_choice(layer.attention, path) for path in kind.choices] if kind else []
        expensive = kind.expensive if kind and mode == "selective" else ()
        self.contexts: Callable[[], Any] = partial(_contexts, choices, expensive)

    def forward(self, *inputs: Any, **others: Any) -> Any:
        # What layers draw at random is kept (`nsa.layers.kind.Kind.choices`): no generator state has to be restored.
        return checkpoint(
            self.inside, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts, **others
        )


class KeptChoice(Around):
    """A module that selects what a layer attends to (integers without gradient), or draws it, and keeps the selection.

    The recomputed pass must attend to what the first pass attended to, so it takes the selections of the first pass,
    in order. This also saves time: for NSA the selection has T x G x n integers, a hundredth of the layer's
    activations, and needs a pass over all compressed scores. (Torch's selective checkpointing could keep it, too, but
    intercepts every operator of the layer: 14 instead of 6 ms of host time per layer and step, measured on a CPU.)
    """

    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        self.kept: list[Tensor] | None = None  # in a first pass: its selections so far
        self.given: Iterator[Tensor] | None = None  # in a recomputed pass: the selections still to return

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
    """The contexts of a forward pass and of its recomputations: a ``context_fn`` of torch.utils.checkpoint.

    Args:
        expensive: operators of torch.ops.nsa whose results are kept, since they cost much time for their memory (arXiv
            2205.05198). If empty, torch does not intercept operators.
    """
    kept: list[list[Tensor]] = [[] for _ in choices]
    first, again = (_Pass(choices, kept, recomputed) for recomputed in (False, True))
    if not expensive:
        return first, again
    operators: list[Any] = [getattr(torch.ops.nsa, name).default for name in expensive if hasattr(torch.ops.nsa, name)]
    results: list[Any] = []
    keep, give = (_Keep((*operators, *KEPT_OF_TORCH), results, recomputed) for recomputed in (False, True))
    return _Both(first, keep), _Both(again, give)


class _Pass(AbstractContextManager[None]):
    """Sets up the `KeptChoice` modules for a pass. Can be entered again: a retained graph is recomputed each time."""

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


class _Keep(TorchDispatchMode):
    """Keeps what ``operators`` return in the first pass; in a recomputed one they return it, in order.

    torch's `create_selective_checkpoint_contexts` would compare all operators of both passes. With ZeRO 3 they differ:
    DeepSpeed gathers parameters in either, and not at the same places.
    """

    def __init__(self, operators: Sequence[Any], results: list[Any], recomputed: bool) -> None:
        super().__init__()
        self.operators, self.results, self.recomputed = frozenset(operators), results, recomputed

    def __enter__(self) -> Any:
        self.given = iter(self.results)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.operators:
            return func(*args, **(kwargs or {}))
        if self.recomputed:
            found = next(self.given)
        else:
            found = func(*args, **(kwargs or {}))
            self.results.append(found)
        return tree_map_only(Tensor, Tensor.detach, found)  # autograd writes into what it gets


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
