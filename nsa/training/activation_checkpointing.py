"""Recomputation of layers in the backward pass, put on from outside of the model (arXiv 1604.06174)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nsa.layers.around import Around
from nsa.ops.selection import recall

KEPT_OF_TORCH = (torch.ops.aten._cudnn_attention_forward.default, torch.ops.aten._flash_attention_forward.default)


def checkpoint_layers(layers: nn.ModuleList, mode: str = "full") -> None:
    """Let each layer's forward pass run again in the backward pass.

    Args:
        mode: ``full`` keeps the inputs of a layer and the blocks that it selected; ``selective`` also the results of
            its attention kernels, which do not run again (the portable operators do).
    """
    for number, layer in enumerate(layers):
        layers[number] = Recomputed(layer, mode)


Context = AbstractContextManager[None]


class Recomputed(Around):
    """A layer whose forward pass runs again in the backward pass; ``mode``: as for `checkpoint_layers`."""

    def __init__(self, inside: nn.Module, mode: str) -> None:
        super().__init__(inside)
        self.contexts: Callable[[], Any] = recall.contexts
        if mode == "selective":
            kind: Any = getattr(inside, "kind", None)  # None: the layer lies on another stage
            self.contexts = partial(_selective_contexts, kind.expensive if kind else ())

    def forward(self, *inputs: Any, **others: Any) -> Any:
        # No layer draws random numbers, so there is no generator state to restore.
        return checkpoint(
            self.inside, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts, **others
        )


def _selective_contexts(
    expensive: tuple[str, ...],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`recall.contexts` for the portable operators, and torch's own for the kernels.

    ``expensive``: operators of torch.ops.nsa whose results are kept (arXiv 2205.05198: what costs much time for its
    memory).
    """
    operators: list[Any] = [getattr(torch.ops.nsa, name).default for name in expensive if hasattr(torch.ops.nsa, name)]
    operators += KEPT_OF_TORCH
    pairs = zip(recall.contexts(), create_selective_checkpoint_contexts(operators), strict=True)
    first, again = (_Both(*pair) for pair in pairs)
    return first, again


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
