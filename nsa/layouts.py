"""Step time, memory and traffic of a configuration under a layout of ranks, predicted; and the best layout, by search.

    python -m nsa.layouts configs/1b.yaml --gpus 64 --gpu H200 [key=value ...]
    python -m nsa.layouts --check                                # the model against what was measured

A step takes the longer of what Python launches and what the device computes, then what the links move (nothing is
assumed to overlap), stretched by the pipeline's bubble. The efficiencies were fitted to 16 whole-model measurements on
one H200 (docs/log.md, 25m and 125m, dense and NSA, 8K to 64K tokens): `check` states the error. That is an error on
the very points it was fitted to, with one device and without any communication: everything about links is arithmetic
from Megatron's communication pattern and data-sheet bandwidths, not measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa.config import Config, ConfigError, load_config
from nsa.models.sizes import attention_flops, count_parameters, training_flops_per_token

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Gpu:
    """peak: bf16 FLOP/s. memory: bytes. fast, slow: bytes/s one way of a rank within a machine and between machines.

    From data sheets: NVLink, and one 400 Gb/s adapter a GPU (200 on the A100).
    """

    peak: float
    memory: float
    fast: float
    slow: float
    per_machine: int = 8


GPUS = {
    "H200": Gpu(989e12, 141e9, 450e9, 50e9),
    "H100": Gpu(989e12, 80e9, 450e9, 50e9),
    "A100": Gpu(312e12, 80e9, 300e9, 25e9),
}
# Fitted (see above): shares of the peak; seconds per layer, hidden unit and token of everything between the matrix
# products (norms, rotary, residuals, on an H200); seconds that Python needs to launch a layer's forward and backward.
MATRICES = 0.40
ATTENTION = {"dense": 0.26, "nsa": 0.14}
ELEMENTWISE = 2.0e-10
LAUNCH = {"dense": 3.0e-3, "nsa": 8.5e-3}
LINK = 0.8  # of a link's bandwidth: assumed
ROOM = 0.9  # of the memory that a plan may fill: assumed


@dataclass(frozen=True)
class Layout:
    """Sizes of tensor, context, pipeline and data parallelism; their product is the number of GPUs."""

    tp: int
    cp: int
    pp: int
    dp: int


@dataclass(frozen=True)
class Estimate:
    """Of one rank and one step. memory: bytes by kind. links: bytes sent by kind. seconds: by kind, without bubble."""

    layout: Layout
    memory: dict[str, float]
    links: dict[str, float]
    seconds: dict[str, float]
    step_seconds: float
    tokens_per_second: float  # of all ranks
    fits: bool


def impossible(config: Config, layout: Layout) -> str:
    """Why a layout cannot train the configuration, or ""."""
    model, training = config.model, config.training
    if model.num_heads % layout.tp or model.intermediate_size % layout.tp or model.vocab_size % layout.tp:
        return f"tp {layout.tp} does not divide heads, MLP width and vocabulary"
    if max(layout.tp, model.num_kv_heads) % min(layout.tp, model.num_kv_heads):
        return f"tp {layout.tp} and {model.num_kv_heads} KV heads do not divide"
    if model.num_layers % layout.pp:
        return f"pp {layout.pp} does not divide {model.num_layers} layers"
    if config.data.sequence_length % (2 * layout.cp):  # balanced causal shards come in pairs
        return f"cp {layout.cp} does not cut {config.data.sequence_length} tokens into balanced shards"
    if training.global_batch_size % (training.micro_batch_size * layout.dp):
        return f"dp {layout.dp} does not divide the global batch"
    if layout.pp > 1 and config.engine.zero_stage > 1:
        return "pipelines go with ZeRO 0 and 1 only"
    return ""


def estimate(config: Config, layout: Layout, gpu: Gpu) -> Estimate:
    """Predict a step. Raises ConfigError if the layout is `impossible`."""
    if reason := impossible(config, layout):
        raise ConfigError(reason)
    from nsa.plan import _activation_bytes, _state_bytes  # torch is slow to import

    model, training, stage = config.model, config.training, config.engine.zero_stage
    tp, cp, pp, dp = layout.tp, layout.cp, layout.pp, layout.dp
    width = 2 if config.engine.precision == "bf16" else 4
    micro_batches = training.global_batch_size // (training.micro_batch_size * dp)
    tokens = training.micro_batch_size * config.data.sequence_length / cp  # of one rank and micro batch
    kinds = [str(kind) for kind in config.attention.kinds(model.num_layers)]
    parameters = count_parameters(model, config.attention)["total"] / (tp * pp)
    hidden = tokens * model.hidden_size * width  # bytes of one activation

    # Under 1F1B the first stage holds the activations of pp micro batches of its 1/pp of the layers.
    memory: dict[str, float] = _state_bytes(config, round(parameters), dp * cp)
    memory |= {"activations": _activation_bytes(config) / (tp * cp) * min(1.0, micro_batches / pp)}

    # Bytes that a rank sends in a step (ring algorithms).
    ring = (dp * cp - 1) / (dp * cp)
    gathers = (3 if stage == 3 else 1 if stage else 0) * width  # weights, in the model's precision
    # Gradients in fp32: reduce-scattered, without ZeRO all-reduced.
    links = {"data": ring * parameters * ((4 if stage else 8) + gathers)}
    # Sequence-parallel pairs: all-gather and reduce-scatter around attention and MLP, forward and backward (4 each).
    links["tensor"] = micro_batches * model.num_layers / pp * 8 * hidden * (tp - 1) / tp
    links["context"] = micro_batches / pp * sum(_context_bytes(kind, config, tokens, tp, cp, width) for kind in kinds)
    links["pipeline"] = micro_batches * 2 * hidden / tp * (pp > 1)

    length = config.data.sequence_length
    flops = training_flops_per_token(model, config.attention, length)["sparse"]
    scores = {
        kind: 3 * attention_flops(kind, model, config.attention, length) * kinds.count(kind)
        for kind in dict.fromkeys(kinds)
    }
    share = micro_batches * tokens / (tp * pp)
    recompute = 4 / 3 if config.engine.activation_checkpointing else 1.0
    seconds = {"matrix products": recompute * share * (flops - sum(scores.values())) / (MATRICES * gpu.peak)}
    seconds["attention"] = recompute * share * sum(f / (ATTENTION[kind] * gpu.peak) for kind, f in scores.items())
    seconds["elementwise"] = recompute * ELEMENTWISE * share * model.num_layers * model.hidden_size
    launch = micro_batches / pp * recompute * sum(LAUNCH[kind] for kind in kinds)
    compute = max(launch, sum(seconds.values()))
    seconds["waiting for Python"] = compute - sum(v for k, v in seconds.items())
    # Tensor-parallel ranks are neighbours, then context, pipeline, data: an axis is slow if it leaves the machine.
    reach = 1
    for kind, size in (("tensor", tp), ("context", cp), ("pipeline", pp), ("data", dp)):
        reach *= size
        bandwidth = gpu.fast if reach <= gpu.per_machine else gpu.slow
        seconds[f"{kind} links"] = links[kind] / (LINK * bandwidth)
    busy = sum(v for k, v in seconds.items() if k != "data links")
    step = busy * (1 + (pp - 1) / micro_batches) + seconds["data links"]
    total = training.global_batch_size * length
    return Estimate(layout, memory, links, seconds, step, total / step, sum(memory.values()) <= ROOM * gpu.memory)


def _context_bytes(kind: str, config: Config, tokens: float, tp: int, cp: int, width: int) -> float:
    """Sent by a rank for one layer and micro batch, forward and backward (gradients go back the way keys came)."""
    if cp == 1:
        return 0.0
    model, a = config.model, config.attention
    heads = max(1, model.num_kv_heads // tp)
    row = heads * (model.head_dim + (model.v_head_dim or model.head_dim)) * width
    gathered = tokens * (cp - 1) * row  # keys and values of all tokens, all-gathered
    if kind == "nsa":  # compressed ones: 1/stride; the selected branch's; a halo for the window
        gathered = gathered * (1 + 1 / a.compress_stride) + min(a.window, tokens) * row
    return 2 * gathered


def layouts(gpus: int) -> Iterator[Layout]:
    """Every layout of so many GPUs."""
    for tp in _divisors(gpus):
        for cp in _divisors(gpus // tp):
            for pp in _divisors(gpus // (tp * cp)):
                yield Layout(tp, cp, pp, gpus // (tp * cp * pp))


def search(config: Config, gpus: int, gpu: Gpu) -> list[Estimate]:
    """All layouts that can train it, those that fit in memory first, then the fastest.

    Raises:
        ConfigError: there is none.
    """
    found = [estimate(config, layout, gpu) for layout in layouts(gpus) if not impossible(config, layout)]
    if not found:
        raise ConfigError(f"no layout of {gpus} GPUs can train this: {impossible(config, Layout(1, 1, 1, gpus))}")
    return sorted(found, key=lambda e: (not e.fits, e.step_seconds))


def describe(found: list[Estimate], gpus: int, name: str, show: int = 8) -> str:
    """The best layouts as a table, and the best one's parts."""
    lines = [f"{gpus} x {name}; tp cp pp dp, GiB per GPU, predicted seconds per step and tokens/s"]
    for e in found[:show]:
        size = sum(e.memory.values()) / GIB
        room = "" if e.fits else "  does not fit"
        place = f"{e.layout.tp:>3} {e.layout.cp:>3} {e.layout.pp:>3} {e.layout.dp:>4}"
        lines.append(f"  {place}  {size:>8.1f}  {e.step_seconds:>9.3f}  {e.tokens_per_second:>12,.0f}{room}")
    best = found[0]
    lines.append("the first of them, per GPU and step:")
    lines += [f"  memory   {kind:<20} {size / GIB:>10.3f} GiB" for kind, size in best.memory.items()]
    lines += [f"  sends    {kind:<20} {size / GIB:>10.3f} GiB" for kind, size in best.links.items()]
    lines += [f"  time     {kind:<20} {seconds:>10.4f} s" for kind, seconds in best.seconds.items()]
    return "\n".join(lines)


# Tokens/s of one H200 (docs/log.md, 2026-11-23): batch 1, no activation checkpointing, at these lengths.
LENGTHS = (8192, 16384, 32768, 65536)
MEASURED = {
    ("25m", "nsa"): (91e3, 211e3, 333e3, 325e3),
    ("25m", "dense"): (263e3, 298e3, 195e3, 111e3),
    ("125m", "nsa"): (63e3, 115e3, 128e3, 121e3),
    ("125m", "dense"): (130e3, 99e3, 64e3, 37e3),
}


def check() -> list[tuple[str, str, int, float, float]]:
    """(configuration, attention, tokens, measured tokens/s, predicted) of every measurement that was fitted."""
    rows = []
    for (name, kind), speeds in MEASURED.items():
        for length, measured in zip(LENGTHS, speeds, strict=True):
            one = [f"attention.kind={kind}", f"data.sequence_length={length}", f"model.max_position={length}"]
            one += ["training.micro_batch_size=1", "training.global_batch_size=1", "engine.zero_stage=0"]
            config = load_config(ROOT / f"configs/{name}.yaml", [*one, "engine.activation_checkpointing=false"])
            found = estimate(config, Layout(1, 1, 1, 1), GPUS["H200"])
            rows.append((name, kind, length, measured, found.tokens_per_second))
    return rows


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.layouts", description="The best layout of ranks, by a model.")
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--check", action="store_true", help="print the model's error on what was measured")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            rows = check()
            for name, kind, length, measured, predicted in rows:
                off = 100 * (predicted / measured - 1)
                speeds = f"measured {measured:>8,.0f}  predicted {predicted:>8,.0f}"
                print(f"{name:>5} {kind:<6} {length:>6}  {speeds}  {off:+.0f} %")
            errors = [abs(row[4] / row[3] - 1) for row in rows]
            mean = sum(errors) / len(errors)
            print(f"error: {100 * mean:.0f} % on average, {100 * max(errors):.0f} % at most (on the points of the fit)")
            return 0
        if options.config is None:
            parser.error("name a YAML file, or --check")
        config = load_config(options.config, options.overrides)
        print(describe(search(config, max(1, options.gpus), GPUS[options.gpu]), options.gpus, options.gpu))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
