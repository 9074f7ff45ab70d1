"""The section ``model.mla`` of a configuration."""

from pydantic import Field, model_validator

from nsa.schema import Section


class MlaConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). Names are those of DeepSeek-V3's config.json."""

    q_lora_rank: int | None = Field(
        None, ge=1, description="width of the query latent; null: queries are projected from the hidden state"
    )
    kv_lora_rank: int = Field(ge=1, description="width of the latent that keys and values are made of")
    qk_nope_head_dim: int = Field(ge=1, description="query and key dims of a head that are not rotated")
    qk_rope_head_dim: int = Field(
        ge=2, description="rotated query and key dims of a head; even; all heads share the rotated key"
    )
    v_head_dim: int = Field(ge=1, description="value width of a head")
    rope_interleave: bool = Field(
        True,
        description="which rotated dims form pairs: true (2i, 2i + 1), as in DeepSeek's weights; false (i, i + half)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "MlaConfig":
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"model.mla.qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: rotary embedding turns pairs"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Query and key width of a head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def row_width(self) -> int:
        """Width of what is kept of a token: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim
