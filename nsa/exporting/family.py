"""The record of a family of models that transformers has: how one of this project is written as one of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nsa.config import Config


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A family of models. No attribute has a default.

    Attributes:
        model_type, architecture: its names in config.json.
        transformers: the releases that have it and that exports are tested with.
        unlike: config -> what of the decoder beside its attention the family has not, in words; empty: nothing.
        fields: config -> fields of config.json, without those of the tokenizer and of the section of the attention's
            kind (`nsa.layers.kind.Known`).
        tensors: this project's names of tensors -> the family's, with {} for the layer's number.
    """

    model_type: str
    architecture: str
    transformers: str
    unlike: Callable[[Config], list[str]]
    fields: Callable[[Config], dict[str, Any]]
    tensors: Mapping[str, str]

    def rename(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the decoder's names -> by the family's."""
        return {_renamed(name, self.tensors): tensor for name, tensor in weights.items()}

    def restore(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back; a name that is not the family's stays."""
        ours = {theirs: name for name, theirs in self.tensors.items()}
        return {_renamed(name, ours): tensor for name, tensor in weights.items()}


NUMBER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    number, pattern = NUMBER.search(name), NUMBER.sub("{}", name, count=1)
    return names[pattern].format(number and number[0]) if pattern in names else name
