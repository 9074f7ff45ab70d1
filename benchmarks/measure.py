"""Measures time, memory and error of differentiable calls, and the speed limits of the hardware."""

import argparse
import datetime
import platform
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.testing import do_bench

# What a bf16 matrix product of random data, and a copy (read + write), reach on an H200. Floors are computed from them.
CEILING = {"tflops": 700.0, "tb_per_s": 4.3}


def environment() -> dict[str, str | None]:
    """Hardware, versions, commit and date of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """End the program with a usage error where there is no GPU: on a CPU its sizes take days."""
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU, and a torch that is built for it")


@dataclass(frozen=True)
class Call:
    """``run()`` returns a tensor. Gradients with respect to ``inputs`` are computed; none if empty."""

    run: Callable[[], Tensor]
    inputs: tuple[Tensor, ...] = ()


class Times(NamedTuple):
    """Milliseconds of the forward pass and of the backward pass alone (0 without inputs), by CUDA graph or eager."""

    forward: float
    backward: float
    recorded: bool


def called_ms(call: Callable[[], object], each: int = 250, clean: bool = False) -> float:
    """Median milliseconds of eager calls, with the L2 cache flushed between repeats.

    Args:
        each: milliseconds of the warm-up, and of the measuring.
        clean: whether the flush reads 256 MB, as a decoding step reads weights before its attention. Else it writes
            them. Then the call also pays for the eviction of what the cache holds of these zeros: up to 50 MB, some 10
            microseconds of an H200.

    Measured in a steady state, as in training: a GPU at its power limit takes some tenths of a second to settle at the
    clock that a kernel allows (H100: 1.98 GHz at first, then 1.5 to 1.8).
    """
    gpu = driver.active
    with mock.patch.object(gpu, "clear_cache", torch.amax) if clean else nullcontext():
        return do_bench(call, warmup=each, rep=each, return_mode="median")


def recording(call: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """The kernels of ``call`` as a CUDA graph; None if it waits for the GPU, which cannot be captured."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = generator.clone_state()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        generator.graphsafe_set_state(random_state)  # its own state is still in capture mode
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return graph


def time_ms(
    call: Callable[[], object],
    stream: torch.cuda.Stream | None = None,
    record: bool = True,
    each: int = 250,
    clean: bool = False,
) -> tuple[float, bool]:
    """(`called_ms` of a CUDA graph, True), as in training; (eager, False) for what cannot be captured."""
    graph = recording(call, stream or torch.cuda.Stream()) if record else None
    return called_ms(graph.replay if graph else call, each, clean), graph is not None


def forward_backward(call: Call, record: bool = True) -> Times:
    stream = torch.cuda.Stream()
    if not call.inputs:
        with torch.no_grad():
            milliseconds, recorded = time_ms(call.run, stream, record)
            return Times(milliseconds, 0.0, recorded)

    def backward() -> tuple[float, bool]:  # a function, so that its graph is freed before the forward pass is timed
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # a backward pass runs on the stream of its forward pass
            out = call.run()
            d_out = torch.randn_like(out)
        return time_ms(lambda: torch.autograd.grad(out, call.inputs, d_out, retain_graph=True), stream, record)

    milliseconds, recorded = backward()
    forward, forward_recorded = time_ms(call.run, stream, record)
    torch.cuda.empty_cache()
    return Times(forward, milliseconds, recorded and forward_recorded)


def memory_mb(call: Call) -> dict[str, int]:
    """MiB besides the inputs: the peak of one forward and backward pass, and what is saved between the two."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call.run()
    saved = torch.cuda.memory_allocated() - before
    gradients = torch.autograd.grad(out, call.inputs, torch.ones_like(out)) if call.inputs else None
    peak = torch.cuda.max_memory_allocated() - before
    del out, gradients
    return {"peak_mb": peak >> 20, "saved_mb": saved >> 20}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance, with float32 sums by slices, since both may have gigabytes."""
    difference = square = 0.0
    rows = max(1, ours.shape[:-1].numel() // 16)
    for a, b in zip(ours.flatten(0, -2).split(rows), theirs.flatten(0, -2).split(rows), strict=True):
        difference += (a.float() - b.float()).square().sum().item()
        square += b.float().square().sum().item()
    return (difference / max(square, 1e-30)) ** 0.5


def agreement(call: Call, reference: Call) -> dict[str, float]:
    """Errors of ``call`` relative to ``reference``: of the output, and the worst of the gradients for the same d_out.

    For integer outputs (.., n), lists of selected blocks in any order: the share of the reference's that are missing.
    """
    if not call.inputs:
        with torch.no_grad():
            out, expected = call.run(), reference.run()
        if not out.is_floating_point():
            missing = (expected >= 0) & ~(expected[..., None] == out[..., None, :]).any(-1)
            return {"missing": round((missing.sum() / (expected >= 0).sum()).item(), 6)}
        return {"output": float(f"{relative_error(out, expected):.3g}")}
    out, expected = call.run(), reference.run()
    d_out = torch.randn_like(expected)
    result = {"output": relative_error(out.detach(), expected.detach())}
    ours = torch.autograd.grad(out, call.inputs, d_out.view_as(out))
    theirs = torch.autograd.grad(expected, reference.inputs, d_out)
    result["gradients"] = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    return {name: float(f"{error:.3g}") for name, error in result.items()}


def row(milliseconds: float, flops: float | None, num_bytes: float | None) -> dict[str, float]:
    """A row of the report: rates, the floor (the longer time of operations and bytes at CEILING) and its share."""
    result: dict[str, float] = {"ms": round(milliseconds, 3)}
    floors = []
    if flops:
        result["tflops"] = round(flops / milliseconds / 1e9)
        floors.append(flops / CEILING["tflops"] / 1e9)
    if num_bytes:
        result["gb_per_s"] = round(num_bytes / milliseconds / 1e6)
        floors.append(num_bytes / CEILING["tb_per_s"] / 1e9)
    if floors:
        result |= {"floor_ms": round(max(floors), 3), "floor_share": round(max(floors) / milliseconds, 2)}
    return result


def ceilings() -> dict[str, float]:
    """The same two ceilings, measured on this machine."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    return {
        "matmul_tflops": round(2 * 8192**3 / called_ms(lambda: a @ b) / 1e9),
        "copy_tb_per_s": round(2 * source.numel() * 4 / called_ms(lambda: target.copy_(source)) / 1e9, 2),
    }
