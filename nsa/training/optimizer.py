"""The optimizer that DeepSpeed shards, and which parameters decay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nsa.config import OptimizerConfig

# The tensors of an optimizer's state that a checkpoint holds, by kind.
STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class _Skippable:
    """An optimizer whose ``step`` does nothing while ``skip`` is set: neither weights nor moments change.

    DeepSpeed's step around it still clears gradients and counts micro-batches, in every ZeRO stage alike.

    ``refuse`` is asked at the first call of a step (DeepSpeed makes one for each group of parameters), when the
    gradient norm is known; its answer, kept in ``refused`` until it is reset, does the same.
    """

    skip = False
    refuse: Callable[[], bool] | None = None
    refused: bool | None = None

    def step(self, closure: Any = None) -> None:
        if self.skip:
            return
        if self.refuse is not None and self.refused is None:
            self.refused = self.refuse()
        if not self.refused:
            super().step(closure)  # type: ignore[misc]


class AdamW(_Skippable, torch.optim.AdamW):  # type: ignore[misc]
    """AdamW (arXiv 1711.05101)."""


class SGD(_Skippable, torch.optim.SGD):  # type: ignore[misc]
    """Plain gradient descent: its updates show the scale of gradients, which Adam hides."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices that multiply activations; no norm, bias, embedding or position."""
    return parameter.ndim >= 2 and not name.startswith("embedding.") and not name.endswith(".position")


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, offload: bool = False) -> AdamW | SGD:
    """The optimizer over all parameters of ``model``, in two groups: with and without decay.

    ``offload``: DeepSpeed will move its state to the host. torch's own fused AdamW is as vectorised there as
    DeepSpeed's, which would have to be compiled on every machine.
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "sgd":
        return SGD(groups, lr=config.learning_rate)
    fused = next(model.parameters()).is_cuda or offload
    return AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)
