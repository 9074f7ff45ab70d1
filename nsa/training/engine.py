"""The decoder inside a DeepSpeed engine."""

import logging
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine

from nsa.config import Config
from nsa.models import Decoder
from nsa.training.activation_checkpointing import checkpoint_layers
from nsa.training.distributed import Ranks
from nsa.training.optimizer import STATE_KEYS, build_optimizer
from nsa.training.sharded_state import create_optimizer_state


def build_engine(config: Config, ranks: Ranks, deepspeed_json: dict[str, Any]) -> DeepSpeedEngine:
    """Initialise the decoder from ``config.seed``, alike on every rank and in every ZeRO stage, and hand it to
    DeepSpeed. The whole model must fit on one device while it is built, ZeRO 3 shards it afterwards."""
    torch.manual_seed(config.seed)
    with torch.device(ranks.device):
        model = Decoder(config.model, config.attention, backend=config.engine.backend)
    if config.engine.activation_checkpointing:
        checkpoint_layers(model.layers)
    optimizer = build_optimizer(model, config.optimizer)

    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)  # "untested optimizer": tests/training/test_parity.py tests it
    optimizer.skip = True  # DeepSpeed takes a step with zero gradients to allocate; it would decay the weights
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_json)
    optimizer.skip = False
    log.setLevel(level)
    create_optimizer_state(engine, STATE_KEYS[config.optimizer.kind])
    return engine
