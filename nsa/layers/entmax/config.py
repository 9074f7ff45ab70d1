"""The section ``attention.entmax`` of a configuration."""

from typing import Literal

from pydantic import Field

from nsa.schema import Section


class EntmaxConfig(Section):
    """alpha-entmax attention. Defaults are those of ASEntmax (arXiv 2506.16640) on rotary heads."""

    alpha: float = Field(1.5, gt=1, le=2, description="2: sparsemax, the sparsest; towards 1 it becomes softmax")
    scaling: Literal["none", "asentmax", "ssmax"] = Field(
        "asentmax",
        description="factor of the scores of the token at position p, with n = p + 2. none: 1; asentmax: "
        "1 + b (log n)^g, b and g of each head from the hidden state; ssmax: (1 + s) log n, s of each head. Where "
        "there are nope_heads, of these alone",
    )
    nope_heads: int = Field(
        0, ge=0, description="query heads, the last ones, that know no positions; with rotary whole groups of a KV head"
    )
    position: Literal["rotary", "alibi"] = Field(
        "rotary", description="of the other heads; alibi: head h (from 1) loses 1 / h of score per token of distance"
    )
