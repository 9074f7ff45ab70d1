"""The decoder inside a DeepSpeed engine."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from nsa.config import Config
from nsa.models import Decoder
from nsa.models.initialisation import first_value
from nsa.ops.dense import libraries
from nsa.parallel.config import stage_layers
from nsa.parallel.decoder import parallelize
from nsa.parallel.grid import Grid, ModelParallelUnit
from nsa.parallel.partition import materialise
from nsa.training.activation_checkpointing import checkpoint_layers
from nsa.training.clipping import clip_by_section
from nsa.training.cuda_graphs import GraphedDecoder, graphs_serve
from nsa.training.distributed import Ranks
from nsa.training.freezing import freeze_others
from nsa.training.gradient_sinks import GradientSinks
from nsa.training.optimizer import SGD, STATE_KEYS, AdamW, build_optimizer
from nsa.training.sharded_state import create_optimizer_state


def build_engine(config: Config, ranks: Ranks, grid: Grid, deepspeed_json: dict[str, Any]) -> DeepSpeedEngine:
    """A DeepSpeed engine around this rank's part of the decoder, in the precision of training.

    Weights are initialised from ``config.seed``, identically in every layout. The part must fit on the device, even if
    ZeRO 3 shards it afterwards.
    """
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    draw = partial(first_value, config=config.model, seed=config.seed, device=ranks.device)
    with torch.device("meta"):
        model = Decoder(
            config.model,
            config.attention,
            backend=config.engine.backend,
            dense_attention=config.engine.dense_attention,
        )
    model = parallelize(model, grid, fill=lambda model: materialise(model, draw, dtype))
    if config.train != "all":
        freeze_others(model, config)
    elif config.engine.activation_checkpointing != "none":
        checkpoint_layers(model.layers, config.engine.activation_checkpointing)
    offload = config.engine.offload_optimizer
    optimizer = build_optimizer(model, config.optimizer, apart=clips_apart(config), offload=offload)

    optimizer.gate.close()  # to allocate, DeepSpeed takes a step with zero gradients, which would decay the weights
    mpu = ModelParallelUnit(grid)
    graphed = None
    if graphs_serve(config, ranks.device):
        graphed = GraphedDecoder(model, config.data.sequence_length, grid.traffic)
    with _quiet():
        engine, *_ = deepspeed.initialize(model=graphed or model, optimizer=optimizer, config=deepspeed_json, mpu=mpu)
    optimizer.gate.reset()
    if isinstance(engine.optimizer, BF16_Optimizer):
        alone, original = grid.model.size == 1, engine.optimizer.get_grads_for_norm
        engine.optimizer.get_grads_for_norm = (
            partial(_flat_gradients, engine.optimizer) if alone else _at_least_one(original, ranks)
        )
    if graphed and isinstance(engine.optimizer, BF16_Optimizer) and config.engine.zero_stage == 1:
        graphed.sinks = GradientSinks(engine.optimizer)
    clip_by_section(engine)
    create_optimizer_state(engine, STATE_KEYS[config.optimizer.kind])
    return engine


def clips_apart(config: Config) -> bool:
    """Whether what is trained apart is clipped apart.

    DeepSpeed's ranks must have the same groups of parameters. So it is not in a pipeline of which some stages have
    such layers, and others have none.
    """
    kinds, stages = config.attention.kinds(config.model.num_layers), config.parallel.pipeline
    return all(any(kinds[i].apart for i in stage_layers(len(kinds), stages, stage)) for stage in range(stages))


def client_optimizer(engine: DeepSpeedEngine) -> AdamW | SGD:
    """Our optimizer, which DeepSpeed's may wrap."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def sum_gradients_held_alike(engine: DeepSpeedEngine) -> None:
    """Sum the gradients of replicated parameters before a step. Needed with CUDA graphs that fill gradient sinks;
    otherwise the backward passes have done it."""
    graphed = engine.module
    if isinstance(graphed, GraphedDecoder) and graphed.sinks is not None:
        graphed.sinks.sum_alike()


def dense_attention_of(config: Config, device: torch.device) -> str | None:
    """Description of the implementation of dense attention in this run; None without dense layers.

    Raises:
        ValueError: the implementation of ``engine.dense_attention`` is not available or does not support the shape.
    """
    model, name = config.model, config.engine.dense_attention
    if not any(kind.dense_library for kind in config.attention.kinds(model.num_layers)):
        return None
    if config.engine.backend != "auto":
        return f"{config.engine.backend} (engine.backend)"
    shape = model.head_dim, model.v_head_dim or model.head_dim
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    obstacles = {n: libraries.not_here(n) or libraries.cannot(n, *shape, dtype) for n in libraries.NAMES}
    if device.type != "cuda":
        obstacles["triton"] = "there is no CUDA device"
    if obstacle := obstacles.get(name):
        can = ["auto", *(n for n in ("triton", *libraries.NAMES) if not obstacles.get(n))]
        raise ValueError(f"engine.dense_attention={name}: {obstacle}. Here it can be {', '.join(can)}")
    if device.type != "cuda":
        return "torch"
    return libraries.in_words(name, *shape, dtype, device)


def _flat_gradients(optimizer: BF16_Optimizer, for_clipping: bool = False) -> Any:
    """`BF16_Optimizer.get_grads_for_norm` for ranks that hold the whole model.

    Returns the flat buffers, whose padding is 0, instead of a gradient per parameter: with one small kernel for each of
    those, the GPU would wait for the host.
    """
    flat = optimizer.fp32_groups_gradients_flat
    return flat if for_clipping else (flat, {})


def _at_least_one(original: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """`BF16_Optimizer.get_grads_for_norm` with a zero for a rank that owns no gradient.

    DeepSpeed cannot compute the norm of an empty list. With expert parallelism a rank may hold only dense layers, which
    other ranks own.
    """

    def gradients(for_clipping: bool = False) -> Any:
        if for_clipping:
            return original(for_clipping)
        shared, of_experts = original()
        return shared or [torch.zeros(1, device=ranks.device)], of_experts

    return gradients


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence DeepSpeed, except for errors.

    It warns of an "untested optimizer" (tests/training/test_parity.py tests it), and its bf16 optimizer prints three
    lines about memory for every parameter group, whatever the log level.
    """
    log, report = logging.getLogger("DeepSpeed"), bf16_optimizer.see_memory_usage
    level = log.level
    log.setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    try:
        yield
    finally:
        bf16_optimizer.see_memory_usage = report
        log.setLevel(level)
