"""Wrappers of modules, with which parallelism and recomputation are added without changes to the model."""

from typing import Any

from torch import nn


class Around(nn.Module):
    """A module that replaces another one, ``inside``, and calls it.

    It has the parameters and submodules of ``inside`` under the same names, so the state dict does not change. Other
    attributes are also looked up in ``inside``.
    """

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = inside._parameters, inside._buffers, inside._modules
        self._non_persistent_buffers_set = inside._non_persistent_buffers_set
        object.__setattr__(self, "inside", inside)  # not a submodule, which would give everything a second name

    inside: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inside"], name)


def innermost(module: nn.Module) -> nn.Module:
    """The module without its wrappers."""
    while isinstance(module, Around):
        module = module.inside
    return module
