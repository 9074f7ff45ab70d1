"""The best layout of ranks, by trying all."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from nsa.config import Config, ConfigError
from nsa.parallel.config import ParallelConfig
from nsa.planning.memory import Memory, memory_of
from nsa.planning.speed import Gpu, Speed, fits, predict_speed


@dataclass(frozen=True)
class Found:
    """A layout, its speed and its memory."""

    config: Config
    speed: Speed
    memory: Memory


def layouts(gpus: int, experts: bool = False) -> Iterator[ParallelConfig]:
    """Every layout of so many GPUs, of a model with ``experts`` or without; what is left over is data-parallel."""
    for tensor in _divisors(gpus):
        for context in _divisors(gpus // tensor):
            for pipeline in _divisors(gpus // (tensor * context)):
                for expert in _divisors(gpus // (tensor * context * pipeline)) if experts else (1,):
                    yield ParallelConfig(tensor=tensor, context=context, pipeline=pipeline, expert=expert)


def in_layout(config: Config, parallel: ParallelConfig) -> Config:
    """The configuration with another `parallel` section. Raises ConfigError in the trainer's words if it refuses it."""
    try:
        return Config.model_validate(config.model_dump() | {"parallel": parallel.model_dump()})
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["ctx"]["error"])) from error


def search(config: Config, gpus: int, gpu: Gpu, most: int = 8) -> list[Found]:
    """The ``most`` fastest layouts that fit in memory.

    Raises:
        ConfigError: none can train it, or none fits.
    """
    tried: list[tuple[Config, Speed]] = []
    reason = ""
    for parallel in layouts(gpus, experts=config.model.moe is not None):
        try:
            other = in_layout(config, parallel)
            tried.append((other, predict_speed(other, gpus, gpu)))
        except ValueError as error:  # the trainer's words, of the last one
            reason = str(error)
    if not tried:
        raise ConfigError(f"no layout of {gpus} GPUs can train this; the last one tried: {reason}")
    tried.sort(key=lambda pair: pair[1].step_seconds)
    found: list[Found] = []
    for other, speed in tried:
        memory = memory_of(other, gpus)
        if fits(memory, gpu):
            found.append(Found(other, speed, memory))
        if len(found) == most:
            break
    if not found:
        raise ConfigError(
            f"no layout of {gpus} GPUs fits into the {gpu.memory / 1e9:.0f} GB of a {gpu.name}: use more, raise "
            "engine.zero_stage or recompute activations (engine.activation_checkpointing=full)"
        )
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
