"""Recomputation of layers in the backward pass, put on from outside of the model."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from nsa.ops.selection import recall


def checkpoint_layers(layers: nn.ModuleList) -> None:
    """Keep only the inputs of each layer, and the blocks that it selects; its forward runs again in the backward pass
    (arXiv 1604.06174) and is given them."""
    for layer in layers:
        # No layer draws random numbers, so there is no generator state to restore.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=recall.contexts
        )
