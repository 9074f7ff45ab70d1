"""The `parallel` section of a configuration, and which layouts a model allows."""

from pydantic import Field

from nsa.models.config import AttentionConfig, ModelConfig
from nsa.schema import Section


class ParallelConfig(Section):
    """How many ranks share one replica of the model; the ranks that are left over are data-parallel."""

    tensor: int = Field(
        1, ge=1, description="ranks that split heads, MLP columns and the vocabulary (Megatron, with sequence-parallel "
        "norms); keep within one node"
    )  # fmt: skip
    context: int = Field(1, ge=1, description="ranks that split the tokens of a sample, with equal work")
    expert: int = Field(
        1, ge=1, description="data-parallel ranks that split the routed experts of model.moe and send each other tokens"
    )
    pipeline: int = Field(1, ge=1, description="stages of consecutive layers, through which micro batches flow (1F1B)")

    @property
    def model_ranks(self) -> int:
        """Ranks that together compute one sample."""
        return self.tensor * self.context * self.pipeline

    @property
    def replica_ranks(self) -> int:
        """Ranks that together hold all weights: `model_ranks` for each expert-parallel rank."""
        return self.model_ranks * self.expert


def check_layout(parallel: ParallelConfig, model: ModelConfig, sequence_length: int, zero_stage: int) -> None:
    """Raise ValueError, with the reason and what to change, if the model or its samples do not fit the layout."""
    tensor, context = parallel.tensor, parallel.context
    for key in ("num_heads", "intermediate_size", "vocab_size"):
        size = getattr(model, key)
        if size % tensor:
            raise ValueError(
                f"parallel.tensor ({tensor}) must divide model.{key} ({size}): every rank computes an equal part; "
                f"set model.{key} to {-(-size // tensor) * tensor} or change parallel.tensor"
            )
    if parallel.expert > 1 and model.moe is None:
        raise ValueError(
            f"parallel.expert ({parallel.expert}) splits the experts of model.moe, and this model has none: "
            "set it to 1; ranks that are left over are data-parallel"
        )
    if model.moe is not None:
        holders = parallel.expert * tensor
        if model.moe.num_experts % holders:
            raise ValueError(
                f"parallel.expert x parallel.tensor ({holders}) must divide model.moe.num_experts "
                f"({model.moe.num_experts}): every one of these ranks holds as many experts"
            )
        shared = model.moe.num_shared * model.moe.expert_size
        if shared % tensor:
            raise ValueError(
                f"parallel.tensor ({tensor}) must divide model.moe.num_shared x model.moe.expert_size ({shared}): "
                "the shared experts are one MLP, of which every rank computes an equal part"
            )
    if parallel.pipeline > model.num_layers:
        raise ValueError(
            f"parallel.pipeline ({parallel.pipeline}) exceeds model.num_layers ({model.num_layers}): every stage needs "
            "a layer"
        )
    if parallel.pipeline > 1 and zero_stage == 3:
        raise ValueError(
            f"engine.zero_stage 3 does not go with parallel.pipeline ({parallel.pipeline}): a stage works on several "
            "micro batches, and each would gather the weights again; use engine.zero_stage 1"
        )
    if model.num_kv_heads % tensor and tensor % model.num_kv_heads:
        raise ValueError(
            f"parallel.tensor ({tensor}) must divide model.num_kv_heads ({model.num_kv_heads}) or be a multiple of it: "
            "a rank holds whole KV heads, or an equal part of the query heads of one"
        )
    if context > 1 and sequence_length % (2 * context):
        raise ValueError(
            f"data.sequence_length ({sequence_length}) must be a multiple of 2 x parallel.context ({2 * context}): "
            "each rank takes one chunk from the front and one from the back, so that all have equal work"
        )
    if sequence_length // context % tensor:
        raise ValueError(
            f"data.sequence_length / parallel.context ({sequence_length // context}) must be a multiple of "
            f"parallel.tensor ({tensor}): between attention and MLP each rank holds an equal part of the tokens"
        )


def stage_layers(num_layers: int, stages: int, stage: int) -> range:
    """The layers of a stage. If they cannot be divided equally, later stages have fewer: the last has the head, too."""
    first, end = (-(-number * num_layers // stages) for number in (stage, stage + 1))
    return range(first, end)


def check_stages(parallel: ParallelConfig, model: ModelConfig, attention: AttentionConfig) -> None:
    """Raise ValueError if a stage begins with a layer that takes something from a layer of the stage before."""
    pattern = len(attention.pattern(model.num_layers))
    for stage in range(1, parallel.pipeline):
        layers, seen = stage_layers(model.num_layers, parallel.pipeline, stage), set()
        for number in layers[:pattern]:
            kind = attention.kind_at(number)
            if kind.borrows and kind.name not in seen:
                raise ValueError(
                    f"parallel.pipeline ({parallel.pipeline}): stage {stage} begins at layer {layers.start}, and layer "
                    f"{number} attends to index sets that a layer of the stage before selects. A group of "
                    f"attention.{kind.name}.share_layers must lie within one stage: change share_layers, share_from or "
                    "parallel.pipeline"
                )
            seen.add(kind.name)
