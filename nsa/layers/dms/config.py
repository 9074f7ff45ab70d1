"""The section ``attention.dms`` of a configuration."""

from pydantic import Field

from nsa.schema import Section


class DmsConfig(Section):
    """Dynamic Memory Sparsification (arXiv 2506.05345). Lengths are in tokens."""

    window: int = Field(
        256,
        ge=1,
        description="only tokens further back than this may be forgotten: a query always sees window + 1 tokens",
    )
    evicted: float = Field(
        0.75,
        ge=0,
        lt=1,
        description="least share of the tokens that each layer learns to forget: 1 - 1 / the compression ratio",
    )
    weight: float = Field(1.0, ge=0, description="weight of the loss that asks for the share `evicted`")
    temperature: float = Field(
        0.1, gt=0, description="temperature of the sigmoid that decides in training; its noise is logistic"
    )
    offset: float = Field(5.0, description="subtracted from the eviction logits, so that a new layer forgets nothing")
