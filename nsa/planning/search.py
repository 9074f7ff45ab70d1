"""Exhaustive search for the best layout, recomputation and micro batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from nsa.config import Config, ConfigError
from nsa.parallel.config import ParallelConfig
from nsa.parallel.grid import data_parallel_size
from nsa.planning.memory import Memory, memory_at_least, memory_of
from nsa.planning.speed import Gpu, Speed, fits, known, predict_speed

MODES = ("none", "selective", "full")  # from the most memory to the least


@dataclass(frozen=True)
class Candidate:
    """A layout with its recomputation and micro batch, its predicted speed and memory."""

    config: Config
    speed: Speed
    memory: Memory


def layouts(gpus: int, experts: bool = False) -> Iterator[ParallelConfig]:
    """Every layout of ``gpus`` GPUs for a model with or without ``experts``; the remaining ranks are data-parallel."""
    for tensor in _divisors(gpus):
        for context in _divisors(gpus // tensor):
            for pipeline in _divisors(gpus // (tensor * context)):
                for expert in _divisors(gpus // (tensor * context * pipeline)) if experts else (1,):
                    yield ParallelConfig(tensor=tensor, context=context, pipeline=pipeline, expert=expert)


def in_layout(config: Config, parallel: ParallelConfig, mode: str | None = None, micro: int | None = None) -> Config:
    """The configuration with another `parallel` section, and perhaps another recomputation and micro batch.

    Raises ConfigError, with the trainer's message, if the configuration is invalid.
    """
    settings: dict[str, Any] = config.model_dump() | {"parallel": parallel.model_dump()}
    settings["engine"] |= {"activation_checkpointing": mode or config.engine.activation_checkpointing}
    settings["training"] |= {"micro_batch_size": micro or config.training.micro_batch_size}
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["ctx"]["error"])) from error


def micro_batches(config: Config, parallel: ParallelConfig, gpus: int) -> list[int]:
    """The configured size, and the powers of two that divide a rank's part of the global batch.

    With a balance loss only the configured size, since that loss is computed per micro batch.
    """
    training, moe = config.training, config.model.moe
    if moe is not None and moe.loss_weight:
        return [training.micro_batch_size]
    samples = training.global_batch_size // data_parallel_size(parallel, gpus)
    powers = {2**n for n in range(samples.bit_length()) if samples % 2**n == 0}
    return sorted(powers | {training.micro_batch_size})


def search(config: Config, gpus: int, gpu: Gpu, most: int = 8) -> list[Candidate]:
    """The ``most`` fastest candidates that fit in memory: the fastest micro batch of each layout and recomputation.

    Raises:
        ConfigError: no layout can train the model, or none fits in memory.
    """
    tried: list[tuple[Config, Speed]] = []
    reason = ""
    for parallel in layouts(gpus, experts=config.model.moe is not None):
        try:
            in_layout(config, parallel)
            sizes = micro_batches(config, parallel, gpus)
        except ValueError as error:
            reason = str(error)
            continue
        for micro in sizes:
            for mode in MODES if config.train == "all" else MODES[:1]:  # without effect there
                try:
                    other = in_layout(config, parallel, mode, micro)
                    tried.append((other, predict_speed(other, gpus, gpu)))
                except ValueError as error:
                    reason = str(error)
    if not tried:
        raise ConfigError(f"no layout of {gpus} GPUs can train this; the last one tried: {reason}")
    # If two are equally fast, the smaller micro batch comes first.
    tried.sort(key=lambda pair: (pair[1].step_seconds, pair[0].training.micro_batch_size))
    best: dict[tuple[ParallelConfig, str], Candidate] = {}
    for other, speed in tried:
        choice = other.parallel, other.engine.activation_checkpointing
        if choice in best or memory_at_least(other, gpus) > known().room * gpu.memory:
            continue
        memory = memory_of(other, gpus)
        if fits(memory, gpu):
            best[choice] = Candidate(other, speed, memory)
        if len(best) == most:
            break
    if not best:
        raise ConfigError(
            f"no layout of {gpus} GPUs fits into the {gpu.memory / 1e9:.0f} GB of a {gpu.name}, whatever is "
            "recomputed: use more, or raise engine.zero_stage"
        )
    return list(best.values())


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
