"""The section ``attention.nsa`` of a configuration."""

from typing import Literal

from pydantic import Field, model_validator

from nsa.schema import Section


class NsaConfig(Section):
    """Native Sparse Attention. Lengths are in tokens. Defaults are those of the paper (arXiv 2502.11089, 4.1)."""

    compress_length: int = Field(32, ge=1, description="tokens in a compression block (l), a multiple of the stride")
    compress_stride: int = Field(16, ge=1, description="tokens between two compression blocks (d)")
    compress_hidden: int | None = Field(None, ge=1, description="hidden width of the compression MLP; null: head_dim")
    key_compression: Literal["mlp", "pooled"] = Field(
        "mlp",
        description="how keys are compressed. mlp: by the paper's MLP; pooled: as a mean with learned weights, which "
        "selects better blocks if the selection is taught (docs/importing.md)",
    )
    block_size: int = Field(64, ge=1, description="tokens in one selection block (l'); a multiple of compress_stride")
    num_blocks: int = Field(16, ge=1, description="selected blocks per query, initial and local ones included (n)")
    num_initial: int = Field(1, ge=0, description="blocks at the start of a document that are always selected")
    num_local: int = Field(2, ge=0, description="most recent blocks that are always selected, the current one included")
    window: int = Field(512, ge=1, description="tokens seen by the sliding-window branch, the query's own included (w)")
    phase: Literal["warm-up", "sparse"] = Field(
        "sparse",
        description="sparse: NSA. warm-up: queries attend to all tokens, and the compression of keys learns which "
        "blocks hold this attention; goes with `train: indexer`, and starts from a dense model",
    )
    kl_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the loss that teaches the selection in the sparse phase (mean over tokens, sum over "
        "layers). 0: the selection learns through the compressed branch alone, as in the paper. The loss costs half "
        "as much as dense attention: its forward pass, and its scores again. In the warm-up the weight is 1",
    )
    kl_stride: int = Field(
        1,
        ge=1,
        description="the loss of kl_weight looks at one query in so many: each pass draws one of every kl_stride "
        "neighbours, which counts for all of them. The loss stays the same in the mean, and its cost is divided by "
        "this. 1: every query. The warm-up looks at every query",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "NsaConfig":
        if self.compress_length % self.compress_stride:
            raise ValueError(
                f"attention.nsa.compress_length ({self.compress_length}) must be a multiple of "
                f"attention.nsa.compress_stride ({self.compress_stride})"
            )
        if self.block_size % self.compress_stride:
            raise ValueError(
                f"attention.nsa.block_size ({self.block_size}) must be a multiple of "
                f"attention.nsa.compress_stride ({self.compress_stride})"
            )
        if self.block_size < self.compress_length:
            raise ValueError(
                f"attention.nsa.block_size ({self.block_size}) must not be below "
                f"attention.nsa.compress_length ({self.compress_length}): NSA's equation 9 needs l <= l'"
            )
        if self.num_initial + self.num_local > self.num_blocks:
            raise ValueError(
                f"attention.nsa.num_initial + attention.nsa.num_local ({self.num_initial + self.num_local}) exceed "
                f"attention.nsa.num_blocks ({self.num_blocks}): raise num_blocks or force fewer blocks"
            )
        if self.kl_stride > 1 and not self.kl_weight and self.phase == "sparse":
            raise ValueError(
                f"attention.nsa.kl_stride ({self.kl_stride}) thins out the queries of a loss that has no weight: set "
                "attention.nsa.kl_weight above 0, or leave kl_stride out"
            )
        return self
