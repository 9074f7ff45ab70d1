"""Times one decoder layer, forward and backward, NSA and dense: is the GPU busy, or does it wait for the host?

    python benchmarks/layer.py [--configs 25m 125m 1b] [--tokens 2048 8192 16384 32768] [--out FILE] [KEY=VALUE ...]

bf16, batch 1. ms: median of consecutive iterations, as in training. host_ms: time until the host has launched all
kernels, with the GPU idle at the start. gpu_ms: sum over the kernels of one iteration (torch.profiler), which are
counted. If host_ms is close to ms, launches limit the speed. Results go into FILE under "layer"; an existing FILE keeps
its other entries. `launches.py` counts launches without a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.launches import layer_and_input
from benchmarks.measure import environment, need_gpu

REPEATS = 20


def wall_ms(step: Callable[[], None]) -> float:
    """Median over runs of ten iterations, without waiting for the GPU within a run."""
    times = []
    for _ in range(REPEATS // 4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 10)
    return statistics.median(times)


def host_ms(step: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def kernels(step: Callable[[], None]) -> tuple[int, float]:
    """Number of kernels, fills and copies of one iteration, and their total milliseconds."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    on_gpu = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_gpu), sum(event.time_range.elapsed_us() for event in on_gpu) / 1e3


def measure(config: str, kind: str, tokens: int, overrides: list[str]) -> dict:
    torch.manual_seed(0)
    layer, x, rotary = layer_and_input(config, kind, tokens, overrides, device="cuda")
    d_out = torch.randn_like(x)

    def step() -> None:
        layer(x, rotary).backward(d_out)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    for _ in range(3):  # compiles
        step()
    count, gpu = kernels(step)
    times = {"ms": wall_ms(step), "host_ms": host_ms(step), "gpu_ms": gpu}
    row = {"config": config, "attention": kind, "tokens": tokens, "launches": count}
    return row | {name: round(value, 3) for name, value in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["25m", "125m", "1b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 16384, 32768])
    parser.add_argument("--kinds", nargs="+", default=["nsa", "dense"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    need_gpu(parser)
    report: dict = environment()
    if options.out and options.out.exists():
        report = json.loads(options.out.read_text())
    rows = report["layer"] = []
    columns = ("config", "attention", "tokens", "launches", "ms", "host_ms", "gpu_ms")
    print(" ".join(f"{name:>9}" for name in columns))
    for config in options.configs:
        for tokens in options.tokens:
            for kind in options.kinds:
                row = measure(config, kind, tokens, options.overrides)
                rows.append(row)
                print(" ".join(f"{row[name]!s:>9}" for name in columns), flush=True)
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
