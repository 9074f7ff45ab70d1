"""The strict base class of every configuration section: rejects unknown keys and does not convert types."""

import os
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

LARGEST = 1e30  # of a number: the fp32 arithmetic in which it is used goes to 3e38


class Section(BaseModel):
    """A frozen, strict part of the configuration tree. Unknown keys raise ``pydantic.ValidationError``."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,  # no quiet conversion: "8" is no number and true is not 1 (a whole number is a valid float)
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def _no_larger_than_fp32_holds(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > LARGEST:
            raise PydanticCustomError("too_large", "Input should be at most {most} in size", {"most": f"{LARGEST:g}"})
        return value


def shell_path(value: str) -> str:
    """A path with ``~`` and ``$NAME`` as a shell reads them. Raises ``ValueError`` if there is no such variable."""
    path = os.path.expanduser(os.path.expandvars(value))  # noqa: PTH111 - a pattern is no Path
    if unknown := re.search(r"\$(\w+|\{\w*\})", path):
        raise ValueError(f"{value}: the environment has no {unknown[0]}")
    if path.startswith("~"):
        raise ValueError(f"{value}: there is no such user")
    return path
