"""Training of the indexer alone: everything else is frozen."""

from typing import Any

import torch
from torch import Tensor, nn

from nsa.config import Config
from nsa.layers.around import Around
from nsa.layers.kind import Kind
from nsa.parallel.pipeline import Elsewhere
from nsa.training.optimizer import trained_apart


def attached(config: Config) -> bool:
    """Whether the indexers' losses are attached to the activations, though nothing before them is trained.

    That costs a backward pass through the whole model. ZeRO 3 needs it, which gathers weights as that pass reaches
    them. Elsewhere the losses are taken from the layers (`nsa.training.attention_losses.AttentionLosses.take`).
    """
    return config.engine.zero_stage == 3


def has_loss(kind: Kind, config: Config) -> bool:
    """Whether a layer of this kind computes its loss. Where only what is trained apart is trained, one does that has
    such parts, or that borrows them."""
    return kind.loss is not None and (config.train == "all" or bool(kind.apart) or kind.borrows)


class NoHead(Around):
    """An output head that computes no losses in training; 0 for each token. Validation has them."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not self.training:
            return self.inside(hidden, targets)
        if hidden.requires_grad:
            return hidden.sum(-1, dtype=torch.float32) * 0
        return torch.zeros(targets.shape, device=hidden.device)


class WithGradient(Around):
    """A frozen embedding whose output has a gradient."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.inside(input_ids)
        return x.requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x


def add_placeholders(model: nn.Module) -> None:
    """Give a stage of a pipeline that trains nothing two parameters that it does not use: a matrix and a vector.

    DeepSpeed's ranks must have the same groups of parameters, and an indexer has one with weight decay and one without.
    Checkpoints do not have them, since no stage has such names in the whole model.
    """
    like = next(model.parameters())
    model.idle = nn.ParameterList(nn.Parameter(like.new_zeros(shape)) for shape in ((1, 1), (1,)))


def freeze_others(model: nn.Module, config: Config) -> None:
    """Freeze all but what is trained apart (`nsa.layers.kind.Kind.apart`).

    A frozen parameter keeps its fp32 value for checkpoints (`nsa.training.sharded_state`).
    """
    trained = trained_apart(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if not isinstance(model.head, Elsewhere):
        model.head = NoHead(model.head)  # type: ignore[arg-type]
    if hasattr(model, "everywhere"):
        stages: Any = model.everywhere
        model.everywhere = {name: (*about[:2], name in trained) for name, about in stages.items()}  # type: ignore[assignment]
        if not any(p.requires_grad for p in model.parameters()):
            add_placeholders(model)
    if attached(config):
        model.embedding = WithGradient(model.embedding)  # type: ignore[arg-type]
