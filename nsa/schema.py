"""The strict base of every configuration section: an unknown key is an error, a value is what its type says."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strict part of the configuration tree. Unknown keys raise ``pydantic.ValidationError``."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
