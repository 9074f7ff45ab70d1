"""Modules around other modules: how parallelism and recomputation are put onto a model that knows nothing of them."""

from typing import Any

from torch import nn


class Around(nn.Module):
    """A module in the place of another, ``inside``, which it calls.

    Its parameters and submodules are those of ``inside``, under the same names: a state dict does not change. Other
    attributes are looked for there, too.
    """

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = inside._parameters, inside._buffers, inside._modules
        self._non_persistent_buffers_set = inside._non_persistent_buffers_set
        object.__setattr__(self, "inside", inside)  # no submodule: it would give everything a second name

    inside: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inside"], name)


def innermost(module: nn.Module) -> nn.Module:
    """What all the modules around it are around."""
    while isinstance(module, Around):
        module = module.inside
    return module
