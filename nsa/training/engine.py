"""The decoder inside a DeepSpeed engine."""

import logging
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine

from nsa.config import Config
from nsa.models import Decoder
from nsa.parallel.decoder import parallelize
from nsa.parallel.grid import Grid, ModelParallelUnit
from nsa.training.activation_checkpointing import checkpoint_layers
from nsa.training.distributed import Ranks
from nsa.training.optimizer import STATE_KEYS, build_optimizer
from nsa.training.sharded_state import create_optimizer_state


def build_engine(config: Config, ranks: Ranks, grid: Grid, deepspeed_json: dict[str, Any]) -> DeepSpeedEngine:
    """Initialise the decoder from ``config.seed``, alike on every rank and in every layout, spread it over the grid
    and hand it to DeepSpeed. The whole model must fit on one device while it is built; it is sharded afterwards."""
    torch.manual_seed(config.seed)
    with torch.device(ranks.device):
        model = Decoder(config.model, config.attention, backend=config.engine.backend)
    parallelize(model, grid)
    if config.engine.activation_checkpointing:
        checkpoint_layers(model.layers)
    optimizer = build_optimizer(model, config.optimizer)

    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)  # "untested optimizer": tests/training/test_parity.py tests it
    optimizer.skip = True  # DeepSpeed takes a step with zero gradients to allocate; it would decay the weights
    mpu = ModelParallelUnit(grid)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_json, mpu=mpu)
    optimizer.skip = False
    log.setLevel(level)
    create_optimizer_state(engine, STATE_KEYS[config.optimizer.kind])
    return engine
