"""The optimizer that DeepSpeed shards, and which parameters have weight decay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nsa.config import OptimizerConfig

# The tensors of an optimizer's state that a checkpoint holds, by kind.
STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class UpdateGate:
    """Whether an optimizer may update in this step. The trainer closes the gate, the optimizer checks it.

    DeepSpeed calls the optimizer in its own step, once for each parameter group. With a closed gate that step still
    clears gradients and counts micro batches, in every ZeRO stage.
    """

    def __init__(self) -> None:
        self.closed = False
        self._refuse: Callable[[], bool] | None = None
        self._refused: bool | None = None

    def close(self) -> None:
        """No update until `reset`."""
        self.closed = True

    def ask_before_update(self, refuse: Callable[[], bool]) -> None:
        """Call ``refuse`` once, when the gradient norm is known. If it returns true, there is no update."""
        self._refuse = refuse

    def is_open(self) -> bool:
        """Whether to update. The optimizer calls it for each parameter group."""
        if self.closed:
            return False
        if self._refuse is not None and self._refused is None:
            self._refused = self._refuse()
        return not self._refused

    @property
    def refused(self) -> bool:
        """Whether ``refuse`` returned true in this step."""
        return bool(self._refused)

    def reset(self) -> None:
        """Open the gate for the next step, without a ``refuse``."""
        self.closed, self._refuse, self._refused = False, None, None


class _Gated:
    """An optimizer whose ``step`` does nothing while its ``gate`` is closed: neither weights nor moments change."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = UpdateGate()

    def step(self, closure: Any = None) -> None:
        if self.gate.is_open():
            super().step(closure)  # type: ignore[misc]


class AdamW(_Gated, torch.optim.AdamW):  # type: ignore[misc]
    """AdamW (arXiv 1711.05101)."""


class SGD(_Gated, torch.optim.SGD):  # type: ignore[misc]
    """Plain gradient descent: its updates show the scale of gradients, which Adam hides."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices that multiply activations, not to norms, biases, embeddings and
    position encodings."""
    return parameter.ndim >= 2 and not name.startswith("embedding.") and not name.endswith(".position")


def trained_apart(model: Any) -> set[str]:
    """Names of the parameters that only their layer's auxiliary loss trains (`nsa.layers.kind.Kind.apart`).

    Of a pipeline's stage: those of all stages.
    """
    kinds = enumerate(model.attention.kinds(model.config.num_layers))
    prefixes = tuple(f"layers.{number}.attention.{path}." for number, kind in kinds for path in kind.apart)
    names = [name for name, _ in model.named_parameters()]
    return {name for name in (*names, *getattr(model, "everywhere", ())) if name.startswith(prefixes)}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, apart: bool = True, offload: bool = False
) -> AdamW | SGD:
    """The optimizer over all parameters of ``model`` that are trained, in groups: with and without weight decay.

    Args:
        apart: whether parameters that are trained apart have groups of their own. A group's ``section`` says which it
            is of: "model" or "apart".
        offload: DeepSpeed will move its state to the host. torch's fused AdamW is vectorised there, as DeepSpeed's is,
            but does not need to be compiled on every machine.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = trained_apart(model) if apart else set()
    groups = []
    for section, members in (
        ("model", [(n, p) for n, p in named if n not in own]),
        ("apart", [(n, p) for n, p in named if n in own]),
    ):
        decayed = [p for n, p in members if decays(n, p)]
        others = [p for n, p in members if not decays(n, p)]
        groups.append({"params": decayed, "weight_decay": config.weight_decay, "section": section})
        groups.append({"params": others, "weight_decay": 0.0, "section": section})
    groups = [group for group in groups if group["params"]]
    if config.kind == "sgd":
        return SGD(groups, lr=config.learning_rate)
    fused = next(model.parameters()).is_cuda or offload
    return AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)
