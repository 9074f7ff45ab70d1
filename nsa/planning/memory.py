"""Memory of one rank, by kind.

Weights, gradients and the optimizer's state are counted as DeepSpeed 0.19 keeps them in each ZeRO stage. Activations
are measured in dry runs of decoders of one and two layers, so they are what the code really keeps.
"""

from dataclasses import dataclass
from typing import Any

import torch

from nsa.config import Config
from nsa.layers.kind import Kind
from nsa.parallel.config import ParallelConfig, stage_layers
from nsa.parallel.grid import data_parallel_size
from nsa.planning.dry_run import dry_run
from nsa.planning.traffic import element_bytes, parameters_of_rank, passes_of, trained_of_rank
from nsa.training.cuda_graphs import graphs_serve
from nsa.training.deepspeed_config import deepspeed_config, micro_batches_per_step


@dataclass(frozen=True)
class Memory:
    """Bytes of the first rank of a replica, which holds the most layers and micro batches.

    Attributes:
        device: by kind, during training. host: the same, for the optimizer's state if it is offloaded, and for the fp32
            values of weights that are not trained.
        start: on the device before ZeRO shards anything: the rank's part, and one whole parameter in fp32.
    """

    device: dict[str, float]
    host: dict[str, float]
    start: float

    @property
    def peak(self) -> float:
        """Peak memory of the device."""
        return max(self.start, sum(self.device.values()))


def memory_of(config: Config, gpus: int) -> Memory:
    """The memory of a rank. Raises ValueError if ``gpus`` do not fit the layout."""
    model, stages, kinds = config.model, config.parallel.pipeline, _kinds(config)
    costs = {kind: _layer_costs(_alone(config, *kind)) for kind in dict.fromkeys(kinds)}
    tables = 1 if stages > 1 or model.tie_embeddings else 2
    parameters = tables * _table(config) + sum(costs[kind].parameters for kind in kinds)
    if stages == 1:
        parameters += model.hidden_size  # the last norm
    trained = parameters if config.train == "all" else sum(costs[kind].trained for kind in kinds)
    kept = _in_flight(config, gpus) * sum(costs[kind].kept for kind in kinds)
    return _memory(config, gpus, parameters, trained, max(cost.fixed for cost in costs.values()) + kept)


def memory_at_least(config: Config, gpus: int) -> float:
    """A lower bound of the device's memory in bytes, cheaper than `memory_of`.

    Needs no dry run per layout, since layers keep about the same memory per token in all layouts. Raises ValueError if
    ``gpus`` do not fit the layout.
    """
    parallel, training, kinds = config.parallel, config.training, _kinds(config)
    one = training.model_copy(update={"micro_batch_size": 1})
    alone = config.model_copy(update={"parallel": ParallelConfig(), "training": one})
    kept = {kind: _layer_costs(_alone(alone, *kind)).kept for kind in dict.fromkeys(kinds)}
    samples = _in_flight(config, gpus) * training.micro_batch_size / (parallel.tensor * parallel.context)
    activations = samples * sum(kept[kind] for kind in kinds)
    parameters = parameters_of_rank(config), trained_of_rank(config)
    return 0.8 * sum(_memory(config, gpus, *parameters, activations).device.values())


def _kinds(config: Config) -> list[tuple[Kind, bool]]:
    """(record of the attention, whether it has experts) of each layer of the first stage."""
    model, attention = config.model, config.attention.kinds(config.model.num_layers)
    numbers = stage_layers(model.num_layers, config.parallel.pipeline, 0)
    return [(attention[number], model.has_experts(number)) for number in numbers]


def _in_flight(config: Config, gpus: int) -> int:
    """Number of micro batches whose activations the first stage keeps under 1F1B, or without backward passes."""
    if not passes_of(config).backward:
        return 1
    return min(micro_batches_per_step(config, gpus), config.parallel.pipeline)


def _table(config: Config) -> int:
    """Elements of a rank's part of the embedding."""
    return config.model.vocab_size // config.parallel.tensor * config.model.hidden_size


def _memory(config: Config, gpus: int, parameters: float, trained: float, activations: float) -> Memory:
    """``parameters``: of the rank; ``trained`` of them have gradients and state."""
    passes = micro_batches_per_step(config, gpus)
    replicas = data_parallel_size(config.parallel, gpus) * config.parallel.context // config.parallel.expert
    model, engine, width, stages = config.model, config.engine, element_bytes(config), config.parallel.pipeline
    device: dict[str, float] = {"weights": parameters * width}
    if engine.zero_stage == 3:
        zero = deepspeed_config(config, gpus)["zero_optimization"]
        # Weights that are used again soon stay gathered.
        device["weights"] = device["weights"] / replicas + min(parameters, zero["stage3_max_live_parameters"]) * width
    device["gradients"] = trained * _gradient_bytes(config, replicas)
    if stages > 1:
        device["gradients"] += trained * (4 + width)  # the pipeline's sum, and the gradients of one pass
    if straight_gradients(config):
        # The CUDA graph holds the gradients of a whole pass, in part in the memory of activations that it freed.
        device["recording"] = max(parameters * width - activations, _table(config) * width)
    elif graphs_serve(config, torch.device("cuda")):
        # The gradients that the CUDA graph writes. With several passes or ZeRO 2 also a copy of them.
        device["recording"] = parameters * width * (1 + (passes > 1 or engine.zero_stage == 2))
    state: dict[str, float] = {}
    copies = 4 if width == 2 or engine.offload_optimizer else 0
    copies += 8 if config.optimizer.kind == "adamw" else 0
    state["optimizer"] = trained * copies / (replicas if engine.zero_stage else 1)
    if engine.offload_optimizer:
        state["gradients"] = trained * 4 / replicas
        host, state = state, {}
    else:
        host = {}
    if trained < parameters:
        host["weights that are not trained"] = 4 * (parameters - trained) / (replicas if engine.zero_stage == 3 else 1)
    device |= state
    device["buffers"] = _bucket(config, gpus, trained) if replicas > 1 or engine.zero_stage >= 2 else 0.0
    device["activations"] = activations
    largest = max(model.vocab_size * model.hidden_size, _experts(config))
    start = width * parameters + 4.0 * largest
    return Memory(device, host, start)


def straight_gradients(config: Config) -> bool:
    """Whether the CUDA graph adds gradients to DeepSpeed's fp32 sums itself (`nsa.training.gradient_sinks`)."""
    engine = config.engine
    kept = engine.precision == "bf16" and engine.zero_stage == 1 and not engine.offload_optimizer
    return kept and graphs_serve(config, torch.device("cuda"))


def _experts(config: Config) -> int:
    """Elements of one weight matrix of all routed experts of a layer."""
    moe = config.model.moe
    return moe.num_experts * config.model.hidden_size * moe.expert_size if moe else 0


def _gradient_bytes(config: Config, replicas: int) -> float:
    """Bytes of gradients per parameter of a rank."""
    stage, width = config.engine.zero_stage, element_bytes(config)
    if stage == 0:
        return 4 if width == 4 else 2 + 4  # accumulated in bf16, and in fp32 for the update
    if stage == 1 and width == 2:
        return 4 + (0 if straight_gradients(config) else 2)  # the fp32 sum, and the gradients of one pass
    if stage == 1:
        return 4 + (0 if config.engine.offload_optimizer else 4 / replicas)  # and the average of the rank's shard
    return 0 if config.engine.offload_optimizer else 4 / replicas


def _bucket(config: Config, gpus: int, trained: float) -> float:
    """Bytes of the bucket that gradients are gathered in before they are reduced, and of its fp32 copy."""
    size = deepspeed_config(config, gpus)["zero_optimization"]["reduce_bucket_size"]
    width = element_bytes(config)
    return min(size, trained) * (width + (4 if width == 2 else 0))


@dataclass(frozen=True)
class _Costs:
    """kept: bytes that a layer keeps until its backward pass. fixed: bytes besides. parameters: number per layer.
    trained: of them."""

    kept: float
    fixed: float
    parameters: int
    trained: int


def _alone(config: Config, kind: Kind, experts: bool) -> Config:
    """The configuration with one layer of this kind and one micro batch, equal for all numbers of layers and ranks."""
    changes: dict[str, Any] = {"kind": kind.name}
    if kind.config is not None:
        changes[kind.name] = kind.twin(config.attention.of(kind))
    attention, parallel = config.attention.model_copy(update=changes), config.parallel
    moe = config.model.moe.model_copy(update={"first_dense": 0}) if config.model.moe and experts else None
    model = config.model.model_copy(update={"num_layers": 1, "moe": moe})
    parallel = ParallelConfig(tensor=parallel.tensor, context=parallel.context, expert=parallel.expert)
    samples = config.training.micro_batch_size * parallel.expert
    training = config.training.model_copy(update={"global_batch_size": samples})
    update = {"attention": attention, "model": model, "parallel": parallel, "training": training}
    return config.model_copy(update=update)


_known: dict[str, _Costs] = {}


def _layer_costs(config: Config) -> _Costs:
    """The costs of a layer, from the difference between decoders of one and of two layers."""
    key = config.model_dump_json(include={"attention", "model", "parallel", "training", "engine", "data", "train"})
    if key not in _known:
        two = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 2})})
        ranks = config.parallel.replica_ranks
        one, both = dry_run(config, ranks), dry_run(two, ranks)
        kept = both.peak_bytes - one.peak_bytes
        more = both.parameters - one.parameters, both.trained - one.trained
        _known[key] = _Costs(kept, one.peak_bytes - kept, *more)
    return _known[key]
