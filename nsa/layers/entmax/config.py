"""The section ``attention.entmax`` of a configuration."""

from typing import Literal

from pydantic import Field

from nsa.schema import Section


class EntmaxConfig(Section):
    """alpha-entmax attention. Defaults are those of ASEntmax (arXiv 2506.16640) on rotary heads."""

    alpha: float = Field(1.5, gt=1, le=2, description="2: sparsemax, the sparsest; near 1: close to softmax")
    scaling: Literal["none", "asentmax", "ssmax"] = Field(
        "asentmax",
        description="factor of the scores of the token at position p, with n = p + 2. none: 1; asentmax: "
        "1 + b (log n)^g, with b and g per head from the hidden state; ssmax: (1 + s) log n, with a learned s per "
        "head. If there are nope_heads, only they get the factor",
    )
    nope_heads: int = Field(
        0,
        ge=0,
        description="so many last query heads get no positions; with rotary, all query heads of a KV head or none",
    )
    position: Literal["rotary", "alibi"] = Field(
        "rotary",
        description="positions of the other heads; alibi: the score of head h (from 1) falls by 1 / h per token",
    )
