"""The section ``attention.dsa`` of a configuration."""

from typing import Literal

from pydantic import Field, model_validator

from nsa.schema import Section


class DsaConfig(Section):
    """DeepSeek Sparse Attention. Lengths are in tokens. Defaults are those of DeepSeek-V3.2 (arXiv 2512.02556)."""

    topk: int = Field(2048, ge=1, description="tokens that a query attends to, initial and local ones included (k)")
    num_initial: int = Field(0, ge=0, description="tokens at the start of a document that are always selected")
    num_local: int = Field(0, ge=0, description="most recent tokens that are always selected, the query's own included")
    index_heads: int = Field(64, ge=1, description="heads of the indexer")
    index_head_dim: int = Field(128, ge=2, description="width of an index head")
    index_rotary_dims: int = Field(64, ge=2, description="dims of an index head that are rotated; even")
    index_rotary_place: Literal["first", "last"] = Field("first", description="which dims of an index head are rotated")
    index_rotary_pairs: Literal["half-split", "interleaved"] = Field(
        "half-split", description="which rotated dims form pairs: (i, i + half) or (2i, 2i + 1)"
    )
    index_fp8: bool = Field(
        False,
        description="round index queries and keys to fp8 (e4m3) for the selection, with a scale for each head of a "
        "query and each key; the indexer's loss uses them unrounded",
    )
    phase: Literal["warm-up", "sparse"] = Field(
        "sparse",
        description="warm-up: queries attend to all tokens, and the indexer learns this attention; sparse: queries "
        "attend to the selected tokens, and the indexer learns the attention among these",
    )
    kl_weight: float = Field(1.0, ge=0, description="weight of the indexer's loss (mean over tokens, sum over layers)")

    share_layers: int = Field(
        1,
        ge=1,
        description="DSA layers in a group (IndexShare): only the first has an indexer, and all attend to the tokens "
        "that it selects; 1: every layer has an indexer",
    )
    share_from: int = Field(0, ge=0, description="DSA layers before the first group, each with an indexer of its own")

    def is_served(self, place: int) -> bool:
        """Whether the DSA layer number ``place`` attends to the tokens that an earlier one selects."""
        return place >= self.share_from and (place - self.share_from) % self.share_layers > 0

    @model_validator(mode="after")
    def _consistent(self) -> "DsaConfig":
        if self.num_initial + self.num_local > self.topk:
            raise ValueError(
                f"attention.dsa: num_initial ({self.num_initial}) + num_local ({self.num_local}) tokens are always "
                f"selected, so topk ({self.topk}) must be at least their sum"
            )
        if self.index_rotary_dims % 2 or self.index_rotary_dims > self.index_head_dim:
            raise ValueError(
                f"attention.dsa.index_rotary_dims ({self.index_rotary_dims}) must be even and at most index_head_dim "
                f"({self.index_head_dim})"
            )
        return self
