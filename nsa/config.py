"""The configuration tree of a run, from YAML with `key=value` overrides."""

from typing import Literal

from pydantic import Field, model_validator

from nsa.data.config import DataConfig
from nsa.models.config import AttentionConfig, ModelConfig
from nsa.schema import Section


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "sgd"] = Field("adamw", description="adamw; sgd is for tests of gradients")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="decay; wsd: warm-up, stable, decay")
    decay_steps: int | None = Field(None, ge=1, description="wsd: length of the final linear decay; null: a fifth of training.steps")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only; norms, biases and embeddings have none")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")


class TrainingConfig(Section):
    """How long and in what pieces."""

    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    global_batch_size: int = Field(ge=1, description="samples (sequences) per optimizer step over all ranks")
    micro_batch_size: int = Field(ge=1, description="samples per forward pass of one rank")
    validation_every: int = Field(100, ge=1, description="steps between two validations; the last step always validates")
    validation_samples: int = Field(32, ge=1, description="held-out samples read by one validation")
    log_every: int = Field(1, ge=1, description="steps between two lines of metrics")
    probe_every: int = Field(50, ge=1, description="steps between two looks into the attention (gates, selected blocks)")
    max_skipped_steps: int = Field(10, ge=0, description="consecutive non-finite steps that are skipped before the run stops")


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: int = Field(200, ge=1, description="steps between two checkpoints; the last step always saves")
    keep_last: int = Field(2, ge=1, description="complete checkpoints that are kept")


class EngineConfig(Section):
    """DeepSpeed and memory."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what ZeRO shards over the ranks: 1 optimizer, 2 + gradients, 3 + weights")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="weights and activations; the optimizer is fp32 always")
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")
    backend: Literal["auto", "triton", "torch", "naive"] = Field("auto", description="implementation of the attention operators")


class EvaluationConfig(Section):
    """What `nsa.evaluate` measures on an export."""

    length_factors: list[int] = Field([1, 2, 4], description="lengths of the recall tasks, times the training length")
    recall_samples: int = Field(64, ge=1, description="samples per recall task and length")
    bpb_samples: int = Field(64, ge=1, description="held-out samples for bits per byte by position")


class Config(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="names the run's folder")
    seed: int = Field(1234, ge=0, lt=2**31, description="of initialisation and data order")
    output_dir: str = Field("checkpoints", description="folder that holds the run folders")
    model: ModelConfig
    attention: AttentionConfig = AttentionConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.data.sequence_length > self.model.max_position:
            raise ValueError(
                f"data.sequence_length ({self.data.sequence_length}) exceeds the rotary range model.max_position "
                f"({self.model.max_position}): shorten the samples or raise max_position"
            )
        if self.training.global_batch_size % self.training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size ({self.training.global_batch_size}) must be a multiple of "
                f"training.micro_batch_size ({self.training.micro_batch_size})"
            )
        return self
