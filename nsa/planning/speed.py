"""Step time of a configuration in its layout of ranks, predicted.

A step takes the longer of what Python launches (where CUDA graphs serve: the sums of gradients between tensor-parallel
ranks alone) and what the device computes, then what the links move (nothing is assumed to overlap), stretched by the
pipeline's bubble. The efficiencies were fitted to 17 measurements on one H200: 15 of whole models without DeepSpeed
(25m and 125m, dense and NSA, 8K to 64K tokens), two of the trainer (1b's layers, 32K and 128K tokens);
`nsa.planning.measured` states the error, on these points and on others. A sample is taken for one document: of packed
ones dense attention computes less. Of links and of the host's memory nothing is measured yet: arithmetic from data
sheets.
"""

from dataclasses import dataclass

import torch

from nsa.config import Config
from nsa.models.sizes import attention_flops, training_flops_per_token
from nsa.planning.memory import Memory
from nsa.planning.traffic import bytes_sent, data_bytes, element_bytes, held_alike, parameters_of_rank
from nsa.training.cuda_graphs import graphs_serve
from nsa.training.deepspeed_config import micro_batches_per_step

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """peak: bf16 FLOP/s. memory: bytes. fast, slow: bytes/s one way of a rank within a machine and between machines.

    From data sheets: NVLink, and one 400 Gb/s adapter a GPU (200 on the A100).
    """

    name: str
    peak: float
    memory: float
    fast: float
    slow: float
    per_machine: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 989e12, 141e9, 450e9, 50e9),
        Gpu("H100", 989e12, 80e9, 450e9, 50e9),
        Gpu("A100", 312e12, 80e9, 300e9, 25e9),
    )
}
# Fitted (see above), but for what the fit does not tell apart, which was set by hand: the share of the peak in matrix
# products and in NSA's, and ELEMENTWISE. Shares of the peak; seconds per layer, hidden unit and token of everything
# between the matrix products (norms, rotary, residuals, on an H200), per token and word of the vocabulary (the loss and
# its gradient), per layer of NSA, KV head and token (lists, and tiles that neighbours with other blocks share); seconds
# that Python needs to launch a layer's forward and backward.
MATRICES = 0.7
ATTENTION = {"dense": 0.345, "nsa": 0.6}
ELEMENTWISE = 1e-11
LOGITS = 4.5e-11
LISTS = 1.18e-7
LAUNCH = {"dense": 2.55e-3, "nsa": 9.5e-3}
# Measured once, 125m over four H100s (docs/log.md, 2026-11-26): how much more Python launches where tensor- or
# context-parallel ranks share a sample; seconds for a gradient that tensor-parallel ranks sum, which is in no graph.
SHARED, SUMMED = 3.0, 2e-4
# Assumed: the share of a link's bandwidth that is reached, the share of the memory that a plan may fill, bytes/s
# between device and host, and parameters/s that AdamW updates on the host.
LINK, ROOM, HOST_LINK, HOST_ADAM = 0.8, 0.9, 25e9, 1e9
AXES = ("tensor", "expert", "context", "pipeline", "data")


@dataclass(frozen=True)
class Speed:
    """Of the first rank and one step.

    Attributes:
        sent: bytes by name, DeepSpeed's as ``data``. seconds: by kind, without the pipeline's bubble.
        tokens_per_second: of all ranks.
    """

    sent: dict[str, float]
    seconds: dict[str, float]
    step_seconds: float
    tokens_per_second: float


def fits(memory: Memory, gpu: Gpu) -> bool:
    """Whether a part of the device's memory stays free, for fragments and what nobody counts."""
    return memory.peak <= ROOM * gpu.memory


def predict_speed(config: Config, gpus: int, gpu: Gpu) -> Speed:
    """Predict a step on ``gpus`` GPUs. Raises ValueError if they cannot be dealt out."""
    model, engine, parallel = config.model, config.engine, config.parallel
    tp, ep, cp, pp = parallel.tensor, parallel.expert, parallel.context, parallel.pipeline
    passes, length = micro_batches_per_step(config, gpus), config.data.sequence_length
    kinds = [str(kind) for kind in config.attention.kinds(model.num_layers)]
    parameters = parameters_of_rank(config)
    sent: dict[str, float] = {**bytes_sent(config, gpus), "data": data_bytes(config, gpus, parameters)}

    scores = {
        kind: 3 * attention_flops(kind, model, config.attention, length) * kinds.count(kind)
        for kind in dict.fromkeys(kinds)
    }
    matrices = training_flops_per_token(model, config.attention, length)["sparse"] - sum(scores.values())
    share = passes * config.training.micro_batch_size * length / (cp * tp * pp)  # tokens x part of the model
    # Recomputed is a forward pass, a third of both; selectively, not that of attention.
    again = 1.0 if engine.activation_checkpointing == "none" else 4 / 3
    attention_again = again if engine.activation_checkpointing == "full" else 1.0
    seconds = {"matrix products": again * share * matrices / (MATRICES * gpu.peak)}
    seconds["attention"] = attention_again * share * sum(f / (ATTENTION[k] * gpu.peak) for k, f in scores.items())
    lists = LISTS * kinds.count("nsa") * model.num_kv_heads
    seconds["elementwise"] = again * share * (ELEMENTWISE * model.num_layers * model.hidden_size + lists)
    seconds["logits"] = LOGITS * share * model.vocab_size
    launch = passes / pp * again * sum(LAUNCH[kind] for kind in kinds) * (SHARED if tp * cp > 1 else 1.0)
    if graphs_serve(config, torch.device("cuda")):
        launch = 0.0
    sums = (1 if pp > 1 else passes) * SUMMED * len(held_alike(config, kinds, last=True)) / pp
    seconds["waiting for Python"] = max(0.0, launch - sum(seconds.values())) + sums
    # Tensor-parallel ranks are neighbours, then expert, context ...: an axis is slow if it leaves the machine.
    reach = 1
    for axis, size in zip(AXES, (tp, ep, cp, pp, gpus // (tp * ep * cp * pp)), strict=True):
        reach *= size
        moved = sum(num_bytes for name, num_bytes in sent.items() if name.partition("/")[0].rstrip("s") == axis)
        seconds[f"{axis} links"] = moved / (LINK * (gpu.fast if reach <= gpu.per_machine else gpu.slow))
    busy = sum(seconds.values()) - seconds["data links"]
    if engine.offload_optimizer:
        mine = parameters / (gpus // (tp * ep * pp))  # ZeRO's part
        seconds["optimizer on the host"] = mine * (2 * element_bytes(config) / HOST_LINK + 1 / HOST_ADAM)
    step = busy * (1 + (pp - 1) / passes) + seconds["data links"] + seconds.get("optimizer on the host", 0.0)
    return Speed(sent, seconds, step, config.training.global_batch_size * length / step)
