"""Predicts the step time of a configuration in its layout.

A step takes the maximum of the time to launch kernels from Python and the time of the kernels, plus the time of
communication (no overlap is assumed). The pipeline's bubble stretches the sum. With CUDA graphs Python launches only
the sums of gradients between tensor-parallel ranks. `nsa.planning.work` counts what is computed; constants.json has
the speeds, the measurements that they were fitted to, and the errors. Speeds of links and of the host's memory come
from data sheets: little of them is measured yet.
"""

import json
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from nsa.config import Config
from nsa.ops.dense import libraries
from nsa.planning import constants
from nsa.planning.constants import Constants
from nsa.planning.memory import Memory, straight_gradients
from nsa.planning.traffic import bytes_sent, data_bytes, element_bytes, trained_of_rank
from nsa.planning.work import Work, work_of
from nsa.training.deepspeed_config import micro_batches_per_step

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU, from its data sheet.

    Attributes:
        peak: bf16 FLOP/s. memory: bytes. bandwidth: bytes/s of the memory.
        fast, slow: bytes/s of a rank in one direction, within a node (NVLink) and between nodes (one adapter of
            400 Gb/s per GPU, 200 Gb/s for the A100).
    """

    name: str
    architecture: str
    peak: float
    memory: float
    bandwidth: float
    fast: float
    slow: float
    per_machine: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", "sm_90", 989e12, 141e9, 4.8e12, 450e9, 50e9),
        Gpu("H100", "sm_90", 989e12, 80e9, 3.35e12, 450e9, 50e9),
        Gpu("A100", "sm_80", 312e12, 80e9, 2.04e12, 300e9, 25e9),
    )
}
ONCE = ("optimizer", "between steps", "data links", "optimizer on the host")  # once per step: outside of the bubble
AXES = ("tensor", "expert", "context", "pipeline", "data")


@dataclass(frozen=True)
class Speed:
    """One step of the busiest rank.

    Attributes:
        sent: bytes by name, DeepSpeed's as ``data``. seconds: by kind, without the pipeline's bubble.
        tokens_per_second: of all ranks together.
    """

    sent: dict[str, float]
    seconds: dict[str, float]
    step_seconds: float
    tokens_per_second: float


@cache
def known() -> Constants:
    """The committed constants."""
    return constants.read().values()


def fits(memory: Memory, gpu: Gpu) -> bool:
    """Whether the plan fits with some memory to spare, for fragmentation and what is not counted."""
    return memory.peak <= known().room * gpu.memory


def predict_speed(config: Config, gpus: int, gpu: Gpu, document: float | None = None) -> Speed:
    """Predict a step on ``gpus`` GPUs. Raises ValueError if they do not fit the layout.

    ``document``: tokens of the document that a token lies in, mean over tokens; None: one document fills a sample.
    """
    return Plan(config, gpus, gpu, document).speed(known())


class Plan:
    """The work and traffic of a configuration in its layout. Its predicted time depends on the constants alone.

    Args:
        document: as for `predict_speed`.
        dense: implementation of dense attention, as in engine.dense_attention; None: as configured.
    """

    def __init__(
        self, config: Config, gpus: int, gpu: Gpu, document: float | None = None, dense: str | None = None
    ) -> None:
        self.config, self.gpus, self.gpu = config, gpus, gpu
        self.steps = 1  # 0 if nothing but the update is done once per step
        self.passes = micro_batches_per_step(config, gpus)
        self.trained = trained_of_rank(config)
        self.sent: dict[str, float] = {**bytes_sent(config, gpus), "data": data_bytes(config, gpus)}
        # The first stage has the most layers, the last one the head.
        if straight_gradients(config) and "tensor/gradients" in self.sent:
            self.sent["tensor/gradients"] /= self.passes  # summed once per step
        self.works = [work_of(config, gpus, stage, document) for stage in sorted({0, config.parallel.pipeline - 1})]
        self.dense = dense or dense_attention(config, gpu, packed=document is not None)

    def speed(self, known: Constants) -> Speed:
        parallel, training = self.config.parallel, self.config.training
        tp, ep, cp, pp = parallel.tensor, parallel.expert, parallel.context, parallel.pipeline
        priced = [price(work, self.gpu, known, dense=self.dense, shared=tp * cp > 1) for work in self.works]
        seconds = max(priced, key=lambda one: sum(one.values()))
        sizes = dict(zip(AXES, (tp, ep, cp, pp, self.gpus // (tp * ep * cp * pp)), strict=True))
        for axis in AXES:
            moved = sum(size for name, size in self.sent.items() if name.partition("/")[0].rstrip("s") == axis)
            seconds[f"{axis} links"] = moved / (known.link * link(self.gpu, sizes, axis))
        if self.config.engine.offload_optimizer:
            mine = self.trained / (self.gpus // (tp * ep * pp))  # ZeRO's shard
            moved = 2 * mine * element_bytes(self.config)
            seconds["optimizer on the host"] = moved / known.host_link + mine / known.host_adam
        seconds["between steps"] = known.step * self.steps
        once = sum(seconds.get(kind, 0.0) for kind in ONCE)
        step = (sum(seconds.values()) - once) * (1 + (pp - 1) / self.passes) + once
        tokens = training.global_batch_size * self.config.data.sequence_length
        return Speed(self.sent, seconds, step, tokens / step)


def link(gpu: Gpu, sizes: dict[str, int], axis: str) -> float:
    """Bytes/s of a rank to the others along an axis. ``sizes``: number of ranks of each of AXES.

    Ranks are numbered in the order of AXES, so an axis is slow if it spans several nodes. It is faster if it has
    several ranks in each node: a ring then uses the network adapters of all of them. Experts and pipeline stages send
    to single ranks, over one adapter.
    """
    inner = prod(sizes[other] for other in AXES[: AXES.index(axis)])
    if inner * sizes[axis] <= gpu.per_machine:
        return gpu.fast
    if axis == "data":  # ZeRO's ranks are the context-parallel ones, too
        inner //= sizes["context"]
    together = 1 if axis in ("expert", "pipeline") else max(1, gpu.per_machine // inner)
    return min(gpu.fast, together * gpu.slow)


def dense_attention(config: Config, gpu: Gpu, packed: bool) -> str:
    """The implementation of dense attention without optional packages. ``packed``: documents differ in length."""
    engine = config.engine
    if engine.backend != "auto" or engine.dense_attention != "auto":
        return engine.dense_attention if engine.backend == "auto" else "triton"
    order = json.loads(Path(libraries.__file__).with_name("fastest.json").read_text())["order"]
    order = order.get(gpu.architecture, order["other"])["packed" if packed else "equal"]
    return next(name for name in order if name not in libraries.MODULES)


def price(work: Work, gpu: Gpu, known: Constants, dense: str, shared: bool) -> dict[str, float]:
    """Seconds by kind.

    ``dense``: implementation of dense attention. ``shared``: whether tensor- or context-parallel ranks share a sample.
    """
    faster = {"triton": known.dense_triton, "flash": known.dense_flash, "flash-attn-4": known.dense_flash_4}
    attention = known.dense * faster.get(dense, 1.0)
    flops = work.attention
    narrow = 1 + known.nsa_width / work.head_width
    seconds = {
        "matrix products": (work.flops + known.matrices_width * work.thin) / (known.matrices * gpu.peak),
        "dense attention": flops["causal"] * (1 + known.dense_width / work.head_width) / (attention * gpu.peak),
        "NSA": narrow * (flops["compressed"] / known.nsa_compressed + flops["near"] / known.nsa_near) / gpu.peak
        + work.lists * known.lists * GPUS["H200"].peak / gpu.peak,
        "elementwise": work.elementwise / (known.elementwise * gpu.bandwidth),
        "logits": 2 * known.logits * work.logits / gpu.bandwidth,
        "optimizer": work.optimizer / (known.optimizer * gpu.bandwidth),
        "handing gradients over": work.gradients * known.gradient,
    }
    starts = {"dense": known.start_dense, "nsa": known.start_nsa}
    seconds["starting kernels"] = sum(starts[kind] * number for kind, number in work.layers.items())
    calls = {"dense": known.launch_dense, "nsa": known.launch_nsa}
    launch = sum(calls[kind] * number for kind, number in work.layers.items()) if work.launched else 0.0
    launch *= known.shared if shared else 1
    seconds["waiting for Python"] = max(0.0, launch - sum(seconds.values())) + known.summed * work.sums
    return seconds
