"""The `model` and `attention` sections of a configuration."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from nsa.layers.kind import Kind, Shape
from nsa.layers.kinds import BASELINE, DEFAULT, KINDS, kind_of
from nsa.layers.projections.config import MlaConfig
from nsa.layers.rotary_scaling import RopeScaling
from nsa.schema import Section

NAMES = tuple(kind.name for kind in KINDS)
# The type of attention.kind: the names of all kinds.
KindName = Literal[NAMES]  # type: ignore[valid-type]


class _AttentionConfig(Section):
    """What attention is whatever its kinds: `AttentionConfig` has a section for each kind beside it."""

    kind: KindName | list[KindName] = Field(
        DEFAULT.name,
        description="one kind for all layers, or a pattern that is repeated over them, e.g. "
        f"[{', '.join([BASELINE.name, DEFAULT.name, DEFAULT.name])}]",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "_AttentionConfig":
        if isinstance(self.kind, list) and not self.kind:
            raise ValueError(f"attention.kind: the pattern is empty; name at least one of {', '.join(NAMES)}")
        return self

    def pattern(self, num_layers: int) -> list[Kind]:
        """The kinds that repeat over ``num_layers`` layers, as far as there are so many."""
        names = self.kind if isinstance(self.kind, list) else [self.kind]
        return [kind_of(name) for name in names[:num_layers]]

    def kinds(self, num_layers: int) -> list[Kind]:
        """The record of each of ``num_layers`` layers (`nsa.layers.kind.Kind.placed`)."""
        return [self.kind_at(number) for number in range(num_layers)]

    def kind_at(self, number: int) -> Kind:
        """The record of layer ``number``."""
        names = self.kind if isinstance(self.kind, list) else [self.kind]
        rounds, at = divmod(number, len(names))
        kind = kind_of(names[at])
        if kind.placed is None:
            return kind
        return kind.placed(self.of(kind), rounds * names.count(kind.name) + names[:at].count(kind.name))

    def not_exportable(self, num_layers: int) -> list[str]:
        """Titles of the kinds among ``num_layers`` layers that an export cannot carry, sorted."""
        return sorted({kind.title for kind in self.kinds(num_layers) if kind.export is None})

    def of(self, kind: Kind) -> Any:
        """The section of ``kind``; None if it has no keys."""
        return None if kind.config is None else getattr(self, kind.name)


if TYPE_CHECKING:
    AttentionConfig = _AttentionConfig
else:
    AttentionConfig = create_model(
        "AttentionConfig",
        __base__=_AttentionConfig,
        __module__=__name__,
        __doc__="Attention of every layer: its kind, and a section for each kind.",
        **{
            kind.name: (kind.config, Field(kind.config(), description=f"{kind.title}, where it is the kind of a layer"))
            for kind in KINDS
            if kind.config is not None
        },
    )


class RopeConfig(Section):
    """Rotary position embedding (arXiv 2104.09864) with YaRN length extension (arXiv 2309.00071)."""

    theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    yarn_factor: float = Field(1.0, ge=1, description="YaRN length extension: new range / max_position; 1: none")
    yarn_beta_fast: float = Field(
        32.0, gt=0, description="YaRN: frequencies with more rotations over max_position are kept"
    )
    yarn_beta_slow: float = Field(
        1.0, gt=0, description="YaRN: frequencies with fewer rotations over max_position are divided by yarn_factor"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "RopeConfig":
        if self.yarn_beta_slow >= self.yarn_beta_fast:
            raise ValueError(
                f"model.rope.yarn_beta_slow ({self.yarn_beta_slow}) must be below "
                f"model.rope.yarn_beta_fast ({self.yarn_beta_fast})"
            )
        return self


class MoEConfig(Section):
    """Mixture of experts in place of the MLP (DeepSeekMoE, arXiv 2401.06066)."""

    num_experts: int = Field(ge=2, description="routed experts of a layer; without this section every MLP is dense")
    top_k: int = Field(
        ge=2, description="routed experts per token; with 1 the gate would be constant, and the router get no gradient"
    )
    num_shared: int = Field(0, ge=0, description="shared experts, applied to every token")
    expert_size: int = Field(ge=1, description="hidden width of one expert")
    first_dense: int = Field(1, ge=0, description="layers at the start that keep a dense MLP of intermediate_size")
    bias_rate: float = Field(
        0.001,
        ge=0,
        description="load balancing without a loss: after each step the router bias of experts with too few tokens "
        "grows by this number, and the bias of the other experts falls by it; 0: off",
    )
    loss_weight: float = Field(
        0.0, ge=0, description="weight of the balance loss, which is 1 if a micro batch loads experts evenly; 0: off"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "MoEConfig":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k ({self.top_k}) exceeds model.moe.num_experts ({self.num_experts}): "
                "a token cannot go to more experts than there are"
            )
        return self


class ModelConfig(Section):
    """Shape of a pre-norm decoder (RMSNorm, rotary, SwiGLU, grouped-query attention)."""

    vocab_size: int = Field(ge=2, description="rows of the embedding; at least the tokenizer's vocabulary")
    hidden_size: int = Field(ge=1, description="width of the residual stream")
    num_layers: int = Field(ge=1, description="decoder layers")
    num_heads: int = Field(ge=1, description="query heads")
    num_kv_heads: int = Field(ge=1, description="key/value heads; divides num_heads")
    head_dim: int = Field(ge=2, description="query and key width of a head; even")
    v_head_dim: int | None = Field(None, ge=1, description="value width of a head; null: head_dim")
    intermediate_size: int = Field(ge=1, description="hidden width of the SwiGLU MLP")
    max_position: int = Field(ge=1, description="range of the rotary embedding in tokens; the longest sequence")
    rope: RopeConfig = Field(RopeConfig(), description="rotary position embedding")
    rope_scaling: RopeScaling | None = Field(
        None,
        description="rotary frequencies of a model that another trainer extended; null: those of rope. "
        "model.rope.yarn_factor extends the range of either",
    )
    moe: MoEConfig | None = Field(None, description="mixture of experts; null: every MLP is dense")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    tie_embeddings: bool = Field(True, description="the output head shares the embedding's weight")
    projection: Literal["gqa", "mla"] = Field(
        "gqa", description="gqa: grouped queries, num_kv_heads keys and values; mla: multi-head latent attention"
    )
    mla: MlaConfig | None = Field(None, description="widths of multi-head latent attention; null with projection gqa")
    qkv_bias: bool = Field(False, description="query, key and value projections have a bias (Qwen2)")
    qk_norm: bool = Field(False, description="RMSNorm of each query and key head before rotation (Qwen3)")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) must be even: rotary embedding turns pairs")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and self.rope.theta <= 1:
            raise ValueError(
                f"model.rope.theta ({self.rope.theta}) must be above 1 with model.rope_scaling of type yarn"
            )
        self._check_mla()
        if self.moe is not None and self.moe.first_dense >= self.num_layers:
            raise ValueError(
                f"model.moe.first_dense ({self.moe.first_dense}) leaves none of model.num_layers ({self.num_layers}) "
                "with experts: lower it, or take model.moe out"
            )
        return self

    def _check_mla(self) -> None:
        if (self.mla is not None) != (self.projection == "mla"):
            todo = "give the widths" if self.mla is None else "set model.projection to mla, or take model.mla out"
            raise ValueError(f"model.projection mla and the section model.mla go together: {todo}")
        if self.mla is None:
            return
        for option in ("qkv_bias", "qk_norm"):
            if getattr(self, option):
                raise ValueError(f"model.{option} goes with model.projection gqa: MLA norms its latents; turn it off")
        for key, value, why in (
            ("num_kv_heads", self.num_heads, "model.num_heads: every head has keys and values of its own"),
            ("head_dim", self.mla.qk_head_dim, "model.mla.qk_nope_head_dim + qk_rope_head_dim"),
            ("v_head_dim", self.mla.v_head_dim, "model.mla.v_head_dim"),
        ):
            if getattr(self, key) != value:
                raise ValueError(f"model.{key} ({getattr(self, key)}) must be {value} with model.projection mla: {why}")

    @property
    def attention_shape(self) -> Shape:
        """The shape of an attention layer."""
        return Shape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim or self.head_dim,
            rope_theta=self.rope.theta,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            mla=self.mla,
        )

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of ``layer`` (from 0) is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.first_dense


def check_projection(model: ModelConfig, attention: AttentionConfig) -> None:
    """Raise ValueError if a layer's kind of attention does not have an option of the projection that is on."""
    for option in model.attention_shape.options:
        lacking = sorted({kind.name for kind in attention.pattern(model.num_layers) if option not in kind.options})
        if lacking:
            having = ", ".join(kind.name for kind in KINDS if option in kind.options)
            raise ValueError(
                f"model.{option} does not go with attention.kind {', '.join(lacking)}: only {having} has it; turn it "
                "off or choose another kind"
            )
