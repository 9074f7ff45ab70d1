"""Recomputation of layers in the backward pass, put on from outside of the model (arXiv 1604.06174)."""

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nsa.ops.selection import recall

# The kernels' operators whose results `selective` keeps (arXiv 2205.05198: what costs much time for its memory).
KEPT = ("range_attention", "select_blocks", "selected_attention", "compress_blocks")
KEPT_OF_TORCH = (torch.ops.aten._cudnn_attention_forward.default, torch.ops.aten._flash_attention_forward.default)


def checkpoint_layers(layers: nn.ModuleList, mode: str = "full") -> None:
    """Let each layer's forward pass run again in the backward pass.

    Args:
        mode: ``full`` keeps the inputs of a layer and the blocks that it selected; ``selective`` also the results of
            its attention kernels, which do not run again (the portable operators do).
    """
    contexts = recall.contexts if mode == "full" else _selective_contexts
    for layer in layers:
        # No layer draws random numbers, so there is no generator state to restore.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


def _selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`recall.contexts` for the portable operators, and torch's own for the kernels."""
    operators: list[Any] = [getattr(torch.ops.nsa, name).default for name in KEPT if hasattr(torch.ops.nsa, name)]
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
