"""What a run will need, before it is started: parameters, memory per GPU, FLOPs.

Command:
    python -m nsa.plan configs/1b.yaml --gpus 8 [--gpu H200] [key=value ...]

The decoder is built on the meta device: nothing is allocated, any size fits on a laptop.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa import layouts
from nsa.config import Config, ConfigError, load_config
from nsa.models import Decoder, training_flops_per_token
from nsa.models.head import CHUNK_LOGITS

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Memory is in bytes per GPU, FLOPs are forward and backward."""

    parameters: int
    embedding_parameters: int
    micro_batches_per_step: int  # of one GPU: the gradient accumulation
    tokens_per_step: int  # over all GPUs
    memory: dict[str, float]  # weights, gradients, optimizer, activations
    flops_per_token: dict[str, float]  # sparse, dense_equivalent


def make_plan(config: Config, gpus: int) -> Plan:
    """Count and estimate. Raises ``ConfigError`` if the global batch cannot be dealt out to so many GPUs."""
    training, length = config.training, config.data.sequence_length
    if gpus < 1 or training.global_batch_size % (training.micro_batch_size * gpus):
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size}) times {gpus} GPUs"
        )
    with torch.device("meta"):
        decoder = Decoder(config.model, config.attention, backend=config.engine.backend)
    parameters = sum(p.numel() for p in decoder.parameters())  # a tied head is listed once
    embedding = decoder.embedding.weight.numel() * (1 if config.model.tie_embeddings else 2)
    return Plan(
        parameters=parameters,
        embedding_parameters=embedding,
        micro_batches_per_step=training.global_batch_size // (training.micro_batch_size * gpus),
        tokens_per_step=training.global_batch_size * length,
        memory={**_state_bytes(config, parameters, gpus), "activations": _activation_bytes(config)},
        flops_per_token=training_flops_per_token(config.model, config.attention, length),
    )


def _state_bytes(config: Config, parameters: int, gpus: int) -> dict[str, float]:
    """Bytes per GPU of weights, gradients (kept in fp32) and optimizer state (fp32), as ZeRO shards them."""
    stage, half = config.engine.zero_stage, config.engine.precision == "bf16"
    moments = 8 if config.optimizer.kind == "adamw" else 0
    return {
        "weights": parameters * (2 if half else 4) / (gpus if stage >= 3 else 1),
        "gradients": parameters * 4 / (gpus if stage >= 2 else 1),
        "optimizer": parameters * (moments + (4 if half else 0)) / (gpus if stage >= 1 else 1),
    }


def _activation_bytes(config: Config) -> float:
    """Bytes that the forward pass of one micro batch keeps for the backward pass, with fused attention kernels.

    Per token and layer: both norms keep their fp32 input and result and hand on one row; attention keeps its
    queries, keys, values, the output of each branch and their sum; the MLP keeps four rows. Activation
    checkpointing keeps the input of each layer, and everything of the one layer that is being recomputed.
    """
    model, width = config.model, 2 if config.engine.precision == "bf16" else 4
    value = model.v_head_dim or model.head_dim
    layers = []
    for kind in config.attention.kinds(model.num_layers):
        branches = 3 if kind == "nsa" else 1
        attention = model.num_heads * model.head_dim + branches * model.num_kv_heads * (model.head_dim + value)
        attention += (branches + (branches > 1)) * model.num_heads * value
        rows = 2 * model.hidden_size + attention + 4 * model.intermediate_size
        layers.append(width * rows + 2 * 2 * 4 * model.hidden_size)
    if config.engine.activation_checkpointing:
        per_token = model.num_layers * width * model.hidden_size + max(layers)
    else:
        per_token = sum(layers)
    tokens = config.training.micro_batch_size * config.data.sequence_length
    # One chunk of the loss: its logits and their gradient, each in the model's precision and in fp32.
    logits = min(CHUNK_LOGITS, tokens * model.vocab_size) * 2 * (width + (4 if width == 2 else 0))
    return tokens * per_token + logits


def describe(config: Config, gpus: int) -> str:
    """The plan as a text of a few lines."""
    plan = make_plan(config, gpus)
    kinds = config.attention.kinds(config.model.num_layers)
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    tokens = plan.tokens_per_step * config.training.steps
    total = sum(plan.memory.values())
    lines = [
        f"{config.name}: {plan.parameters:,} parameters, {plan.embedding_parameters:,} of them embeddings",
        f"  layers      {layers}",
        f"  step        {config.training.global_batch_size} samples of {config.data.sequence_length} tokens = "
        f"{plan.tokens_per_step:,} tokens; micro batches per GPU: {plan.micro_batches_per_step}",
        f"  run         {config.training.steps:,} steps = {tokens:,} tokens, "
        f"{tokens / plan.parameters:.1f} per parameter",
        "",
        f"FLOPs, forward and backward {'per token':>12} {'per step':>12} {'whole run':>12}",
    ]
    for name, flops in plan.flops_per_token.items():
        per_step = flops * plan.tokens_per_step
        lines.append(
            f"  {name.replace('_', '-'):<25} {flops:>12.3g} {per_step:>12.3g} {per_step * config.training.steps:>12.3g}"
        )
    engine = config.engine
    recompute = "with" if engine.activation_checkpointing else "without"
    lines += [
        "",
        f"Memory per GPU (estimate): GPUs: {gpus}, ZeRO {engine.zero_stage}, {engine.precision}, "
        f"{recompute} activation checkpointing",
        *(f"  {kind:<12} {size / GIB:>9.3f} GiB" for kind, size in plan.memory.items()),
        f"  {'total':<12} {total / GIB:>9.3f} GiB  (communication buffers and fragmentation come on top)",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.plan", description="What a run will need, before it starts.")
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. engine.zero_stage=3")
    parser.add_argument("--gpus", type=int, default=8, help="data-parallel GPUs (default: 8)")
    parser.add_argument("--gpu", choices=layouts.GPUS, help="also predict step times and search layouts")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        print(describe(config, options.gpus))
        if options.gpu:
            found = layouts.search(config, options.gpus, layouts.GPUS[options.gpu])
            print("\n" + layouts.describe(found, options.gpus, options.gpu))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
