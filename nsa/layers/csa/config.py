"""The section ``attention.csa`` of a configuration."""

from typing import Literal

from pydantic import Field, model_validator

from nsa.schema import Section


class CsaConfig(Section):
    """Compressed Sparse Attention. Defaults are those of DeepSeek-V4-Flash (arXiv 2606.19348) where they fit any model.

    Its heavily compressed attention (HCA) is ``{ratio: 128, overlap: false, topk: null}``; with ``heavy_ratio: 128``
    every second layer is HCA, as in V4.
    """

    ratio: int = Field(4, ge=2, description="tokens per entry (m)")
    overlap: bool = Field(
        True, description="an entry is made of its own tokens and of as many tokens before, with separate weights"
    )
    topk: int | None = Field(
        512, ge=1, description="entries that a query attends to (k); null: all, without an indexer (HCA)"
    )
    heavy_ratio: int | None = Field(
        None,
        ge=2,
        description="tokens per entry in every second CSA layer. Such a layer has no overlap and attends to all "
        "entries (HCA; V4: 128). null: all CSA layers are alike",
    )
    window: int = Field(128, ge=1, description="most recent tokens that a query sees uncompressed, its own included")
    rotary_dims: int | None = Field(
        None, ge=2, description="so many last dims of a head are rotated; even; null: all (V4: 64 of 512)"
    )
    q_lora_rank: int | None = Field(
        None,
        ge=1,
        description="width of the query latent; null: queries are projected from the hidden state (V4: 1024)",
    )
    index_heads: int = Field(64, ge=1, description="heads of the indexer")
    index_head_dim: int = Field(128, ge=2, description="width of an index head")
    index_rotary_dims: int = Field(64, ge=2, description="so many last dims of an index head are rotated; even")
    phase: Literal["warm-up", "sparse"] = Field(
        "sparse",
        description="warm-up: queries attend to all entries, and the indexer learns this attention; sparse: queries "
        "attend to the selected entries, and the indexer learns the attention among these",
    )
    kl_weight: float = Field(1.0, ge=0, description="weight of the indexer's loss (mean over tokens, sum over layers)")

    def is_heavy(self, place: int) -> bool:
        """Whether the CSA layer number ``place`` is one of HCA."""
        return self.heavy_ratio is not None and place % 2 == 1

    def heavy(self) -> "CsaConfig":
        """The section that such a layer has by itself."""
        update = {"ratio": self.heavy_ratio, "overlap": False, "topk": None, "phase": "sparse", "heavy_ratio": None}
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _consistent(self) -> "CsaConfig":
        if self.topk is None and self.phase == "warm-up":
            raise ValueError(
                "attention.csa.phase warm-up trains an indexer, and with topk null there is none: set phase to sparse"
            )
        if self.rotary_dims is not None and self.rotary_dims % 2:
            raise ValueError(f"attention.csa.rotary_dims ({self.rotary_dims}) must be even: pairs are turned")
        if self.index_rotary_dims % 2 or self.index_rotary_dims > self.index_head_dim:
            raise ValueError(
                f"attention.csa.index_rotary_dims ({self.index_rotary_dims}) must be even and at most index_head_dim "
                f"({self.index_head_dim})"
            )
        return self
