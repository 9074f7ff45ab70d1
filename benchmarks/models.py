"""Tokens/s, MFU and memory of whole training steps, of NSA and the same model with dense attention.

    python benchmarks/models.py [--configs 25m 125m] [--tokens 8192 16384 32768 65536] [--samples 1] [--out FILE]
                                [--kinds nsa dense dense:triton] [--packed] [--profile] [KEY=VALUE ...]

A step is --accumulate forward and backward passes of the decoder in bf16 on --samples samples of one document each, and
a fused AdamW update, on one GPU, without DeepSpeed, by CUDA graphs as in the trainer. Reported is the median of several
consecutive steps. A kind names its attention, and for dense layers the implementation (engine.dense_attention): `dense`
is the fastest on this machine, which the row names. MFU counts the FLOPs of the configured attention
(`nsa.models.sizes`), not those of a dense one, against the data sheet's peak. --packed takes the samples that the
trainer reads in `benchmarks/training.py`, with several documents each. --profile prints the kernels that take most
time. Results go into FILE under "models"; an existing FILE keeps its other entries.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import environment, need_gpu
from benchmarks.training import SOURCE, TOKENIZER
from nsa.config import Config, load_config
from nsa.data.loader import SampleStream, batch
from nsa.data.prepare import prepare
from nsa.models import Decoder, training_flops_per_token
from nsa.ops.dense.libraries import chosen
from nsa.ops.geometry import KnownLengths, tell_lengths
from nsa.training.activation_checkpointing import checkpoint_layers
from nsa.training.batches import ON_DEVICE
from nsa.training.cuda_graphs import GraphedDecoder

ROOT = Path(__file__).parents[1]
WARM_UP = 3  # steps
PEAK_TFLOPS = 989.5  # dense bf16 of an H100 or H200 (NVIDIA's data sheet)


class Gradients:
    """Where a CUDA graph writes its gradients (`nsa.training.cuda_graphs.Sinks`) and the optimizer reads them. Sums
    those of several micro batches."""

    def __init__(self, accumulate: bool) -> None:
        self.accumulate, self.sums = accumulate, []

    def add(self, gradients: Mapping[torch.nn.Parameter, torch.Tensor | None]) -> Callable[[], None]:
        present = {p: g for p, g in gradients.items() if g is not None}
        if not torch.cuda.is_current_stream_capturing():
            self.sums = [torch.zeros_like(g) for g in present.values()] if self.accumulate else []
            return lambda: None
        for p, g in zip(present, self.sums or present.values(), strict=True):
            p.grad = g
        if self.sums:
            torch._foreach_add_(self.sums, list(present.values()))
        return lambda: None

    def clear(self) -> None:
        if self.sums:
            torch._foreach_zero_(self.sums)

    def filled(self) -> None:
        pass

    def sum_alike(self) -> None:
        pass


MicroBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs and targets (1, tokens), document boundaries


def one_document_each(config: Config, tokens: int, samples: int) -> Iterator[MicroBatch]:
    """Repeats one micro batch: ``samples`` documents of ``tokens`` random tokens."""
    count = tokens * samples
    inputs, targets = (torch.randint(config.model.vocab_size, (1, count), device="cuda") for _ in range(2))
    borders = torch.arange(0, count + 1, tokens, dtype=torch.int32, device="cuda")
    tell_lengths(borders, KnownLengths(tokens, True))
    return itertools.repeat((inputs, targets, borders))


def as_the_trainer_reads(config: Config, samples: int, number: int) -> Iterator[MicroBatch]:
    """The trainer's first ``number`` micro batches of ``samples``, in its order, copied to the GPU beforehand."""
    stream = SampleStream(prepare(config.data, config.seed), config.data, "train", config.seed)
    batches = []
    for i in range(number):
        read = batch(stream, range(i * samples, (i + 1) * samples))
        inputs, targets, borders = (read[key].cuda() for key in ON_DEVICE)
        tell_lengths(borders, KnownLengths.of(read["cu_seqlens"]))
        batches.append((inputs, targets, borders))
    return iter(batches)


def measure(config_name: str, kind: str, tokens: int, options: argparse.Namespace) -> dict:
    attention, _, implementation = kind.partition(":")
    overrides = [f"attention.kind={attention}", f"engine.dense_attention={implementation or 'auto'}"]
    if options.packed:
        overrides += [SOURCE, TOKENIZER, "data.validation_fraction=0.02", f"data.sequence_length={tokens}"]
        overrides += [f"data.cache_dir={tempfile.gettempdir()}/nsa-models-benchmark"]
    config = load_config(ROOT / "configs" / f"{config_name}.yaml", [*options.overrides, *overrides])
    device, count = torch.device("cuda", 0), tokens * options.samples
    row: dict = {"config": config_name, "attention": attention, "tokens": tokens, "samples": options.samples}
    if attention == "dense":
        shape = config.model.head_dim, config.model.v_head_dim or config.model.head_dim
        name = config.engine.dense_attention
        row["dense_attention"] = chosen(name, not options.packed, *shape, torch.bfloat16, device)
    if options.accumulate > 1:
        row["accumulate"] = options.accumulate
    torch.manual_seed(0)
    with device:
        model = Decoder(config.model, config.attention, dense_attention=config.engine.dense_attention).bfloat16()
    if config.engine.activation_checkpointing != "none":
        row["recomputed"] = config.engine.activation_checkpointing
        checkpoint_layers(model.layers, config.engine.activation_checkpointing)
    gradients = Gradients(options.accumulate > 1)
    graphed = GraphedDecoder(model, sinks=gradients)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if options.packed:
        row["packed"] = True
        number = (WARM_UP + options.steps + 1 + 2 * options.profile) * options.accumulate
        micro_batches = as_the_trainer_reads(config, options.samples, number)
    else:
        micro_batches = one_document_each(config, tokens, options.samples)
    torch.cuda.reset_peak_memory_stats()

    def step() -> torch.cuda.Event:
        for inputs, targets, borders in itertools.islice(micro_batches, options.accumulate):
            graphed(inputs, targets=targets, cu_seqlens=borders).mean().backward()
        optimizer.step()
        gradients.clear()
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        return end

    for _ in range(WARM_UP):  # compiles, and fills caches
        step()
    torch.cuda.synchronize()
    ends = [step() for _ in range(options.steps + 1)]
    torch.cuda.synchronize()
    milliseconds = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(ends))
    flops = training_flops_per_token(config.model, config.attention, tokens)["sparse"]
    count *= options.accumulate
    row["ms"] = round(milliseconds, 2)
    row["tokens_per_s"] = round(count / milliseconds * 1e3)
    row["mfu"] = round(flops * count / milliseconds / 1e9 / PEAK_TFLOPS, 3)
    row["peak_mb"] = torch.cuda.max_memory_allocated() >> 20
    if options.profile:
        profile(step)
    return row


def profile(step: Callable[[], object], shown: int = 60) -> None:
    """Print the kernels of two steps by their time in one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(), step()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.device_time / 1e3)
    print(f"  {sum(map(len, times.values())) / 2:.0f} kernels, {sum(map(sum, times.values())) / 2:.2f} ms")
    for name, ms in sorted(times.items(), key=lambda item: -sum(item[1]))[:shown]:
        print(f"  {sum(ms) / 2:8.3f} ms {len(ms) / 2:6.0f} x {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["25m", "125m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 16384, 32768, 65536])
    parser.add_argument("--samples", type=int, default=1, help="samples of a micro batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro batches of a step")
    parser.add_argument("--kinds", nargs="+", default=["nsa", "dense"], help="KIND or dense:IMPLEMENTATION")
    parser.add_argument("--packed", action="store_true", help="the trainer's samples")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    need_gpu(parser)
    report: dict = environment()
    if options.out and options.out.exists():
        report = json.loads(options.out.read_text())
    rows = report.setdefault("models", [])
    for config in options.configs:
        for tokens in options.tokens:
            for kind in options.kinds:
                try:
                    row = measure(config, kind, tokens, options)
                except torch.OutOfMemoryError:
                    row = {"config": config, "attention": kind, "tokens": tokens, "refused": "out of memory"}
                gc.collect()
                torch.cuda.empty_cache()
                rows.append(row)
                print(row, flush=True)
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
