"""The list of all families that models can be exported as, and which of them a model is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from nsa.config import Config
from nsa.exporting.deepseek_v32 import DEEPSEEK_V32
from nsa.exporting.family import Family

FAMILIES: tuple[Family, ...] = (DEEPSEEK_V32,)


@dataclass(frozen=True)
class Format:
    """How a model is exported.

    Attributes:
        family: the family that it belongs to; None: the export has code of its own.
        attention: fields of the family's config.json for the attention.
        why: without a family: the one that comes near, and what it has not; empty: none comes near.
    """

    family: Family | None = None
    attention: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        if self.family is not None:
            return f"{self.family.model_type} of transformers {self.family.transformers}, no code of its own"
        return "code of its own (trust_remote_code)" + (f": {self.why}" if self.why else "")


def format_of(config: Config) -> Format:
    kinds = dict.fromkeys(config.attention.kinds(config.model.num_layers))
    found = [kind.known(config.model.attention_shape, config.attention.of(kind)) for kind in kinds]
    known = [layers for layers in found if layers is not None]
    for family in FAMILIES:
        layers = next((layers for layers in known if layers.model_type == family.model_type), None)
        if layers is None:
            continue
        unlike = ["layers of another kind"] if len({kind.name for kind in kinds}) > 1 else []
        unlike += [*layers.unlike, *family.unlike(config)]
        if unlike:
            return Format(why=f"{family.model_type} has no {', no '.join(unlike)}")
        if family.model_type not in transformers.CONFIG_MAPPING:
            release = f"it takes transformers {family.transformers}, this is {transformers.__version__}"
            return Format(why=f"for {family.model_type} {release}")
        return Format(family, layers.fields)
    return Format()
