"""Formats a plan as text."""

from nsa.config import Config
from nsa.data.epochs import describe_readings
from nsa.data.prepare import find_prepared
from nsa.models import count_parameters, training_flops_per_token
from nsa.parallel.config import ParallelConfig
from nsa.parallel.grid import data_parallel_size
from nsa.planning.dry_run import DryRun
from nsa.planning.memory import Memory, memory_of
from nsa.planning.search import Candidate
from nsa.planning.speed import Gpu, Speed, fits, known
from nsa.planning.traffic import bytes_sent, data_bytes, passes_of
from nsa.training.console import limits_of
from nsa.training.deepspeed_config import micro_batches_per_step

GIB = 2**30


def describe(config: Config, gpus: int) -> str:
    """Parameters, FLOPs, memory and traffic in the configured layout. Raises ValueError if ``gpus`` do not fit it."""
    training, engine, length = config.training, config.engine, config.data.sequence_length
    passes, memory = micro_batches_per_step(config, gpus), memory_of(config, gpus)
    counts = count_parameters(config.model, config.attention)
    records = config.attention.kinds(config.model.num_layers)
    kinds = [kind.name + " with shared index sets" * kind.borrows for kind in records]
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    step = training.global_batch_size * length
    lines = [
        f"{config.name}: {counts['total']:,} parameters, {counts['embedding']:,} of them embeddings"
        + (f", {counts['active']:,} active" if config.model.moe else "")
        + (f", {counts['apart']:,} trained" if config.train != "all" else ""),
        f"  layers      {layers}",
        f"  step        {training.global_batch_size} samples of {length} tokens = {step:,} tokens; "
        f"micro batches per GPU: {passes}",
        f"  run         {training.steps:,} steps = {step * training.steps:,} tokens, "
        f"{step * training.steps / counts['total']:.1f} per parameter",
        f"  layout      {_layout(config.parallel, gpus)}",
        "",
        f"FLOPs, forward and backward {'per token':>12} {'per step':>12} {'whole run':>12}",
    ]
    apart = config.train != "all"
    for name, flops in training_flops_per_token(config.model, config.attention, length, apart).items():
        name = name.replace("_", "-")
        lines.append(f"  {name:<25} {flops:>12.3g} {flops * step:>12.3g} {flops * step * training.steps:>12.3g}")
    where = ", optimizer on the host" if engine.offload_optimizer else ""
    lines += [
        "",
        f"Memory per GPU (estimate): GPUs: {gpus}, ZeRO {engine.zero_stage}, {engine.precision}, "
        f"activation checkpointing: {passes_of(config).again}{where}",
        *_memory_lines(memory),
    ]
    data = data_bytes(config, gpus)
    sent: dict[str, float] = {**bytes_sent(config, gpus), "data (DeepSpeed)": data}
    sent = {name: num_bytes for name, num_bytes in sent.items() if num_bytes}
    if sent:
        lines += ["", "Sent by the first GPU in a step:", *_gib_lines(sent)]
    if limits := limits_of(config):
        lines += ["", limits]
    return "\n".join(lines)


def describe_text(config: Config) -> str:
    """How often the run reads each text source, where its data are prepared here."""
    prepared = find_prepared(config.data, config.seed)
    if prepared is None:
        return "Text: not prepared here; python -m nsa.data.prepare with this configuration says how often it is read"
    lines = describe_readings(prepared, config.data, config.training.steps, config.training.global_batch_size)
    return "\n".join(["Text:", *(line if line.startswith("warning") else f"  {line}" for line in lines)])


def describe_speed(speed: Speed, memory: Memory, gpus: int, gpu: Gpu) -> str:
    """The prediction for the configured layout."""
    room = "" if fits(memory, gpu) else f"; DOES NOT FIT into {gpu.memory / 1e9:.0f} GB"
    lines = [
        f"Predicted on {gpus} x {gpu.name}: {speed.step_seconds:.3f} s a step, {speed.tokens_per_second:,.0f} tokens/s"
        + room
    ]
    lines += [f"  {kind:<24} {seconds:>9.4f} s" for kind, seconds in speed.seconds.items() if seconds]
    return "\n".join(lines)


def describe_search(candidates: list[Candidate], gpus: int, gpu: Gpu) -> str:
    """The best layouts as a table."""
    free = f"with {100 - 100 * known().room:.0f} % of {gpu.memory / 1e9:.0f} GB left free"
    lines = [
        f"The fastest of {gpus} x {gpu.name} that fit {free}, by the same prediction:",
        "  tensor context pipeline expert data  recomputed  micro batch   GiB per GPU   s a step     tokens/s",
    ]
    for one in candidates:
        p, speed = one.config.parallel, one.speed
        place = f"{p.tensor:>8} {p.context:>7} {p.pipeline:>8} {p.expert:>6}"
        place += f" {data_parallel_size(p, gpus) // p.expert:>4}"
        place += f"  {one.config.engine.activation_checkpointing:<10}  {one.config.training.micro_batch_size:>11}"
        numbers = f"{one.memory.peak / GIB:>11.1f}   {speed.step_seconds:>8.3f}   {speed.tokens_per_second:>10,.0f}"
        lines.append(f"{place}   {numbers}")
    return "\n".join(lines)


def describe_dry_run(run: DryRun) -> str:
    """The result of a dry run."""
    lines = [
        f"Dry run of rank {run.rank} of {run.layout}, in {run.seconds:.0f} s: forward and backward passes go through",
        f"  {'parameters of the rank':<28} {run.parameters:>14,}",
        f"  {'matrix products in a step':<28} {run.flops:>14.4g} FLOPs",
        f"  {'activations at most':<28} {run.peak_bytes / GIB:>14.3f} GiB",
    ]
    return "\n".join([*lines, *(["  sent in a step:"] if run.sent else []), *_gib_lines(dict(run.sent))])


def _layout(parallel: ParallelConfig, gpus: int) -> str:
    sizes = {"data": data_parallel_size(parallel, gpus) // parallel.expert, **parallel.model_dump()}
    return " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1) or "one GPU"


def _memory_lines(memory: Memory) -> list[str]:
    total = sum(memory.device.values())
    lines = _gib_lines(memory.device)
    lines.append(
        f"  {'total':<24} {total / GIB:>9.3f} GiB  (what kernels need while they run, and fragments, come on top)"
    )
    lines.append(f"  {'at the start':<24} {memory.start / GIB:>9.3f} GiB  (before ZeRO shards anything)")
    if memory.host:
        host = sum(memory.host.values())
        lines.append(f"  {'on the host':<24} {host / GIB:>9.3f} GiB  ({', '.join(memory.host)})")
    return lines


def _gib_lines(sizes: dict[str, float]) -> list[str]:
    return [f"  {name:<24} {size / GIB:>9.3f} GiB" for name, size in sizes.items()]
