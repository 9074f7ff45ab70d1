"""The strict base class of every configuration section: rejects unknown keys and does not convert types."""

from pydantic import BaseModel, ConfigDict


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
